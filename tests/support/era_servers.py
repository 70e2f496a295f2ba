"""tests/servers/legacy.py and modern.py over HTTP, each a process with a port of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.startable import Startable
from tests.support.waiting import eventually

_SERVERS = Path(__file__).resolve().parents[1] / "servers"
_PATIENCE = 20.0


class EraServerProcess(Startable):
    """One of the two servers, `legacy` or `modern`, with options of its command line."""

    def __init__(self, era: str, *options: str, trace: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.trace = trace or Path(self._directory.name, "trace")
        self.trace.touch()
        self._script = str(_SERVERS / f"{era}.py")
        self._options = ["--trace", str(self.trace), *options]
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def __repr__(self) -> str:
        return f"<EraServerProcess {self._script} port={self.port}>"

    def start(self) -> None:
        """Runs the process; again, on the same port, once it was killed."""
        command = [
            sys.executable,
            "-I",
            "-S",
            self._script,
            "--http",
            str(self.port),
            *self._options,
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        found = re.match(r"http://127\.0\.0\.1:(\d+)/", self._process.stdout.readline())
        assert found is not None, "the server did not start"
        self.port = int(found[1])

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=_PATIENCE)
            self._process = None

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}/mcp"

    # --- what happened in it ---

    @property
    def lines(self) -> list[str]:
        """What it has traced."""
        return self.trace.read_text(encoding="utf-8").splitlines()

    def requests(self, rpc: str | None = None) -> list[dict[str, Any]]:
        """The requests that came, each with `verb`, `rpc` and its headers in lower case."""
        found = [json.loads(line[5:]) for line in self.lines if line.startswith("http ")]
        seen = [{name.lower(): value for name, value in one.items()} for one in found]
        return [one for one in seen if rpc in (None, one["rpc"])]

    def await_line(self, start: str) -> str:
        """The first line that begins so."""

        def found() -> bool:
            return any(line.startswith(start) for line in self.lines)

        eventually(found, _PATIENCE, f"no line begins with {start!r}")
        return next(line for line in self.lines if line.startswith(start))
