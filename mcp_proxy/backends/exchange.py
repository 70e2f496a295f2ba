"""The contract between a transport and what stands behind a session.

A transport makes an exchange, the client's view of one answer, and hands it to a backend, which
attaches a source: whoever has the messages. Whether the server is a child of this process, of
another replica, or behind HTTP shows nowhere above this line.

An exchange waits for its answer, is a stream, and is over when everything was received; it is
left when its client no longer listens, and closed when nobody reads it any more.

Threads: the source's threads offer, one thread receives, anyone may close. The byte counts are
approximate: two threads that offer at the same time may count once.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mcp_proxy.errors import (
    BackendError,
    BackendTimeout,
    BackendUnreached,
    ClientLeft,
    ProxyError,
    in_seconds,
)
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

if TYPE_CHECKING:
    from mcp_proxy.spans import CallSpans

#: Bytes that may wait for a slow client before its server's reader waits too.
MAX_BACKLOG = 4 * 1024 * 1024

# Seconds between looks at whether the client of a crowded exchange has left, and one that waits.
_ROOM_CHECK = 1.0
_LOOK = 1.0

# Messages of one stream that are logged in one round trip, at the most.
_LOGGED_TOGETHER = 64


class ServerMessage(NamedTuple):
    """One message for the client: a line of JSON.

    `is_response` tells answers from what comes before them. `failure` is set where the proxy wrote
    the answer itself because the backend gave none. `event_id` is set where the message was logged
    under it; without data it is where a stream begins.
    """

    data: bytes
    is_response: bool
    failure: BackendError | None = None
    event_id: str | None = None


_END = ServerMessage(b"", is_response=False)
_REFUSED = ServerMessage(b"", is_response=False)

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Source(Protocol):
    """Who has the messages of an exchange, and is told of what happens to it."""

    def stream_begun(self, exchange: Exchange) -> None:
        """The client gets a stream, even if nothing but the answer comes."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """The deadline has passed: whatever is unanswered is to be answered by `failure`."""

    def leave(self, exchange: Exchange) -> None:
        """The client no longer listens; a call that is running goes on, or is cancelled where
        `exchange.cancels` says so.
        """


class StreamLog(Protocol):
    """The log of one session's streams, from which they are resumed. Thread-safe."""

    def begin(self, exchange: Exchange) -> str | None:
        """Logs that a stream begins, and for which requests.

        The id of that event, None where it could not be logged.
        """

    def append(
        self, exchange: Exchange, messages: Sequence[ServerMessage], is_last: bool
    ) -> Sequence[str | None]:
        """Logs messages before they are sent; their event ids, None where they could not be
        logged. `is_last` is said of the last one.
        """

    def missed(self, exchange: Exchange, after: str) -> list[ServerMessage]:
        """The messages that were logged of the exchange's stream after an event."""

    def continue_standing(self, exchange: Exchange, after: str | None, is_taken: bool) -> bool:
        """Has a standing stream go on where an earlier one was at the event `after`.

        False where that is not possible any more since another one has begun (`is_taken`): what
        was missed is then all that the exchange has.
        """

    def read_on(self, exchange: Exchange) -> None:
        """Reads the rest of a stream into the log: its client has left, and may come back."""


