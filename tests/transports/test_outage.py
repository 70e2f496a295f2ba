"""Redis goes away and comes back, with two replicas that share a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.front import McpClient
from tests.support.proxies import Replicas, replicas, running
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually
from tests.transports.calls import hold, pid_of, release, say


@pytest.fixture
def redis(own_redis: Callable[..., RedisServer]) -> RedisServer:
    return own_redis()


@pytest.fixture(params=[15.0, 1.0], ids=["within the lease", "beyond the lease"])
def two(request: pytest.FixtureRequest, redis: RedisServer) -> Iterator[Replicas]:
    quick = {"sse_after": 3, "keepalive_interval": 0.2}
    with replicas(2, redis_url=redis.url, lease=request.param, **quick) as several:
        yield several


def wait_until_noticed(client: McpClient) -> None:
    """The owner of a session does without the store for a second."""
    eventually(lambda: client.call("echo").failure == "store-unavailable")


def outage(redis: RedisServer, several: Replicas, clients: list[McpClient]) -> None:
    """Redis is away until every lease of a second is long over, and comes back with its data."""
    relays = [replica.app.owner.relay for replica in several.each]
    redis.stop()
    for client in clients:
        wait_until_noticed(client)
        began = time.monotonic()
        answers = (client.call("count", key=7), client.listen())
        assert [answer.status for answer in answers] == [200, 503]
        for answer in answers:
            assert answer.failure == "store-unavailable"
            assert answer.headers["Retry-After"] == "1"
            assert answer.error()["code"] == -32000
        told = client.notify("notifications/x")
        assert (told.status, told.failure) == (202, "store-unavailable")
        assert time.monotonic() - began < 5
    if several[0].line.lease < 2:
        eventually(lambda: not any(relay.is_held for relay in relays))
    redis.start()


def test_the_same_server_answers_when_redis_is_back(redis: RedisServer, two: Replicas) -> None:
    owner, other = clients = two.opened()
    pid = pid_of(owner)
    assert pid_of(other) == pid
    outage(redis, two, clients)
    assert other.result("count") == {"calls": 3, "pid": pid}
    assert owner.result("count") == {"calls": 4, "pid": pid}
    assert [replica.children for replica in two.each] == [1, 0]


def test_a_full_redis_lets_sessions_go_on_where_their_server_is(
    redis: RedisServer, two: Replicas
) -> None:
    owner, other = two.opened()
    pid = pid_of(owner)
    with redis.client() as admin:
        admin.config_set("maxmemory", "1")
        assert pid_of(owner) == pid
        assert other.call("count").error()["code"] == -32000
        assert McpClient(owner.front).initialize().failure == "store-unavailable"
        admin.config_set("maxmemory", "0")
    assert pid_of(other) == pid


def test_everybody_asks_at_once_when_redis_is_back(redis: RedisServer, two: Replicas) -> None:
    from tests.support.threads import run_together

    clients = two.opened()
    pid = pid_of(clients[1])
    outage(redis, two, clients)
    assert set(run_together([lambda c=c: pid_of(c) for c in clients * 4])) == {pid}


def test_a_session_of_each_replica_survives(redis: RedisServer, two: Replicas) -> None:
    sessions = [two.client_at(number).open() for number in (0, 1)]
    pids = [pid_of(client) for client in sessions]
    outage(redis, two, [])
    for client, pid in zip(sessions, pids, strict=True):
        for replica in two.each:
            assert pid_of(client.at(replica.front)) == pid


def test_a_call_of_the_owner_survives(redis: RedisServer, two: Replicas) -> None:
    owner, other = clients = two.opened()
    call = hold(owner, "h", before=2)
    pid_of(other)
    outage(redis, two, clients)
    release(other, "h")
    assert call.message()["result"]["held"] == "h"


def test_a_call_of_another_replica_ends_with_an_answer_or_an_error(
    redis: RedisServer, two: Replicas
) -> None:
    owner, other = clients = two.opened()
    call = hold(other, "h", key="mine")
    outage(redis, two, clients)
    release(owner, "h")
    message = call.message()
    assert message["id"] == "mine"
    if two[0].line.lease > 2:  # nothing was lost
        assert message["result"]["held"] == "h"


def test_a_standing_stream_of_another_replica_goes_on_or_ends(
    redis: RedisServer, two: Replicas
) -> None:
    owner, other = clients = two.opened()
    stream = other.listen()
    events = stream.events()
    say(owner, 1)
    next(events)
    outage(redis, two, clients)
    say(owner, 2)
    found = next(events, None)  # an end tells the client to open another
    if two[0].line.lease > 2:
        assert found is not None
    if found is None:
        again = owner.listen()
        assert next(again.stream())["params"]["n"] == 2
        again.close()
    stream.close()


def test_a_delete_elsewhere_during_an_outage_ends_nothing(
    redis: RedisServer, two: Replicas
) -> None:
    owner, other = two.opened()
    pid = pid_of(owner)
    redis.stop()
    answer = other.delete()
    assert (answer.status, answer.failure) == (503, "store-unavailable")
    assert answer.headers["Retry-After"] == "1"
    redis.start()
    assert pid_of(owner) == pid


def test_a_session_deleted_during_an_outage_is_over_here(redis: RedisServer) -> None:
    with replicas(1, redis_url=redis.url, connect_timeout=1) as one:
        client, other = one.client_at(0).open(), one.client_at(0).open()
        pid_of(other)
        redis.stop()
        answer = client.delete()
        assert (answer.status, answer.failure) == (503, "store-unavailable")
        assert answer.headers["Retry-After"]
        eventually(lambda: one[0].children == 1)
        redis.start()
        eventually(lambda: client.call("count").status == 404)
        assert client.delete().status == 404
        assert one[0].children == 1
        assert pid_of(other)


def test_the_record_of_such_a_session_goes_when_the_store_is_back(redis: RedisServer) -> None:
    with replicas(1, redis_url=redis.url, connect_timeout=1, idle_timeout=2) as one:
        client = one.client_at(0).open()
        assert client.session is not None
        owner = one[0].app.owner
        redis.stop()
        client.delete()
        redis.start()
        eventually(lambda: owner.manager.exists(client.session))
        eventually(lambda: not owner.manager.exists(client.session))
        assert "ended=0" in repr(owner)


def test_a_session_of_the_other_wire_is_not_ended_by_a_delete(redis: RedisServer) -> None:
    with running("wsgi", redis_url=redis.url, connect_timeout=1) as proxy:
        stream = SseClient(proxy.client().front).open()
        thief = proxy.client()
        thief.session = stream.session
        redis.stop()
        assert thief.delete().status == 503
        assert stream.result("count")["calls"] == 1
        stream.close()
