"""What is measured, and how each is started and ended; the same stdio server is behind all."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from store import listens, redis_server

HERE = Path(__file__).resolve().parent

#: The stdio server, started without the modules that it does not need.
ECHO = (sys.executable, "-I", "-S", str(HERE / "echo_server.py"))

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


class Contender(NamedTuple):
    """`command` makes the command line for a port; `package` is the npm package it needs.

    One that `shares` is given a Redis of its own.
    """

    name: str
    title: str
    command: Callable[[int, Path], list[str]]
    package: str | None = None
    shares: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's proxy."""
        return self.package is not None

    def is_installed(self, peers: Path) -> bool:
        """Whether it can be started."""
        if self.package is None:
            return True
        return node() is not None and (peers / self.package / "package.json").exists()


def node() -> str | None:
    """The node program: beside this Python (a wheel can bring it), then on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("node", path=places)


def _proxy(affinity: str, workers: int = 1) -> Callable[[int, Path], list[str]]:
    def command(port: int, peers: Path) -> list[str]:
        options = ["--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
        options += ["--cpu-affinity", affinity, "--workers", str(workers)]
        return [sys.executable, "-m", "mcp_proxy", *options, "--", *ECHO]

    return command


def _bare(affinity: str) -> Callable[[int, Path], list[str]]:
    return lambda port, peers: [sys.executable, str(HERE / "bare.py"), str(port), affinity]


def _mcp_proxy(*more: str) -> Callable[[int, Path], list[str]]:
    def command(port: int, peers: Path) -> list[str]:
        script = str(peers / "mcp-proxy/dist/bin/mcp-proxy.mjs")
        options = ["--host", "127.0.0.1", "--port", str(port), "--server", "stream", *more]
        return [str(node()), script, *options, "--", *ECHO]

    return command


def _supergateway(port: int, peers: Path) -> list[str]:
    options = ["--outputTransport", "streamableHttp", "--stateful", "--port", str(port)]
    options += ["--logLevel", "none", "--streamableHttpPath", "/mcp"]
    script = str(peers / "supergateway/dist/index.js")
    return [str(node()), script, "--stdio", shlex.join(ECHO), *options]


CONTENDERS = (
    Contender("ours-pinned", "this proxy, worker pinned to one CPU", _proxy("auto")),
    Contender("ours-free", "this proxy, worker on all CPUs", _proxy("off")),
    Contender(
        "ours-2-workers", "this proxy, 2 workers and Redis", _proxy("auto", workers=2), shares=True
    ),
    Contender("mcp-proxy", "npm mcp-proxy", _mcp_proxy(), "mcp-proxy"),
    Contender(
        "mcp-proxy-lean",
        "npm mcp-proxy without its event store",
        _mcp_proxy("--no-eventStore"),
        "mcp-proxy",
    ),
    Contender("supergateway", "npm supergateway, stateful", _supergateway, "supergateway"),
    Contender("bare-pinned", "bare WSGI answer, worker pinned", _bare("auto")),
    Contender("bare-free", "bare WSGI answer, worker on all CPUs", _bare("off")),
)


@contextlib.contextmanager
def started(contender: Contender, peers: Path) -> Iterator[int]:
    """A contender that listens on the port, which the system has chosen; ended afterwards."""
    port = _free_port()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile())
        environment = dict(os.environ)
        if contender.shares:
            environment["MCP_PROXY_REDIS_URL"] = stack.enter_context(redis_server())
        process = subprocess.Popen(
            contender.command(port, peers),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            if not listens(port, process, _START_SECONDS):
                output.seek(0)
                said = output.read().decode(errors="replace")[-2000:]
                sys.exit(f"{contender.name} did not start:\n{said}")
            yield port
        finally:
            _end(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks politely, then ends what is left in the group that we made for it.

    The node of a wheel is a script that starts the real one, and leaves it behind.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
