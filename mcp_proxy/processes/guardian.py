"""A small process that kills the children of its replica once the replica is gone.

A worker killed by SIGKILL cannot stop its children. A child may ignore the end of its input, and so
may a grandchild that `npx`, `uv run` or a shell started. The guardian is told of every process
group over its standard input; when that ends, it kills the groups that are still listed, and then,
where /proc exists, every process with the replica's id in its environment: children that were not
announced yet, and descendants that left their group. When a child has exited it kills descendants
of that child that left the group, which a tag of the child in their environment tells.

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
import time
from collections.abc import Iterable

log = logging.getLogger(__name__)

#: The environment variable that marks every child of a replica, and the child's descendants.
REPLICA_VARIABLE = "MCP_PROXY_REPLICA"

#: The one that marks one child, and that child's descendants.
CHILD_VARIABLE = "MCP_PROXY_CHILD"

#: After a guardian that ran for less than this (seconds) there is one more; if that does not stay
#: either, the next is started when it is needed again.
SETTLED = 1.0

# How often descendants are looked for: those that fork meanwhile are found the next time.
_PASSES = 5


class Guardian:
    """The replica's side: starts the guardian process and keeps its list current.

    `python` is the interpreter for it. Thread-safe. When the guardian process has exited, `renew`
    or the next announcement starts another one.
    """

    def __init__(self, replica_id: str, python: str = sys.executable) -> None:
        self._replica_id = replica_id
        self._python = python
        self._lock = threading.Lock()  # guards what follows
        self._launched = 0.0
        self._was_brief = False  # that the last one exited as soon as it was started
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()

    @property
    def pid(self) -> int | None:
        """The process, None where there is none. It may have exited."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Starts the process; called before the first child is started."""
        with self._lock:
            if self._process is None:
                self._launch()

    def watch(self, group: int) -> None:
        """Adds a process group to those that are killed once this replica is gone.

        Raises OSError where no guardian can be started to know of it.
        """
        with self._lock:
            self._groups.add(group)
            try:
                self._send(b"+%d\n" % group)
            except OSError:
                self._groups.discard(group)
                raise

    def forget(self, group: int, tag: str = "") -> None:
        """Removes a process group, which has exited, and has descendants with `tag` killed."""
        with self._lock:
            self._groups.discard(group)
            self._send(b"-%d %s\n" % (group, tag.encode()))

    def exit_descriptor(self) -> int | None:
        """A descriptor that is readable once the process has exited; None where there is none."""
        with self._lock:
            if self._process is None or not hasattr(os, "pidfd_open"):
                return None
            try:
                return os.pidfd_open(self._process.pid)
            except OSError:
                return None

    def renew(self) -> None:
        """Replaces a process that has exited; the new one is told of every group."""
        with self._lock:
            if self._process is None or self._process.poll() is None:
                return
            is_brief = time.monotonic() - self._launched < SETTLED
            was_brief, self._was_brief = self._was_brief, is_brief
            if is_brief and was_brief:
                log.error(
                    "the guardian of child processes exits as soon as it is started; until another "
                    "server starts, servers would outlive a worker that is killed"
                )
                return
            self._replace()

    def close(self) -> None:
        """Has the guardian kill the remaining processes and exit, and waits for its exit."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _send(self, line: bytes) -> None:
        try:
            if self._process is None:
                self._launch()
            else:
                self._write(line)
        except OSError:
            self._replace()

    def _replace(self) -> None:
        log.warning("the guardian of child processes has exited; starting another one")
        self._discard()
        self._launch()

    def _launch(self) -> None:
        command = [self._python, "-I", "-S", os.path.abspath(__file__), self._replica_id]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._launched = time.monotonic()
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
        group, *tags = line[1:].split()
        (groups.add if line.startswith(b"+") else groups.discard)(int(group))
        for tag in tags:
            kill_marked(f"{CHILD_VARIABLE}={tag.decode()}".encode())
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    kill_marked(f"{REPLICA_VARIABLE}={replica_id}".encode())


def kill_marked(entry: bytes) -> None:
    """Kills every process with this entry in its environment, and what they start meanwhile."""
    for _ in range(_PASSES):
        marked = list(_marked(entry))
        for pid in marked:
            with contextlib.suppress(OSError):
                _kill(pid, entry)
        if not marked:
            return


def processes_of(replica_id: str) -> Iterable[int]:
    """The processes with the replica's id in their environment, none without /proc."""
    return _marked(f"{REPLICA_VARIABLE}={replica_id}".encode())


def _marked(entry: bytes) -> Iterable[int]:
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit() and _has(int(name), entry):
            yield int(name)


def _has(pid: int, entry: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environ:
            return entry in environ.read().split(b"\0")
    except OSError:
        return False


def _kill(pid: int, entry: bytes) -> None:
    """Kills a process, unless another one has got its number since it was looked at."""
    if not hasattr(os, "pidfd_open"):
        os.kill(pid, signal.SIGKILL)
        return
    descriptor = os.pidfd_open(pid)
    try:
        if _has(pid, entry):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
