"""Requests of callers, counted in Redis for all hosts of a deployment (`rate_limit_scope`).

The library `limits` counts them: two numbers a caller, that of the window before the last one with
the weight of what is left of it. Redis tells the time, so hosts need no common clock.
"""

from __future__ import annotations

import time
from typing import Any

from limits import RateLimitItemPerSecond
from limits.storage import RedisStorage as LimitsStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.rate_buckets import Key, Rate
from mcp_proxy.redis.client import Client, Connection, Use

# Seconds in which a Redis that was out of reach is not asked again: each call would wait for it.
_PAUSE = 5.0


class _Counts(LimitsStorage):
    """The library's storage over a client of ours, which knows all forms of Redis."""

    STORAGE_SCHEME = []  # noqa: RUF012  (else the library's users would get this one)

    def __init__(self, client: Client, prefix: str) -> None:
        self._client = client
        super().__init__("redis://", key_prefix=prefix)  # its own client never connects

    def get_connection(self, readonly: bool = False) -> Any:
        return self._client


class RateCounter:
    """The counts below one prefix. Thread-safe."""

    def __init__(self, connection: Connection, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix
        self._limiter: SlidingWindowCounterRateLimiter | None = None
        self._asks_from = float("-inf")  # monotonic

    def __repr__(self) -> str:
        return f"<RateCounter {self._prefix}>"

    def __call__(self, key: Key, rate: Rate, count: int) -> float:
        """Takes so many requests; returns how long to wait for them, in seconds, 0 where they were
        there. A number below zero puts back what was taken for nothing.

        Raises StorageUnavailable, for some seconds after an outage without asking.
        """
        if time.monotonic() < self._asks_from:
            raise StorageUnavailable
        caller = f"{key[0]:016x}{key[1]:016x}"
        item = RateLimitItemPerSecond(*rate.window, namespace="rate")
        try:
            with self._connection.mapped_errors(Use.GROW):
                limiter = self._limiter
                if limiter is None:  # a Cluster is reached for the first time
                    counts = _Counts(self._connection.client, self._prefix)
                    limiter = self._limiter = SlidingWindowCounterRateLimiter(counts)
                if limiter.hit(item, caller, cost=count):
                    return 0.0
                free_at = limiter.get_window_stats(item, caller).reset_time
        except StorageUnavailable:
            self._asks_from = time.monotonic() + _PAUSE
            raise
        return max(free_at - time.time(), 1.0)
