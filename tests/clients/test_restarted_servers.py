"""Real HTTP servers of the official SDKs that are killed and start again: their sessions go on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mcp_proxy import TransparentProxy
from tests.clients.programs import (
    everything_server,
    go_program,
    node,
    node_modules,
    python_with_mcp1,
)
from tests.support.front import McpClient
from tests.support.startable import Startable
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

_SERVERS = Path(__file__).resolve().parents[1] / "servers"
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
_START_TIME = 30.0


def python_1(port: int) -> list[str]:
    """SDK 1.x in its own environment."""
    return [python_with_mcp1(), str(_SERVERS / "streamable_python.py"), str(port)]


def python_2(port: int) -> list[str]:
    """SDK 2.x."""
    return [sys.executable, str(_SERVERS / "streamable_python.py"), str(port)]


def typescript_1(port: int) -> list[str]:
    """SDK 1.x."""
    return _typescript("1", port)


def typescript_2(port: int) -> list[str]:
    """SDK 2.x."""
    return _typescript("2", port)


def _typescript(version: str, port: int) -> list[str]:
    node_modules()
    return [node(), str(_SERVERS / "streamable_typescript.mjs"), version, str(port)]


def go(port: int) -> list[str]:
    """The Go SDK."""
    return [go_program("servers/go"), str(port)]


def everything(port: int) -> list[str]:
    """@modelcontextprotocol/server-everything, made with the TypeScript SDK."""
    _, script, _ = everything_server()
    return [node(), "--require", str(_SERVERS / "loopback.cjs"), script, "streamableHttp"]


class HttpServer(Startable):
    """A server that is killed and started again at the port that it had first."""

    def __init__(self, command: Callable[[int], Sequence[str]]) -> None:
        self.port = 0
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close

    @property
    def url(self) -> str:
        """Its MCP endpoint."""
        return f"http://127.0.0.1:{self.port}/mcp"

    def start(self) -> None:
        self._output.truncate(0)
        self._process = subprocess.Popen(
            self._command(self.port),
            env={**os.environ, "LOOPBACK_PORT": str(self.port)},
            stderr=self._output,
            stdout=self._output,
            start_new_session=True,
        )
        eventually(lambda: _LISTENING.search(self.log()), _START_TIME, "a server does not listen")
        found = _LISTENING.search(self.log())
        assert found is not None
        self.port = int(found[1])

    def kill(self) -> None:
        """Ends it at once; nothing that it knew is left."""
        if self._process is not None:
            # The group: a node that came with pip is the child of a process of Python's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        self.kill()
        self._output.close()

    def log(self) -> str:
        descriptor = self._output.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")


_KINDS = [python_1, python_2, typescript_1, typescript_2, everything, go]


@pytest.fixture(scope="module", params=_KINDS, ids=lambda kind: kind.__name__)
def server(request: pytest.FixtureRequest) -> Iterator[HttpServer]:
    with HttpServer(request.param) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[McpClient]:
    with TransparentProxy(server.url) as proxy:
        front = LocalFront(proxy)
        with contextlib.closing(front):
            yield McpClient(front)


def echoed(client: McpClient, said: str) -> str:
    """What the server's `echo` says."""
    result = client.result("tools/call", {"name": "echo", "arguments": {"message": said}})
    return str(result["content"][0]["text"])


def test_a_session_outlives_its_server_under_the_same_id(
    server: HttpServer, client: McpClient
) -> None:
    session = client.open().session
    assert echoed(client, "before") == "Echo: before"
    for life in ("second", "third"):
        server.kill()
        server.start()
        assert echoed(client, life) == f"Echo: {life}"
        assert client.session == session


def test_a_standing_stream_brings_the_session_back_too(
    server: HttpServer, client: McpClient
) -> None:
    client.open()
    server.kill()
    server.start()
    stream = client.listen()
    assert (stream.status, stream.is_stream) == (200, True)
    stream.close()
    assert echoed(client, "after") == "Echo: after"


def test_a_session_that_its_server_has_lost_can_be_deleted(
    server: HttpServer, client: McpClient
) -> None:
    client.open()
    server.kill()
    server.start()
    client.delete().body()
    assert client.call("tools/list").status == 404
