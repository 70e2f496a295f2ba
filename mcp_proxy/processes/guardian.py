"""A small process that kills the children of its replica once the replica is gone.

A worker killed by SIGKILL cannot stop its children. A child may ignore the end of its input, and so
may a grandchild that `npx`, `uv run` or a shell started. The guardian is told of every process
group over its standard input; when that ends, it kills the groups that are still listed, and then,
where /proc exists, every process with the replica's id in its environment: children that were not
announced yet, and descendants that left their group.

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

#: The environment variable that marks every child of a replica, and the child's descendants.
REPLICA_VARIABLE = "MCP_PROXY_REPLICA"


class Guardian:
    """The replica's side: starts the guardian process and keeps its list current.

    Thread-safe. When the guardian process has exited, the next announcement starts another one.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._lock = threading.Lock()  # guards _process and _groups
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()

    def start(self) -> None:
        """Starts the process; called before the first child is started."""
        with self._lock:
            if self._process is None:
                self._launch()

    def watch(self, group: int) -> None:
        """Adds a process group to those that are killed once this replica is gone."""
        with self._lock:
            self._groups.add(group)
            self._tell(b"+%d\n" % group)

    def forget(self, group: int) -> None:
        """Removes a process group, which has exited."""
        with self._lock:
            self._groups.discard(group)
            self._tell(b"-%d\n" % group)

    def close(self) -> None:
        """Has the guardian kill the remaining processes and exit, and waits for its exit."""
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
            log.warning("the guardian of child processes has exited; starting another one")
            self._discard()
            self._launch()

    def _launch(self) -> None:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), self._replica_id]
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


def main(replica_id: str) -> None:
    """Reads announcements until the replica is gone, then kills its processes."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        group = int(line[1:])
        (groups.add if line.startswith(b"+") else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for pid in processes_of(replica_id):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def processes_of(replica_id: str) -> Iterable[int]:
    """The processes with the replica's id in their environment, none without /proc."""
    wanted = f"{REPLICA_VARIABLE}={replica_id}".encode()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as environ:
                if wanted in environ.read().split(b"\0"):
                    yield int(entry)


if __name__ == "__main__":
    main(sys.argv[1])
