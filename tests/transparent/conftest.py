"""One backend and, in front of it, one proxy of each kind for a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.http_backend import HttpBackend
from tests.support.front import Json
from tests.support.redis_server import RedisServer
from tests.support.transparent import BOTH, Transparent, transparent


@pytest.fixture(scope="module")
def target() -> Iterator[HttpBackend]:
    with HttpBackend(name="target") as backend:
        yield backend


@pytest.fixture(scope="module")
def settings() -> Json:
    """Of the proxy; a module that needs others has a fixture of this name."""
    return {"request_timeout": 1, "max_streams": 2}


@pytest.fixture(scope="module", params=BOTH)
def shared(
    request: pytest.FixtureRequest, target: HttpBackend, redis_server: RedisServer, settings: Json
) -> Iterator[Transparent]:
    with transparent(request.param, target.url, redis_server.url, **settings) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared: Transparent, target: HttpBackend) -> Iterator[Transparent]:
    """The proxy, in front of a backend that has forgotten the test before."""
    target.reset()
    yield shared
    shared.leave()


@pytest.fixture(autouse=True)
def _no_outbound_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxies reach none of the servers of these tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
