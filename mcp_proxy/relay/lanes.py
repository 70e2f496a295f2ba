"""Work in lanes: in order within a lane, at once in different ones.

A child that does not read its input holds up its own lane only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)


class Lanes:
    """At most `width` lanes move at the same time; threads start when they are needed."""

    def __init__(self, width: int) -> None:
        self._lock = threading.Lock()  # guards _lanes and _is_closed
        self._is_closed = False
        self._lanes: dict[str, deque[Callable[[], None]]] = {}
        self._threads = ThreadPoolExecutor(width, thread_name_prefix="mcp-relay-lane")

    def __repr__(self) -> str:
        return f"<Lanes {len(self._lanes)}>"

    def add(self, lane: str, act: Callable[[], None]) -> None:
        """Has `act` called after everything that was added to the lane before; never waits.

        After `close` nothing is called any more.
        """
        with self._lock:
            if self._is_closed:
                return
            waiting = self._lanes.get(lane)
            if waiting is not None:
                waiting.append(act)
                return
            self._lanes[lane] = deque([act])
            self._threads.submit(self._move, lane)

    def close(self) -> None:
        """Takes no more; what is waiting is not begun."""
        with self._lock:
            self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _move(self, lane: str) -> None:
        while (act := self._next(lane)) is not None:
            try:
                act()
            except Exception:
                log.exception("serving another replica failed")

    def _next(self, lane: str) -> Callable[[], None] | None:
        """The next thing to do in a lane; one with nothing left is closed."""
        with self._lock:
            if self._lanes[lane]:
                return self._lanes[lane].popleft()
            del self._lanes[lane]
            return None
