"""More connections than a worker may have: how many have to go, and what is kept back of its files.

A worker accepts beyond its bound, so that nobody waits behind clients that say nothing, and a probe
is answered whoever else has come. Some of its files it never gives to connections: with none left
no server could be started, and no store be asked.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

from mcp_proxy.edge.logs import OnceAMinute

#: Files that are neither a connection's nor a session's: code, logs, Redis, HTTP servers.
OTHER_FILES = 64

#: Seconds between two looks at which connections' time is over, and which are too many.
SWEEP = 0.25

#: Seconds for which a connection may be sure not to be closed in favour of another.
SURE = 1.0

# Connections that go at the first look where files are missing below the bound: sessions may have
# them. It is twice as many at each look at which they still are.
_FIRST = 16


class Bound:
    """The bound of one worker's connections. Used by one thread."""

    def __init__(self, connections: int, log: Any) -> None:
        self.connections = connections
        self._log = log
        self._lines = OnceAMinute()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_limited = soft != resource.RLIM_INFINITY
        self._first_other = max(soft - OTHER_FILES, soft // 2) if is_limited else sys.maxsize
        self._next_count = _FIRST
        #: Whether there has been no file for another connection since the last look.
        self.lacks_files = False

    def has_files_after(self, descriptor: int) -> bool:
        """Whether another connection may be accepted, after one with that number.

        Numbers tell how many files are open: the system gives the lowest that is free.
        """
        if descriptor < self._first_other:
            return True
        self.note_no_file()
        return False

    def note_no_file(self) -> None:
        """There is no file for another connection."""
        self.lacks_files = True
        self._warn("The worker has no file for more connections (ulimit -n)")

    def excess(self, count: int) -> int:
        """How many of so many connections have to go at this look."""
        beyond = count - self.connections
        if beyond > 0:
            self._warn(f"The worker has more than {self.connections} connections")
        if not self.lacks_files:
            self._next_count = _FIRST
            return beyond
        self.lacks_files = False
        found, self._next_count = max(beyond, self._next_count), self._next_count * 2
        return found

    def _warn(self, what: str) -> None:
        if self._lines.is_due():
            self._log.warning("%s: those that have been silent for longest are closed", what)
