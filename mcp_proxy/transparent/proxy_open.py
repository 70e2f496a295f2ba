"""The responses that a transport is in the middle of: counted, and ended when the replica stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Endable(Protocol):
    """A response that can be ended from another thread."""

    def end(self) -> None: ...


class OpenBodies:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _bodies
        self._bodies: dict[Endable, bool] = {}  # whether it is a standing stream

    def __repr__(self) -> str:
        return f"<OpenBodies {len(self._bodies)}>"

    def add(self, body: Endable, is_standing: bool) -> Callable[[], None]:
        """Notes a response that begins; what is returned notes its end."""
        with self._lock:
            self._bodies[body] = is_standing
        return lambda: self._remove(body)

    @property
    def calls(self) -> int:
        """How many responses are under way that are no standing streams."""
        with self._lock:
            return sum(not is_standing for is_standing in self._bodies.values())

    def end_streams(self) -> None:
        """Ends the standing streams."""
        with self._lock:
            streams = [body for body, is_standing in self._bodies.items() if is_standing]
        for body in streams:
            body.end()

    def end_all(self) -> None:
        """Ends everything."""
        with self._lock:
            bodies = list(self._bodies)
        for body in bodies:
            body.end()

    def _remove(self, body: Endable) -> None:
        with self._lock:
            self._bodies.pop(body, None)
