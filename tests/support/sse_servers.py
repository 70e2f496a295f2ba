"""Real HTTP+SSE servers, each made with an official SDK, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.clients.programs import everything_server, node, node_modules, python_with_mcp1
from tests.support.startable import Startable
from tests.support.waiting import eventually

_SERVERS = Path(__file__).resolve().parents[1] / "servers"
_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_START_TIME = 30.0


def python_1(name: str) -> list[str]:
    """SDK 1.x in its own environment."""
    return [python_with_mcp1(), str(_SERVERS / "sse_python.py"), name]


def python_2(name: str) -> list[str]:
    """SDK 2.x."""
    return [sys.executable, str(_SERVERS / "sse_python.py"), name]


def typescript(name: str) -> list[str]:
    """@modelcontextprotocol/sdk."""
    node_modules()
    return [node(), str(_SERVERS / "sse_typescript.mjs"), name]


def everything(name: str) -> list[str]:
    """@modelcontextprotocol/server-everything, which has no name of its own and no `prove`."""
    _, script, _ = everything_server()
    return [node(), "--require", str(_SERVERS / "loopback.cjs"), script, "sse"]


class SseServer(Startable):
    """A server that runs as long as the context; `command` makes its command line from a name."""

    def __init__(self, command: Callable[[str], list[str]], name: str) -> None:
        self.name = name
        self._command = command(name)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stderr=self._output, stdout=self._output, start_new_session=True
        )
        eventually(self._is_listening, _START_TIME, "a server does not listen")

    def close(self) -> None:
        if self._process is not None:
            # The group: a node that came with pip is the child of a process of Python's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()

    @property
    def url(self) -> str:
        """Its address without a path."""
        found = _LISTENING.search(self.log())
        assert found is not None
        return found[1]

    def log(self) -> str:
        """What it wrote."""
        descriptor = self._output.fileno()  # read without seeking: the position is the writer's
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    def _is_listening(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        return _LISTENING.search(self.log()) is not None
