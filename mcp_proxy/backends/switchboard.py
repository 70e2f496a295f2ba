"""Who is connected to whom: which message of a child belongs to which exchange.

Tables and rules only: no I/O, no threads, no lock. Its bridge holds a lock around every call.

Ids. The child sees ids of our own, one counter a child, so that two calls in flight under one id
each get their answer and a late answer to a call that was given up reaches nobody. A progress token
is replaced only while another call uses the same one.

Attribution of what names no request (logs, sampling, elicitation, roots): the only POST in flight
if it takes streams; else the standing stream; else the newest POST that takes streams; else it
waits for a standing stream, bounded, the oldest given up first.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import NamedTuple

from mcp_proxy.backends.base import Delivery
from mcp_proxy.backends.exchange import QueuedExchange
from mcp_proxy.errors import RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

#: Messages, and bytes of them, that wait for a standing stream.
MAX_WAITING = 256
MAX_WAITING_BYTES = 1024 * 1024

_PROGRESS = "notifications/progress"
_CANCELLED = "notifications/cancelled"


class Call(NamedTuple):
    """A request on its way: under which ids the child and the client know it, and who waits."""

    wire_id: int
    id: RequestId
    method: str
    exchange: QueuedExchange
    token: RequestId | None
    wire_token: RequestId | None
    deadline: float | None = None  # monotonic; None: its exchange has one for all its calls


class Switchboard:
    """The tables of one child."""

    def __init__(self) -> None:
        self._wire_ids = itertools.count(1)
        self._calls: dict[int, Call] = {}  # by wire id, oldest first
        self._tokens: dict[RequestId, Call] = {}  # by wire token
        self._posts: dict[QueuedExchange, int] = {}  # oldest first, with their unanswered calls
        self._asked: dict[RequestId, QueuedExchange | None] = {}  # requests of the child
        self._waiting: deque[Delivery] = deque()
        self._waiting_bytes = 0
        self._stream: QueuedExchange | None = None

    def __repr__(self) -> str:
        return (
            f"<Switchboard calls={len(self._calls)} posts={len(self._posts)}"
            f" asked={len(self._asked)} waiting={len(self._waiting)}"
            f" stream={self._stream is not None}>"
        )

    @property
    def has_posts(self) -> bool:
        """Whether a client waits for an answer."""
        return bool(self._posts)

    @property
    def stream(self) -> QueuedExchange | None:
        """The standing stream, None while there is none."""
        return self._stream

    def owes(self, exchange: QueuedExchange) -> bool:
        """Whether answers are to leave through an exchange."""
        return exchange in self._posts

    # --- calls of the client ---------------------------------------------------------------------

    def enter(
        self, request: Request, exchange: QueuedExchange, deadline: float | None = None
    ) -> bytes:
        """Notes a call and returns it as the child is to see it."""
        wire_id = next(self._wire_ids)
        token = wire_token = _token_of(request)
        if token is not None and token in self._tokens:
            wire_token = f"mcp-proxy-{wire_id}"
            path = ("_meta", "progressToken")
            params = jsonrpc.replace_field(request.params, path, wire_token)
            request = Request(request.id, request.method, params)
        call = Call(wire_id, request.id, request.method, exchange, token, wire_token, deadline)
        self._calls[wire_id] = call
        if wire_token is not None:
            self._tokens[wire_token] = call
        self._posts[exchange] = self._posts.get(exchange, 0) + 1
        return jsonrpc.encode(request, wire_id)

    def leave(self, wire_id: RequestId) -> Call | None:
        """Forgets a call that is answered and returns it, None where there is none."""
        call = self._calls.pop(wire_id, None) if isinstance(wire_id, int) else None
        if call is None:
            return None
        if call.wire_token is not None:
            self._tokens.pop(call.wire_token, None)
        left = self._posts.get(call.exchange, 0) - 1
        if left > 0:
            self._posts[call.exchange] = left
        else:
            self._posts.pop(call.exchange, None)
        return call

    def newest(self, request_id: RequestId | None) -> Call | None:
        """The newest call that the client knows by this id: 1 and "1" differ."""
        for call in reversed(self._calls.values()):
            if type(call.id) is type(request_id) and call.id == request_id:
                return call
        return None

    def leave_overdue(self, exchange: QueuedExchange, now: float) -> list[Call]:
        """Forgets the calls of an exchange whose time is over, and returns them."""
        calls = [call for call in self._calls.values() if call.exchange is exchange]
        due = [call.wire_id for call in calls if call.deadline is None or call.deadline <= now]
        return [call for wire_id in due if (call := self.leave(wire_id)) is not None]

    def next_deadline(self, exchange: QueuedExchange) -> float | None:
        """When the next call of an exchange is due that has a deadline of its own."""
        calls = (call for call in self._calls.values() if call.exchange is exchange)
        return min((call.deadline for call in calls if call.deadline is not None), default=None)

    def leave_exchange(self, exchange: QueuedExchange) -> list[Call]:
        """Forgets every call of an exchange and returns them."""
        mine = [wire_id for wire_id, call in self._calls.items() if call.exchange is exchange]
        return [call for wire_id in mine if (call := self.leave(wire_id)) is not None]

    def unheard(self) -> set[QueuedExchange]:
        """The exchanges with calls whose client has left."""
        return {call.exchange for call in self._calls.values() if call.exchange.is_closed}

    def take_answer(self, response: Response) -> bool:
        """Whether the child waits for this answer of the client; once."""
        return self._asked.pop(response.id, self) is not self

    # --- messages of the child -------------------------------------------------------------------

    def deliver(self, message: Request | Notification) -> QueuedExchange | None:
        """Hands a message to the exchange it belongs to and returns that; None: it waits."""
        if isinstance(message, Notification) and message.method == _PROGRESS:
            exchange, message = self._route_progress(message)
        else:
            exchange = self._route(message)
        if isinstance(message, Request):
            self._asked[message.id] = exchange
        delivery = Delivery(jsonrpc.encode(message), is_response=False)
        if exchange is not None:
            exchange.offer(delivery)
        elif message.method != _PROGRESS:  # how far a call is interests nobody later
            self._park(delivery)
        return exchange

    def can_deliver(self) -> bool:
        """Whether anybody could receive a message that names no call."""
        return self._stream is not None or self._newest_streaming() is not None

    def overflow(self) -> list[Request | Notification]:
        """What no longer fits among the waiting, oldest first; it is the caller's to give up."""
        dropped: list[Request | Notification] = []
        while len(self._waiting) > MAX_WAITING or self._waiting_bytes > MAX_WAITING_BYTES:
            data = self._waiting.popleft().data
            self._waiting_bytes -= len(data)
            message = jsonrpc.parse_message(data)
            if isinstance(message, Request):
                self._asked.pop(message.id, None)
            if not isinstance(message, Response):
                dropped.append(message)
        return dropped

    def _park(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)
        self._waiting_bytes += len(delivery.data)

    def _route_progress(self, progress: Notification) -> tuple[QueuedExchange | None, Notification]:
        """Where progress goes, and as which message: under the token that the client gave."""
        token = jsonrpc.progress_token_of(progress)
        call = None if token is None else self._tokens.get(token)
        if call is None:
            return self._route(progress), progress
        if call.token is not None and call.token != call.wire_token:
            params = jsonrpc.replace_field(progress.params, ("progressToken",), call.token)
            progress = Notification(progress.method, params)
        if call.exchange in self._posts and call.exchange.accepts_stream:
            return call.exchange, progress
        return self._stream, progress

    def _route(self, message: Request | Notification) -> QueuedExchange | None:
        """Where a message goes that names no call of the client."""
        if isinstance(message, Notification) and message.method == _CANCELLED:
            named = jsonrpc.cancelled_id_of(message)
            asked = None if named is None else self._asked.pop(named, None)
            if asked is not None and (asked in self._posts or asked is self._stream):
                return asked
        newest = self._newest_streaming()
        if newest is not None and len(self._posts) == 1:
            return newest
        return self._stream or newest

    def _newest_streaming(self) -> QueuedExchange | None:
        return next((post for post in reversed(self._posts) if post.accepts_stream), None)

    # --- streams and departures ------------------------------------------------------------------

    def set_stream(self, stream: QueuedExchange | None) -> QueuedExchange | None:
        """Makes `stream` the standing one, with what waited for one; returns the older."""
        older, self._stream = self._stream, stream
        if stream is not None:
            for delivery in self._waiting:
                stream.offer(delivery)
            self._waiting.clear()
            self._waiting_bytes = 0
        return older

    def depart(self, exchange: QueuedExchange) -> None:
        """The client of an exchange has left: its calls go on, what it did not take waits."""
        self._posts.pop(exchange, None)
        if self._stream is exchange:
            self._stream = None
        for delivery in exchange.drain():
            if not delivery.is_response:
                self._park(delivery)

    def clear(self) -> tuple[list[Call], QueuedExchange | None]:
        """Forgets everybody and returns who is to be told."""
        calls, stream = list(self._calls.values()), self._stream
        for table in (self._calls, self._tokens, self._posts, self._asked, self._waiting):
            table.clear()
        self._waiting_bytes = 0
        self._stream = None
        return calls, stream


def _token_of(request: Request) -> RequestId | None:
    token = jsonrpc.meta_of(request).progress_token
    return token if isinstance(token, (int, str)) else None
