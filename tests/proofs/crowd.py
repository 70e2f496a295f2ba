"""The processes of a proof with sticky sessions: HTTP MCP servers, and crowds of SDK clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.programs import HERE, ROOT
from tests.support.startable import Startable
from tests.support.waiting import eventually

Json = dict[str, Any]

_SERVER = ROOT / "tests" / "servers" / "sticky.py"
_CLIENT = HERE / "sticky_client.py"
_LISTENING = re.compile(r"listening on http://[\d.]+:(\d+)")
_START_TIME = 30.0


class Output:
    """Lines of JSON that a process writes, read as they come."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        self._read = 0
        self._documents: list[Json] = []

    def text(self) -> str:
        """Everything that was written."""
        self.file.flush()
        return _read(self.file.fileno(), 0).decode("utf-8", "replace")

    def documents(self) -> list[Json]:
        """Every whole line so far that is an object."""
        found = _read(self.file.fileno(), self._read)
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = [line for line in whole.splitlines() if line.startswith(b"{")]
        self._documents += [json.loads(line) for line in lines]
        return list(self._documents)


class StickyServer(Startable):
    """A process of `tests/servers/sticky.py` that keeps its address, and its log, over its lives.

    `host` is one of the loopback's addresses; port 0 is chosen at the first start.
    """

    def __init__(self, name: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.output = Output()
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        self.output.file.close()

    @property
    def url(self) -> str:
        """The MCP endpoint."""
        return f"http://{self.host}:{self.port}/mcp"

    def start(self) -> None:
        """Starts the process, on the port that it had before, and waits until it listens."""
        lives = len(_LISTENING.findall(self.output.text()))
        command = [str(_SERVER), str(self.port), "--host", self.host, "--name", self.name]
        process = subprocess.Popen([sys.executable, *command], stderr=self.output.file)
        self._process = process

        def is_listening() -> bool:
            assert process.poll() is None, self.output.text()
            return len(_LISTENING.findall(self.output.text())) > lives

        eventually(is_listening, _START_TIME, "a server does not listen")
        self.port = int(_LISTENING.findall(self.output.text())[-1])

    def kill(self) -> tuple[float, float]:
        """SIGKILL; the moments before it and after the process was gone."""
        assert self._process is not None
        process, self._process = self._process, None
        before = time.monotonic()
        process.send_signal(signal.SIGKILL)
        process.wait()
        return before, time.monotonic()

    def began(self) -> int:
        """How many sessions were initialized here, in all lives."""
        return sum(line.get("event") == "session" for line in self.output.documents())


class Call(NamedTuple):
    """One call of a client. `place` is the server and the process that answered, None: failed."""

    client: int
    started: float
    ended: float
    place: tuple[str, int] | None
    counter: int
    marker: str
    error: str


class Crowd(Startable):
    """Client processes that call until they are told to finish.

    `interpreters` each run a part of the `clients`; `options` are those of `program`.
    """

    def __init__(
        self,
        interpreters: Sequence[str],
        ports: Sequence[int],
        clients: int,
        options: Sequence[str] = (),
        program: Path = _CLIENT,
    ) -> None:
        self.clients = clients
        shares = len(interpreters)
        edges = [clients * n // shares for n in range(shares + 1)]
        self._outputs = [Output() for _ in interpreters]
        self._errors = [Output() for _ in interpreters]
        self._processes = [
            subprocess.Popen(
                [
                    *(interpreter, str(program), "--ports", ",".join(map(str, ports))),
                    *("--clients", f"{edges[n]}-{edges[n + 1]}", *options),
                ],
                stdin=subprocess.PIPE,
                stdout=self._outputs[n].file,
                stderr=self._errors[n].file,
            )
            for n, interpreter in enumerate(interpreters)
        ]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for output in (*self._outputs, *self._errors):
            output.file.close()

    def finish(self, timeout: float) -> None:
        """Has the clients end, and waits; fails with what they wrote if they do not end well."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + timeout
        for process, errors in zip(self._processes, self._errors, strict=True):
            code = process.wait(max(0.1, deadline - time.monotonic()))
            assert code == 0, f"clients ended with {code}:\n{errors.text()[-6000:]}"

    def require_running(self) -> None:
        """Fails with what they wrote if a process has ended."""
        for process, errors in zip(self._processes, self._errors, strict=True):
            assert process.poll() is None, errors.text()[-6000:]

    def calls(self) -> list[Call]:
        """Every call so far, in the order of their ends."""
        lines = [line for line in self.lines() if "call" in line]
        return sorted((_call(line) for line in lines), key=lambda call: call.ended)

    def ends(self) -> list[Json]:
        """What each client that is done said about itself."""
        return [line for line in self.lines() if "end" in line]

    def lines(self) -> list[Json]:
        """Everything that was said so far."""
        return [line for output in self._outputs for line in output.documents()]


def _call(line: Json) -> Call:
    return Call(
        client=line["client"],
        started=line["started"],
        ended=line["ended"],
        place=None if "error" in line else (line["name"], line["pid"]),
        counter=line.get("counter", 0),
        marker=line.get("marker", ""),
        error=line.get("error", ""),
    )


def _read(descriptor: int, start: int) -> bytes:
    """What a file has from `start` on; its position, which is the writers', stays."""
    return os.pread(descriptor, os.fstat(descriptor).st_size - start, start)
