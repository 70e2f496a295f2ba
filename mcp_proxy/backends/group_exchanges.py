"""Exchanges of a group that are answered by exchanges of its servers.

A call whose answer comes on another stream, a standing stream that has what several servers say, a
batch whose requests are for several: each server has an exchange of its own, whose messages go on
in their order, as far as the client of the other one reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from mcp_proxy.backends.exchange import MAX_BACKLOG, Exchange, ServerMessage, StreamLog
from mcp_proxy.errors import BackendError, ProxyError
from mcp_proxy.wire import jsonrpc


class InnerExchange:
    """An exchange whose messages go on to another one, in their order.

    They wait where the client of that other one does not read. `on_over` is called when everything
    has gone on.
    """

    def __init__(
        self,
        exchange: Exchange,
        target: Exchange,
        on_over: Callable[[InnerExchange], object] | None = None,
    ) -> None:
        self.exchange = exchange
        self._target = target
        self._on_over = on_over
        self._passing = threading.Lock()  # guards the order
        exchange.set_on_ready(self.pass_on)

    def send(self, dispatch: Callable[[Exchange], object]) -> None:
        """Has its request sent; what keeps it from that is its answer."""
        try:
            dispatch(self.exchange)
            self.exchange.resend = None  # whoever learns of it late is the server's own thread
        except ProxyError as error:
            self._offer_failure(error)

    def pass_on(self) -> None:
        """Passes on what has come, as far as the other's client has room for it. Never waits."""
        try:
            with self._passing:
                while self._target.backlog <= MAX_BACKLOG:
                    message = self.exchange.poll()
                    if message is None:
                        break
                    self._target.offer(message)
        except ProxyError as error:
            self._offer_failure(error)
        if self.exchange.is_over and self._on_over is not None:
            self._on_over(self)

    def _offer_failure(self, error: ProxyError) -> None:
        for request in self.exchange.requests:
            data = jsonrpc.encode_error(error.code, error.message, request.id, error.data)
            failure = error if isinstance(error, BackendError) else None
            self._target.offer(ServerMessage(data, is_response=True, failure=failure))
        if self._on_over is not None:
            self._on_over(self)


class SplitBatch:
    """A batch whose requests are for several servers: each is sent for itself."""

    def __init__(self, exchange: Exchange, log: StreamLog | None) -> None:
        exchange.attach(self, log, on_read=self._note_read)
        self._inner: list[InnerExchange] = []
        for request in exchange.requests:
            own = Exchange([request], exchange.accepts_stream, exchange.timeout)
            own.has_left, own.headers = exchange.has_left, exchange.headers
            own.spans, own.may_be_logged = exchange.spans, False
            self._inner.append(InnerExchange(own, exchange))

    def send(self, dispatch: Callable[[Exchange], object]) -> None:
        """Has each request sent."""
        for inner in self._inner:
            inner.send(dispatch)

    def _note_read(self) -> None:
        for inner in self._inner:
            inner.pass_on()

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: no server need know."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """Answers what is unanswered."""
        for inner in self._inner:
            inner.exchange.set_deadline(0.0, lambda: failure)
            inner.exchange.expire_if_due()

    def leave(self, exchange: Exchange) -> None:
        """The client no longer listens."""
        for inner in self._inner:
            inner.exchange.close()
