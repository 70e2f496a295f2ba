"""Whether this replica can serve: what /readyz answers, found out by one thread.

Whoever asks waits for no store and no server. The thread looks each second while somebody has asked
within the last minute. The first question waits for a moment, and nobody believes an old look.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from mcp_proxy.background import Worker

#: Seconds that the first question waits.
FIRST_WAIT = 0.4

_INTERVAL = 1.0  # seconds between two looks
_ASKED = 60.0  # seconds after a question for which the thread looks
_FRESH = 5.0  # seconds for which a look is believed


class Weight(Enum):
    """What follows when a part fails."""

    #: Nothing can be served.
    ESSENTIAL = 1
    #: Nothing can be served if all parts of this weight fail.
    ONE_OF_MANY = 2
    #: Something works worse than it should.
    USEFUL = 3
    #: As ONE_OF_MANY, of one that serves although something is wrong with it.
    USABLE = 4


class Part(NamedTuple):
    """Something that is looked at; `reason` is why it fails, None if it does not."""

    name: str
    reason: str | None
    weight: Weight


class State(NamedTuple):
    """An answer to /readyz: the status, and the document with and without the reasons.

    `summary` is the first word of the document: ready, degraded, not ready or draining.
    """

    status: int
    summary: str
    document: bytes
    without_reasons: bytes

    def body(self, shows_reasons: bool) -> bytes:
        """The document; the reasons name hosts and ports, which not everybody may know."""
        return self.document if shows_reasons else self.without_reasons


class Readiness(Worker):
    """The state of a replica. Every method may be called from any thread.

    `look` finds out how the parts are and may wait, `is_draining` is asked by `current`, and must
    not.
    """

    def __init__(
        self,
        look: Callable[[], Sequence[Part]],
        is_draining: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("mcp-readiness")
        self._look = look
        self._is_draining = is_draining
        self._clock = clock
        # Each is replaced as a whole, so no lock guards them.
        self._asked = self._asked_first = float("-inf")
        self._found: tuple[float, State] | None = None
        self._wanted = threading.Event()
        self._was_found = threading.Event()

    def current(self) -> State | None:
        """The state as it was found last, None where the first look is not over yet. Never waits.

        After None ask again: a state comes within `FIRST_WAIT` seconds.
        """
        if self._is_draining():
            return _DRAINING
        now = self._clock()
        is_first = now - self._asked > _ASKED
        self._asked = now
        if is_first:
            self._asked_first = now
            self._was_found.clear()
            self._wanted.set()
        if not self.is_running:
            with contextlib.suppress(RuntimeError):  # no thread: the look is missing, or too old
                self.start()
        if self._found is None or self._found[0] < self._asked_first:
            return None if now - self._asked_first < FIRST_WAIT else _UNKNOWN
        looked, state = self._found
        return state if now - looked <= _FRESH else _OLD

    def wait_for_current(self) -> State:
        """As `current`, but waits for the first look, at most `FIRST_WAIT` seconds."""
        while (state := self.current()) is None:
            self._was_found.wait(FIRST_WAIT / 4)
        return state

    def prepare(self) -> None:
        self._wanted, self._was_found = threading.Event(), threading.Event()
        self._found = None

    def wake(self) -> None:
        self._wanted.set()

    def run_once(self) -> None:
        is_wanted = self._clock() - self._asked <= _ASKED
        if is_wanted:
            began = self._clock()
            self._found = (began, state_of(self._look()))
            self._was_found.set()
        self._wanted.wait(_INTERVAL if is_wanted else None)
        self._wanted.clear()


def state_of(parts: Sequence[Part]) -> State:
    """What is to be said of these parts."""
    choices = [part for part in parts if part.weight in (Weight.ONE_OF_MANY, Weight.USABLE)]
    is_unusable = any(part.reason for part in parts if part.weight is Weight.ESSENTIAL) or (
        bool(choices) and all(part.reason and part.weight is not Weight.USABLE for part in choices)
    )
    if is_unusable:
        return _state(503, "not ready", parts)
    summary = "degraded" if any(part.reason for part in parts) else "ready"
    return _state(200, summary, parts)


def _state(status: int, summary: str, parts: Sequence[Part]) -> State:
    def document(shows_reasons: bool) -> bytes:
        checks: dict[str, Any] = {part.name: _check(part, shows_reasons) for part in parts}
        return msgspec.json.encode({"status": summary, "checks": checks})

    return State(status, summary, document(True), document(False))


def _check(part: Part, shows_reasons: bool) -> dict[str, str]:
    if part.reason is None:
        return {"state": "ok"}
    state = "degraded" if part.weight in (Weight.USEFUL, Weight.USABLE) else "failed"
    return {"state": state, "reason": part.reason} if shows_reasons else {"state": state}


def _alone(summary: str, reason: str) -> State:
    """The state of a worker that nothing else is said of."""
    return _state(503, summary, [Part("worker", reason, Weight.ESSENTIAL)])


_DRAINING = _alone("draining", "shutting down")
_UNKNOWN = _alone("not ready", "not all parts have answered yet")
_OLD = _alone("not ready", f"a part has not answered for {_FRESH:g} seconds")
