"""A tiny process that sees its replica die and kills what the replica has left behind.

A worker killed with -9 cannot stop its children, and a child that ignores the end of its input
lives on, as does the grandchild that `npx`, `uv run` or a shell started. The guardian is told of
every process group over its standard input; when that ends, it kills the groups that are still
listed, and then, where /proc exists, every process that carries the replica's mark in its
environment: children that were not announced yet, and descendants that left their group.

This file is also run by its path, without site-packages: standard library only, no import of ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable

log = logging.getLogger(__name__)

#: The environment variable by which every child of a replica, and what it starts, is known.
MARK = "MCP_PROXY_REPLICA"


class Guardian:
    """The replica's side: starts the guardian process and keeps its list current.

    Thread-safe. When the guardian itself was killed, the next announcement starts another one.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._lock = threading.Lock()  # guards _process and _groups
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()

    def start(self) -> None:
        """Starts the process, so that it is there before the first child is."""
        with self._lock:
            if self._process is None:
                self._launch()

    def watch(self, group: int) -> None:
        """From now on the process group dies with this replica."""
        with self._lock:
            self._groups.add(group)
            self._tell(b"+%d\n" % group)

    def forget(self, group: int) -> None:
        """The group has ended."""
        with self._lock:
            self._groups.discard(group)
            self._tell(b"-%d\n" % group)

    def close(self) -> None:
        """Ends the guardian, which kills what is left, and waits for that."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _tell(self, line: bytes) -> None:
        try:
            if self._process is None:
                self._launch()
            else:
                self._write(line)
        except OSError:
            log.warning("the guardian of child processes had ended; starting another one")
            self._discard()
            self._launch()

    def _launch(self) -> None:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), self._mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        for group in self._groups:
            self._write(b"+%d\n" % group)

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _discard(self) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()


# --- the guardian process ------------------------------------------------------------------------


def main(mark: str) -> None:
    """Reads announcements until the replica is gone, then kills."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        group = int(line[1:])
        (groups.add if line.startswith(b"+") else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def marked_processes(mark: str) -> Iterable[int]:
    """The processes that carry `mark` in their environment, as far as /proc tells."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as environ:
                if wanted in environ.read().split(b"\0"):
                    yield int(entry)


if __name__ == "__main__":
    main(sys.argv[1])
