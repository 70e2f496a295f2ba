"""Several replicas over one store, in memory or in Redis, for the tests of stdio transports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.proxies import Replicas, replicas
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["local", "redis"])
def store(
    request: pytest.FixtureRequest, redis_server: RedisServer, redis_prefix: str
) -> dict[str, Any]:
    """What `replicas` has to be told to share sessions in memory, or in Redis."""
    if request.param == "local":
        return {}
    return {"redis_url": redis_server.url, "redis_prefix": redis_prefix}


@pytest.fixture
def three(store: dict[str, Any]) -> Iterator[Replicas]:
    """Three replicas; the first is the owner of what `opened` opens."""
    with replicas(3, **store, sse_after=0.3, keepalive_interval=0.2) as several:
        yield several


@pytest.fixture
def fleeting(store: dict[str, Any]) -> Iterator[Replicas]:
    """Three replicas that take one another for gone after a second without a sign."""
    with replicas(3, **store, lease=1.0, sse_after=0.3, keepalive_interval=0.2) as several:
        yield several
