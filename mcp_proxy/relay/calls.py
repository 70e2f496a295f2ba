"""Both sides of a relayed call: at the replica of the client, and at the owner of the child.

Nothing that comes late is executed: a replica that was frozen finds its mailbox gone, or what it
had taken out of it stale, and says so to whoever asked.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from mcp_proxy.backends.bridge import WRITE_TIMEOUT
from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage, wait_for
from mcp_proxy.background import KeyedExecutor
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendDraining,
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnavailable,
    BackendUnreached,
    InvalidRequest,
    ProxyError,
    RequestId,
)
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import (
    Channel,
    Close,
    Delivered,
    Detach,
    Done,
    Ended,
    Frame,
    Listen,
    Message,
    Refused,
    SendOneWay,
    SendRequests,
    StartStream,
)
from mcp_proxy.relay.sender import Call, Sender
from mcp_proxy.traces import Tracing
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.outcomes import CLIENT_LEFT

if TYPE_CHECKING:
    from mcp_proxy.spans import CallSpans

log = logging.getLogger(__name__)

#: The child of an id, None where there is none of that id; for a call or a stream that begins, or
#: for what is about one.
Find = Callable[[str, bool], Backend | None]

# Seconds beyond its own deadline in which the owner is expected to say that it has passed.
_GRACE = 5.0

# Seconds for which the end of a session waits for the replica that has its child.
_CLOSE_TIME = 5.0


# Children of this replica that are served to others at the same time.
_EXECUTOR_WIDTH = 64

# Streams of this replica's children that are logged for other replicas' clients at the same time.
_LOGGER_WIDTH = 8

# What tells the spans of a replica to which a call is relayed.
_RELAYED = {"mcp_proxy.relayed": True}

# Inbound calls that are over, and remembered: an envelope may come twice.
_REMEMBERED = 65_536


class Calls:
    """Every call of this replica, to others and from them, by the name of its channel.

    `own` is this replica's id; `find` knows its children by their ids. Thread-safe.
    """

    def __init__(self, own: str, sender: Sender, find: Find) -> None:
        self.find = find
        self._own = own
        self._sender = sender
        self._executor = KeyedExecutor("mcp-relay-executor", _EXECUTOR_WIDTH)
        self._logger = KeyedExecutor("mcp-relay-logger", _LOGGER_WIDTH)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards what follows
        self._calls: dict[str, Call] = {}
        self._over: set[str] = set()
        self._over_order: deque[str] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def all(self) -> list[Call]:
        """The calls that are under way."""
        with self._lock:
            return list(self._calls.values())

    def channel_to(self, replica: str) -> Channel:
        """A new channel to another replica."""
        return Channel(f"{self._own}/{next(self._numbers)}", self._own, replica)

    def enter(self, call: Call, first: protocol.ToOwner) -> None:
        """A call to another replica begins with this message, as soon as it is sent."""
        call.channel.put(protocol.encode(first))
        with self._lock:
            self._calls[call.channel.name] = call

    def send(self, call: Call) -> None:
        """Sends what a call has to say, by this thread or another; it may wait for the store."""
        self._sender.send(call)

    def of(self, frame: Frame) -> Call | None:
        """Who a frame is for; the first frame of a channel begins an inbound call."""
        with self._lock:
            known = self._calls.get(frame.channel)
            if known is not None:
                return known
            is_ours = frame.channel.startswith(f"{self._own}/")
            if not frame.is_first or is_ours or frame.channel in self._over:
                return None
            channel = Channel(frame.channel, self._own, frame.sender)
            call = self._calls[frame.channel] = InboundCall(channel, self)
            return call

    def wake(self, call: Call) -> None:
        """A call may have something to send."""
        self._sender.put(call)

    def submit(self, key: str, act: Callable[[], object]) -> None:
        """Has `act` called by another thread, after what was submitted for the key before."""
        self._executor.submit(key, act)

    def log(self, call: InboundCall) -> bool:
        """Has another thread take what a call has for its client, and log it; False where the
        system has no thread to give.
        """
        try:
            self._logger.submit(call.channel.name, call.take_logged)
        except RuntimeError:
            return False
        return True

    def forget(self, call: Call) -> None:
        """The call is over."""
        name = call.channel.name
        with self._lock:
            if isinstance(self._calls.pop(name, None), InboundCall):
                self._over.add(name)
                self._over_order.append(name)
                if len(self._over_order) > _REMEMBERED:
                    self._over.discard(self._over_order.popleft())

    def begin_no_more(self) -> None:
        """From now on what other replicas ask for is not begun."""
        self._executor.close()

    def refuse_unbegun(self) -> None:
        """Tells other replicas which of their calls were not begun, so that others may be asked."""
        for call in self.all():
            if isinstance(call, InboundCall):
                call.refuse_unless_begun()

    def close(self) -> None:
        """Ends every call."""
        self.begin_no_more()
        for call in self.all():
            if isinstance(call, InboundCall):
                call.leave()
            elif isinstance(call, (OutboundCall, OneWayCall)):
                call.fail(BackendDraining("This replica is shutting down"))
        self._logger.close()


# --- at the replica of the client ----------------------------------------------------------------


class OutboundCall(Call):
    """Requests that another replica's child answers, or its standing stream: an exchange's source.

    The exchange is read by one thread; everything else here may come from any.
    """

    def __init__(self, calls: Calls, replica: str, exchange: Exchange) -> None:
        self.channel = calls.channel_to(replica)
        self._calls = calls
        self._exchange = exchange
        self._lock = threading.Lock()  # guards _unanswered
        self._unanswered = [request.id for request in exchange.requests]
        self._is_standing = not exchange.requests
        self._is_accepted = threading.Event()  # or refused, of a standing stream
        self._refusal: BackendError | None = None

    def __repr__(self) -> str:
        return f"<OutboundCall {self.channel!r} {self._exchange!r}>"

    # --- from the exchange -----------------------------------------------------------------------

    def stream_begun(self, exchange: Exchange) -> None:
        if self._unanswered:
            self._send(StartStream())

    def note_read(self) -> None:
        """The client's side has taken a message out."""
        if self.channel.note_read():
            self._calls.wake(self)

    def leave(self, exchange: Exchange) -> None:
        if self._is_standing or self._unanswered:
            self._send(Detach())

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        self._fail(failure)
        self._send(Detach())

    def _send(self, message: protocol.ToOwner) -> None:
        self.channel.put(protocol.encode(message))
        self._calls.wake(self)

    # --- from the owner --------------------------------------------------------------------------

    @property
    def is_awaited(self) -> bool:
        return bool(self._unanswered)

    def outgoing(self) -> list[Frame]:
        frames = self.channel.outgoing()
        if self._exchange.is_closed and self.channel.is_drained:
            self._calls.forget(self)
        return frames

    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        received = protocol.decode_from_owner(message)
        if isinstance(received, Message):
            failure = None if received.failure is None else protocol.error_of(received.failure)
            if received.is_response:
                self._note_answered(received.data)
            offered = ServerMessage(received.data, received.is_response, failure, received.event_id)
            if not self._exchange.offer(offered):
                self.note_read()  # left out: the owner may send more
            if not self._is_standing and not self._unanswered:
                self._calls.forget(self)
        elif isinstance(received, Done):
            self.channel.note_read()
            self._is_accepted.set()
        elif isinstance(received, Ended):
            self._exchange.end(received.replaced)
            self._calls.forget(self)
        else:
            self.fail(protocol.error_of(received.failure))

    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        self.fail(_loss(self.channel, sentence, is_gone))

    def fail(self, failure: BackendError) -> None:
        """Ends the call: whatever is unanswered is answered by `failure`."""
        self._fail(failure)
        self._calls.forget(self)

    def _note_answered(self, data: bytes) -> None:
        with self._lock:
            if len(self._unanswered) <= 1:
                self._unanswered.clear()
                return
        answer = jsonrpc.parse_message(data)
        with self._lock:
            if isinstance(answer, Response) and answer.id in self._unanswered:
                self._unanswered.remove(answer.id)

    def _fail(self, failure: BackendError) -> None:
        """Answers what is unanswered; a standing stream ends, unless it never began."""
        with self._lock:
            unanswered, self._unanswered = self._unanswered, []
        if self._is_standing:
            self._end_standing(failure)
        elif unanswered and isinstance(failure, BackendUnreached):
            self._exchange.refuse(failure)
        else:
            self._answer(unanswered, failure)

    def _answer(self, unanswered: list[RequestId], failure: BackendError) -> None:
        for request_id in unanswered:
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request_id)
            self._exchange.offer(ServerMessage(data, is_response=True, failure=failure))

    def _end_standing(self, failure: BackendError) -> None:
        if not self._is_accepted.is_set():
            self._refusal = failure
            self._is_accepted.set()
        elif self._refusal is None:  # else the exchange may have gone to another backend
            self._exchange.end()

    def require_accepted(self, timeout: float) -> None:
        """Returns when the owner has made this the standing stream; raises why it has not.

        Without this an older stream could arrive there after a newer one. Raises ClientLeft.
        """
        try:
            if not wait_for(self._is_accepted, timeout, self._exchange.has_left):
                self._refusal = _silent()
            if self._refusal is not None:
                raise self._refusal
        except ProxyError:
            self._send(Detach())
            self._calls.forget(self)
            raise


