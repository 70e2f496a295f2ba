"""Rate limits: what they say, and token buckets in memory that gunicorn's master shares with its
workers.

A bucket holds `burst` tokens at most and gets `per_second` of them back. It is kept as the one time
at which it is full again, so a row is changed by one write of eight bytes. Workers do not wait for
each other: of two that take a token in the same moment one may go uncounted. Times are in seconds
by the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import re
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from mcp_proxy.errors import ConfigError

# The bytes of a cell, and the cells of a row: two of the key, the time, and one that is free.
_CELL = 8
_ROW = 4

# The rows that a key may have: where others have them all, the one that is full soonest is lost.
_ROWS_OF_A_SET = 4
_SETS = 1024

_NUMBER = "[1-9][0-9]{0,5}"
_TEXT = re.compile(rf"({_NUMBER})/(second|minute)(?::({_NUMBER}))?")
_SECONDS = {"second": 1, "minute": 60}

# A limit that is none.
_OFF = "off"

#: The pattern of a limit as a whole.
LIMIT = f"{_TEXT.pattern}|{_OFF}"

# Seconds that are no waiting: a time of some months has no more digits.
_NO_TIME = 1e-6

# Seconds by which `now` may be older than what others have written.
_LATE = 1.0

Key = tuple[int, int]


class Rate(NamedTuple):
    """So many requests in a second, of which `burst` may come at once.

    `seconds` are those of the unit in which it is written.
    """

    per_second: float
    burst: int
    seconds: int = 1

    @property
    def seconds_to_fill(self) -> float:
        """How long an empty bucket takes to be full."""
        return self.burst / self.per_second

    @property
    def window(self) -> tuple[int, int]:
        """How many requests may come in how many seconds, where they are counted by windows: as it
        is written, or as many as may come at once, in the time that those take to come back.
        """
        count = round(self.per_second * self.seconds)
        units = math.ceil(self.burst / count)
        return count * units, self.seconds * units

    def taken(self, full_at: float, count: int, now: float) -> tuple[float, float]:
        """When a bucket will be full after so many tokens were taken, and how long to wait for
        them, in seconds: 0 where they were there.

        Where they were not, none is taken. A time that only a bucket with another rate can have is
        taken for that of an empty one.
        """
        latest = now + self.seconds_to_fill
        if full_at > latest + _LATE:
            full_at = latest
        full_at = max(full_at, now)
        after = full_at + count / self.per_second
        wait = after - latest
        return (full_at, wait) if wait > _NO_TIME else (after, 0.0)


def rate_of(text: str) -> Rate | None:
    """The rate that a limit says, None for `off`; raises ValueError for what is no limit.

    Without `:BURST` as many may come at once as in the second, or the minute.
    """
    if text == _OFF:
        return None
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError("expected N/second or N/minute, also with :BURST, or off")
    count, unit, burst = found.groups()
    seconds = _SECONDS[unit]
    return Rate(int(count) / seconds, int(burst or count), seconds)


#: Takes so many requests of a key for a whole deployment, as `RateCounter` of `redis/` does.
CountEverywhere = Callable[[Key, Rate, int], float]


def require_library() -> None:
    """Raises ConfigError where what counts for a whole deployment is not installed."""
    if importlib.util.find_spec("limits") is None:
        raise ConfigError(
            "rate_limit_scope=deployment needs limits: pip install 'mcp-wsgi-proxy[limits]'"
        )


class RateBuckets:
    """The buckets of 4,096 keys; several processes share them if it is made before their fork.

    A key that has none gets a full one, in place of the bucket of its set that is full soonest.
    Thread-safe.
    """

    def __init__(self) -> None:
        size = _SETS * _ROWS_OF_A_SET * _ROW * _CELL
        memory = memoryview(mmap.mmap(-1, size))
        self._numbers = memory.cast("Q")
        self._times = memory.cast("d")
        self._lock = threading.Lock()  # guards the rows against threads of this process

    def __repr__(self) -> str:
        taken = sum(any(self._numbers[at : at + 2]) for at in range(0, len(self._numbers), _ROW))
        return f"<RateBuckets {taken}/{_SETS * _ROWS_OF_A_SET}>"

    def take(self, key: Key, rate: Rate, count: int, now: float) -> float:
        """Takes so many tokens; returns how long to wait for them, 0 where they were there."""
        with self._lock:
            at = self._find(key)
            if at is None:
                at = self._begin(key)
            while True:
                before = self._times[at]
                full_at, wait = rate.taken(before, count, now)
                if wait and full_at >= before:
                    return wait  # a time that is written late would undo what others have taken
                if self._times[at] == before:
                    self._times[at] = full_at
                    return wait

    def give_back(self, key: Key, rate: Rate, count: int) -> None:
        """Puts back what was taken for nothing."""
        with self._lock:
            at = self._find(key)
            if at is not None:
                self._times[at] -= count / rate.per_second

    def _find(self, key: Key) -> int | None:
        """The cell with the time of a key's bucket; None where there is none."""
        low, high = key
        start = _start_of(key)
        for at in range(start, start + _ROWS_OF_A_SET * _ROW, _ROW):
            if self._numbers[at] == low and self._numbers[at + 1] == high:
                return at + 2
        return None

    def _begin(self, key: Key) -> int:
        """As `_find`, for a key that had none."""
        start = _start_of(key)
        rows = range(start, start + _ROWS_OF_A_SET * _ROW, _ROW)
        at = min(rows, key=lambda row: self._times[row + 2])
        self._times[at + 2] = 0.0
        self._numbers[at], self._numbers[at + 1] = key
        return at + 2


def _start_of(key: Key) -> int:
    """The first cell of the set in which a key may be."""
    return key[0] % _SETS * _ROWS_OF_A_SET * _ROW


@lru_cache(maxsize=1024)
def key_of(*parts: str) -> Key:
    """128 bits that stand for these texts."""
    text = "\0".join(parts).encode("utf-8", "surrogateescape")
    digest = blake2b(text, digest_size=2 * _CELL).digest()
    low, high = digest[:_CELL], digest[_CELL:]
    return int.from_bytes(low, sys.byteorder), int.from_bytes(high, sys.byteorder)


class _Process:
    """What this process counts in."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards buckets
        self.buckets: RateBuckets | None = None


_process = _Process()


def share() -> None:
    """New buckets, which processes that are forked from now on share with this one."""
    with _process.lock:
        _process.buckets = RateBuckets()


def current() -> RateBuckets:
    """The buckets of this process: those that it shares, or its own from the first use on."""
    buckets = _process.buckets
    if buckets is None:
        with _process.lock:
            buckets = _process.buckets = _process.buckets or RateBuckets()
    return buckets
