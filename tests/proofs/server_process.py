"""The HTTP servers of the proofs in processes of their own, so that they take no time from ours."""

from __future__ import annotations

import subprocess
import sys

from tests.clients.programs import ROOT
from tests.support.startable import Startable

_STOP_TIME = 10.0


class ServerProcess(Startable):
    """A module that prints its URL and serves until its standard input ends."""

    def __init__(self, module: str) -> None:
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )

    def start(self) -> None:
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, "the server has not started"

    def close(self) -> None:
        try:
            self._process.communicate(timeout=_STOP_TIME)
        finally:
            self._process.kill()
            self._process.wait()
