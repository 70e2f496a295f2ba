"""The event log in Redis: what is really stored and sent, and what happens without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.client import Access
from mcp_proxy.redis.event_log import RedisEventLog
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.event_log import KEPT, EventLog
from tests.support.lossy import LossyProxy
from tests.support.monitor import recorded_commands
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

CALLS: dict[str, Callable[[EventLog], object]] = {
    "append": lambda log: log.append("s", "a", b"1", False),
    "find": lambda log: log.find("s", "1-1"),
    "read": lambda log: log.read("s", None, 0),
    "read with time": lambda log: log.read("s", None, 0.01),
    "forget": lambda log: log.forget("s"),
}


@pytest.fixture
def server(own_redis: Callable[..., RedisServer]) -> RedisServer:
    """A server of this test alone."""
    return own_redis()


@pytest.fixture
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    """A client that looks into the server."""
    with server.client() as client:
        yield client


def log_at(url: str, timeout: float = 5, kept: float = KEPT) -> RedisEventLog:
    """A log as a replica has it."""
    return RedisEventLog(Access(url, timeout), "p:", kept)


def test_a_log_is_one_key_with_a_time_to_live(server: RedisServer, admin: redis.Redis) -> None:
    log = log_at(server.url)
    for _ in range(3):
        log.append("s", "a", b"1", False)
        assert admin.keys("*") == [b"p:events:s"]
        assert KEPT - 20 < admin.pttl("p:events:s") / 1000 <= KEPT
        admin.pexpire("p:events:s", 5000)
    log.read("s", None, 0)
    log.find("s", "1-1")
    assert admin.pttl("p:events:s") <= 5000
    log.forget("s")
    assert admin.keys("*") == []


def test_looking_leaves_no_key(server: RedisServer, admin: redis.Redis) -> None:
    log = log_at(server.url)
    for name in ("find", "read", "read with time", "forget"):
        CALLS[name](log)
    assert admin.keys("*") == []


def test_an_event_costs_one_command(server: RedisServer) -> None:
    log = log_at(server.url)
    log.append("s", "a", b"0", False)  # the server learns the script
    with recorded_commands(server) as commands:
        log.append("s", "a", b"1", False)
    ((name, _, keys, key, *_),) = commands
    assert (name, keys, key) == ("EVALSHA", "1", "p:events:s")


def test_a_log_really_expires(server: RedisServer) -> None:
    log = log_at(server.url, kept=0.05)
    log.append("s", "a", b"1", False)
    eventually(lambda: log.read("s", None, 0) == [], message="the log did not expire")


def test_the_log_of_a_store_lives_no_longer_than_its_sessions(
    server: RedisServer, admin: redis.Redis
) -> None:
    for ttl, expected in ((30.0, 30.0), (7200.0, KEPT)):
        storage = RedisStorage(server.url, ttl=ttl, prefix="p:")
        storage.event_log().append("s", "a", b"1", False)
        assert expected - 5 < admin.pttl("p:events:s") / 1000 <= expected
        storage.close()


def test_prefixes_keep_logs_apart(server: RedisServer) -> None:
    access = Access(server.url)
    one, other = RedisEventLog(access, "one:"), RedisEventLog(access, "other:")
    event_id = one.append("s", "a", b"1", False)
    assert other.find("s", event_id) is None
    assert other.read("s", None, 0) == []


def test_replicas_share_a_log(server: RedisServer) -> None:
    here, there = log_at(server.url), log_at(server.url)
    first = here.append("s", "a", b"1", False)
    second = there.append("s", "b", b"2", True)
    assert [event.id for event in here.read("s", None, 0)] == [first, second]
    assert there.find("s", first) == here.find("s", first)


def test_a_patient_reader_stays_below_the_time_for_an_answer(server: RedisServer) -> None:
    log = log_at(server.url, timeout=0.4)
    began = time.monotonic()
    assert log.read("s", None, 60) == []
    assert time.monotonic() - began < 0.4


def test_a_stopped_server_is_unavailable_and_its_log_is_there_when_it_is_back(
    server: RedisServer,
) -> None:
    log = log_at(server.url)
    first = log.append("s", "a", b"1", False)
    server.stop()
    for name, call in CALLS.items():
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            call(log)
        assert time.monotonic() - began < 3, name
    server.start()
    second = log.append("s", "a", b"2", True)
    assert [event.id for event in log.read("s", None, 0)] == [first, second]


def test_a_frozen_server_is_unavailable_within_the_timeout(server: RedisServer) -> None:
    log = log_at(server.url, timeout=0.2)
    server.pause()
    for name, call in CALLS.items():
        began = time.monotonic()
        with pytest.raises(StorageUnavailable):
            call(log)
        assert time.monotonic() - began < 1.5, name
    server.resume()


def test_an_event_whose_id_was_lost_is_at_most_there_twice(server: RedisServer) -> None:
    with LossyProxy(server.port) as way:
        log = log_at(f"redis://127.0.0.1:{way.port}/0")
        log.append("s", "a", b"0", False)
        way.lose_answer_to(b"EVALSHA")
        event_id = log.append("s", "a", b"1", False)
        assert way.lost == 1
        found = log.read("s", None, 0)
        assert found[-1].id == event_id
        assert {event.data for event in found} == {b"0", b"1"}
        assert len(found) <= 3
        log._access.close()
