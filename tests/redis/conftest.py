"""Every form of Redis, started once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mcp_proxy.redis.client import Client
from mcp_proxy.redis.storage import RedisStorage
from tests.support.redis_forms import Form, OneServer, ThreeNodes, WithSentinels

FORMS: dict[str, Callable[[], Form]] = {
    "tcp": OneServer,
    "unix": lambda: OneServer("unix"),
    "tls": lambda: OneServer("tls"),
    "sentinel": WithSentinels,
    "sentinel with tls": lambda: WithSentinels(tls=True),
    "cluster": ThreeNodes,
    "cluster with tls": lambda: ThreeNodes(tls=True),
}

MakeStorage = Callable[..., RedisStorage]


@pytest.fixture(scope="session", params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[Form]:
    """Each form in turn; a test leaves it as it was."""
    with FORMS[request.param]() as running:
        yield running


@pytest.fixture(params=["by url", "by client", "by client with decode_responses"])
def address(request: pytest.FixtureRequest, form: Form) -> Iterator[str | Client]:
    """What a store is given: the URL of a form, or a client for it."""
    if request.param == "by url":
        yield form.url
        return
    with form.client(decode_responses=request.param != "by client") as client:
        yield client


@pytest.fixture
def make_storage(redis_prefix: str) -> Iterator[MakeStorage]:
    """Makes stores with one prefix that are closed when the test is over."""
    made: list[RedisStorage] = []

    def make(address: str | Client, timeout: float = 5) -> RedisStorage:
        made.append(RedisStorage(address, ttl=60, prefix=redis_prefix, timeout=timeout))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


@pytest.fixture
def storage(make_storage: MakeStorage, address: str | Client) -> RedisStorage:
    """A store in a form that is reached in one of the ways."""
    return make_storage(address)
