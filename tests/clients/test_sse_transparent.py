"""The official SDKs' HTTP+SSE clients, through real workers, in front of real HTTP+SSE servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.programs import HERE, node, node_modules, python_with_mcp1
from tests.proofs.crowd import Crowd
from tests.support import sse_servers
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_servers import SseServer
from tests.support.waiting import eventually

SERVERS: list[Callable[[str], list[str]]] = [
    sse_servers.python_1,
    sse_servers.python_2,
    sse_servers.typescript,
    sse_servers.everything,
]

_PATIENCE = 30.0
_SESSIONS = 4
_CALLS = 3


def python_1() -> tuple[str, Path]:
    """SDK 1.x in its own environment."""
    return python_with_mcp1(), HERE / "sse_crowd.py"


def python_2() -> tuple[str, Path]:
    """SDK 2.x."""
    return sys.executable, HERE / "sse_crowd.py"


def typescript() -> tuple[str, Path]:
    """@modelcontextprotocol/sdk."""
    node_modules()
    return node(), HERE / "sse_crowd.mjs"


@pytest.fixture(scope="module", params=SERVERS, ids=lambda server: server.__name__)
def server(request: pytest.FixtureRequest) -> Iterator[SseServer]:
    with SseServer(request.param, request.param.__name__) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server: SseServer, redis_server: RedisServer) -> Iterator[ProxyProcess]:
    prefix = f"sse-{server.name}:"
    options = ["--workers", "2", "--redis-url", redis_server.url, "--redis-prefix", prefix]
    with ProxyProcess(options=[*options, "--target-url", server.url]) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log(), proxy.log()


@pytest.mark.parametrize("client", [python_1, python_2, typescript], ids=lambda made: made.__name__)
def test_every_client_is_served_by_every_server(
    client: Callable[[], tuple[str, Path]],
    server: SseServer,
    proxy: ProxyProcess,
    redis_server: RedisServer,
) -> None:
    interpreter, program = client()
    tool = "echo" if server.name == "everything" else "prove"
    options = ["--calls", str(_CALLS), "--tool", tool]
    with Crowd([interpreter], [proxy.port], _SESSIONS, options, program) as crowd:
        crowd.finish(_PATIENCE)
        lines = crowd.lines()
    assert [line["error"] for line in lines if "error" in line] == []
    assert len(lines) == _SESSIONS * _CALLS
    for line in lines:
        if tool == "echo":
            assert line["text"] == f"Echo: {line['expected']}"
        else:
            assert line["said"] == line["expected"]
            assert (line["marker"], line["counter"]) == (line["mine"], line["call"])
    if tool == "prove":
        assert len({line["session"] for line in lines}) == _SESSIONS
        ids = {line["call"]: set[object]() for line in lines}
        for line in lines:
            ids[line["call"]].add(line["id"])
        assert all(len(same) == 1 for same in ids.values())  # every session counts alike
    with redis_server.client() as redis:
        eventually(lambda: not list(redis.scan_iter(f"sse-{server.name}:*session:*")))