class OneWayCall(Call):
    """Something that a child is told, and that is waited for until the owner has told it."""

    def __init__(self, calls: Calls, replica: str) -> None:
        self.channel = calls.channel_to(replica)
        self._calls = calls
        self._done = threading.Event()
        self._failure: BackendError | None = None

    @property
    def is_awaited(self) -> bool:
        return not self._done.is_set()

    def outgoing(self) -> list[Frame]:
        return self.channel.outgoing()

    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        received = protocol.decode_from_owner(message)
        if isinstance(received, Refused):
            self._failure = protocol.error_of(received.failure)
        if isinstance(received, (Refused, Done)):
            self._finish()

    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        self.fail(_loss(self.channel, sentence, is_gone))

    def fail(self, failure: BackendError) -> None:
        """Ends the call: whoever waits for it gets `failure`."""
        self._failure = failure
        self._finish()

    def _finish(self) -> None:
        self._done.set()
        self._calls.forget(self)

    def run(
        self,
        message: protocol.ToOwner,
        timeout: float,
        has_left: Callable[[], bool] | None,
    ) -> None:
        """Returns when it is done; raises why it is not, or ClientLeft: it may be done yet."""
        self._calls.enter(self, message)
        self._calls.send(self)
        try:
            if not wait_for(self._done, timeout, has_left):
                raise _silent()
        finally:
            self._calls.forget(self)
        if self._failure is not None:
            raise self._failure


