"""The session manager: ids, and telling a session that is over from one that never was."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from mcp_proxy.errors import (
    SESSION_NOT_FOUND,
    InvalidRequest,
    SessionEnded,
    SessionExists,
    SessionUnknown,
    StorageUnavailable,
)
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage
from mcp_proxy.wire.headers import is_session_id
from tests.storage.stores import LocalHouse, record
from tests.support.monitor import recorded_commands
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together

MINTED_ELSEWHERE = "mcp-00000000-" + "0" * 32


@pytest.fixture
def manager() -> SessionManager:
    """A manager with its records in memory."""
    return SessionManager()


@pytest.fixture
def shared(redis_url: str, redis_prefix: str) -> Iterator[SessionManager]:
    """A manager with its records in Redis."""
    manager = SessionManager.with_redis(redis_url, prefix=redis_prefix)
    yield manager
    manager.storage.close()


@pytest.fixture
def unreachable() -> Iterator[SessionManager]:
    """A manager whose store does not answer."""
    manager = SessionManager.with_redis("redis://127.0.0.1:1/0")
    yield manager
    manager.storage.close()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the manager; grows while the test runs."""
    logger = logging.getLogger("mcp_proxy.sessions.manager")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda line: messages.append(line.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    return messages


# --- ids -----------------------------------------------------------------------------------------


def test_a_minted_id_has_a_form_of_our_own(manager: SessionManager) -> None:
    minted = manager.mint_id()
    assert re.fullmatch(r"mcp-[0-9a-f]{8}-[0-9a-f]{32}", minted)
    assert is_session_id(minted)


def test_the_ids_of_one_manager_share_its_nonce(manager: SessionManager) -> None:
    assert manager.mint_id()[:13] == manager.mint_id()[:13]
    assert manager.mint_id()[:13] != SessionManager().mint_id()[:13]


def test_no_two_threads_get_the_same_id(manager: SessionManager) -> None:
    minted = run_together([lambda: [manager.mint_id() for _ in range(500)]] * 16)
    ids = {session_id for batch in minted for session_id in batch}
    assert len(ids) == 16 * 500
    assert len({session_id[:13] for session_id in ids}) == 1


def test_a_fork_gets_a_nonce_of_its_own() -> None:
    # In a process without other threads, where forking is safe.
    script = """
import os
from mcp_proxy.sessions.manager import SessionManager
manager = SessionManager()
print(manager.mint_id(), flush=True)
if os.fork() == 0:
    print(manager.mint_id(), flush=True)
    os._exit(0)
os.wait()
print(manager.mint_id(), flush=True)
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    before, forked, after = (line.split("-")[1] for line in printed.stdout.split())
    assert before == after
    assert forked != before


# --- finding sessions ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["manager", "shared"])
def test_a_session_is_created_found_changed_and_ended(
    request: pytest.FixtureRequest, kind: str
) -> None:
    manager: SessionManager = request.getfixturevalue(kind)
    session_id = manager.mint_id()
    session = record(session_id, a="1")
    manager.create(session)
    assert manager.load(session_id) == session
    assert manager.exists(session_id)
    assert manager.peek(session_id) == session
    with pytest.raises(SessionExists):
        manager.create(record(session_id, a="other"))
    assert manager.swap(session, record(session_id, a="2"))
    assert not manager.swap(session, record(session_id, a="3"))
    assert manager.load(session_id) == record(session_id, a="2")
    manager.end(session_id)
    manager.end(session_id)
    assert not manager.exists(session_id)
    assert manager.peek(session_id) is None


@pytest.mark.parametrize("kind", ["manager", "shared"])
@pytest.mark.parametrize(
    "session_id",
    [
        "s",
        "mcp-",
        MINTED_ELSEWHERE + "0",
        MINTED_ELSEWHERE.replace("0", "A"),
        "x" + MINTED_ELSEWHERE,
        "x" * 1024,
    ],
)
def test_an_id_that_was_never_issued_is_unknown(
    request: pytest.FixtureRequest, kind: str, session_id: str
) -> None:
    manager: SessionManager = request.getfixturevalue(kind)
    with pytest.raises(SessionUnknown) as caught:
        manager.load(session_id)
    assert (caught.value.status, caught.value.code) == (400, SESSION_NOT_FOUND)
    assert caught.value.message == "Session not found"


def test_the_status_of_an_unknown_id_can_be_chosen(manager: SessionManager) -> None:
    lenient = SessionManager(unknown_status=404)
    with pytest.raises(SessionUnknown) as caught:
        lenient.load("s")
    assert caught.value.status == 404
    assert SessionUnknown().status == 400
    with pytest.raises(SessionUnknown) as caught:
        manager.load("s")
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["manager", "shared"])
@pytest.mark.parametrize("session_id", ["s", "mcp-0123abcd-" + "f" * 32])
def test_a_session_that_was_ended_is_over(
    request: pytest.FixtureRequest, kind: str, session_id: str
) -> None:
    manager: SessionManager = request.getfixturevalue(kind)
    manager.create(record(session_id))
    manager.end(session_id)
    with pytest.raises(SessionEnded) as caught:
        manager.load(session_id)
    assert (caught.value.status, caught.value.code) == (404, SESSION_NOT_FOUND)
    assert caught.value.message == "Session not found"


def test_a_session_that_expired_is_over() -> None:
    house = LocalHouse()
    manager = SessionManager(house.storage)
    manager.create(record("s"))
    house.pass_time(2000)
    with pytest.raises(SessionEnded):
        manager.load("s")


@pytest.mark.parametrize("kind", ["manager", "shared"])
def test_an_id_of_our_own_form_is_over_even_if_nobody_remembers_it(
    request: pytest.FixtureRequest, kind: str
) -> None:
    manager: SessionManager = request.getfixturevalue(kind)
    with pytest.raises(SessionEnded) as caught:
        manager.load(MINTED_ELSEWHERE)
    assert caught.value.status == 404


@pytest.mark.parametrize("session_id", ["", " ", "a b", "é", "s\n", "x" * 1025])
def test_what_cannot_be_an_id_is_refused_without_asking_the_store(
    unreachable: SessionManager, session_id: str
) -> None:
    with pytest.raises(InvalidRequest, match="1024") as caught:
        unreachable.load(session_id)
    assert caught.value.status == 400


@pytest.mark.parametrize("session_id", ["s", MINTED_ELSEWHERE])
def test_a_store_that_cannot_be_reached_makes_no_session_lost(
    unreachable: SessionManager, session_id: str
) -> None:
    with pytest.raises(StorageUnavailable):
        unreachable.load(session_id)


def test_the_store_is_asked_about_issued_ids_only_after_a_miss(
    own_redis: Callable[..., RedisServer],
) -> None:
    server = own_redis()
    manager = SessionManager.with_redis(server.url, prefix="p:")
    manager.create(record("s"))
    with recorded_commands(server) as commands:
        manager.load("s")
        with pytest.raises(SessionUnknown):
            manager.load("t")
        with pytest.raises(SessionEnded):
            manager.load(MINTED_ELSEWHERE)
    manager.storage.close()
    assert [words[:2] for words in commands if words[0] in ("GETEX", "EXISTS")] == [
        ["GETEX", "p:default:session:s"],
        ["GETEX", "p:default:session:t"],
        ["EXISTS", "p:default:issued:t"],
        ["GETEX", f"p:default:session:{MINTED_ELSEWHERE}"],
    ]


# --- the log -------------------------------------------------------------------------------------


def test_an_id_of_another_process_is_logged_with_what_to_set(
    manager: SessionManager, warnings: list[str]
) -> None:
    manager.mint_id()
    manager.warn_of_other_process("issued-by-a-server")
    assert warnings == []
    manager.warn_of_other_process(MINTED_ELSEWHERE)
    (warning,) = warnings
    assert "redis_url" in warning
    assert MINTED_ELSEWHERE not in warning


def test_an_id_of_this_process_is_not_logged(manager: SessionManager, warnings: list[str]) -> None:
    session_id = manager.mint_id()
    manager.create(record(session_id))
    manager.end(session_id)
    manager.warn_of_other_process(session_id)
    assert warnings == []


def test_an_id_of_another_process_is_not_logged_where_sessions_are_shared(
    shared: SessionManager, warnings: list[str]
) -> None:
    shared.warn_of_other_process(MINTED_ELSEWHERE)
    assert warnings == []


# --- storage -------------------------------------------------------------------------------------


def test_without_a_storage_records_live_in_memory_for_the_given_time() -> None:
    manager = SessionManager(ttl=12)
    assert isinstance(manager.storage, LocalStorage)
    assert manager.storage.ttl == 12


def test_a_storage_that_is_given_is_used() -> None:
    storage = LocalStorage(5)
    assert SessionManager(storage, ttl=12).storage is storage
    assert storage.ttl == 5


def test_with_redis_takes_ttl_and_prefix(redis_server: RedisServer, redis_prefix: str) -> None:
    with redis_server.client() as client:
        manager = SessionManager.with_redis(client, ttl=60, prefix=redis_prefix)
        manager.create(record("s"))
        assert 50_000 < client.pttl(f"{redis_prefix}default:session:s") <= 60_000
        manager.storage.close()
        assert client.ping()


def test_managers_with_the_same_redis_and_prefix_share_sessions(
    shared: SessionManager, redis_server: RedisServer, redis_prefix: str
) -> None:
    with redis_server.client() as client:
        other = SessionManager.with_redis(client, prefix=redis_prefix)
        shared.create(record("s"))
        assert other.load("s") == record("s")
        other.end("s")
        with pytest.raises(SessionEnded):
            shared.load("s")


def test_a_manager_says_what_it_stands_on(manager: SessionManager, shared: SessionManager) -> None:
    assert "LocalStorage" in repr(manager)
    assert "RedisStorage" in repr(shared)
    assert isinstance(shared.storage, RedisStorage)
