"""Connections to Redis that a firewall has forgotten while they were idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import redis

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.mailboxes import Envelope
from tests.storage.stores import record
from tests.support.firewall import Firewall
from tests.support.redis_forms import OneServer
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

TIMEOUT = 4.0

#: Seconds after which a connection counts as idle here.
IDLE = 1


@pytest.fixture
def firewall(own_server: RedisServer) -> Iterator[Firewall]:
    with Firewall(own_server.port) as firewall:
        yield firewall


@pytest.fixture
def storage(firewall: Firewall) -> Iterator[RedisStorage]:
    """A store behind the firewall that has been used once."""
    url = f"redis://127.0.0.1:{firewall.port}?health_check_interval={IDLE}"
    storage = RedisStorage(url, timeout=TIMEOUT)
    storage.create(record())
    yield storage
    storage.close()


def appended(storage: RedisStorage) -> object:
    return storage.event_log().append("s", "stream", b"1", False)


def posted(storage: RedisStorage) -> object:
    mailboxes = storage.mailboxes()
    mailboxes.renew("r")
    mailboxes.post([Envelope("r", b"1")])
    return mailboxes.collect("r", 0.01)


CALLS: dict[str, Callable[[RedisStorage], object]] = {
    "load": lambda storage: storage.load("s"),
    "swap": lambda storage: storage.swap(record(), record(a="1")),
    "append": appended,
    "post": posted,
    "check": lambda storage: storage.check(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_command_on_a_forgotten_connection_is_executed_once_and_in_time(
    firewall: Firewall, storage: RedisStorage, admin: redis.Redis, call: str
) -> None:
    firewall.forget()
    eventually(lambda: idle(admin) > IDLE, TIMEOUT * 2)
    began = time.monotonic()
    result = CALLS[call](storage)
    assert time.monotonic() - began < TIMEOUT
    assert firewall.lost
    assert all(b"PING" in lost for lost in firewall.lost)
    if call == "post":
        assert result == [b"1"]
    if call == "append":
        assert len(storage.event_log().read("s", None, 0)) == 1


def test_a_forgotten_connection_with_tls_is_replaced() -> None:
    with OneServer("tls") as form, Firewall(form.gates[0].port) as firewall:
        url = form.url.replace(f":{firewall.target}/", f":{firewall.port}/")
        url += f"&health_check_interval={IDLE}"
        storage = RedisStorage(url, prefix="test-", timeout=TIMEOUT)
        with closing(storage), form.server.client() as admin:
            storage.create(record())
            firewall.forget()
            eventually(lambda: idle(admin) > IDLE, TIMEOUT * 2)
            began = time.monotonic()
            assert storage.load("s") == record()
            assert time.monotonic() - began < TIMEOUT
        assert firewall.lost


def test_a_connection_that_is_in_use_is_not_asked(
    storage: RedisStorage, admin: redis.Redis
) -> None:
    pings = calls_of(admin, "ping")
    for _ in range(50):
        storage.load("s")
    assert calls_of(admin, "ping") - pings < 10  # some, where the machine stood still


def test_a_redis_that_is_silent_is_given_up(
    storage: RedisStorage, own_server: RedisServer, admin: redis.Redis
) -> None:
    eventually(lambda: idle(admin) > IDLE, TIMEOUT * 2)
    own_server.pause()
    try:
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            storage.load("s")
        assert time.monotonic() - began < TIMEOUT + 3
    finally:
        own_server.resume()


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_an_idle_connection_is_asked_after_ten_seconds(scheme: str) -> None:
    connection = Connection(f"{scheme}://127.0.0.1:1")
    settings = connection.client.connection_pool.connection_kwargs
    assert settings["health_check_interval"] == 10


def idle(admin: redis.Redis) -> int:
    """For how long the connections of others have been idle, in seconds."""
    own = admin.client_id()
    return min(int(line["idle"]) for line in admin.client_list() if int(line["id"]) != own)


def calls_of(admin: redis.Redis, command: str) -> int:
    """How often a command was executed."""
    return int(admin.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])
