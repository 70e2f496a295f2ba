"""Servers that go away for good: Sentinel has another master, and everything goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis.backoff import NoBackoff
from redis.retry import Retry

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.client import Client
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.mailboxes import Envelope
from tests.redis.conftest import MakeStorage
from tests.redis.test_proxies import two_proxies
from tests.storage.stores import record
from tests.support.front import McpClient
from tests.support.redis_forms import SERVICE, WithSentinels, admin_of
from tests.support.waiting import eventually

TIMEOUT = 2.0


@pytest.fixture
def form() -> Iterator[WithSentinels]:
    """A master, a replica and sentinels of one test alone."""
    with WithSentinels() as running:
        assert isinstance(running, WithSentinels)
        yield running


def copied(form: WithSentinels) -> bool:
    """Whether the replica has all that the master has."""
    with admin_of(form.master) as master, admin_of(form.replica) as replica:
        there = replica.info("replication")
        offset = there["slave_repl_offset"]
        return bool(
            there["master_link_status"] == "up"
            and offset >= master.info("replication")["master_repl_offset"]
        )


def answers(storage: RedisStorage) -> bool:
    """Whether the store can be written to."""
    try:
        storage.delete("nobody")
    except StorageUnavailable:
        return False
    return True


@pytest.mark.parametrize("address", ["by url", "by client"], indirect=True)
def test_the_replica_takes_over(
    form: WithSentinels, make_storage: MakeStorage, address: str | Client
) -> None:
    storage = make_storage(address, timeout=TIMEOUT)
    mailboxes = RedisMailboxes(storage.connection, storage.prefix)
    log = storage.event_log()
    storage.create(record())
    storage.swap(record(), record(a="1"))
    event = log.append("s", "stream", b"1", False)
    mailboxes.renew("r")
    mailboxes.post([Envelope("r", b"1"), Envelope("r", b"2")])
    eventually(lambda: copied(form))

    form.sentinels[0].kill()  # the first of the list: the others are asked
    form.master.kill()
    if isinstance(address, str):  # a client of somebody else's may try longer
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            storage.load("s")
        assert time.monotonic() - began < TIMEOUT + 1
    eventually(lambda: answers(storage), 30)

    assert storage.load("s") == record(a="1")
    assert storage.issued("s")
    assert storage.swap(record(a="1"), record(a="2"))
    assert log.read("s", None, 0)[0].id == event
    log.append("s", "stream", b"2", True)
    assert [found.data for found in log.read("s", event, 0)] == [b"2"]
    assert mailboxes.collect("r", 1) == [b"1", b"2"]
    assert mailboxes.post([Envelope("r", b"3"), Envelope("nobody", b"4")]) == [True, False]
    assert mailboxes.collect("r", 1) == [b"3"]


def test_sessions_of_two_replicas_go_on(form: WithSentinels, make_storage: MakeStorage) -> None:
    with two_proxies(make_storage, form.url, form.url, TIMEOUT) as (here, there):
        there.session = here.open().session
        pid = here.result("count")["pid"]
        assert there.result("count") == {"calls": 2, "pid": pid}
        eventually(lambda: copied(form))
        form.master.kill()
        eventually(lambda: here.call("echo").failure, message="the owner knows the session on")
        for client in (here, there):
            answer = client.call("count")
            assert (answer.failure, answer.headers["Retry-After"]) == ("store-unavailable", "1")
            assert answer.error()["code"] == -32000
        assert eventually(lambda: _count(here), 30) == {"calls": 3, "pid": pid}
        assert eventually(lambda: _count(there), 30) == {"calls": 4, "pid": pid}
        other = McpClient(there.front).open()
        assert other.result("count")["pid"] != pid
        for client in (there, other):
            assert client.delete().status == 204


def test_the_old_master_comes_back_as_a_replica(
    form: WithSentinels, make_storage: MakeStorage
) -> None:
    storage = make_storage(form.url, timeout=TIMEOUT)
    storage.create(record())
    eventually(lambda: copied(form))
    form.master.pause()  # no longer answers, but its connections stay
    eventually(lambda: answers(storage), 30)
    assert storage.swap(record(), record(a="1"))
    form.master.resume()
    # Sentinel ends all connections of what it makes a replica.
    with form.master.client(retry=Retry(NoBackoff(), 3)) as old:
        eventually(lambda: old.info("replication")["role"] == "slave", 30)
        eventually(lambda: old.info("replication")["master_link_status"] == "up", 30)
    for _ in range(20):
        assert storage.load("s") == record(a="1")
    with form.sentinels[0].client() as sentinel:
        assert sentinel.sentinel_masters()[SERVICE]["port"] == form.replica.port


def _count(client: McpClient) -> object:
    """The result of a call, None where the store is still away."""
    answer = client.call("count")
    if answer.failure == "store-unavailable":
        answer.body()
        return None
    return answer.message()["result"]
