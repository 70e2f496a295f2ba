"""The cap on standing streams: each holds a thread, and calls must always find one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mcp_proxy.errors import Overloaded


class StreamSlots:
    """`limit` places; thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()  # guards _taken
        self._taken = 0

    def __repr__(self) -> str:
        return f"<StreamSlots {self._taken}/{self.limit}>"

    def take(self) -> None:
        """Takes a place; raises Overloaded when there is none."""
        with self._lock:
            if self._taken >= self.limit:
                raise Overloaded(f"All {self.limit} standing streams of this worker are taken")
            self._taken += 1

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Takes a place, which stays taken unless the block raises; raises Overloaded."""
        self.take()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives a place back; once for each that was taken."""
        with self._lock:
            self._taken -= 1
