"""Fixtures of the relay's tests: every kind of mailboxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mcp_proxy.redis.client import Access
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.storage.mailboxes import LocalMailboxes, Mailboxes
from tests.relay.offices import LocalOffice, Office, RedisOffice
from tests.relay.scene import Node, Scene
from tests.support.redis_server import RedisServer

_CLIENTS: dict[str, dict[str, object]] = {
    "redis": {},
    "redis with decode_responses": {"decode_responses": True},
    "redis with protocol 3": {"protocol": 3},
    "redis with protocol 3 and decode_responses": {"protocol": 3, "decode_responses": True},
}


@pytest.fixture(params=["memory", *_CLIENTS])
def office(request: pytest.FixtureRequest) -> Iterator[Office]:
    """Each kind of mailboxes in turn."""
    if request.param == "memory":
        yield LocalOffice()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with ExitStack() as stack:
        admin = stack.enter_context(server.client())
        client = stack.enter_context(server.client(**_CLIENTS[request.param]))
        office = RedisOffice(client, admin, request.getfixturevalue("redis_prefix"))
        stack.callback(office.mailboxes.close)
        yield office


@pytest.fixture
def mailboxes(office: Office) -> Mailboxes:
    """The mailboxes of the office."""
    return office.mailboxes


@pytest.fixture(params=["memory", "redis"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Three replicas over each kind of mailboxes."""
    mailboxes: list[Mailboxes] = [LocalMailboxes()] * 3
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        prefix = request.getfixturevalue("redis_prefix")
        mailboxes = [RedisMailboxes(Access(url), prefix) for _ in range(3)]
    with Scene(*mailboxes) as made:
        yield made


@pytest.fixture
def client(scene: Scene) -> Node:
    """The replica that asks."""
    return scene.nodes[0]


@pytest.fixture
def owner(scene: Scene) -> Node:
    """The replica that has the child."""
    return scene.nodes[1]
