"""The event log in Redis: what is really stored and sent, and what happens without a server."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.event_log import RedisEventLog
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.event_log import KEPT, EventLog
from tests.support.lossy import LossyProxy
from tests.support.monitor import recorded_commands
from tests.support.outage import assert_unavailable
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

CALLS: dict[str, Callable[[EventLog], object]] = {
    "append": lambda log: log.append("s", "a", b"1", False),
    "find": lambda log: log.find("s", "1-1"),
    "read": lambda log: log.read("s", None, 0),
    "read with time": lambda log: log.read("s", None, 0.01),
    "forget": lambda log: log.forget("s"),
}

MakeLog = Callable[..., RedisEventLog]


@pytest.fixture
def log_at(redis_at: Callable[..., Connection]) -> MakeLog:
    """Makes logs as a replica has them."""

    def make(url: str, timeout: float = 5, kept: float = KEPT) -> RedisEventLog:
        return RedisEventLog(redis_at(url, timeout), "p:", kept)

    return make


def test_a_log_is_one_key_with_a_time_to_live(
    own_server: RedisServer, admin: redis.Redis, log_at: MakeLog
) -> None:
    log = log_at(own_server.url)
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


def test_looking_leaves_no_key(
    own_server: RedisServer, admin: redis.Redis, log_at: MakeLog
) -> None:
    log = log_at(own_server.url)
    for name in ("find", "read", "read with time", "forget"):
        CALLS[name](log)
    assert admin.keys("*") == []


def test_an_event_costs_one_command(own_server: RedisServer, log_at: MakeLog) -> None:
    log = log_at(own_server.url)
    log.append("s", "a", b"0", False)  # the server learns the script
    with recorded_commands(own_server) as commands:
        log.append("s", "a", b"1", False)
    ((name, _, keys, key, *_),) = commands
    assert (name, keys, key) == ("EVALSHA", "1", "p:events:s")


def test_a_log_really_expires(own_server: RedisServer, log_at: MakeLog) -> None:
    log = log_at(own_server.url, kept=0.05)
    log.append("s", "a", b"1", False)
    eventually(lambda: log.read("s", None, 0) == [], message="the log did not expire")


def test_the_log_of_a_store_lives_no_longer_than_its_sessions(
    own_server: RedisServer, admin: redis.Redis
) -> None:
    for ttl, expected in ((30.0, 30.0), (7200.0, KEPT)):
        storage = RedisStorage(own_server.url, ttl=ttl, prefix="p:")
        storage.event_log().append("s", "a", b"1", False)
        assert expected - 5 < admin.pttl("p:events:s") / 1000 <= expected
        storage.close()


def test_prefixes_keep_logs_apart(
    own_server: RedisServer, redis_at: Callable[..., Connection]
) -> None:
    connection = redis_at(own_server.url)
    one, other = RedisEventLog(connection, "one:"), RedisEventLog(connection, "other:")
    event_id = one.append("s", "a", b"1", False)
    assert other.find("s", event_id) is None
    assert other.read("s", None, 0) == []


def test_replicas_share_a_log(own_server: RedisServer, log_at: MakeLog) -> None:
    here, there = log_at(own_server.url), log_at(own_server.url)
    first = here.append("s", "a", b"1", False)
    second = there.append("s", "b", b"2", True)
    assert [event.id for event in here.read("s", None, 0)] == [first, second]
    assert there.find("s", first) == here.find("s", first)


def test_a_patient_reader_stays_below_the_time_for_an_answer(
    own_server: RedisServer, log_at: MakeLog
) -> None:
    log = log_at(own_server.url, timeout=2)
    began = time.monotonic()
    assert log.read("s", None, 60) == []
    assert time.monotonic() - began < 2


def test_a_stopped_server_is_unavailable_and_its_log_is_there_when_it_is_back(
    own_server: RedisServer, log_at: MakeLog
) -> None:
    log = log_at(own_server.url)
    first = log.append("s", "a", b"1", False)
    own_server.stop()
    assert_unavailable(log, CALLS, within=3)
    own_server.start()
    second = log.append("s", "a", b"2", True)
    assert [event.id for event in log.read("s", None, 0)] == [first, second]


def test_a_frozen_server_is_unavailable_within_the_timeout(
    own_server: RedisServer, log_at: MakeLog
) -> None:
    log = log_at(own_server.url, timeout=0.2)
    own_server.pause()
    assert_unavailable(log, CALLS, within=3)
    own_server.resume()


def test_an_event_whose_id_was_lost_is_at_most_there_twice(
    own_server: RedisServer, redis_at: Callable[..., Connection]
) -> None:
    with LossyProxy(own_server.port) as way:
        connection = redis_at(f"redis://127.0.0.1:{way.port}/0")
        log = RedisEventLog(connection, "p:", KEPT)
        log.append("s", "a", b"0", False)
        way.lose_answer_to(b"EVALSHA")
        event_id = log.append("s", "a", b"1", False)
        assert way.lost == 1
        found = log.read("s", None, 0)
        assert found[-1].id == event_id
        assert {event.data for event in found} == {b"0", b"1"}
        assert len(found) <= 3
        connection.close()
