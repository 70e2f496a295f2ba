"""Two replicas over every form of Redis: what one has begun, the other goes on with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from mcp_proxy import StreamableProxy
from mcp_proxy.redis.client import Client
from tests.redis.conftest import MakeStorage
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.redis_forms import Form
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

MANY = 3


@contextlib.contextmanager
def two_proxies(
    make_storage: MakeStorage, here: str | Client, there: str | Client, timeout: float = 5
) -> Iterator[list[McpClient]]:
    """A client for each of two replicas."""
    addresses = (here, there)
    proxies = [StreamableProxy(SCRIPTED, make_storage(address, timeout)) for address in addresses]
    try:
        yield [McpClient(WsgiFront(proxy)) for proxy in proxies]
    finally:
        for proxy in proxies:
            proxy.close()


@pytest.fixture
def client(form: Form) -> Iterator[Client]:
    """A client of a program that wants text."""
    with form.client(decode_responses=True) as client:
        yield client


def test_a_session_is_used_at_either_of_two_replicas(
    form: Form, client: Client, make_storage: MakeStorage
) -> None:
    with two_proxies(make_storage, form.url, client) as (here, there):
        for _ in range(MANY):  # sessions, so that their keys are on several nodes of a Cluster
            there.session = here.open().session
            pid = here.result("count")["pid"]
            assert there.result("count") == {"calls": 2, "pid": pid}
            assert there.result("echo", {"text": "é" * 100_000}) == {"text": "é" * 100_000}
            assert [m.get("method") for m in there.call("notify", {"count": 2}).stream()][:2]
            assert here.result("count") == {"calls": 3, "pid": pid}
            assert there.delete().status == 204
            assert here.call("count").status == 404


def test_a_stream_of_another_replica_is_resumed(
    form: Form, client: Client, make_storage: MakeStorage
) -> None:
    with two_proxies(make_storage, form.url, client) as (here, there):
        there.session = here.open("2025-11-25").session
        answer = there.call("notify", {"count": 3})
        first = next(event.id for event in answer.events() if event.data)
        answer.close()
        assert first is not None
        resumed = here.listen(Last_Event_ID=first.decode())
        messages = list(resumed.stream())
        resumed.close()
        assert "result" in messages[-1]
        assert len(messages) == 3
        here.delete().body()


def test_a_record_that_cannot_be_read_is_a_failure_of_the_store(
    own_server: RedisServer, make_storage: MakeStorage
) -> None:
    with own_server.client() as admin, StreamableProxy(SCRIPTED, make_storage(own_server.url)) as p:
        client = McpClient(WsgiFront(p)).open()
        (key,) = admin.scan_iter(f"*session:{client.session}")
        admin.set(key, b"{", px=60_000)
        eventually(lambda: client.call("echo").failure, message="nobody reads the record")
        answers = [client.call("echo"), client.listen(), client.delete()]
        assert {answer.failure for answer in answers} == {"store-unavailable"}
        assert [answer.status for answer in answers] == [200, 502, 502]