class RemoteBackend(Backend):
    """A child of another replica."""

    def __init__(self, calls: Calls, replica: str, child: str) -> None:
        self._calls = calls
        self._replica = replica
        self._child = child

    def __repr__(self) -> str:
        return f"<RemoteBackend {self._replica}/{self._child}>"

    def send(self, exchange: Exchange) -> None:
        timeout = exchange.timeout or 0.0
        exchange.is_relayed = True
        exchange.backend = f"worker:{self._replica}"
        requests = exchange.requests
        if exchange.spans is not None:  # the other side reads the context in them
            requests = exchange.spans.sent(requests, {"mcp_proxy.backend": exchange.backend})
        lines = list(map(jsonrpc.encode, requests))
        call = OutboundCall(self._calls, self._replica, exchange)
        first = SendRequests(
            self._child,
            lines,
            exchange.accepts_stream,
            timeout,
            exchange.cancels,
            dict(exchange.headers),
        )
        self._calls.enter(call, first)
        # The owner applies the time limit; only where it is silent itself this side does.
        exchange.attach(call, on_read=call.note_read, grace=_GRACE)
        self._calls.send(call)

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        self._send_one_way(jsonrpc.encode(request), has_left, timeout)

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        self._send_one_way(jsonrpc.encode(notification), has_left)

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        self._send_one_way(jsonrpc.encode(response), has_left)

    def _send_one_way(
        self, line: bytes, has_left: Callable[[], bool] | None, timeout: float = 0.0
    ) -> None:
        message = SendOneWay(self._child, line, timeout)
        call = OneWayCall(self._calls, self._replica)
        call.run(message, WRITE_TIMEOUT + _GRACE, has_left)

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        call = OutboundCall(self._calls, self._replica, exchange)
        self._calls.enter(call, Listen(self._child, after))
        exchange.attach(call, on_read=call.note_read)
        self._calls.send(call)
        call.require_accepted(WRITE_TIMEOUT + _GRACE)

    def close(self) -> None:
        """Ends the child, and returns when its owner has; one that is silent is not waited for."""
        call = OneWayCall(self._calls, self._replica)
        with contextlib.suppress(BackendError):
            call.run(Close(self._child), _CLOSE_TIME, None)


