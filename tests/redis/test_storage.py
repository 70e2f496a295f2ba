"""Sessions in Redis: what is really sent, and what happens when the server or an answer is lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from mcp_proxy.errors import (
    ConfigError,
    SessionExists,
    SessionNotFound,
    StorageError,
    StorageUnavailable,
)
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.mailboxes import Envelope
from mcp_proxy.storage.records import ISSUED_TTL
from mcp_proxy.storage.session import encode
from mcp_proxy.transports.base import store_reason
from tests.storage.stores import record
from tests.support.lossy import LossyProxy
from tests.support.monitor import recorded_commands
from tests.support.outage import assert_unavailable
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together
from tests.support.waiting import eventually

OwnRedis = Callable[..., RedisServer]

PREFIX = "p:"
TTL = 60.0

CALLS: dict[str, Callable[[RedisStorage], object]] = {
    "create": lambda storage: storage.create(record("new")),
    "load": lambda storage: storage.load("s"),
    "exists": lambda storage: storage.exists("s"),
    "peek": lambda storage: storage.peek("s"),
    "swap": lambda storage: storage.swap(record("s"), record("s", a="1")),
    "delete": lambda storage: storage.delete("s"),
    "issued": lambda storage: storage.issued("s"),
    "check": lambda storage: storage.check(),
    "version": lambda storage: storage.version(),
    "eviction": lambda storage: storage.eviction(),
}


@pytest.fixture
def make_storage() -> Iterator[Callable[..., RedisStorage]]:
    """Makes stores that are closed when the test is over."""
    made: list[RedisStorage] = []

    def make(client_or_url: redis.Redis | str, **options: float) -> RedisStorage:
        made.append(RedisStorage(client_or_url, **{"ttl": TTL, "prefix": PREFIX, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for storage in made:
        storage.close()


MakeStorage = Callable[..., RedisStorage]


@pytest.fixture
def storage(own_server: RedisServer, make_storage: MakeStorage) -> RedisStorage:
    """A store on that server that knows one session, `s`, and has its connection open."""
    made = make_storage(own_server.url)
    made.create(record("s"))
    return made


# --- what is sent --------------------------------------------------------------------------------


def test_a_load_is_one_getex_and_nothing_else(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with recorded_commands(own_server) as commands:
        for _ in range(3):
            storage.load("s")
    assert commands == [["GETEX", "p:session:s", "PX", "60000"]] * 3


def test_a_load_that_misses_is_one_getex_too(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with recorded_commands(own_server) as commands, pytest.raises(SessionNotFound):
        storage.load("absent")
    assert commands == [["GETEX", "p:session:absent", "PX", "60000"]]


def test_the_server_counts_one_command_a_load(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with own_server.client() as admin:
        before = admin.info("commandstats")
        for _ in range(10):
            storage.load("s")
        after = admin.info("commandstats")
    calls = {
        name: stats["calls"] - before.get(name, {"calls": 0})["calls"]
        for name, stats in after.items()
    }
    calls.pop("cmdstat_info")
    assert {name: count for name, count in calls.items() if count} == {"cmdstat_getex": 10}


def test_create_writes_marker_and_record_each_with_its_time_to_live(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with recorded_commands(own_server) as commands:
        storage.create(record("t"))
    marker, written = commands
    assert marker == ["SET", "p:issued:t", "1", "EX", str(ISSUED_TTL)]
    assert written[:2] == ["SET", "p:session:t"]
    assert sorted(written[3:]) == ["60000", "NX", "PX"]


def test_create_of_an_id_of_our_own_form_is_one_command(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    minted = SessionManager().mint_id()
    with recorded_commands(own_server) as commands:
        storage.create(record(minted))
    ((name, key, *_),) = commands
    assert (name, key) == ("SET", f"p:session:{minted}")
    with own_server.client() as admin:
        assert admin.keys(f"*{minted}") == [f"p:session:{minted}".encode()]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("exists", ["EXISTS", "p:session:s"]),
        ("peek", ["GET", "p:session:s"]),
        ("issued", ["EXISTS", "p:issued:s"]),
        ("delete", ["DEL", "p:session:s"]),
    ],
)
def test_the_other_calls_are_one_command_each(
    own_server: RedisServer, storage: RedisStorage, call: str, expected: list[str]
) -> None:
    with recorded_commands(own_server) as commands:
        CALLS[call](storage)
    assert commands == [expected]


def test_check_writes_and_reads_as_sessions_do(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with recorded_commands(own_server) as commands:
        storage.check()
    assert commands == [
        ["PING"],
        ["SET", "p:check", "1", "PX", "60000"],
        ["GETEX", "p:check", "PX", "60000"],
    ]


def _read_only(admin: redis.Redis) -> None:
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")


def _full(admin: redis.Redis) -> None:
    admin.config_set("maxmemory", "1")


@pytest.mark.parametrize(("spoil", "named"), [(_read_only, "READONLY"), (_full, "OOM")])
def test_a_store_that_refuses_writes_is_not_ready_and_says_why(
    own_redis: OwnRedis,
    make_storage: MakeStorage,
    spoil: Callable[[redis.Redis], None],
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = own_redis()
    storage = make_storage(server.url)
    storage.create(record("s"))
    with server.client() as admin:
        spoil(admin)
        for _ in range(3):
            with pytest.raises(StorageUnavailable, match=rf"refuses writes \({named}\)"):
                storage.check()
        changing = [
            lambda: storage.create(record("t")),
            lambda: storage.swap(record("s"), record("s", a="1")),
        ]
        for change in changing:
            with pytest.raises(StorageUnavailable, match=named):
                change()
        assert [named in line.getMessage() for line in caplog.records] == [True]
        admin.execute_command("REPLICAOF", "NO", "ONE")
        admin.config_set("maxmemory", "0")
    storage.check()
    assert "usable again after" in caplog.records[-1].getMessage()


def test_the_reason_says_what_a_full_store_still_does(
    own_redis: OwnRedis, make_storage: MakeStorage
) -> None:
    server = own_redis()
    storage = make_storage(server.url)
    storage.create(record("s"))
    mailboxes = storage.mailboxes()
    mailboxes.renew("r")
    with server.client() as admin:
        _full(admin)
        assert store_reason(storage).endswith(
            "; sessions that have begun are served, those of a stdio server by the worker that has "
            "it; none begins or is taken over, and no request goes to another worker"
        )
        assert storage.load("s") == record("s")
        assert mailboxes.renew("r")
        for change in (
            lambda: storage.create(record("t")),
            lambda: storage.swap(record("s"), record("s", a="1")),
            lambda: mailboxes.post([Envelope("r", b"1")]),
        ):
            with pytest.raises(StorageUnavailable) as caught:
                change()
            assert "another worker" not in caught.value.message, "clients need not know"


def test_the_reason_says_what_a_replica_does_not_do(
    own_redis: OwnRedis, make_storage: MakeStorage
) -> None:
    server = own_redis()
    storage = make_storage(server.url)
    storage.create(record("s"))
    with server.client() as admin:
        _read_only(admin)
        assert store_reason(storage).endswith("; no request of a session is served")
        with pytest.raises(StorageUnavailable, match="READONLY"):
            storage.load("s")


def test_who_waits_at_a_server_that_becomes_a_replica_gets_a_sentence(
    own_redis: OwnRedis, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """As at a failover: redis-py quotes the whole pipeline, with the keys."""
    server = own_redis()
    mailboxes = make_storage(server.url).mailboxes()
    mailboxes.renew("r")
    with ThreadPoolExecutor(1) as pool, server.client() as admin:
        waiting = pool.submit(mailboxes.collect, "r", 60)
        eventually(lambda: admin.info("clients")["blocked_clients"] == 1)
        _read_only(admin)
        with pytest.raises(StorageUnavailable):
            waiting.result(30)
    (line,) = (line.getMessage() for line in caplog.records)
    assert line.endswith(f"127.0.0.1:{server.port}/0: it was a primary until now (UNBLOCKED)")
    assert line.startswith(f"[pid={os.getpid()}] the session store is not usable: redis://")


def test_a_server_that_has_become_a_replica_is_usable_again_when_it_takes_writes(
    own_redis: OwnRedis, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers reads all the time. The lease of a replica finds out, where nobody else writes."""
    server = own_redis()
    storage = make_storage(server.url)
    mailboxes = storage.mailboxes()
    mailboxes.renew("r")
    with ThreadPoolExecutor(1) as pool, server.client() as admin:
        waiting = pool.submit(mailboxes.collect, "r", 60)
        eventually(lambda: admin.info("clients")["blocked_clients"] == 1)
        _read_only(admin)
        with pytest.raises(StorageUnavailable):
            waiting.result(30)
        for _ in range(2):
            assert mailboxes.is_open("r")
            assert mailboxes.collect("r", 0.01) == []
            assert not storage.swap(record("s"), record("s", a="1"))  # writes nothing
            assert "usable again" not in caplog.text
            with pytest.raises(StorageUnavailable, match="READONLY"):
                mailboxes.renew("r")
        admin.execute_command("REPLICAOF", "NO", "ONE")
    assert "usable again" not in caplog.text
    mailboxes.renew("r")
    assert "usable again after" in caplog.records[-1].getMessage()


