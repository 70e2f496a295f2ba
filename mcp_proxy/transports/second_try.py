"""An exchange with a second try: for a backend that turns out to be out of reach only later."""

from __future__ import annotations

from collections.abc import Callable

from mcp_proxy.backends.base import Delivery, Exchange
from mcp_proxy.errors import BackendUnreached


class SecondTry(Exchange):
    """Passes `first` through; if that got nothing at all, `again` opens what takes its place."""

    def __init__(self, first: Exchange, again: Callable[[], Exchange]) -> None:
        self._current = first
        self._again: Callable[[], Exchange] | None = again
        self._is_begun = False

    @property
    def is_over(self) -> bool:
        return self._current.is_over

    @property
    def was_replaced(self) -> bool:  # type: ignore[override]
        """Whether a newer standing stream took its place."""
        return self._current.was_replaced

    def begin(self) -> None:
        self._is_begun = True
        self._current.begin()

    def receive(self, timeout: float) -> Delivery | None:
        try:
            return self._current.receive(timeout)
        except BackendUnreached:
            again, self._again = self._again, None
            if again is None:
                raise
        self._current.close()
        self._current = again()
        if self._is_begun:
            self._current.begin()
        return self._current.receive(timeout)

    def close(self) -> None:
        self._current.close()
