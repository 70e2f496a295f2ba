"""The switchboard: decides which message of a child belongs to which exchange.

Tables and rules only: no I/O, no threads, no lock. The bridge holds a lock around every call.

Ids: the child sees ids of our own, from one counter per child. So two calls in flight with the same
client id each get their answer, and a late answer to an expired call is dropped. A progress token
is replaced only while another call uses the same one.

Messages that name no request (logs, sampling, elicitation, roots) go to the only POST in flight if
it accepts streams; else to the standing stream; else to the newest POST that accepts streams; else
they wait for a standing stream, bounded in number and bytes, the oldest dropped first.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from typing import NamedTuple

from msgspec import UNSET

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.errors import RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.modern import LISTEN

#: The most messages, and the most bytes of them, that wait for a standing stream.
MAX_WAITING = 256
MAX_WAITING_BYTES = 1024 * 1024

#: The most requests of the child that clients have not answered; the oldest are refused.
MAX_ASKED = 1000

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")

#: The notification that names its call by a token.
PROGRESS = "notifications/progress"


class PendingCall(NamedTuple):
    """A request in flight: its ids at the child and at the client, and its exchange.

    One that is not `is_at_child` waits for something else, under an id that the child does not know
    yet. `kept` is what the switchboard alone knows of it.
    """

    wire_id: int
    id: RequestId
    method: str
    exchange: Exchange
    token: RequestId | None
    wire_token: RequestId | None
    deadline: float | None = None  # monotonic; None: its exchange has one for all its calls
    is_at_child: bool = True
    kept: object = None


class _Asked(NamedTuple):
    """A request of the child that no client has answered yet."""

    method: str
    exchange: Exchange | None


class Switchboard:
    """The tables of one child."""

    #: The switchboard in whose place another one comes: its tables are there from now on.
    successor: Switchboard | None = None

    #: Seconds to wait before the `lines` are written.
    pause = 0.0

    def __init__(self) -> None:
        self._wire_ids = itertools.count(1)
        self._calls: dict[int, PendingCall] = {}  # by wire id, oldest first
        self._tokens: dict[RequestId, PendingCall] = {}  # by wire token
        self._posts: dict[Exchange, int] = {}  # numbers of unanswered calls, oldest first
        self._asked: dict[RequestId, _Asked] = {}  # by the child's id, oldest first
        self._waiting: deque[ServerMessage] = deque()
        self._waiting_bytes = 0
        self._stream: Exchange | None = None
        #: Lines for the child that delivering has brought about.
        self.lines: list[bytes] = []

    def __repr__(self) -> str:
        return (
            f"<Switchboard calls={len(self._calls)} posts={len(self._posts)}"
            f" asked={len(self._asked)} waiting={len(self._waiting)}"
            f" stream={self._stream is not None}>"
        )

    def continue_from(self, other: Switchboard) -> None:
        """Takes over the tables of another switchboard, which is used no more."""
        self._wire_ids = other._wire_ids
        self._calls, self._tokens, self._posts = other._calls, other._tokens, other._posts
        self._asked, self._stream = other._asked, other._stream
        self._waiting, self._waiting_bytes = other._waiting, other._waiting_bytes
        self.lines = other.lines

    @property
    def has_posts(self) -> bool:
        """Whether a client waits for an answer."""
        return any(self._is_waiting(exchange) for exchange in list(self._posts))

    def _is_waiting(self, exchange: Exchange) -> bool:
        """Whether the client of an exchange with calls waits for answers, and not for changes."""
        return not (exchange.requests and exchange.is_standing)

    @property
    def is_calling(self) -> bool:
        """Whether a call is in flight, also one that no client waits for just now."""
        return any(call.method != LISTEN for call in self._calls.values())

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for the child or the child for anybody."""
        return bool(self._calls or self._asked) or self._stream is not None

    @property
    def stream(self) -> Exchange | None:
        """The standing stream, None while there is none."""
        return self._stream

    def has_calls(self, exchange: Exchange) -> bool:
        """Whether an exchange has unanswered calls."""
        return exchange in self._posts

    def is_of_a_call(self, progress: Notification) -> bool:
        """Whether a `notifications/progress` has the token of a call in flight."""
        return jsonrpc.progress_token_of(progress) in self._tokens

    # --- calls of the client ---------------------------------------------------------------------

    def enter(self, request: Request, exchange: Exchange, deadline: float | None = None) -> bytes:
        """Adds a call and returns it encoded for the child."""
        wire_id = next(self._wire_ids)
        found = request.meta.progress_token
        token = wire_token = None if found is UNSET else found
        if token is not None and token in self._tokens:
            wire_token = f"mcp-proxy-{wire_id}"
            path = ("_meta", "progressToken")
            params = jsonrpc.replace_field(request.params, path, wire_token)
            request = Request(request.id, request.method, params)
        call = PendingCall(
            wire_id, request.id, request.method, exchange, token, wire_token, deadline
        )
        self._calls[wire_id] = call
        if wire_token is not None:
            self._tokens[wire_token] = call
        self._posts[exchange] = self._posts.get(exchange, 0) + 1
        return jsonrpc.encode(request, wire_id)

    def pop(self, wire_id: RequestId) -> PendingCall | None:
        """Removes a call that is answered and returns it, None where there is none.

        Some servers make a text of the number that they got.
        """
        if isinstance(wire_id, str) and _NUMBER.fullmatch(wire_id):
            wire_id = int(wire_id)
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

    def pop_answered(self, wire_id: RequestId) -> PendingCall | None:
        """As `pop`, of a call that the child has just answered."""
        return self.pop(wire_id)

    def pop_only(self) -> PendingCall | None:
        """Removes the only call in flight and returns it, None where there are none or several."""
        return self.pop(next(iter(self._calls))) if len(self._calls) == 1 else None

    def set_deadline(self, call: PendingCall, deadline: float) -> None:
        """Gives a call that is still in flight an earlier deadline of its own."""
        if call.wire_id in self._calls:
            self._calls[call.wire_id] = call._replace(deadline=deadline)

    def newest(self, request_id: RequestId | None) -> PendingCall | None:
        """The newest call that the client knows by this id: 1 and "1" differ."""
        for call in reversed(self._calls.values()):
            if type(call.id) is type(request_id) and call.id == request_id:
                return call
        return None

    def pop_overdue(self, exchange: Exchange, now: float) -> list[PendingCall]:
        """Removes the calls of an exchange whose deadline has passed, and returns them."""
        calls = [call for call in self._calls.values() if call.exchange is exchange]
        due = [call.wire_id for call in calls if call.deadline is None or call.deadline <= now]
        return [call for wire_id in due if (call := self.pop(wire_id)) is not None]

    def next_deadline(self, exchange: Exchange) -> float | None:
        """The next deadline of the calls of an exchange that have one of their own."""
        calls = (call for call in self._calls.values() if call.exchange is exchange)
        return min((call.deadline for call in calls if call.deadline is not None), default=None)

    def pop_exchange(self, exchange: Exchange) -> list[PendingCall]:
        """Removes every call of an exchange and returns them."""
        mine = [wire_id for wire_id, call in self._calls.items() if call.exchange is exchange]
        return [call for wire_id in mine if (call := self.pop(wire_id)) is not None]

    def left_exchanges(self) -> set[Exchange]:
        """The exchanges with calls whose client has left."""
        return {call.exchange for call in self._calls.values() if call.exchange.is_closed}

    def encoded(self, response: Response, call: PendingCall) -> bytes | None:
        """A response of the child as the client gets it; None where the client gets none, or not
        yet.
        """
        return jsonrpc.encode(response, call.id)

    def notice(self, notification: Notification) -> bytes:
        """A client's notification encoded for the child; empty where that gets none."""
        return jsonrpc.encode(notification)

    def take_answer(self, response: Response) -> bytes | None:
        """What the child gets of a client's answer, which may be nothing; None where nobody waits
        for it. From now on nobody does.
        """
        return None if self._asked.pop(response.id, None) is None else jsonrpc.encode(response)

    # --- messages of the child -------------------------------------------------------------------

    def deliver(self, message: Request | Notification) -> Exchange | None:
        """Offers a message to its exchange and returns that; None: it waits, or is progress."""
        if isinstance(message, Notification) and message.method == PROGRESS:
            exchange, message = self._route_progress(message)
        else:
            exchange = self._route(message)
        if isinstance(message, Request):
            self._asked.pop(message.id, None)
            self._asked[message.id] = _Asked(message.method, exchange)
        line = ServerMessage(jsonrpc.encode(message), is_response=False)
        if exchange is not None:
            exchange.offer(line)
        elif message.method != PROGRESS:  # late progress is useless
            self._park(line)
        return exchange

    def can_deliver(self) -> bool:
        """Whether an exchange can take a message that names no call."""
        return self._stream is not None or self._newest_streaming() is not None

    def overflow(self) -> list[Request | Notification]:
        """Removes what exceeds the bounds and returns it, oldest first: messages that wait, and
        requests of the child that clients do not answer.
        """
        dropped: list[Request | Notification] = []
        while len(self._waiting) > MAX_WAITING or self._waiting_bytes > MAX_WAITING_BYTES:
            data = self._waiting.popleft().data
            self._waiting_bytes -= len(data)
            message = jsonrpc.parse_message(data)
            if isinstance(message, Request):
                self._asked.pop(message.id, None)
            if not isinstance(message, Response):
                dropped.append(message)
        while len(self._asked) > MAX_ASKED:
            oldest = next(iter(self._asked))
            dropped.append(Request(oldest, self._asked.pop(oldest).method))
        return dropped

    def end_listening(self) -> list[tuple[Exchange, ServerMessage]]:
        """Removes the standing streams that are calls; returns each with its answer."""
        return []

    def take_lines(self) -> list[bytes]:
        """The `lines`, each once."""
        lines, self.lines = self.lines, []
        return lines

    def end_parked(self, state: str) -> None:
        """Ends the call that waits for its client under a state."""

    def ask_open(self) -> None:
        """Asks a client the questions of the child that have come for it by now."""

    def do_overdue(self) -> None:
        """Does what is due by now, as ending calls that have waited too long for their client."""

    def _park(self, message: ServerMessage) -> None:
        self._waiting.append(message)
        self._waiting_bytes += len(message.data)

    def _route_progress(self, progress: Notification) -> tuple[Exchange | None, Notification]:
        """The exchange for a `notifications/progress`, and the message with the client's token."""
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

    def _route(self, message: Request | Notification) -> Exchange | None:
        """The exchange for a message that names no call of the client, None if it has to wait."""
        if isinstance(message, Notification) and message.method == jsonrpc.CANCELLED:
            named = jsonrpc.cancelled_id_of(message)
            asked = None if named is None else self._asked.pop(named, None)
            exchange = None if asked is None else asked.exchange
            if exchange is not None and (exchange in self._posts or exchange is self._stream):
                return exchange
        newest = self._newest_streaming()
        if newest is not None and len(self._posts) == 1:
            return newest
        return self._stream or newest

    def _newest_streaming(self) -> Exchange | None:
        return next((post for post in reversed(self._posts) if post.accepts_stream), None)

    # --- streams, and clients that leave ---------------------------------------------------------

    def set_stream(self, stream: Exchange | None) -> Exchange | None:
        """Makes `stream` the standing one and offers it the waiting messages; returns the older."""
        older, self._stream = self._stream, stream
        if stream is not None:
            for message in self._waiting:
                stream.offer(message)
            self._waiting.clear()
            self._waiting_bytes = 0
        return older

    def leave(self, exchange: Exchange) -> None:
        """Detaches an exchange whose client has left: calls go on, undelivered messages wait."""
        self._posts.pop(exchange, None)
        if self._stream is exchange:
            self._stream = None
        for message in exchange.drain():
            if not message.is_response:
                self._park(message)

    def clear(self) -> tuple[list[PendingCall], Exchange | None]:
        """Empties the tables; returns the unanswered calls and the standing stream."""
        calls, stream = list(self._calls.values()), self._stream
        for table in (self._calls, self._tokens, self._posts, self._asked, self._waiting):
            table.clear()
        self._waiting_bytes = 0
        self._stream = None
        return calls, stream
