"""The body of an event stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.edge.disconnects import ClientConnection, DisconnectWatcher
from mcp_proxy.edge.edge import as_message
from mcp_proxy.errors import ClientLeft, ProxyError, RequestId
from mcp_proxy.wire import refusals, sse

log = logging.getLogger(__name__)

#: How long (ms) a client that lost its connection should wait before it resumes the stream.
RETRY = 1000

#: A client whose stream a newer one replaced should not come back for it soon: a day, in ms.
RETRY_WHEN_REPLACED = 24 * 3600 * 1000

# Above this many bytes a message is sent in pieces instead of being copied into one.
_LARGE = 64 * 1024


class EventStream:
    """Sends what an exchange delivers, as server-sent events, and keepalives while it is silent.

    `first` is what the stream begins with, unless there are early messages.
    `early` are messages that came before it was known that a stream was needed. The first bytes
    leave at once. `primes` says whether the client understands an event without data, by which a
    stream that can be resumed begins (MCP 2025-11-25, "Sending Messages to the Server"). The
    client's leaving is noticed within a second while an answer is waited for, else by `watcher`, at
    the next keepalive without one; then the thread is free.
    `close` closes the exchange. `on_failure` is told of each failure that the stream carries,
    `on_response` of each response before it leaves, with the failure that it tells of, if any.
    """

    #: Whoever counts is told of each answer, so it need not know the body.
    reports_answers = True

    def __init__(
        self,
        exchange: Exchange,
        connection: ClientConnection,
        keepalive: float,
        early: Sequence[ServerMessage] = (),
        request_id: RequestId | None = None,
        primes: bool = False,
        first: bytes = sse.KEEPALIVE,
        on_failure: Callable[[ProxyError], object] | None = None,
        on_response: Callable[[bytes, ProxyError | None], object] | None = None,
        watcher: DisconnectWatcher | None = None,
    ) -> None:
        exchange.has_left = connection.has_left
        self._exchange = exchange
        self._connection = connection
        self._keepalive = keepalive
        self._early = early
        self._request_id = request_id
        self._primes = primes
        self._first = first
        self._on_failure = on_failure
        self._on_response = on_response
        self._watcher = watcher
        self._end_watch: Callable[[], object] | None = None

    def __iter__(self) -> Iterator[bytes]:
        self._connection.give_up_after(2 * self._keepalive)
        if self._watcher is not None:
            self._end_watch = self._watcher.watch(self._connection, self._exchange.wake)
        if not self._early:
            yield self._first
        for message in self._early:
            yield from self._event(message)
        try:
            yield from self._rest()
        except ClientLeft:
            log.debug("the client of a stream has left")
        except ProxyError as error:
            self._note(error)
            error.request_id = self._request_id
            data = as_message(error)
            self._report(data, error)
            yield sse.encode_message(data)

    def _rest(self) -> Iterator[bytes]:
        exchange = self._exchange
        while not exchange.is_over:
            message = exchange.receive(self._keepalive)
            if message is not None:
                yield from self._event(message)
            elif not exchange.is_over:
                yield sse.KEEPALIVE
        if exchange.was_replaced:
            yield sse.encode(sse.Event(retry=RETRY_WHEN_REPLACED))

    def close(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
        self._exchange.close()

    def _note(self, failure: ProxyError) -> None:
        if self._on_failure is not None:
            self._on_failure(failure)

    def _report(self, data: bytes, failure: ProxyError | None) -> None:
        if self._on_response is not None:
            self._on_response(data, failure)

    def _event(self, message: ServerMessage) -> Iterator[bytes]:
        if message.failure is not None:
            self._note(message.failure)
        if message.is_response:
            message = message._replace(data=refusals.as_plain_error(message.data))
            self._report(message.data, message.failure)
        if not message.data:
            yield _priming_event(message) if self._primes else sse.KEEPALIVE
        elif len(message.data) <= _LARGE:
            yield sse.encode_message(message.data, message.event_id)
        else:
            yield sse.message_head(message.event_id)
            yield message.data
            yield b"\n\n"


def _priming_event(message: ServerMessage) -> bytes:
    assert message.event_id is not None
    return sse.encode(sse.Event(id=message.event_id.encode(), retry=RETRY, data=b""))
