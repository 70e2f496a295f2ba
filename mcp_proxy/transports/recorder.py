"""Reads on, into the log, the streams whose clients have left: they may come back for the rest."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from mcp_proxy.backends.exchange import PushedExchange

log = logging.getLogger(__name__)

# Seconds between looks at deadlines.
_LOOK = 1.0


class Recorder:
    """One thread, which begins with the first stream that is left. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _recorded and _thread
        self._recorded: dict[PushedExchange, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._woken: queue.SimpleQueue[PushedExchange | None] = queue.SimpleQueue()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Recorder {len(self._recorded)}>"

    def record(self, exchange: PushedExchange, on_over: Callable[[], None]) -> None:
        """Reads an exchange that logs what is received from it, until it is over."""
        with self._lock:
            self._recorded[exchange] = on_over
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="mcp-recorder", daemon=True)
                self._thread.start()
        exchange.wake_with(lambda: self._woken.put(exchange))

    def close(self) -> None:
        """Ends the thread; what is recorded ends with its backends."""
        with self._lock:
            self._is_closed = True
        self._woken.put(None)

    def _run(self) -> None:
        next_look = 0.0
        while not self._is_closed:
            with contextlib.suppress(queue.Empty):
                exchange = self._woken.get(timeout=_LOOK if self._recorded else None)
                if exchange is not None:
                    self._read(exchange)
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK
                self._look_at_deadlines()

    def _look_at_deadlines(self) -> None:
        with self._lock:
            waiting = list(self._recorded)
        for exchange in waiting:
            exchange.expire_if_due()

    def _read(self, exchange: PushedExchange) -> None:
        try:
            while not exchange.is_over and exchange.poll() is not None:
                pass
        except Exception:
            log.exception("recording a stream failed")
        if exchange.is_over:
            with self._lock:
                on_over = self._recorded.pop(exchange, None)
            if on_over is not None:
                on_over()
