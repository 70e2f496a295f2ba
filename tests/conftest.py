"""Fixtures for every layer: real Redis servers, and how hypothesis runs."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import redis
from hypothesis import settings

from mcp_proxy.redis.client import Connection
from tests.support import needs
from tests.support.proxy_process import WORKER_CLASS, ProxyProcess
from tests.support.redis_connections import Openers
from tests.support.redis_server import RedisServer
from tests.support.second_run import starts_gunicorn
from tests.support.transparent import FRONTS

settings.register_profile(
    "mcp_proxy", deadline=None, database=None, derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("mcp_proxy")

# Who starts the tests in the background may have them ignore SIGINT; processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_HAS_FIXTURES = pytest.StashKey[bool]()

# How many gunicorns there had been before a test.
_GUNICORNS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A server that all tests share; a test that stops or freezes one takes `own_redis`."""
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True, scope="module")
def _openers() -> Iterator[Openers]:
    openers = Openers()
    yield openers
    openers.judge()


@pytest.fixture(autouse=True)
def _every_answer_is_closed() -> Iterator[None]:
    """Closes what a test left unread, so that no later test hears of it."""
    yield
    for front in list(FRONTS):
        front.close()


@pytest.fixture(autouse=True)
def _every_client_is_closed(request: pytest.FixtureRequest, _openers: Openers) -> Iterator[None]:
    """Fails a test that leaves connections to Redis open.

    Those of a module's fixtures last longer: where there are any, the module's last test fails, and
    the one that began is named.
    """
    yield
    _openers.note(request.node.nodeid)
    module = request.node.getparent(pytest.Module)
    if not module.stash.get(_HAS_FIXTURES, False):
        _openers.judge()


def pytest_configure(config: pytest.Config) -> None:
    """Says what the mark is for (`tests/support/needs.py`)."""
    config.addinivalue_line("markers", f"{needs.NAME}(reason): what gevent workers have not")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where all proxies have another kind of worker, leaves out the tests that start none."""
    if WORKER_CLASS in os.environ:
        left_out = [item for item in items if not starts_gunicorn(item)]
        items[:] = [item for item in items if starts_gunicorn(item)]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out, with the reason, what gevent workers have not, where all proxies have those."""
    item.stash[_GUNICORNS] = ProxyProcess.count
    if (reason := needs.missing_for(item)) is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test that starts a gunicorn, and would not be run with another kind of worker."""
    yield
    assert ProxyProcess.count == item.stash[_GUNICORNS] or starts_gunicorn(item)


def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> None:
    """Notes which modules have fixtures of their own."""
    if fixturedef.scope == "module" and fixturedef.argname != _openers.__name__:
        request.node.stash[_HAS_FIXTURES] = True


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


@pytest.fixture
def own_server(own_redis: Callable[..., RedisServer]) -> RedisServer:
    """A server of this test alone."""
    return own_redis()


@pytest.fixture
def admin(own_server: RedisServer) -> Iterator[redis.Redis]:
    """A client that looks into that server."""
    with own_server.client() as client:
        yield client


@pytest.fixture
def redis_at() -> Iterator[Callable[..., Connection]]:
    """Makes what stores of this test reach Redis by, with the arguments of `Connection`."""
    with ExitStack() as made:

        def make(url: str, timeout: float = 5) -> Connection:
            connection = Connection(url, timeout)
            made.callback(connection.close)
            return connection

        yield make
