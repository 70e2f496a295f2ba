"""Starts take turns: as many servers start at once as can, the others in the order of arrival.

All clients come back after a restart; if all of their servers started together, none would answer
before nearly all did, and clients would have given up by then.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from mcp_proxy.errors import ClientLeft, Draining, Overloaded

#: Seconds after which a start holds up nobody any more: it needs no CPU, but waits for a network or
#: for its client.
LONGEST = 1.0

# Seconds between looks at whether a client that waits has left.
_LOOK = 1.0


class Turn:
    """The turn of one start; as a context manager it is given back at the end of the block."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """The start is over; harmless when repeated."""
        self._turns.give_back(self)


class Turns:
    """The line in which starts wait. `width` says how many may be under way. Thread-safe."""

    def __init__(self, width: Callable[[], int]) -> None:
        self.width = width
        self._changed = threading.Condition()  # guards and announces what follows
        self._under_way: dict[Turn, float] = {}  # since when
        self._waiting: deque[Turn] = deque()
        self._ahead_since = -math.inf  # when one was last started that nobody waits for
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Turns under_way={len(self._under_way)} waiting={len(self._waiting)}>"

    def take(self, timeout: float, has_left: Callable[[], bool] | None = None) -> Turn:
        """A turn, once it has come; raises Overloaded when it has not in `timeout` seconds.

        Raises ClientLeft when `has_left` says so meanwhile, so that others need not wait for it,
        and Draining once there are no more turns.
        """
        turn, until = Turn(self), time.monotonic() + timeout
        with self._changed:
            self._waiting.append(turn)
        try:
            while not self._has_begun(turn, until):
                if self._is_closed:
                    raise Draining
                if has_left is not None and has_left():
                    raise ClientLeft
                if time.monotonic() >= until:
                    raise Overloaded("Too many servers are starting; try again shortly")
        finally:
            with self._changed:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                self._changed.notify_all()
        return turn

    def take_ahead(self) -> bool:
        """Whether a start for which nobody waits may begin: no other is under way, or waits.

        One may in `LONGEST` seconds, and it keeps no other waiting.
        """
        with self._changed:
            long_ago = time.monotonic() - LONGEST
            latest = max(self._ahead_since, *self._under_way.values(), -math.inf)
            if self._is_closed or self._waiting or latest > long_ago:
                return False
            self._ahead_since = time.monotonic()
            return True

    def give_back(self, turn: Turn) -> None:
        """A start is over; harmless when repeated."""
        with self._changed:
            self._under_way.pop(turn, None)
            self._changed.notify_all()

    def close(self) -> None:
        """There are no more turns: whoever waits is told so."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_begun(self, turn: Turn, until: float) -> bool:
        """Waits for a while, and returns whether it was the turn's turn."""
        with self._changed:
            seconds = max(0.0, min(_LOOK, until - time.monotonic()))
            self._changed.wait_for(lambda: self._is_closed or self._is_next(turn), seconds)
            if self._is_closed or not self._is_next(turn):
                return False
            self._waiting.popleft()
            self._under_way[turn] = time.monotonic()
            return True

    def _is_next(self, turn: Turn) -> bool:
        if self._waiting[0] is not turn:
            return False
        long_ago = time.monotonic() - LONGEST
        return sum(since > long_ago for since in self._under_way.values()) < self.width()
