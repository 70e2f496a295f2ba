"""Fixtures for every layer: real Redis servers, and how hypothesis runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import settings

from mcp_proxy.redis.client import Access, _pools
from tests.support.redis_server import RedisServer

settings.register_profile(
    "mcp_proxy", deadline=None, database=None, derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("mcp_proxy")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A server that all tests share; a test that stops or freezes one takes `own_redis`."""
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _connections_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes connections to Redis that no `close` of the test reached."""
    made: list[Access] = []
    original = Access.__init__

    def note(self: Access, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Access, "__init__", note)
    yield
    for access in made:
        if access._owns_client and access._client is not None:
            for pool in _pools(access._client):
                pool.disconnect()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of the shared server; every key of a test begins with `redis_prefix`."""
    return redis_server.url


@pytest.fixture
def redis_prefix() -> str:
    """What the keys of this test begin with, so that tests never meet."""
    return f"test-{uuid.uuid4().hex}:"


@pytest.fixture
def own_redis() -> Iterator[Callable[..., RedisServer]]:
    """Makes and starts servers of this test alone, with the arguments of `RedisServer`."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(RedisServer(**options))
