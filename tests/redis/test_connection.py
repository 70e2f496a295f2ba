"""Commands on the way of a call: on connections that are kept, and as safe as redis-py's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from mcp_proxy.redis.client import Connection
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together
from tests.support.waiting import eventually

NAME = "asked"


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    """A connection by URL, which the server knows by a name."""
    made = Connection(f"{redis_server.url}?client_name={NAME}")
    yield made
    made.close()


@pytest.fixture
def count(redis_server: RedisServer) -> Callable[[], int]:
    """Says how many connections the server has of that name."""

    def counted() -> int:
        with redis_server.client() as admin:
            return sum(one["name"] == NAME for one in admin.client_list())

    return counted


def test_answers_come_in_order_and_as_bytes(connection: Connection, redis_prefix: str) -> None:
    key = f"{redis_prefix}key"
    commands = [("SET", key, b"\xff", "PX", 60_000), ("GET", key), ("EXISTS", key)]
    assert connection.ask(commands) == [b"OK", b"\xff", 1]


def test_an_error_of_one_command_is_raised_when_all_are_answered(
    connection: Connection, redis_prefix: str
) -> None:
    key = f"{redis_prefix}key"
    commands = [("SET", key, "text", "PX", 60_000), ("XLEN", key), ("GET", key)]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        connection.ask(commands)
    assert connection.ask([("GET", key)]) == [b"text"]


def test_a_connection_is_kept_for_the_next_command_and_closed_in_the_end(
    connection: Connection, count: Callable[[], int]
) -> None:
    for _ in range(5):
        connection.ask([("PING",)])
    assert count() == 1
    run_together([lambda: connection.ask([("PING",)])] * 4)
    assert count() <= 5
    connection.close()
    eventually(lambda: count() == 0)
    assert connection.ask([("PING",)]) == [b"PONG"]


def test_a_connection_that_the_server_has_closed_is_replaced(
    connection: Connection, count: Callable[[], int], redis_server: RedisServer
) -> None:
    connection.ask([("PING",)])
    with redis_server.client() as admin:
        for one in admin.client_list():
            if one["name"] == NAME:
                admin.client_kill_filter(_id=one["id"])
    eventually(lambda: count() == 0)
    assert connection.ask([("PING",)]) == [b"PONG"]


def test_an_answer_that_is_late_is_nobody_elses(redis_server: RedisServer) -> None:
    connection = Connection(redis_server.url, timeout=0.2)
    with redis_server.client() as admin:
        admin.client_pause(1000)
        with pytest.raises(redis.TimeoutError):
            connection.ask([("ECHO", "late")])
        admin.client_unpause()
    assert connection.ask([("ECHO", "next")]) == [b"next"]
    connection.close()


def test_a_client_with_a_single_connection_is_asked_as_redis_py_does(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    key = f"{redis_prefix}key"
    with redis_server.client(single_connection_client=True, decode_responses=True) as client:
        connection = Connection(client)
        assert connection.ask([("SET", key, b"\xff", "PX", 60_000), ("GET", key)])[1] == b"\xff"
        assert connection.ask([("GET", key)]) == [b"\xff"]
