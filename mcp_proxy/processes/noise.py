"""What a server says that nobody asked for: how much of it is logged, and how fast it is taken.

One session's noise must cost the others nothing: neither the log nor the processor of the worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

#: Seconds between two counts of what was not logged.
NOISE_INTERVAL = 60.0

# Lines that are taken at once, and the share of a processor that those after them may have.
_FREE = 256
_SHARE = 0.1
_PIECE = 32  # lines between two pauses
_LONGEST_PAUSE = 0.2

# Seconds without noise after which a server may be loud again.
_QUIET = 1.0


class NoiseLog:
    """Lines of the log of one kind: the first are logged, and `rate` a second; others are counted.

    `left_out` says what was counted. `clock` is for tests. Used by one thread at a time.
    """

    def __init__(
        self,
        name: str,
        left_out: str,
        first: int,
        rate: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._what = left_out
        self._clock = clock
        self._first = first
        self._rate = rate
        self._left = float(first)
        self._filled = clock()
        self._left_out = 0
        self._next_count = 0.0

    def allows(self) -> bool:
        """Whether one more may be logged; it counts if not."""
        now = self._clock()
        self._left = min(float(self._first), self._left + (now - self._filled) * self._rate)
        self._filled = now
        if self._left >= 1:
            self._left -= 1
            if not self._left_out:
                self._next_count = now + NOISE_INTERVAL
            return True
        self.leave_out(1)
        return False

    def leave_out(self, count: int) -> None:
        """Counts what is not logged."""
        self._left_out += count
        if self._clock() >= self._next_count:
            self.flush()

    def flush(self) -> None:
        """Logs how much was counted since the last time, if anything was."""
        if self._left_out:
            log.warning("[%s] %d more %s", self._name, self._left_out, self._what)
        self._left_out = 0
        self._next_count = self._clock() + NOISE_INTERVAL


class Brake:
    """Slows the thread that reads a server's output while all that comes is noise.

    The server waits then, as its output is full. Used by that thread only.
    """

    def __init__(self) -> None:
        #: Lines of noise without any other between; whoever gets another one sets it to 0.
        self.lines = 0
        self._last = time.monotonic()
        self._busy_since = time.thread_time()

    def slow(self) -> None:
        """One more line was noise; sleeps where there have been too many."""
        self.lines += 1
        if self.lines % _PIECE:
            return
        now, busy = time.monotonic(), time.thread_time()
        if now - self._last > _QUIET:
            self.lines = 0
        elif self.lines > _FREE:
            time.sleep(min(_LONGEST_PAUSE, (busy - self._busy_since) / _SHARE))
        self._last, self._busy_since = time.monotonic(), busy