class Exchange:
    """The messages that belong to `requests`, which came in one body, in order.

    Without requests it is the session's standing stream. `accepts_stream` says whether anything but
    responses may be delivered. A request that is unanswered after `timeout` seconds is answered
    with a failure; without a time limit the exchange is a standing stream.

    `cancels` says whether a client that leaves takes its requests back, as modern ones do (MCP
    2026-07-28, streamable HTTP, "Cancellation"); `headers` are those of the client that the backend
    has to know, by their names in lower case.
    """

    #: Whether its streams may be logged, so that they can be resumed.
    may_be_logged = True
    #: The spans of the requests, where they are traced.
    spans: CallSpans | None = None

    def __init__(
        self,
        requests: Sequence[Request] = (),
        accepts_stream: bool = True,
        timeout: float | None = None,
        cancels: bool = False,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        self.requests = requests
        self.accepts_stream = accepts_stream
        self.timeout = timeout
        self.cancels = cancels
        self.headers = headers
        #: Whether the client gets, or has to get, a stream.
        self.is_stream = not requests
        #: Whether everything that belongs here was received.
        self.is_over = False
        #: Whether the client has stopped listening, and nobody reads in its place.
        self.is_closed = False
        #: Whether the backend is another replica's, and what the log calls it.
        self.is_relayed = False
        self.backend = ""
        #: Called with each request whose answer is to come on this stream; what it returns is sent.
        self.on_submit: Callable[[Request], Request] | None = None
        #: Whether this was a standing stream whose place a newer one took.
        self.was_replaced = False
        #: The name of the stream in the log, empty before it has one.
        self.stream = ""
        self.deadline: float | None = None
        #: Called with each response before the client gets it; what it raises the receiver gets.
        self.on_response: Callable[[ServerMessage], object] | None = None
        #: Whether the client is known to have left; looked at each second while an answer is waited
        #: for, whenever a stream was silent, and at `wake`. None where nobody can know.
        self.has_left: Callable[[], bool] | None = None
        #: Called once when the client's side is done with the exchange.
        self.on_close: Callable[[], object] | None = None
        #: What the client gets in place of a message, when that is received; None: nothing.
        self.rewrite: Callable[[ServerMessage], ServerMessage | None] | None = None
        #: Sends the requests to another backend, at most once, when this one got nothing of them.
        self.resend: Callable[[Exchange], object] | None = None
        #: How many times in a row the call is sent anew since its client had to open a page first.
        self.pages = 0
        self._source: Source | None = None
        self._log: StreamLog | None = None
        self._is_logged = False  # that the stream begins; true where there is no log
        self._missed_after: str | None = None
        self._on_ready: Callable[[], object] | None = None
        self._read_more: Callable[[float], object] | None = None
        self._on_read: Callable[[], object] | None = None
        self._on_deadline: Callable[[], BackendError] | None = None
        self._refusal: ProxyError | None = None
        self._unanswered = len(requests)
        self._queue: queue.SimpleQueue[ServerMessage | None] = queue.SimpleQueue()
        self._ahead: deque[ServerMessage] = deque()  # what is received before what is in the queue
        self._is_ended = False  # nothing comes after what is ahead
        self._is_talkative = False  # something was offered that is no response
        self._is_left = False
        self._offered = 0  # bytes; written by the source
        self._read = 0  # bytes; written by the receiver
        self._room: threading.Event | None = None  # made when the client is slow

    def __repr__(self) -> str:
        return (
            f"<Exchange {[request.method for request in self.requests] or 'standing'}"
            f" unanswered={self._unanswered} backlog={self.backlog} stream={self.is_stream}"
            f" over={self.is_over} closed={self.is_closed}>"
        )

    @property
    def is_standing(self) -> bool:
        """Whether this may stay open for ever, so that nobody is kept waiting by it."""
        return self.timeout is None

    @property
    def is_being_logged(self) -> bool:
        """Whether to receive what comes next takes the time to log it, as far as one can know."""
        return self._log is not None and (self.is_stream or self._is_talkative)

    @property
    def has_news(self) -> bool:
        """Whether there is something to receive."""
        must_begin = self.is_stream and not self._is_logged
        return must_begin or bool(self._ahead) or self._is_ended or not self._queue.empty()

    @property
    def backlog(self) -> int:
        """Bytes that were offered and not yet received."""
        return self._offered - self._read

    @property
    def waiting(self) -> int:
        """Messages that were offered and not yet received."""
        return self._queue.qsize()

    # --- the receiving side ----------------------------------------------------------------------

    def receive(self, timeout: float) -> ServerMessage | None:
        """The next message, None if nothing came for `timeout` seconds or the exchange is over.

        A backend that is lost, silent beyond the time limit, or cancelled is no exception here:
        each request gets a response that says so. Raises ClientLeft when the client has left,
        BackendUnreached only when it turns out late that no backend got the requests, and what
        `resend` and `on_response` raise.
        """
        until = time.monotonic() + timeout
        while not self.is_over:
            if self.is_stream and not self._is_logged:
                self._log_begin()
            if self._ahead or self._is_ended:
                return self._next()
            limit = until if self.deadline is None else min(until, self.deadline)
            message = self._take(self._wait(max(0.0, limit - time.monotonic())))
            if message is not None:
                return message
            if time.monotonic() >= until and self._queue.empty():
                break
        return None

    def poll(self) -> ServerMessage | None:
        """The next message if it is there. Never waits, and unlike `receive` expires nothing."""
        while not self.is_over:
            if self.is_stream and not self._is_logged:
                self._log_begin()
            if self._ahead or self._is_ended:
                return self._next()
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return None
            message = self._take(item)
            if message is not None:
                return message
        return None

    def _wait(self, seconds: float) -> ServerMessage | None:
        """One item; None for a wake-up, or when the time, the deadline or a look has come.

        This is where the thread of a request waits for its server.
        """
        if self.requests and seconds > _LOOK:
            seconds = _LOOK
        if self._read_more is not None and self._queue.empty():
            self._read_more(seconds)
            seconds = 0.0
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            self.expire_if_due()
            item = None
        if item is None and self.has_left is not None and self.has_left():
            raise ClientLeft
        return item

    def _take(self, item: ServerMessage | None) -> ServerMessage | None:
        """What the client gets next, now that `item` has come."""
        if self._missed_after is not None:
            self._catch_up(self._missed_after)
        if item is _END:
            self._is_ended = True
        elif item is not None:
            self._note(item)
        return self._next()

    def _next(self) -> ServerMessage | None:
        message = self._ahead.popleft() if self._ahead else None
        self.is_over = self._is_ended and not self._ahead
        return message

    def _note(self, message: ServerMessage) -> None:
        if message is _REFUSED:
            assert self._refusal is not None
            self._send_again(self._refusal)
            return
        shown = self._count(message)
        if shown is None:
            return
        if self._log is None or not self.is_stream:
            self._ahead.append(shown)
            return
        together = [shown]
        try:
            if self.requests:
                self._count_what_waits(together)
        finally:
            self._ahead.extend(self._logged(self._log, together))

    def _count_what_waits(self, together: list[ServerMessage]) -> None:
        """Takes what else has come, to be logged in the same round trip.

        Not of a standing stream: what nobody has received of that goes to the next one.
        """
        while len(together) < _LOGGED_TOGETHER and not self._is_ended:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is _END:
                self._is_ended = True
            elif item is not None:
                shown = self._count(item)
                if shown is not None:
                    together.append(shown)

    def _count(self, message: ServerMessage) -> ServerMessage | None:
        """What the client gets of a message that is received; None where it gets nothing."""
        self._read += len(message.data)
        if self._room is not None:
            self._room.set()
        if self._on_read is not None:
            self._on_read()
        if self.rewrite is not None:
            shown = self.rewrite(message)
            if shown is None:
                return None
            message = shown
        if not message.is_response:
            self.is_stream = True
        elif self.requests:
            self._unanswered -= 1
            self._is_ended = self._unanswered == 0
        if not message.is_response:
            return message
        if self.spans is not None:
            failure = message.failure
            self.spans.received(message.data, "" if failure is None else failure.kind)
        if self.on_response is not None:
            self.on_response(message)
        return message

    def _send_again(self, failure: ProxyError) -> None:
        resend, self.resend = self.resend, None
        if resend is None or not isinstance(failure, BackendUnreached):
            raise failure
        resend(self)

    def begin_stream(self) -> None:
        """The client gets a stream, even if nothing but the answer comes: what is received from
        now on can be resumed, if there is a log. Harmless when repeated.
        """
        if not self.is_stream:
            self.is_stream = True
            if self._source is not None:
                self._source.stream_begun(self)
            if self._on_ready is not None:
                self._on_ready()

    def set_on_ready(self, on_ready: Callable[[], object]) -> None:
        """Has `on_ready`, which must be quick, called by whoever makes something happen here.

        For who serves many exchanges and waits for none of them. Called at once where something
        has happened already.
        """
        self._on_ready = on_ready
        if self.has_news:
            on_ready()

    def close(self) -> None:
        """The client no longer listens; a call that is running goes on, unless this `cancels` it.

        Harmless when repeated. A stream whose client may come back for the rest is read on, into
        the log.
        """
        if self._is_left:
            return
        self._is_left = True
        try:
            if self.is_over:  # nothing follows the last response
                self.is_closed = True
            elif self._log is not None and self.is_stream and self.requests:
                self._log.read_on(self)
            else:
                self._leave()
        finally:
            if self.on_close is not None:
                self.on_close()

    def _leave(self) -> None:
        self.is_closed = True
        if self._room is not None:
            self._room.set()
        if self._source is not None:
            self._source.leave(self)

    def note_sent(self) -> None:
        """The requests were sent by another thread than the client's, which may have left before
        there was a source: that learns of it now.
        """
        if self.is_closed and self._source is not None:
            self._source.leave(self)

    # --- the log ---------------------------------------------------------------------------------

    def continue_after(self, event_id: str, missed: Iterable[ServerMessage]) -> None:
        """This stream goes on where an earlier one of the same name was when its client left."""
        self._is_logged = True
        self._ahead.extend(missed)
        self._missed_after = self._ahead[-1].event_id if self._ahead else event_id

    def _catch_up(self, after: str) -> None:
        """What was logged meanwhile: whoever read the stream before may still be at it."""
        self._missed_after = None
        if self._log is not None:
            self._ahead.extend(self._log.missed(self, after))

    def _log_begin(self) -> None:
        """Logs the event with which the stream begins; it is received next."""
        self._is_logged = True
        event_id = None if self._log is None else self._log.begin(self)
        if event_id is not None:
            self._ahead.append(ServerMessage(b"", is_response=False, event_id=event_id))

    def _logged(self, log: StreamLog, messages: Sequence[ServerMessage]) -> list[ServerMessage]:
        if not self._is_logged:
            self._log_begin()
        ids = log.append(self, messages, self._is_ended)
        return [
            message._replace(event_id=event_id)
            for message, event_id in zip(messages, ids, strict=True)
        ]

    # --- the source's side -----------------------------------------------------------------------

    def attach(
        self,
        source: Source,
        log: StreamLog | None = None,
        read_more: Callable[[float], object] | None = None,
        on_read: Callable[[], object] | None = None,
        grace: float = 0.0,
    ) -> None:
        """From now on the messages come from `source`, and streams are logged in `log`.

        A source without a thread gives `read_more`: the receiver calls it, with seconds that it
        may wait, to have more offered. `on_read` is called for each message that was received.
        `grace` are seconds beyond the time limit for a source that applies the limit itself.
        """
        self._source = source
        self._log = log
        self._is_logged = log is None
        self._read_more = read_more
        self._on_read = on_read
        if self.timeout is not None:
            self.deadline = time.monotonic() + self.timeout + grace
        if self.is_stream and self.requests:
            source.stream_begun(self)

    def offer(self, message: ServerMessage) -> bool:
        """Adds a message; never blocks. False where it is left out.

        That is what comes before the answer to a modern request whose client does not read: its
        server has other clients, which cannot wait for this one.
        """
        if self.cancels and not message.is_response and self.backlog > MAX_BACKLOG:
            return False
        self._offered += len(message.data)
        if not message.is_response:
            self._is_talkative = True
        self._queue.put(message)
        if self._on_ready is not None:
            self._on_ready()
        return True

    def wait_for_room(self) -> None:
        """Returns when the client has caught up or left. Called by the reader, without any lock.

        Nobody waits for the client of a modern request (`offer`).
        """
        while not self.cancels and self._offered - self._read > MAX_BACKLOG and not self.is_closed:
            room = self._room = threading.Event()
            if self.backlog > MAX_BACKLOG and not self.is_closed:
                room.wait(_ROOM_CHECK)

    def end(self, replaced: bool = False) -> None:
        """Ends a stream after what was offered."""
        self.was_replaced = replaced
        self._put(_END)

    def refuse(self, failure: ProxyError) -> None:
        """The requests are given up before anything was offered, by the source or by who sends.

        Where the failure is BackendUnreached they are sent again, to another backend.
        """
        self._refusal = failure
        self._put(_REFUSED)

    def wake(self) -> None:
        """Has whoever waits here look again."""
        self._put(None)

    def _put(self, item: ServerMessage | None) -> None:
        self._queue.put(item)
        if self._on_ready is not None:
            self._on_ready()

    def drain(self) -> list[ServerMessage]:
        """What was offered and never received; for an exchange that nobody reads any more."""
        messages: list[ServerMessage] = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return messages
            if item is not None and item is not _END and item is not _REFUSED:
                messages.append(item)

    def set_deadline(self, at: float, failure: Callable[[], BackendError] | None = None) -> None:
        """At `at` (monotonic) everything unanswered is answered by what `failure` makes.

        Without `failure` that is what is said of a server that does not answer in `timeout`.
        """
        self._on_deadline = failure
        self.deadline = at
        self.wake()  # a receiver that waits learns of the new deadline

    @property
    def is_due(self) -> bool:
        """Whether the deadline has passed."""
        deadline = self.deadline
        return deadline is not None and time.monotonic() >= deadline

    def expire_if_due(self) -> None:
        """Acts on a deadline that has passed."""
        if self.is_due and self._source is not None:
            self.deadline = None
            make, self._on_deadline = self._on_deadline, None
            self._source.expire(self, no_answer(self.timeout or 0.0) if make is None else make())


class Backend(ABC):
    """One MCP server as one session sees it. Every method may be called from any thread.

    Raises BackendLost when the backend is gone, BackendUnreached when it is certain that it got
    nothing of what was sent.
    """

    @abstractmethod
    def send(self, exchange: Exchange) -> None:
        """Sends the requests of an exchange and attaches what delivers their messages."""

    @abstractmethod
    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        """Passes a request on whose answer, or failure, goes to the session's standing stream.

        That is how the HTTP+SSE wire of 2024-11-05 works. Raises BackendLost also when there is no
        such stream. As with what follows, nothing is waited for any longer once `has_left` says
        that the client has left, which raises ClientLeft; what has gone on its way may arrive.
        """

    @abstractmethod
    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        """Passes a notification on."""

    @abstractmethod
    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        """Passes on the answer to a request of the server; drops one that nobody waits for."""

    @abstractmethod
    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        """Makes an exchange the session's standing stream; an older one ends.

        `after` names the last event that the client got of an earlier one, which then goes on where
        it was; unless another has begun meanwhile: then what the client missed is all it gets.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the backend and every exchange with it; returns before the server has stopped."""


def wait_for(
    event: threading.Event, timeout: float, has_left: Callable[[], bool] | None = None
) -> bool:
    """Whether an event comes within `timeout` seconds, for which the thread of a request waits.

    Raises ClientLeft when `has_left`, which is looked at each second, says so.
    """
    until = time.monotonic() + timeout
    while not event.wait(max(0.0, min(_LOOK, until - time.monotonic()))):
        if has_left is not None and has_left():
            raise ClientLeft
        if time.monotonic() >= until:
            return False
    return True


def no_answer(timeout: float) -> BackendTimeout:
    """The failure of a call that was not answered in time."""
    return BackendTimeout(f"The server did not answer within {in_seconds(timeout)}")
