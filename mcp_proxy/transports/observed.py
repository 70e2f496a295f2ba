"""An exchange that somebody watches on its way to the client."""

from __future__ import annotations

from collections.abc import Callable

from mcp_proxy.backends.base import Delivery, Exchange


class ObservedExchange(Exchange):
    """Passes everything through; `on_response` sees each response before the client does.

    What `on_response` raises the receiver gets. `on_close` is told once that the client is done.
    """

    def __init__(
        self,
        inner: Exchange,
        on_response: Callable[[Delivery], None],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._inner = inner
        self._on_response = on_response
        self._on_close = on_close
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        return self._inner.is_over

    def receive(self, timeout: float) -> Delivery | None:
        delivery = self._inner.receive(timeout)
        if delivery is not None and delivery.is_response:
            self._on_response(delivery)
        return delivery

    def begin(self) -> None:
        self._inner.begin()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._inner.close()
            self._on_close()
