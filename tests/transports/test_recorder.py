"""Streams that are read on, into the log, when their clients have left."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mcp_proxy.backends.base import Delivery
from mcp_proxy.backends.exchange import PushedExchange
from mcp_proxy.resumption.writing import Recorder
from tests.support.waiting import eventually


class Chatterbox(PushedExchange):
    """Says something as soon as it was read, and never ends by itself."""

    def __init__(self) -> None:
        self.said = 0
        self.has_expired = threading.Event()
        self._wake: Callable[[], None] = lambda: None

    @property
    def is_over(self) -> bool:
        return self.has_expired.is_set()

    @property
    def is_due(self) -> bool:
        return True

    def expire_if_due(self) -> None:
        self.has_expired.set()
        self._wake()

    def poll(self) -> Delivery | None:
        self.said += 1
        self._wake()
        return None

    def receive(self, timeout: float) -> Delivery | None:
        raise AssertionError("the recorder waits for nobody")

    def wake_with(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        wake()

    def close(self) -> None:
        pass


def test_deadlines_are_looked_at_while_somebody_talks_all_the_time() -> None:
    recorder, exchange, over = Recorder(), Chatterbox(), threading.Event()
    recorder.record(exchange, over.set)
    try:
        eventually(over.is_set)
        assert exchange.said > 0
    finally:
        recorder.close()
