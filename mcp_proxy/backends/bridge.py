"""The bridge: one child, many exchanges.

What lives here: a child as a backend, from its start to its end. The rules of who gets what are the
switchboard's; the process is the supervisor's; sessions and HTTP are nobody's business here.

Threads: the child's reader calls `_on_line`, the supervisor `_on_exit`, request threads the rest.
One lock guards the switchboard; writing to the child happens outside it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from mcp_proxy.backends.base import Backend, Delivery
from mcp_proxy.backends.exchange import QueuedExchange
from mcp_proxy.backends.switchboard import Call, Switchboard
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    Cancelled,
    ClientError,
)
from mcp_proxy.processes.child import shown
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.servers import StdioServer
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Message, Notification, Request, Response

log = logging.getLogger(__name__)

#: Seconds that a server has to read a message, and that a cancelled call has to end by itself.
WRITE_TIMEOUT = 30.0
CANCEL_GRACE = 2.0

# Seconds until the end of a child that cannot be written to is noticed.
_NOTICE = 2.0

_NOBODY = "No client is listening that could answer"

_INITIALIZE = "initialize"
_CANCELLED = "notifications/cancelled"


class Bridge(Backend):
    """A child process as a backend; dies with the child. Raises BackendLost if that cannot start.

    `on_lost` is called once, from another thread, when the child has ended without being asked to.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        server: StdioServer,
        max_message: int,
        on_lost: Callable[[Bridge], None],
    ) -> None:
        self.name = server.name
        self.child_id = secrets.token_hex(8)
        self.started = time.monotonic()
        self._supervisor = supervisor
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards _switchboard and _lost
        self._switchboard = Switchboard()
        self._lost: str | None = None
        self._is_closed = False
        self._gone = threading.Event()
        self._child = supervisor.spawn(server, max_message, self._on_line, self._on_exit)

    def __repr__(self) -> str:
        return f"<Bridge {self._child!r} {self._switchboard!r} lost={self._lost!r}>"

    @property
    def is_alive(self) -> bool:
        """Whether messages can still be sent."""
        return self._lost is None

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for an answer."""
        return self._switchboard.has_posts

    @property
    def is_watched(self) -> bool:
        """Whether a client is listening right now."""
        return self.is_busy or self.has_stream

    @property
    def has_stream(self) -> bool:
        """Whether a client is listening to the standing stream."""
        return self._switchboard.stream is not None

    @property
    def stderr_tail(self) -> list[str]:
        """The last lines that the server wrote to stderr."""
        return self._child.stderr_tail

    # --- from the client -------------------------------------------------------------------------

    def send(
        self, requests: Sequence[Request], accepts_stream: bool, timeout: float
    ) -> QueuedExchange:
        exchange = QueuedExchange(self, len(requests), accepts_stream)
        with self._lock:
            self._require_alive()
            exchange.set_deadline(timeout, lambda: _no_answer(timeout))
            lines = [self._switchboard.enter(request, exchange) for request in requests]
        try:
            self._write(b"\n".join(lines))
        except BackendUnreached as error:
            with self._lock:
                self._switchboard.leave_exchange(exchange)
            self._gone.wait(
                _NOTICE
            )  # how it ended is a better reason than that its input is closed
            raise BackendUnreached(self._lost or str(error)) from error
        return exchange

    def submit(self, request: Request, timeout: float) -> None:
        with self._lock:
            self._require_alive()
            stream = self._switchboard.stream
            if stream is None:
                raise BackendLost("There is no stream that the answer could go to")
            line = self._switchboard.enter(request, stream, time.monotonic() + timeout)
            self._set_next_deadline(stream, lambda: _no_answer(timeout))
        self._write(line)

    def _set_next_deadline(
        self, stream: QueuedExchange, on_deadline: Callable[[], BackendError]
    ) -> None:
        """Has the stream look at its calls when the first of them is due; the lock is held."""
        due = self._switchboard.next_deadline(stream)
        if due is not None and due != stream.deadline:
            stream.set_deadline(due - time.monotonic(), on_deadline)

    def notify(self, notification: Notification) -> None:
        self._require_alive()
        if notification.method == _CANCELLED:
            self._cancel(notification)
        else:
            self._write(jsonrpc.encode(notification))

    def _cancel(self, notification: Notification) -> None:
        """Passes a cancellation on under the child's id for the newest call with that id."""
        with self._lock:
            call = self._switchboard.newest(jsonrpc.cancelled_id_of(notification))
        if call is None or call.method == _INITIALIZE:
            return  # the answer was faster, or it must not be cancelled (lifecycle page)
        params = jsonrpc.replace_field(notification.params, ("requestId",), call.wire_id)
        self._write(jsonrpc.encode(Notification(_CANCELLED, params)))
        if call.deadline is None:
            call.exchange.set_deadline(CANCEL_GRACE, Cancelled)
            return
        with self._lock:  # on the HTTP+SSE wire nobody waits for an answer any more
            self._switchboard.leave(call.wire_id)

    def respond(self, response: Response) -> None:
        with self._lock:
            is_awaited = self._switchboard.take_answer(response)
        if is_awaited:
            self._write(jsonrpc.encode(response))
        else:
            log.info("[%s] dropped a client's response that nobody waits for", self.name)

    def listen(self, after: str | None = None) -> QueuedExchange:
        stream = QueuedExchange(self, None, accepts_stream=True)
        with self._lock:
            self._require_alive()
            older = self._switchboard.set_stream(stream)
        if older is not None:
            older.end(replaced=True)
        return stream

    def end_stream(self) -> None:
        """Ends the standing stream; the client may open another one elsewhere.

        One on which answers are still to leave, as all do on HTTP+SSE, is left as it is.
        """
        with self._lock:
            stream = self._switchboard.stream
            if stream is None or self._switchboard.owes(stream):
                return
            self._switchboard.set_stream(None)
        stream.end()

    def retire(self) -> bool:
        """Ends the backend unless a client waits for an answer; whether it did."""
        with self._lock:
            if self._switchboard.has_posts:
                return False
            self._lost = self._lost or "The session goes to another replica"
        self.close()
        return True

    def close(self, reason: str = "The session was ended") -> None:
        self._is_closed = True
        self._fail_all(reason)
        self._supervisor.retire(self._child)

    def _require_alive(self) -> None:
        if self._lost is not None:
            raise BackendUnreached(self._lost)

    def _write(self, line: bytes) -> None:
        """Writes to the child; one that cannot be written to any more is stopped."""
        try:
            self._child.write(line, WRITE_TIMEOUT)
        except BackendTimeout:
            log.error("[%s] the server does not read its input; stopping it", self.name)
            self._supervisor.retire(self._child)
            raise
        except BackendUnreached:
            self._supervisor.retire(self._child)
            raise
        except BackendLost:
            # Its exit is about to be noticed, and every call will be told how it ended.
            self._supervisor.retire(self._child)

    # --- from the child --------------------------------------------------------------------------

    def _on_line(self, line: bytes) -> None:
        for message in self._parse(line):
            try:
                exchange = self._take(message)
            except ClientError as error:
                log.warning("[%s] dropped a message (%s): %s", self.name, error, shown(line))
                continue
            if exchange is not None:
                exchange.wait_for_room()

    def _parse(self, line: bytes) -> Sequence[Message]:
        """The messages in a line of output: none if it is noise, several if it is a batch."""
        try:
            parsed = jsonrpc.parse(line)
        except ClientError:
            try:
                parsed = jsonrpc.parse(jsonrpc.repair(line))
            except ClientError as error:
                if line.strip():
                    log.warning("[%s] no message on stdout (%s): %s", self.name, error, shown(line))
                return ()
        return parsed if isinstance(parsed, list) else (parsed,)

    def _take(self, message: Message) -> QueuedExchange | None:
        """Delivers one message of the child and returns where it went, None if it waits."""
        if isinstance(message, Response):
            return self._take_response(message)
        with self._lock:
            if _is_ping(message) and not self._switchboard.can_deliver():
                exchange, dropped = None, [message]
            else:
                exchange = self._switchboard.deliver(message)
                dropped = self._switchboard.overflow()
        self._give_up(dropped)
        return exchange

    def _take_response(self, response: Response) -> QueuedExchange | None:
        with self._lock:
            call = self._switchboard.leave(response.id)
            if call is not None:
                data = jsonrpc.encode(response, call.id)
                call.exchange.offer(Delivery(data, is_response=True))
                return call.exchange
        log.debug("[%s] dropped an answer that nobody waits for", self.name)
        return None

    def _give_up(self, undelivered: Sequence[Request | Notification]) -> None:
        """What no client could take is logged; a request of the child gets its answer from us."""
        for message in undelivered:
            if isinstance(message, Notification):
                log.warning("[%s] no client listens; gave up a %s", self.name, message.method)
                continue
            # A ping asks whether anybody is there: we are. Anything else only a client can answer.
            answer = Response(message.id, result=jsonrpc.as_payload({}))
            if not _is_ping(message):
                log.warning("[%s] no client listens; refused a %s", self.name, message.method)
                answer = Response(message.id, error=jsonrpc.error_payload(PROXY_ERROR, _NOBODY))
            with contextlib.suppress(BackendError):
                self._write(jsonrpc.encode(answer))

    def _on_exit(self, how: str) -> None:
        self._fail_all(f"The server ended ({how})")
        self._gone.set()
        if not self._is_closed:
            log.warning("[%s] the server ended by itself (%s)", self.name, how)
            self._on_lost(self)

    def _fail_all(self, sentence: str) -> None:
        """Ends every exchange; from now on the backend is lost. Only the first reason counts."""
        with self._lock:
            self._lost = self._lost or sentence
            calls, stream = self._switchboard.clear()
        for call in calls:
            _fail(call, BackendLost(f"{sentence} before it answered"))
        if stream is not None:
            stream.end()

    # --- from exchanges --------------------------------------------------------------------------

    def expire(self, exchange: QueuedExchange, failure: BackendError) -> None:
        """Answers what is unanswered, and tells the child not to go on with it."""
        with self._lock:
            overdue = self._switchboard.leave_overdue(exchange, time.monotonic())
            self._set_next_deadline(exchange, lambda: failure)
        for call in overdue:
            _fail(call, failure)
            if call.method != _INITIALIZE and not isinstance(failure, Cancelled) and self.is_alive:
                reason = {"requestId": call.wire_id, "reason": "The proxy's time limit has passed"}
                with contextlib.suppress(BackendError):  # then it is being stopped anyway
                    self._write(
                        jsonrpc.encode(Notification(_CANCELLED, jsonrpc.as_payload(reason)))
                    )

    def detach(self, exchange: QueuedExchange) -> None:
        """The client left: its call goes on (a disconnect is no cancellation), the rest waits."""
        with self._lock:
            self._switchboard.depart(exchange)
            dropped = self._switchboard.overflow()
        self._give_up(dropped)

    def expire_unheard(self) -> None:
        """Applies deadlines to calls whose client left: nobody else looks at those."""
        with self._lock:
            unheard = self._switchboard.unheard()
        for exchange in unheard:
            exchange.expire_if_due()


def _is_ping(message: Message) -> bool:
    return isinstance(message, Request) and message.method == "ping"


def _fail(call: Call, failure: BackendError) -> None:
    data = jsonrpc.encode_error(PROXY_ERROR, failure.message, call.id)
    call.exchange.offer(Delivery(data, is_response=True, failure=failure))


def _no_answer(timeout: float) -> BackendTimeout:
    return BackendTimeout(f"The server did not answer within {timeout:g} seconds")