def test_a_refusal_within_a_pipeline_quotes_no_commands(
    own_redis: OwnRedis, make_storage: MakeStorage
) -> None:
    server = own_redis()
    storage = make_storage(server.url)
    storage.mailboxes().renew("r")
    with server.client() as admin:
        _full(admin)
        with pytest.raises(StorageUnavailable) as caught:
            storage.mailboxes().post([Envelope("r", b"1"), Envelope("r", b"2")])
    assert f"(redis://127.0.0.1:{server.port}/0: command not allowed" in caught.value.detail
    assert "XADD" not in caught.value.detail


def test_any_command_says_in_the_log_that_writes_are_refused(
    own_redis: OwnRedis, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_redis()
    storage = make_storage(server.url)
    with server.client() as admin:
        _full(admin)
        for _ in range(3):
            with pytest.raises(StorageUnavailable) as caught:
                storage.create(record("t"))
        (line,) = (line.getMessage() for line in caplog.records)
        assert f"127.0.0.1:{server.port}" in line
        assert "OOM" in line
        assert f"127.0.0.1:{server.port}" in caught.value.detail
        assert "127.0.0.1" not in caught.value.message, "clients need not know"
        storage.exists("t")  # reading works, and says nothing about writing
        admin.config_set("maxmemory", "0")
    assert len(caplog.records) == 1
    storage.create(record("t"))
    assert "usable again after" in caplog.records[-1].getMessage()


def test_an_outage_is_logged_at_once_then_once_a_minute_then_when_it_is_over(
    own_redis: OwnRedis, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    server = own_redis()
    storage = RedisStorage(Connection(server.url, 5, lambda: now[0]))
    server.stop()
    for now[0] in (0, 1, 59, 60, 61):
        for command in (storage.exists, storage.load, storage.delete):
            with pytest.raises(StorageUnavailable):
                command("s")
    lines = [line.getMessage() for line in caplog.records]
    assert len(lines) == 2
    assert all("Connection refused" in line for line in lines)
    assert all(f"127.0.0.1:{server.port}" in line for line in lines)
    server.start()
    now[0] = 75
    storage.exists("s")
    last = caplog.records[-1].getMessage()
    assert last == f"[pid={os.getpid()}] the session store is usable again after 75 s"
    storage.exists("s")
    assert len(caplog.records) == 3
    storage.close()


def _fail(connection: Connection, words: str) -> None:
    with pytest.raises(StorageUnavailable), connection.mapped_errors():
        raise redis.ConnectionError(words)


def _succeed(connection: Connection) -> None:
    with connection.mapped_errors():
        pass


@pytest.mark.parametrize("cause", ["Connection refused", "Timeout reading from socket"])
def test_each_outage_has_a_first_line_and_a_last_one(
    caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    """However soon after another one, and whatever its cause is."""
    now = [0.0]
    connection = Connection("redis://127.0.0.1:1", 5, lambda: now[0])
    for now[0] in (0, 1, 2):
        _fail(connection, "Connection refused")
    now[0] = 3
    _succeed(connection)
    for now[0] in (10, 15, 69, 70, 80):
        _fail(connection, cause)
    now[0] = 90
    _succeed(connection)
    what = f"[pid={os.getpid()}] the session store is"
    assert [line.getMessage() for line in caplog.records] == [
        f"{what} not usable: redis://127.0.0.1:1: Connection refused",
        f"{what} usable again after 3 s",
        f"{what} not usable: redis://127.0.0.1:1: {cause}",
        f"{what} not usable: redis://127.0.0.1:1: {cause}",
        f"{what} usable again after 80 s",
    ]


def test_one_of_several_servers_that_is_away_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its commands fail between those of the others, and each looks like an outage."""
    now = [0.0]
    connection = Connection("redis+cluster://127.0.0.1:1", 5, lambda: now[0])
    for minute in (1, 2, 3):
        while now[0] < minute * 60:
            _fail(connection, "Connection refused")
            _succeed(connection)
            now[0] += 0.5
        lines = [line.getMessage() for line in caplog.records]
        assert len(lines) == minute * 10
        assert [" again " in line for line in lines] == [False, True] * 5 * minute


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://me:hunter22@127.0.0.1:1/0", ["redis://127.0.0.1:1/0", "Connection refused"]),
        ("redis://:hunter22@no.such.host.invalid:6379", ["no.such.host.invalid:6379"]),
        ("unix://me:hunter22@/no/such.sock", ["unix:///no/such.sock", "No such file"]),
        ("redis+sentinel://:hunter22@127.0.0.1:1/mine", ["sentinel://127.0.0.1:1/mine", "mine"]),
        ("redis+cluster://:hunter22@127.0.0.1:1", ["cluster://127.0.0.1:1"]),
    ],
)
def test_the_operator_is_told_which_store_and_what_it_said_but_no_password(
    url: str, said: list[str], make_storage: MakeStorage
) -> None:
    with pytest.raises(StorageUnavailable) as caught:
        make_storage(url).check()
    assert all(part in caught.value.detail for part in said), caught.value.detail
    assert "hunter22" not in caught.value.detail
    assert caught.value.message == StorageUnavailable.sentence


def test_a_database_that_is_not_there_is_named(
    redis_server: RedisServer, make_storage: MakeStorage
) -> None:
    with pytest.raises(StorageUnavailable) as caught:
        make_storage(f"redis://127.0.0.1:{redis_server.port}/999").check()
    assert "DB index is out of range" in caught.value.detail


@pytest.mark.parametrize("url", ["redis://h/abc", "rediss://h/0/1", "redis://h//"])
def test_a_path_that_is_no_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Connection(url)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        ("MISCONF Redis is configured to save RDB snapshots, but it's failing", "MISCONF"),
        ("unknown command 'GETEX', with args beginning with: 'k'", "GETEX: Redis 6.2"),
        ("unknown command `GETEX`, with args beginning with: `k`, `PX`", "GETEX: Redis 6.2"),
    ],
)
def test_the_sentence_names_what_is_wrong(error: str, named: str) -> None:
    connection = Connection("redis://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match=named), connection.mapped_errors():
        raise redis.ResponseError(error)


def test_without_getex_no_session_begins(own_redis: OwnRedis, make_storage: MakeStorage) -> None:
    server = own_redis(settings=['rename-command GETEX ""'])
    storage = make_storage(server.url)
    for attempt in (storage.check, lambda: storage.create(record("s"))):
        with pytest.raises(StorageUnavailable, match=r"does not know GETEX: Redis 6\.2"):
            attempt()
    assert not storage.exists("s")
    assert not storage.issued("s")


def test_swap_is_one_script_with_one_key(own_server: RedisServer, storage: RedisStorage) -> None:
    storage.swap(record("s"), record("s", a="1"))  # the server learns the script
    with recorded_commands(own_server) as commands:
        storage.swap(record("s", a="1"), record("s", a="2"))
    ((name, _, keys, key, *_),) = commands
    assert (name, keys, key) == ("EVALSHA", "1", "p:session:s")


def test_swap_teaches_a_server_that_forgot_its_scripts(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    assert storage.swap(record("s"), record("s", a="1"))
    with own_server.client() as admin:
        admin.script_flush()
    assert storage.swap(record("s", a="1"), record("s", a="2"))


FOREIGN = {
    "another order": b'{"metadata":{"z":"1","a":"2"},"updated_at":2.5,"type":"mcp","id":"s",'
    b'"created_at":1.5}',
    "blanks": b'{ "id": "s", "type": "mcp", "created_at": 1.5, "updated_at": 2.5,\n'
    b' "metadata": {"z": "1", "a": "2"} }',
    "a newer version": b'{"id":"s","type":"mcp","created_at":1.5,"updated_at":2.5,'
    b'"metadata":{"z":"1","a":"2"},"colour":{"r":[1,2]},"signed":"0","also":null}',
    "the nonce inside": b'{"id":"s","type":"mcp","created_at":1.5,"updated_at":2.5,"signed":"00",'
    b'"metadata":{"z":"1","a":"\\u0032"}}',
}


@pytest.mark.parametrize("stored", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("read", ["load", "peek"])
def test_a_record_that_somebody_else_wrote_can_be_swapped(
    own_server: RedisServer, storage: RedisStorage, stored: bytes, read: str
) -> None:
    with own_server.client() as admin:
        admin.set("p:session:s", stored)
        found = getattr(storage, read)("s")
        assert found.metadata == {"z": "1", "a": "2"}
        first = found.with_metadata(claim="c")
        assert storage.swap(found, first)
        assert not storage.swap(found, found.with_metadata(claim="other"))
        assert storage.swap(first, first.with_metadata(claim=None, backend_url="new"))
        after = json.loads(admin.get("p:session:s"))
    assert after.pop("metadata") == {"z": "1", "a": "2", "backend_url": "new"}
    before = json.loads(stored)
    own = ("id", "type", "created_at", "updated_at", "metadata", "signed")
    assert {n: v for n, v in after.items() if n not in own} == {
        n: v for n, v in before.items() if n not in own
    }


def test_no_key_is_ever_without_a_time_to_live(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with own_server.client() as admin:

        def left() -> dict[str, float]:
            return {key.decode(): admin.pttl(key) / 1000 for key in admin.keys("*")}

        def assert_limited(session_ttl: float) -> None:
            times = left()
            assert times.keys() == {"p:session:s", "p:issued:s"}
            assert session_ttl - 20 < times["p:session:s"] <= session_ttl
            assert ISSUED_TTL - 20 < times["p:issued:s"] <= ISSUED_TTL

        assert_limited(TTL)
        for change in (
            lambda: storage.load("s"),
            lambda: storage.swap(record("s"), record("s", a="1")),
        ):
            admin.pexpire("p:session:s", 30_000)
            change()
            assert_limited(TTL)
        storage.delete("s")
        assert left().keys() == {"p:issued:s"}


def test_a_time_to_live_of_parts_of_a_second_is_rounded_up(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    brief = make_storage(own_server.url, ttl=0.0011)
    with recorded_commands(own_server) as commands, pytest.raises(SessionNotFound):
        brief.load("s")
    assert commands[-1] == ["GETEX", "p:session:s", "PX", "2"]


def test_a_record_really_expires(own_server: RedisServer, make_storage: MakeStorage) -> None:
    brief = make_storage(own_server.url, ttl=0.05)
    brief.create(record("s"))
    eventually(lambda: not brief.exists("s"), message="the record did not expire")
    assert brief.issued("s")


def test_prefixes_keep_stores_apart(own_server: RedisServer, make_storage: MakeStorage) -> None:
    one, other = (make_storage(own_server.url, prefix=prefix) for prefix in ("one:", "other:"))
    one.create(record("s", a="one"))
    assert not other.issued("s")
    other.create(record("s", a="other"))
    assert one.load("s") == record("s", a="one")
    other.delete("s")
    assert one.exists("s")


def test_two_stores_with_the_same_prefix_share_their_records(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    here, there = make_storage(own_server.url), make_storage(own_server.url)
    here.create(record("s"))
    assert there.swap(there.load("s"), record("s", a="there"))
    assert here.load("s") == record("s", a="there")


# --- ways to reach the server --------------------------------------------------------------------


def test_nothing_is_sent_before_the_first_call(make_storage: MakeStorage) -> None:
    assert "p:" in repr(make_storage("redis://127.0.0.1:1/0"))


@pytest.mark.parametrize("options", [{}, {"password": "secret"}])
def test_a_unix_socket_serves_as_well(
    own_redis: OwnRedis, make_storage: MakeStorage, options: dict[str, str]
) -> None:
    storage = make_storage(own_redis(unix_socket=True, **options).unix_url)
    storage.create(record("s"))
    assert storage.load("s") == record("s")


@pytest.mark.parametrize("user", [None, "proxy"])
def test_a_url_may_carry_user_and_password(
    own_redis: OwnRedis, make_storage: MakeStorage, user: str | None
) -> None:
    storage = make_storage(own_redis(user=user, password="p@ss:w/rd?#%").url)
    storage.create(record("s"))
    assert storage.load("s") == record("s")


def test_a_wrong_password_is_a_store_that_cannot_be_reached(
    own_redis: OwnRedis, make_storage: MakeStorage
) -> None:
    server = own_redis(password="right")
    storage = make_storage(server.url.replace("right", "wrong"))
    with pytest.raises(StorageUnavailable) as caught:
        storage.check()
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "localhost:6379", "http://127.0.0.1", "redis://h:port", "redis://[::1"]
)
def test_a_url_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"."):
        Connection(url, timeout=1)


@pytest.mark.parametrize("url", ["redis://:hunter/2@h", "redis://me:hunter?2@h", "me:hunter2@h"])
def test_the_complaint_about_a_url_shows_nothing_of_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        Connection(url, timeout=1)
    assert "hunter" not in "".join(traceback.format_exception(caught.value))


def test_the_version_is_told_in_numbers(storage: RedisStorage) -> None:
    version = storage.version()
    assert version[:2] >= (6, 2)
    assert len(version) == 3


def test_close_ends_the_connections_of_a_url(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with own_server.client() as admin:
        assert len(admin.client_list()) == 2
        storage.close()
        eventually(lambda: len(admin.client_list()) == 1, message="the connection stayed open")


def test_close_leaves_a_client_that_was_handed_in_open(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    with own_server.client() as client, own_server.client() as admin:
        storage = make_storage(client)
        storage.check()
        connections = {line["id"] for line in admin.client_list()}
        storage.close()
        storage.check()
        assert {line["id"] for line in admin.client_list()} == connections


def test_a_call_that_runs_while_the_store_is_closed_still_has_its_answer(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    own_server.pause()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(storage.load, "s")
        eventually(loading.running, message="the call did not begin")
        storage.close()
        own_server.resume()
        assert loading.result(30) == record("s")
    storage.check()


def test_more_threads_than_redis_py_has_connections_are_served(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    storage = make_storage(own_server.url, timeout=60)
    started = threading.Semaphore(0)

    def ask() -> bool:
        started.release()
        return storage.exists("s")

    own_server.pause()
    with ThreadPoolExecutor(120) as pool:
        asked = [pool.submit(ask) for _ in range(120)]
        for _ in asked:
            assert started.acquire(timeout=30)
        own_server.resume()
        assert [future.result(60) for future in asked] == [False] * 120


# --- a server that is away -----------------------------------------------------------------------


@pytest.mark.parametrize("end", [RedisServer.stop, RedisServer.kill], ids=["stopped", "killed"])
def test_a_server_that_comes_back_is_used_again_with_all_its_data(
    own_server: RedisServer, storage: RedisStorage, end: Callable[[RedisServer], None]
) -> None:
    storage.swap(record("s"), record("s", a="before"))
    end(own_server)
    assert_unavailable(storage, CALLS, within=5)
    own_server.start()
    storage.check()
    assert storage.load("s") == record("s", a="before")
    assert storage.issued("s")
    assert storage.swap(record("s", a="before"), record("s", a="after"))
    storage.create(record("t"))
    storage.delete("s")


@pytest.mark.parametrize("way", ["url", "client"])
def test_a_restart_that_nobody_noticed_costs_no_call(
    own_server: RedisServer, make_storage: MakeStorage, way: str
) -> None:
    with own_server.client() as client:
        storage = make_storage(own_server.url if way == "url" else client)
        storage.create(record("s"))
        loads = [lambda: storage.load("s")] * 8
        run_together(loads)  # every thread leaves a connection in the pool
        own_server.stop()
        own_server.start()
        assert run_together(loads) == [record("s")] * 8


@pytest.mark.parametrize("way", ["url", "client"])
def test_a_server_that_was_never_there_is_unavailable(
    make_storage: MakeStorage, own_redis: OwnRedis, way: str
) -> None:
    server = own_redis()
    server.stop()
    with server.client() as client:
        storage = make_storage(server.url if way == "url" else client)
        assert_unavailable(storage, CALLS, within=5)


@pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "not connected"])
def test_a_frozen_server_is_unavailable_within_the_timeout(
    own_server: RedisServer, make_storage: MakeStorage, is_connected: bool
) -> None:
    storage = make_storage(own_server.url, timeout=2)
    if is_connected:
        storage.check()
    own_server.pause()
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        storage.load("s")
    assert 1.9 < time.monotonic() - began < 3.9, "it was tried once"
    own_server.resume()
    storage.check()


def test_a_server_that_takes_no_connection_is_unavailable_within_the_timeout(
    make_storage: MakeStorage,
) -> None:
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):  # the backlog, and the one more that Linux lets in
            waiting.enter_context(contextlib.closing(_connecting(full.getsockname())))
        storage = make_storage(f"redis://127.0.0.1:{full.getsockname()[1]}/0", timeout=0.3)
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            storage.load("s")
        assert time.monotonic() - began < 2


def _connecting(address: tuple[str, int]) -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex(address)
    return client


def test_every_call_of_a_frozen_server_is_unavailable(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    storage = make_storage(own_server.url, timeout=0.1)
    own_server.pause()
    assert_unavailable(storage, CALLS, within=2)


def test_a_late_answer_is_never_taken_for_another_one(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    storage = make_storage(own_server.url, timeout=0.2)
    for session_id in ("a", "b", "c"):
        storage.create(record(session_id))
    own_server.pause()
    for session_id in ("a", "b"):
        with pytest.raises(StorageUnavailable):
            storage.load(session_id)
    own_server.resume()
    for session_id in ("c", "b", "a"):
        assert storage.load(session_id) == record(session_id)


def test_a_server_that_refuses_to_write_is_unavailable(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with own_server.client() as admin:
        admin.config_set("maxmemory", "1")
        with pytest.raises(StorageUnavailable):
            storage.create(record("t"))
        admin.config_set("maxmemory", "0")
    storage.create(record("t"))


# --- answers that are lost -----------------------------------------------------------------------


@pytest.fixture
def lossy(own_server: RedisServer) -> Iterator[LossyProxy]:
    """A way to the server on which answers can be lost."""
    with LossyProxy(own_server.port) as proxy:
        yield proxy


@pytest.fixture(params=["a url", "a client with decode_responses"])
def unlucky(
    request: pytest.FixtureRequest, lossy: LossyProxy, make_storage: MakeStorage
) -> Iterator[RedisStorage]:
    """A store on that way that knows one session, `s`."""
    with redis.Redis("127.0.0.1", lossy.port, decode_responses=True) as client:
        url = f"redis://127.0.0.1:{lossy.port}/0"
        storage = make_storage(url if request.param == "a url" else client)
        storage.create(record("s"))
        storage.swap(record("s"), record("s"))  # the server learns the script
        yield storage


@pytest.mark.parametrize("word", [b"p:issued:t", b"NX"])
def test_create_succeeds_though_an_answer_was_lost(
    lossy: LossyProxy, unlucky: RedisStorage, word: bytes
) -> None:
    lossy.lose_answer_to(word)
    unlucky.create(record("t", a="1"))
    assert lossy.lost == 1
    assert unlucky.load("t") == record("t", a="1")


def test_create_is_still_refused_where_somebody_else_was_faster(
    lossy: LossyProxy, unlucky: RedisStorage
) -> None:
    lossy.lose_answer_to(b"NX")
    with pytest.raises(SessionExists):
        unlucky.create(record("s", a="mine"))
    assert lossy.lost == 1
    assert unlucky.load("s") == record("s")


def test_swap_has_won_though_its_answer_was_lost(lossy: LossyProxy, unlucky: RedisStorage) -> None:
    lossy.lose_answer_to(b"EVALSHA")
    assert unlucky.swap(record("s"), record("s", a="1")) is True
    assert lossy.lost == 1
    assert unlucky.load("s") == record("s", a="1")


def test_swap_has_lost_though_that_answer_was_lost(
    lossy: LossyProxy, unlucky: RedisStorage
) -> None:
    lossy.lose_answer_to(b"EVALSHA")
    assert unlucky.swap(record("s", a="stale"), record("s", a="1")) is False
    assert lossy.lost == 1
    assert unlucky.load("s") == record("s")


@pytest.mark.parametrize(
    ("word", "call"),
    [(b"GETEX", "load"), (b"EXISTS", "exists"), (b"EXISTS", "issued"), (b"DEL", "delete")],
)
def test_what_may_be_repeated_is_repeated(
    lossy: LossyProxy, unlucky: RedisStorage, word: bytes, call: str
) -> None:
    lossy.lose_answer_to(word)
    CALLS[call](unlucky)
    assert lossy.lost == 1


def test_the_same_swap_by_somebody_else_has_not_won(storage: RedisStorage) -> None:
    assert storage.swap(record("s"), record("s", a="1")) is True
    assert storage.swap(record("s"), record("s", a="1")) is False


def test_the_same_create_by_somebody_else_has_not_succeeded(storage: RedisStorage) -> None:
    with pytest.raises(SessionExists):
        storage.create(record("s"))


# --- records that nobody can read ----------------------------------------------------------------

GARBAGE = {
    "nothing": b"",
    "text": b"hello",
    "another object": b'{"id":1}',
    "a record cut off": encode(record("s"))[:-5],
    "bytes": b"\x80\x81\xff",
    "a record with invalid UTF-8": encode(record("s", a="?")).replace(b"?", b"\xff"),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("decode_responses", [False, True])
def test_a_corrupt_record_is_a_storage_error_and_no_missing_session(
    own_server: RedisServer, make_storage: MakeStorage, garbage: bytes, decode_responses: bool
) -> None:
    with (
        own_server.client() as admin,
        own_server.client(decode_responses=decode_responses) as client,
    ):
        storage = make_storage(client)
        admin.set("p:session:s", garbage, px=60_000)
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                storage.load("s")
        assert not isinstance(caught.value, StorageUnavailable)
        assert storage.exists("s")
        storage.delete("s")
        storage.create(record("s"))
        assert storage.load("s") == record("s")


def test_a_key_of_another_type_is_a_storage_error(
    own_server: RedisServer, storage: RedisStorage
) -> None:
    with own_server.client() as admin:
        admin.delete("p:session:s")
        admin.rpush("p:session:s", "x")
    with pytest.raises(StorageError):
        storage.load("s")
    assert storage.exists("s")


def test_idle_connections_are_kept_known_to_firewalls(redis_server: RedisServer) -> None:
    connection = Connection(redis_server.url)
    pooled = connection.client.connection_pool.get_connection()
    try:
        assert pooled._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    finally:
        connection.client.connection_pool.release(pooled)
        connection.close()


def test_a_command_that_ends_after_the_store_was_closed_leaves_no_connection(
    redis_server: RedisServer,
) -> None:
    connection = Connection(redis_server.url)
    with connection.mapped_errors():
        connection.client.ping()
        pool = connection.client.connection_pool
        pooled = pool.get_connection()
        connection.close()
        pool.release(pooled)
        assert pooled._sock is not None
    assert pooled._sock is None
