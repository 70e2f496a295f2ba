"""The official Python SDK connects with an API key, and is told when it has none."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.programs import HERE, python_with_mcp1, run_client
from tests.support import needs
from tests.support.callers import KeyFile
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

_CLIENT = str(HERE / "key_client.py")

#: An interpreter, how its client connects, and the revision that they settle on.
CLIENTS = {
    "1": (python_with_mcp1, "legacy", "2025-11-25"),
    "2 sessions": (lambda: sys.executable, "legacy", "2025-11-25"),
    "2 auto": (lambda: sys.executable, "auto", "2026-07-28"),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def key(keys: KeyFile) -> str:
    return keys.add("alice")


@pytest.fixture(scope="module", params=[pytest.param("memory", marks=needs.MEMORY), "redis"])
def proxy(
    request: pytest.FixtureRequest, redis_server: RedisServer, keys: KeyFile, key: str
) -> Iterator[ProxyProcess]:
    """Two workers in front of the demo server."""
    settings = {"api_keys": keys.text, "workers": 2}
    if request.param == "redis":
        prefix = f"test-{uuid.uuid4().hex}:"
        settings |= {"redis_url": redis_server.url, "redis_prefix": prefix}
    with ProxyProcess(options=as_options(settings)) as proxy:
        yield proxy


@pytest.mark.parametrize("name", CLIENTS)
def test_an_official_client_connects_with_a_key(name: str, proxy: ProxyProcess, key: str) -> None:
    python, mode, revision = CLIENTS[name]
    told = run_client(str(python()), _CLIENT, proxy.url, mode, key)
    assert (told.get("revision"), told.get("echo")) == (revision, "hello"), told
    assert told["sdk"].startswith(name[0])


@pytest.mark.parametrize("name", CLIENTS)
def test_an_official_client_is_told_that_its_key_is_none(name: str, proxy: ProxyProcess) -> None:
    python, mode, _ = CLIENTS[name]
    told = run_client(str(python()), _CLIENT, proxy.url, mode, "mcpk_wrong")
    assert "echo" not in told
    assert told["failed"]


def test_no_key_is_in_the_log_of_the_proxy(proxy: ProxyProcess, key: str, tmp_path: Path) -> None:
    run_client(sys.executable, _CLIENT, proxy.url, "legacy", key)
    assert 'principal="key:alice"' in proxy.log()
    assert key not in proxy.log()
    assert "mcpk_wrong" not in proxy.log()
