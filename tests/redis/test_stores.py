"""Sessions, event log and mailboxes over every form of Redis, by URL and by a client."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from mcp_proxy.errors import SessionExists, SessionNotFound
from mcp_proxy.rate_buckets import Rate, key_of
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.server.check import check
from mcp_proxy.storage.mailboxes import Envelope
from tests.redis.conftest import MakeStorage
from tests.storage.stores import record
from tests.support.front import SCRIPTED
from tests.support.proxies import configured
from tests.support.redis_forms import USER, Form, ThreeNodes, WithSentinels
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together
from tests.support.waiting import eventually

MANY = 24  # keys, so that each of three nodes has some


def mailboxes_of(storage: RedisStorage) -> RedisMailboxes:
    """Mailboxes over the connections of a store."""
    return RedisMailboxes(storage.connection, storage.prefix)


def keys_of(server: RedisServer, prefix: str) -> int:
    """How many keys with the prefix one server has, in any of its databases."""
    with server.client() as admin:
        databases = [int(name.removeprefix("db")) for name in admin.info("keyspace")]
    found = 0
    for db in databases:
        with redis.Redis(port=server.port, password=server.password, db=db) as client:
            found += len(list(client.scan_iter(f"{prefix}*", count=1000)))
    return found


def somebody_waits(form: Form) -> bool:
    """Whether a server holds a command back until there is an answer."""
    for server in form.servers:
        with server.client() as admin:
            if admin.info("clients")["blocked_clients"] > 0:
                return True
    return False


def connections_of(server: RedisServer) -> int:
    """How many connections the proxy has to a server."""
    with server.client() as admin:
        return sum(line.get("user") == USER for line in admin.client_list())


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_begins_changes_and_ends(storage: RedisStorage) -> None:
    storage.create(record(a="1"))
    with pytest.raises(SessionExists):
        storage.create(record())
    assert storage.load("s") == storage.peek("s") == record(a="1")
    assert storage.swap(record(a="1"), record(a="é 😀"))
    assert not storage.swap(record(a="1"), record(a="3"))
    assert storage.load("s") == record(a="é 😀")
    assert storage.exists("s")
    storage.delete("s")
    assert storage.issued("s")
    assert not storage.issued("t")
    assert storage.peek("s") is None
    with pytest.raises(SessionNotFound):
        storage.load("s")
    assert not storage.swap(record(a="é 😀"), record())


def test_many_sessions_are_spread_and_found(storage: RedisStorage, form: Form) -> None:
    records = [record(f"s{number}") for number in range(MANY)]
    run_together([lambda it=it: storage.create(it) for it in records])
    assert run_together([lambda it=it: storage.load(it.id) for it in records]) == records
    if isinstance(form, ThreeNodes):
        assert all(keys_of(node, storage.prefix) > 0 for node in form.servers)
    assert sum(keys_of(server, storage.prefix) for server in form.servers) >= 2 * MANY


def test_requests_of_many_callers_are_counted(storage: RedisStorage, form: Form) -> None:
    count, rate = storage.scoped("s").rate_counter(), Rate(2 / 60, 2, 60)
    for caller in range(MANY):
        key = key_of(str(caller))
        assert count(key, rate, 2) == 0
        assert 1 <= count(key, rate, 1) <= 60
    if isinstance(form, ThreeNodes):
        assert all(keys_of(node, storage.prefix) > 0 for node in form.servers)


def test_one_of_many_swaps_wins(storage: RedisStorage) -> None:
    storage.create(record())
    swaps = [lambda n=n: storage.swap(record(), record(n=str(n))) for n in range(8)]
    assert sum(run_together(swaps)) == 1


def test_the_store_says_that_it_is_there_and_which_version(storage: RedisStorage) -> None:
    storage.check()
    assert storage.version()[:2] >= (6, 2)
    assert storage.eviction() == ""
    versions = [info["redis_version"] for info in storage.connection.info()]
    assert len(set(versions)) == 1
    storage.connection.ping()


def test_the_command_that_checks_finds_it(form: Form, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(configured(SCRIPTED, redis_url=form.url, redis_prefix="test-check:")) == 0
    found = capsys.readouterr().out
    assert "Redis 6." in found or "Redis 7." in found or "Redis 8." in found
    assert "p@ss" not in found
    assert "p%40ss" not in found


def test_every_server_of_a_cluster_is_asked(form: Form, make_storage: MakeStorage) -> None:
    answers = make_storage(form.url).connection.info()
    assert len(answers) == (3 if isinstance(form, ThreeNodes) else 1)
    assert all("uptime_in_seconds" in answer for answer in answers)


def test_a_policy_of_any_primary_is_told(form: Form, make_storage: MakeStorage) -> None:
    storage = make_storage(form.url)
    for server in form.servers:
        with server.client() as admin:
            if admin.info("replication")["role"] != "master":
                continue
            found = admin.config_get("maxmemory*")
            admin.config_set("maxmemory", "100mb")
            admin.config_set("maxmemory-policy", "volatile-lru")
            try:
                assert storage.eviction() == "volatile-lru"
            finally:
                admin.config_set("maxmemory", found["maxmemory"])
                admin.config_set("maxmemory-policy", found["maxmemory-policy"])
    assert storage.eviction() == ""


# --- the event log -------------------------------------------------------------------------------


def test_events_are_kept_found_and_read(storage: RedisStorage) -> None:
    log = storage.event_log()
    first = log.append("s", "stream", "\0 é 😀".encode(), False)
    second = log.append("s", "stream", b"zwei", True)
    events = log.read("s", None, 0)
    assert [event.data for event in events] == ["\0 é 😀".encode(), b"zwei"]
    assert log.read("s", first, 0) == events[1:]
    assert log.find("s", second) == events[1]
    assert log.find("s", "1-1") is None
    log.forget("s")
    assert log.read("s", None, 0) == []


def test_a_reader_waits_for_an_event(form: Form, storage: RedisStorage) -> None:
    log = storage.event_log()
    first = log.append("s", "stream", b"1", False)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(log.read, "s", first, 30)
        eventually(lambda: somebody_waits(form))
        second = log.append("s", "stream", b"2", False)
        assert [event.id for event in reading.result(10)] == [second]
    began = time.monotonic()
    assert log.read("s", second, 0.2) == []
    assert 0.15 < time.monotonic() - began < 5


# --- mailboxes -----------------------------------------------------------------------------------


def test_one_batch_goes_to_many_mailboxes(storage: RedisStorage) -> None:
    mailboxes = mailboxes_of(storage)
    replicas = [f"replica-{number}" for number in range(MANY)]
    assert not any(mailboxes.renew(replica) for replica in replicas)
    assert all(mailboxes.renew(replica) for replica in replicas)
    envelopes = [Envelope(replica, replica.encode() + b"\xff") for replica in replicas]
    answers = mailboxes.post([*envelopes, Envelope("nobody", b"x"), *envelopes])
    assert answers == [True] * MANY + [False] + [True] * MANY
    for envelope in envelopes:
        assert mailboxes.collect(envelope.to, 0.01) == [envelope.data] * 2
    mailboxes.post(envelopes)
    for replica in replicas:
        assert mailboxes.remove(replica) == [replica.encode() + b"\xff"]
        assert not mailboxes.is_open(replica)
    assert mailboxes.uptime() >= 0


def test_a_letter_is_taken_out_once_and_waited_for(form: Form, storage: RedisStorage) -> None:
    mailboxes = mailboxes_of(storage)
    mailboxes.renew("r")
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(mailboxes.collect, "r", 30)
        eventually(lambda: somebody_waits(form))
        assert mailboxes.post([Envelope("r", b"1")]) == [True]
        assert collecting.result(10) == [b"1"]
    assert mailboxes.post([Envelope("r", b"2")]) == [True]
    assert mailboxes.collect("r", 1) == [b"2"]
    assert mailboxes.collect("r", 0.05) == []
    assert mailboxes.is_open("r")  # an empty mailbox is one
    assert mailboxes.post([Envelope("nobody", b"x")]) == [False]


# --- connections ---------------------------------------------------------------------------------


def test_close_ends_what_a_url_opened_and_all_may_begin_again(
    form: Form, make_storage: MakeStorage
) -> None:
    servers = [*form.servers, *(form.sentinels if isinstance(form, WithSentinels) else [])]
    storage = make_storage(form.url)
    for _ in range(2):
        run_together([storage.check, storage.version, lambda: storage.exists("s")])
        before = [connections_of(server) for server in form.servers]
        assert sum(before) > 0
        storage.close()
        for server in servers:
            eventually(lambda it=server: connections_of(it) == 0, message="one stayed open")


def test_close_lets_a_call_that_waits_have_its_answer(
    form: Form, make_storage: MakeStorage
) -> None:
    storage = make_storage(form.url)
    log = storage.event_log()
    first = log.append("s", "stream", b"1", False)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(log.read, "s", first, 2)
        eventually(lambda: somebody_waits(form))
        storage.close()
        second = log.append("s", "stream", b"2", False)
        assert [event.id for event in reading.result(10)] == [second]


def test_a_client_that_was_handed_in_stays_open(form: Form, make_storage: MakeStorage) -> None:
    with form.client() as client:
        storage = make_storage(client)
        storage.check()
        storage.close()
        assert sum(connections_of(server) for server in form.servers) > 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_goes_on_beside_its_parent(storage: RedisStorage) -> None:
    storage.create(record())
    log = storage.event_log()
    log.append("s", "stream", b"1", False)
    is_over = threading.Event()

    def loading() -> int:
        count = 0
        while not is_over.is_set():
            assert storage.load("s").id == "s"
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        in_parent = pool.submit(loading)
        child = _forked(storage)
        _, status = os.waitpid(child, 0)
        is_over.set()
        assert in_parent.result(10) > 0
    assert os.waitstatus_to_exitcode(status) == 0
    assert storage.load("s") == record(by="child")


def _forked(storage: RedisStorage) -> int:
    """A child process that uses the store and ends with 0 if all was well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            mailboxes = mailboxes_of(storage)
            mailboxes.renew("r")
            is_well = mailboxes.post([Envelope("r", b"1")]) == [True]
            is_well = is_well and mailboxes.collect("r", 1) == [b"1"]
            is_well = is_well and all(storage.load("s") == record() for _ in range(50))
            code = 0 if is_well and storage.swap(record(), record(by="child")) else 2
        finally:
            os._exit(code)
    return child