def _loss(channel: Channel, sentence: str, is_gone: bool) -> BackendError:
    """The loss of the other side, by whether it may have got something and may be alive."""
    if channel.delivered is not Delivered.NO:
        return BackendLost(sentence)
    return BackendUnreached(sentence) if is_gone else BackendUnavailable(sentence)


def _silent() -> BackendTimeout:
    return BackendTimeout("The replica that holds the session does not answer")


# --- at the owner of the child -------------------------------------------------------------------


class InboundCall(Call):
    """One request, notification, response or stream of a client of another replica."""

    def __init__(self, channel: Channel, calls: Calls) -> None:
        self.channel = channel
        self._calls = calls
        self._since = time.monotonic()
        self._key = channel.name  # until it is known which child it is about
        self._exchange: Exchange | None = None
        self._spans: CallSpans | None = None
        self._reading = threading.Lock()  # one thread reads; guards _has_begun and _is_done
        self._has_begun = False
        self._is_done = False

    def __repr__(self) -> str:
        return f"<InboundCall {self.channel!r} {self._exchange!r}>"

    # --- from the other side: the listener's thread, then the executor's --------------------------

    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        received = protocol.decode_to_owner(message)
        if not isinstance(received, (StartStream, Detach)):
            self._key = received.child
        self.channel.note_read()
        self._calls.submit(self._key, lambda: self._act(received, is_fresh))

    def _act(self, received: protocol.ToOwner, is_fresh: Callable[[], bool]) -> None:
        if isinstance(received, Detach):
            self.leave()
        elif not isinstance(received, StartStream):
            self._begin(received, is_fresh)
        elif self._exchange is not None:
            self._exchange.begin_stream()

    def _begin(
        self, received: SendRequests | SendOneWay | Listen | Close, is_fresh: Callable[[], bool]
    ) -> None:
        try:
            if not is_fresh():
                raise BackendUnavailable("The replica that holds the session was away; try again")
            with self._reading:
                if self._is_done:  # refused, or nobody listens any more
                    return
                self._has_begun = True
            begins = isinstance(received, (SendRequests, Listen))
            backend = self._calls.find(received.child, begins)
            if backend is None:
                raise BackendUnreached("The server of the session is not here any more")
            self._pass_on(backend, received)
        except BackendError as error:
            self._finish(Refused(protocol.failure_of(error)))
        except ProxyError as error:
            self._finish(Refused(("BackendLost", error.message)))
        except Exception:
            log.exception("serving a client of another replica failed")
            self._finish(Refused(("BackendLost", "The request could not be served")))

    def _pass_on(
        self, backend: Backend, received: SendRequests | SendOneWay | Listen | Close
    ) -> None:
        if isinstance(received, SendRequests):
            requests = [_as_request(line) for line in received.lines]
            exchange = Exchange(
                requests,
                received.accepts_stream,
                received.timeout or None,
                received.cancels,
                received.headers,
            )
            if Tracing.tracer is not None:
                self._spans = exchange.spans = Tracing.tracer.spans(
                    requests, _RELAYED, since=self._since, ends_when_received=True
                )
            backend.send(exchange)
            self._serve(exchange)
        elif isinstance(received, Listen):
            exchange = Exchange()
            backend.listen(exchange, received.after)
            self.channel.put(protocol.encode(Done()))
            self._serve(exchange)
            self._calls.wake(self)
        else:
            if isinstance(received, Close):
                backend.close()
            else:
                _send_to_child(backend, received)
            self._finish(Done())

    def _serve(self, exchange: Exchange) -> None:
        self._exchange = exchange
        exchange.set_on_ready(self._on_ready)

    def _on_ready(self) -> None:
        """By whoever makes something happen: the child's reader, mostly, in the bridge's lock."""
        if not self._is_left_to_logger():
            self._calls.wake(self)

    def _is_left_to_logger(self) -> bool:
        """Whether another thread takes what there is, since logging it would hold others up."""
        exchange = self._exchange
        if exchange is None or self._is_done or not exchange.is_being_logged:
            return False
        return not exchange.has_news or self._calls.log(self)

    def _finish(self, last: protocol.FromOwner) -> None:
        self._is_done = True
        if self._spans is not None:
            failure = protocol.error_of(last.failure).kind if isinstance(last, Refused) else ""
            self._spans.close(failure)
        self.channel.put(protocol.encode(last))
        self._calls.wake(self)

    @property
    def is_awaited(self) -> bool:
        return self._exchange is None or not self._exchange.is_standing

    def is_awaited_since(self, before: float) -> bool:
        """Whether a client has been waiting for an answer since before that (monotonic) time."""
        return self._since < before and self.is_awaited

    # --- to the other side: the sender's thread, or the logger's ----------------------------------

    def outgoing(self) -> list[Frame]:
        frames = self.channel.outgoing()
        if not self._is_left_to_logger():
            while self._has_put_next():
                frames += self.channel.outgoing()
        if self._is_done:
            frames += self.channel.outgoing()
            if self.channel.is_drained:
                self._calls.forget(self)
        return frames

    def take_logged(self) -> None:
        """Takes what there is for the client, as far as there is room, and sends it."""
        has_put = False
        while self._has_put_next():
            has_put = True
        if has_put or self._is_done:
            self._calls.send(self)

    def _has_put_next(self) -> bool:
        """Puts the next message for the client; False where there is none yet, or none any more.

        Where the log of the stream fails, or no backend got the requests, the call ends.
        """
        exchange = self._exchange
        if exchange is None or self._is_done or not self.channel.has_room:
            return False
        try:
            with self._reading:
                if self._is_done:
                    return False
                message = exchange.poll()
                if message is not None:
                    self.channel.put(protocol.encode(_as_message(message)))
                if exchange.is_over:
                    if not exchange.requests:
                        self.channel.put(protocol.encode(Ended(exchange.was_replaced)))
                    self._is_done = True
        except BackendUnreached as error:  # so that the other side sends it again
            self._finish(Refused(protocol.failure_of(error)))
            return False
        except ProxyError as error:
            log.warning("a stream for another replica ends: %s", error)
            self._finish(Refused(("BackendLost", error.message)))
            self._calls.submit(self._key, self.leave)
            return False
        if exchange.is_over:
            exchange.close()
        return message is not None

    # --- the end ---------------------------------------------------------------------------------

    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        """The client's replica is gone: nobody listens any more."""
        log.info("nobody listens to a relayed call any more: %s", sentence)
        self._calls.submit(self._key, self.leave)

    def refuse_unless_begun(self) -> None:
        """This replica leaves: what was not begun others may serve."""
        with self._reading:
            if self._has_begun or self._is_done:
                return
            self._is_done = True
        error = BackendUnreached("The replica that held the session has left")
        self._finish(Refused(protocol.failure_of(error)))

    def leave(self) -> None:
        """Nobody listens any more."""
        with self._reading:
            self._is_done = True
        if self._exchange is not None:
            self._exchange.close()
        if self._spans is not None:
            self._spans.close(CLIENT_LEFT)
        self._calls.forget(self)

    def expire_if_due(self) -> None:
        exchange = self._exchange
        if exchange is not None and exchange.is_due:
            # Not by the thread that asks: telling the child may take time.
            self._calls.submit(self._key, exchange.expire_if_due)


def _send_to_child(backend: Backend, received: SendOneWay) -> None:
    message = jsonrpc.parse_message(received.line)
    if isinstance(message, Notification):
        backend.notify(message)
    elif isinstance(message, Response):
        backend.respond(message)
    else:
        backend.submit(message, received.timeout)


def _as_request(line: bytes) -> Request:
    """The request in a line; raises ClientError where another replica sent something else."""
    message = jsonrpc.parse(line)
    if not isinstance(message, Request):
        raise InvalidRequest("What another replica passed on is no request")
    return message


def _as_message(message: ServerMessage) -> Message:
    failure = None if message.failure is None else protocol.failure_of(message.failure)
    return Message(message.data, message.is_response, message.event_id, failure)
