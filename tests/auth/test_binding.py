"""How a record is bound to a caller, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy import (
    LocalStorage,
    Principal,
    SessionEnded,
    SessionManager,
    SessionUnknown,
    StorageUnavailable,
    StreamableProxy,
)
from mcp_proxy.storage.session import PRINCIPAL, Session, new_session
from tests.support.callers import told
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.modern_client import ASKABLE, ModernClient, server_of
from tests.support.waiting import eventually


class Store(LocalStorage):
    """A store that may be away, and notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.asked: list[str] = []

    def load(self, session_id: str) -> Session:
        self.asked.append(f"load {session_id}")
        if self.is_away:
            raise StorageUnavailable
        return super().load(session_id)

    def delete(self, session_id: str) -> None:
        if self.is_away:
            raise StorageUnavailable
        super().delete(session_id)

    def issued(self, session_id: str) -> bool:
        self.asked.append(f"issued {session_id}")
        return super().issued(session_id)

    def scoped(self, name: str) -> Store:
        return self


def by_name(environ: dict[str, Any]) -> Principal | None:
    name = environ.get("HTTP_X_USER")
    return None if name is None else Principal(name)


def front(app: Any, name: str) -> WsgiFront:
    return WsgiFront(app, {"HTTP_X_USER": name})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def app(store: Store) -> Iterator[StreamableProxy]:
    with StreamableProxy(SCRIPTED, store, authenticate=by_name) as app:
        yield app


# --- records -------------------------------------------------------------------------------------


def test_a_record_has_no_name_of_a_caller(app: StreamableProxy) -> None:
    session = McpClient(front(app, "alice")).open().session
    record = app.manager.peek(session or "")
    assert record is not None
    assert len(record.metadata[PRINCIPAL]) == 64
    assert "alice" not in repr(record.metadata[PRINCIPAL])


@pytest.mark.parametrize(
    ("bound_to", "caller"), [("a", "b"), ("a", None), (None, "a"), ("a", "a "), ("", "a")]
)
@pytest.mark.parametrize("is_minted", [True, False])
def test_equality_decides_and_a_stranger_is_told_what_is_said_of_no_session(
    store: Store, bound_to: str | None, caller: str | None, is_minted: bool
) -> None:
    manager = SessionManager(store)
    known, unknown = (manager.mint_id() if is_minted else f"theirs-{n}" for n in range(2))
    session = new_session(known, "mcp", **manager.binding(bound_to))
    manager.create(session)
    manager.require_own(manager.load(known), bound_to)
    store.asked.clear()
    with pytest.raises((SessionEnded, SessionUnknown)) as of_theirs:
        manager.require_own(manager.load(known), caller)
    asked_of_theirs = [asked.replace(known, "it") for asked in store.asked]
    store.asked.clear()
    with pytest.raises((SessionEnded, SessionUnknown)) as of_none:
        manager.load(unknown)
    assert [asked.replace(unknown, "it") for asked in store.asked] == asked_of_theirs
    assert type(of_theirs.value) is type(of_none.value)
    assert of_theirs.value.status == of_none.value.status == (404 if is_minted else 400)


def test_the_same_caller_has_another_mark_in_another_deployment() -> None:
    marks = {SessionManager().binding("a")[PRINCIPAL] for _ in range(2)}
    assert len(marks) == 1  # of one process
    assert SessionManager().binding(None) == {}


# --- without the store ---------------------------------------------------------------------------


def test_while_the_store_is_away_nobody_ends_the_server_of_somebody_else(
    app: StreamableProxy, store: Store
) -> None:
    alice = McpClient(front(app, "alice")).open()
    mallory = alice.at(front(app, "mallory"))
    store.is_away = True
    assert mallory.delete().status == 503
    assert app.owner.supervisor.children == 1
    assert alice.delete().status == 503
    eventually(lambda: app.owner.supervisor.children == 0)


# --- homes ---------------------------------------------------------------------------------------


def test_somebody_elses_home_is_no_session_either() -> None:
    with StreamableProxy(server_of("legacy"), authenticate=by_name) as app:
        asked = ModernClient(front(app, "alice"), ASKABLE).asked("ask", message="?")
        thief, stranger = McpClient(front(app, "mallory")), McpClient(front(app, "mallory"))
        thief.session = asked["requestState"].partition(".")[0]
        assert app.manager.peek(thief.session or "") is not None
        stranger.session = f"home-{'1' * 40}"
        for act in (lambda c: c.call("ping", key=1), McpClient.listen, McpClient.delete):
            assert told(act(thief)) == told(act(stranger))


def test_callers_are_no_strangers_to_one_another_s_homes() -> None:
    """Who is known has a home even where strangers get none."""
    with StreamableProxy(server_of("legacy"), authenticate=by_name) as app:
        elsewhere = {"REMOTE_ADDR": "203.0.113.9", "SERVER_NAME": "203.0.113.1"}
        clients = [
            ModernClient(WsgiFront(app, {"HTTP_X_USER": name, **elsewhere})) for name in "abab"
        ]
        pids = [client.pid() for client in clients]
        assert pids[:2] == pids[2:]
        assert pids[0] != pids[1]
