"""Fixtures of the relay's tests: replicas over every kind of mailboxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.storage.mailboxes import LocalMailboxes, Mailboxes
from tests.relay.scene import Node, Scene


@pytest.fixture(params=["memory", "redis"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Three replicas over each kind of mailboxes."""
    mailboxes: list[Mailboxes] = [LocalMailboxes()] * 3
    if request.param == "redis":
        redis_at: Callable[..., Connection] = request.getfixturevalue("redis_at")
        url = request.getfixturevalue("redis_url")
        prefix = request.getfixturevalue("redis_prefix")
        mailboxes = [RedisMailboxes(redis_at(url), prefix) for _ in range(3)]
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
