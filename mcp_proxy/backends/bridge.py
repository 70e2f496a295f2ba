"""The bridge: a child as a backend, from its start to its exit, with many exchanges.

The switchboard decides which exchange gets a message; the supervisor owns the process. Sessions and
HTTP are unknown here.

Threads: the child's reader calls `_on_line`, the supervisor `_on_exit`, request threads the rest.
One lock guards the switchboard; writing to the child happens outside it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from msgspec import UNSET

from mcp_proxy.backends.exchange import (
    Exchange,
    ServerMessage,
    no_answer,
)
from mcp_proxy.backends.owned import OwnedBackend, Peer, Starter, called_by
from mcp_proxy.backends.switchboard import PendingCall, Switchboard
from mcp_proxy.background import Reader
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendExited,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    Cancelled,
    ClientError,
    ClientLeft,
    RequestId,
)
from mcp_proxy.processes.child import LineStart, shown
from mcp_proxy.processes.noise import Brake, NoiseLog
from mcp_proxy.servers import Served
from mcp_proxy.wire import jsonrpc, mending, refusals
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.jsonrpc import Message, Notification, Request, Response
from mcp_proxy.wire.tools import LIST, ToolFilter

log = logging.getLogger(__name__)

#: Seconds that a server has to read a message, and that a cancelled call has to end by itself.
WRITE_TIMEOUT = 30.0
CANCEL_GRACE = 2.0

#: How many of a server's lines that are no messages, and that reach nobody, are shown.
NOISE_SHOWN = 5

# Seconds to wait for the exit of a child that has closed its input.
_NOTICE = 1.0

_TOO_LONG = "the line is longer than max_message_bytes allows"

_UNTAKEN = "The server took nothing of the request before its client left"

_BY_NOBODY = contextlib.nullcontext()

_NOBODY = "No client is listening that could answer"

# What a server takes before it was told that it is initialized (MCP 2025-11-25, lifecycle).
_EARLY = frozenset({INITIALIZE, "ping"})


class Bridge(OwnedBackend):
    """A child process as a backend. Raises BackendLost or Overloaded if it cannot be started.

    `on_lost` is called once, from any thread, when the child has exited without being stopped by
    `close`, or cannot be used any more. `tools` says which tools are hidden, just now.
    """

    def __init__(
        self,
        starter: Starter,
        server: Served,
        max_message: int,
        on_lost: Callable[[OwnedBackend], object],
        switchboard: Switchboard | None = None,
        tools: Callable[[], ToolFilter | None] | None = None,
    ) -> None:
        super().__init__()
        self._tools = tools or _all_tools
        self._starter = starter
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards _switchboard, _held_back and _lost
        self._switchboard = Switchboard() if switchboard is None else switchboard
        # What waits for the calls in flight to end, and is for another backend then.
        self._held_back: dict[Exchange, None] = {}
        # Exchanges that are being written, and the calls of those when the child was lost: only the
        # writer will know whether the child got them.
        self._unwritten: set[Exchange] = set()
        self._left_to_writers: dict[Exchange, list[tuple[PendingCall, BackendLost]]] = {}
        self._lost: str | None = None  # why the backend is lost
        self._is_closed = False
        self._was_reported = False  # whether on_lost was called
        # Whether the child has answered initialize: before that a client can answer nothing.
        self._has_answered = False
        #: Whether the child waits for notifications/initialized, and whether it got ours.
        self._is_initializing = False
        self._was_told = False
        self._has_exited = threading.Event()
        self._noise = NoiseLog(server.name, "lines on stdout were no messages", NOISE_SHOWN)
        self._undelivered = NoiseLog(server.name, "messages reached no client", NOISE_SHOWN, 0.1)
        self._brake = Brake()
        self._on_initialized: Callable[[], object] | None = None
        #: Called with each notification of the child; what it returns True for goes to nobody.
        self.on_notice: Callable[[Notification], bool] | None = None
        #: Whether an exchange was answered without the child; called before it is sent.
        self.has_answered: Callable[[Exchange], bool] | None = None
        self._child: Peer = starter.spawn(server, max_message, self._on_exit, self._on_mute)
        starter.read(self._child, self._on_line)

    @property
    def name(self) -> str:
        return self._child.label

    @property
    def location(self) -> str:
        """What access lines call the server: its process, or its URL."""
        return f"pid:{self._child.pid}" if self._child.pid else self._child.label

    @property
    def _span_attributes(self) -> dict[str, str | int]:
        transport = "pipe" if self._child.pid else "tcp"
        return {"network.transport": transport, "mcp_proxy.backend": self.location}

    def note_session(self, session_id: str) -> None:
        self._child.session = session_id

    def __repr__(self) -> str:
        return f"<Bridge {self._child!r} {self._switchboard!r} lost={self._lost!r}>"

    @property
    def is_busy(self) -> bool:
        return self._switchboard.has_posts or bool(self._held_back)

    @property
    def is_watched(self) -> bool:
        return self.is_busy or self.has_stream

    @property
    def has_stream(self) -> bool:
        """Whether a client is listening to the standing stream."""
        return self._switchboard.stream is not None

    @property
    def lost_reason(self) -> str:
        """Why the backend is lost, in a sentence without its full stop; empty while it is not."""
        return self._lost or ""

    @property
    def stderr_tail(self) -> list[str]:
        """The last lines that the server wrote to stderr."""
        return self._child.stderr_tail

    def is_of_a_call(self, progress: Notification) -> bool:
        """Whether a `notifications/progress` of the child has the token of a call in flight."""
        with self._lock:
            return self._switchboard.is_of_a_call(progress)

    def speak(self, switchboard: Switchboard) -> None:
        """From now on the child's messages are delivered as `switchboard` says.

        For a child of which it has just been learnt what it speaks; no call is in flight.
        """
        with self._lock:
            switchboard.continue_from(self._switchboard)  # no id is used twice
            self._switchboard = switchboard

    # --- from the client -------------------------------------------------------------------------

    def send(self, exchange: Exchange) -> None:
        self.last_used = time.monotonic()
        self.was_called = exchange.requests[0].method != INITIALIZE
        requests, tools = exchange.requests, self._tools()
        if tools is not None:
            requests = _admitted(exchange, tools)
            if not requests:
                return
        if self.has_answered is not None and self.has_answered(exchange):
            return
        headers = exchange.headers
        self._child.headers = headers or self._child.headers
        is_logged = exchange.accepts_stream and exchange.may_be_logged
        exchange.attach(self, self.log if is_logged else None)
        exchange.backend = self.location
        if exchange.spans is not None:
            requests = exchange.spans.sent(requests, self._span_attributes)
            headers = {**self._child.headers, **exchange.spans.headers()}
        lines: list[bytes] = []
        with self._lock:
            if (self.is_outdated or not self.is_alive) and self._holds_back(exchange):
                return
            # Of several calls each can be cancelled, so each has the deadline for itself.
            deadline = exchange.deadline if len(exchange.requests) > 1 else None
            told = self._initialized_before(requests) if self._is_initializing else []
            lines += told
            for request in requests:
                lines.append(self._switchboard.enter(request, exchange, deadline))
            line = _joined(lines)
            if not line:
                return  # the answer is there already, or comes without the child
            self._unwritten.add(exchange)
        try:
            with called_by(headers) if headers else _BY_NOBODY:
                self._write(line, exchange.has_left)
        except ClientLeft:
            self._forget_unwritten(exchange, bool(told))
            raise
        except BackendUnreached as error:
            if not self._forget_unwritten(exchange):
                return  # the client has cancelled them meanwhile, or their time was over
            # The exit status is a better reason than the closed input. The owner looks elsewhere.
            self._has_exited.wait(_NOTICE)
            raise BackendExited(self._lost or str(error)) from error
        finally:
            self._unwritten.discard(exchange)
            if not self.is_alive:  # asked after the line above, so that none is missed
                self._fail_written(exchange)

    def _forget_unwritten(self, exchange: Exchange, with_ours: bool = False) -> bool:
        """Removes the calls of an exchange of which the child got nothing; False where all of them
        are answered already. `with_ours`: nor of our notifications/initialized before it.
        """
        with self._lock:
            if with_ours:
                self._note_unsaid()
            was_left = self._left_to_writers.pop(exchange, None) is not None
            return bool(self._switchboard.pop_exchange(exchange)) or was_left

    def _fail_written(self, exchange: Exchange) -> None:
        """Ends the calls that the pipe has taken, but the child cannot answer any more."""
        with self._lock:
            left = self._left_to_writers.pop(exchange, ())
        for call, failure in left:
            _fail(call, failure)

    def _holds_back(self, exchange: Exchange) -> bool:
        """Whether an exchange waits for the calls in flight to end, as those have overlapped for so
        long. Raises BackendExited where the backend is lost. The lock is held.
        """
        self._require_alive()
        if time.monotonic() < self.waits_until or not self._switchboard.is_calling:
            return False
        self._held_back[exchange] = None
        return True

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        tools = self._tools()
        with self._lock:
            self._require_alive()
            stream = self._switchboard.stream
            if stream is None:
                raise BackendExited("There is no stream for the answer")
            if tools is not None:
                try:
                    request = tools.admitted(request)
                except ClientError as error:
                    stream.offer(_refusal(request, error))
                    return
            deadline = time.monotonic() + timeout
            lines = self._initialized_before([request]) if self._is_initializing else []
            if stream.on_submit is not None:
                request = stream.on_submit(request)
            lines.append(self._switchboard.enter(request, stream, deadline))
            if stream.deadline is None or deadline < stream.deadline:
                stream.set_deadline(deadline, lambda: no_answer(timeout))
        line = _joined(lines)
        if not line:
            return
        try:
            self._write(line, has_left)
        except BackendError:
            pass  # then it is stopped, which answers the call
        except ClientLeft:
            with self._lock:
                call = self._switchboard.newest(request.id)
                if call is not None:
                    self._switchboard.pop(call.wire_id)
                if len(lines) > 1:
                    self._note_unsaid()
            if call is not None:
                _fail(call, BackendError(_UNTAKEN))
            raise

    def _initialized_before(self, requests: Sequence[Request]) -> list[bytes]:
        """What the child has to hear before these requests, as the client's own was lost.

        Many servers refuse everything until then. The lock is held.
        """
        if all(request.method in _EARLY for request in requests):
            return []
        self._is_initializing, self._was_told = False, True
        log.info("[%s] a client's %s was lost; the server gets ours", self.name, INITIALIZED)
        return [self._switchboard.notice(Notification(INITIALIZED))]

    def _note_unsaid(self) -> None:
        """Our notifications/initialized was not written with its request. The lock is held."""
        self._is_initializing, self._was_told = True, False

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        self.last_used = time.monotonic()
        self._require_alive()
        tools = self._tools()
        if tools is not None and not tools.admits(notification):
            log.info("[%s] dropped a %s that asks for no answer", self.name, notification.method)
            return
        if notification.method == jsonrpc.CANCELLED:
            self._cancel(notification, has_left)
            return
        is_initialized = notification.method == INITIALIZED
        if is_initialized and not self._has_to_know():
            return
        with self._lock:
            line = self._switchboard.notice(notification)
        try:
            if line:
                self._write(line, has_left)
        except ClientLeft:
            if is_initialized:
                with self._lock:
                    self._is_initializing = True  # so that it gets ours
            raise

    def _has_to_know(self) -> bool:
        """Whether the client's notifications/initialized is to be passed on: not after ours."""
        with self._lock:
            self._is_initializing = False
            was_told, self._was_told = self._was_told, False
            return not was_told

    def _cancel(self, notification: Notification, has_left: Callable[[], bool] | None) -> None:
        """Passes a cancellation on under the child's id for the newest call with that id."""
        request_id = jsonrpc.cancelled_id_of(notification)
        with self._lock:
            call = self._switchboard.newest(request_id)
            if call is not None and not call.is_at_child:
                self._switchboard.pop(call.wire_id)
            held = [one for one in self._held_back if [r.id for r in one.requests] == [request_id]]
        for exchange in held:
            self._answer_held_back(exchange, Cancelled())
        if call is None or call.method == INITIALIZE:
            return  # answered already, or never to be cancelled (MCP 2025-11-25, cancellation)
        if not call.is_at_child:
            if call.exchange.requests:
                _fail(call, Cancelled())
            return
        params = jsonrpc.replace_field(notification.params, ("requestId",), call.wire_id)
        self._write(jsonrpc.encode(Notification(jsonrpc.CANCELLED, params)), has_left)
        if not call.exchange.requests:
            with self._lock:  # over HTTP+SSE a cancelled call needs no answer
                self._switchboard.pop(call.wire_id)
            return
        until = time.monotonic() + CANCEL_GRACE
        if call.deadline is not None:
            with self._lock:
                self._switchboard.set_deadline(call, min(until, call.deadline))
        exchange = call.exchange  # of which a second cancellation does not lengthen the time
        earlier = until if exchange.deadline is None else exchange.deadline
        exchange.set_deadline(min(until, earlier), Cancelled)

    def _answer_held_back(self, exchange: Exchange, failure: BackendError) -> None:
        """Ends an exchange that waits for the calls in flight; does nothing to any other."""
        with self._lock:
            if exchange not in self._held_back:
                return
            del self._held_back[exchange]
        for request in exchange.requests:
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
            exchange.offer(ServerMessage(data, is_response=True, failure=failure))

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        self.last_used = time.monotonic()
        with self._lock:
            line = self._switchboard.take_answer(response)
        if line is None:
            log.info("[%s] dropped a client's response to no pending request", self.name)
        elif line:
            self._write(line, has_left)

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        self._require_alive()
        exchange.attach(self, self.log)
        if self.log is not None and not self.log.continue_standing(
            exchange, after, self.has_stream
        ):
            exchange.end(replaced=True)
            return
        self.deliver_to(exchange)

    def deliver_to(self, exchange: Exchange) -> None:
        """Has what names no call come on this exchange from now on, to which the bridge is attached
        already; an older one ends.
        """
        with self._lock:
            self._require_alive()
            older = self._switchboard.set_stream(exchange)
        if older is not None:
            older.end(replaced=True)
        self._write_lines()

    def say(self, message: bytes) -> bool:
        """Puts a message of ours on the standing stream; False where there is none. Never waits."""
        with self._lock:
            stream = self._switchboard.stream
        if stream is None:
            return False
        stream.offer(ServerMessage(message, is_response=False))
        return True

    def end_stream(self) -> None:
        """As promised; does nothing while answers are still to be sent on it, as over HTTP+SSE."""
        with self._lock:
            listens = self._switchboard.end_listening()
            stream = self._switchboard.stream
            if stream is not None and not self._switchboard.has_calls(stream):
                self._switchboard.set_stream(None)
            else:
                stream = None
        for exchange, answer in listens:
            exchange.offer(answer)
        if stream is not None:
            stream.end()

    def hand_over(self) -> bool:
        with self._lock:
            if self._switchboard.has_posts or self._held_back:
                return False
            self._set_lost("The session goes to another replica")
        self.close()
        return True

    def end_between_calls(self) -> bool:
        with self._lock:
            if self._switchboard.is_calling:
                return False
            self._set_lost("The server is started again with another command")
        self.close()
        return True

    def is_idle(self, seconds: float) -> bool:
        with self._lock:
            return self._is_idle(seconds)

    def _is_idle(self, seconds: float) -> bool:
        is_needed = not self.is_alive or self._switchboard.is_awaited
        return not is_needed and time.monotonic() - self.last_used >= seconds

    def stop_if_idle(self, seconds: float) -> bool:
        with self._lock:
            if not self._is_idle(seconds):
                return False
            self._set_lost("The server was stopped while its session was idle")
        self.close()
        return True

    def close(self, failure: BackendLost | None = None) -> None:
        on_close, self.on_close = self.on_close, None
        self._is_closed = True
        if on_close is not None:
            on_close()
        reason = failure or BackendLost("The session has ended and the server was stopped")
        untaken = self._fail_all(reason)
        self._starter.stop_child(self._child)
        _send_elsewhere(untaken, reason)

    def set_on_initialized(self, on_initialized: Callable[[], object]) -> None:
        """Has `on_initialized`, which must be quick, called once: when initialize is answered, or
        the backend is lost.
        """
        with self._lock:
            self._on_initialized = on_initialized
            if not self.is_alive:
                self._note_initialized()

    def _note_initialized(self) -> None:
        """The child starts no more. The lock is held."""
        on_initialized, self._on_initialized = self._on_initialized, None
        if on_initialized is not None:
            on_initialized()

    def _set_lost(self, sentence: str) -> None:
        """Only the first reason counts. The lock is held."""
        self._lost = self._lost or sentence
        self.is_alive = False

    def _require_alive(self) -> None:
        if self._lost is not None:
            raise BackendExited(self._lost)

    def _write(self, line: bytes, has_left: Callable[[], bool] | None = None) -> None:
        """Writes to the child, and stops it if that fails: it is lost then, though it may live on.

        Where it takes nothing, and `has_left` says that the client has left, the line is not
        written: ClientLeft. One that is half written is written to its end by another thread.
        """
        try:
            self._child.write(line, WRITE_TIMEOUT, has_left, self._hand_on)
        except (BackendTimeout, BackendUnreached) as error:
            self._give_up_child(error)
            raise
        except BackendLost as error:
            # Its exit is about to be noticed; then every call fails with the exit status.
            self._give_up_child(error)

    def _give_up_child(self, error: BackendError) -> None:
        """Stops a child that takes no message any more; its calls in flight may still end well."""
        with self._lock:
            is_first = self.is_alive
            self._set_lost(error.message)
        if is_first:
            is_timeout = isinstance(error, BackendTimeout)
            what = "does not read its input" if is_timeout else "has closed its input"
            log.error("[%s] the server %s; stopping it", self.name, what)
        self._starter.stop_child(self._child)
        self._report_lost()

    def _report_lost(self) -> None:
        with self._lock:
            was_reported, self._was_reported = self._was_reported, True
        if not was_reported and not self._is_closed:
            self._on_lost(self)

    def _hand_on(self, finish: Callable[[], None]) -> None:
        """Has a thread write the rest of a line, and the child stopped if that fails."""

        def write() -> None:
            try:
                finish()
            except BackendError as error:
                log.error("[%s] half a message was taken (%s)", self.name, error)
                self._give_up_child(error)

        name = f"mcp-writer-{self._child.pid}"
        try:
            Reader(name, write, lambda: self._starter.stop_child(self._child)).start()
        except RuntimeError:
            write()  # there is no thread: the client's own has to

    # --- from the child --------------------------------------------------------------------------

    def _on_line(self, line: bytes) -> None:
        for message in self._parse(line):
            try:
                exchange = self._take(message)
            except ClientError as error:
                log.warning("[%s] dropped a message (%s): %s", self.name, error, shown(line))
                continue
            if exchange is not None:
                self._brake.lines = 0
                exchange.wait_for_room()
            else:
                self._brake.slow()

    def _parse(self, line: bytes) -> Iterable[Message]:
        """The messages in a line of output: none if it is invalid, several if it is a batch."""
        if isinstance(line, LineStart):
            if not self._take_misanswer(line, _TOO_LONG):
                self._brake.slow()
            return ()
        try:
            parsed = jsonrpc.parse(line, keeps_halves=False)
        except ClientError:
            return self._parse_parts(mending.mended(line))
        return parsed if isinstance(parsed, list) else (parsed,)

    def _parse_parts(self, line: bytes) -> Iterator[Message]:
        """The messages in a mended line, in order; what is none is noise or fails its call."""
        for part in mending.elements_of(line) or (line,):
            try:
                yield jsonrpc.parse_message(part)
            except ClientError as error:
                why = _of_a_line(error)
                if part.strip() and not self._take_misanswer(part, why):
                    self._note_noise(part, why)

    def _note_noise(self, line: bytes, why: str) -> None:
        if self._noise.allows():
            log.warning("[%s] a line on stdout is no message (%s): %s", self.name, why, shown(line))
        self._brake.slow()

    def _take_misanswer(self, line: bytes, why: str) -> bool:
        """Ends the call that an unreadable line is about; False where it is about none."""
        found = mending.misanswer_of(line)
        if found is None:
            return False
        with self._lock:
            if found.id is None:
                call = self._switchboard.pop_only()
            else:
                call = self._switchboard.pop(found.id)
            if call is None:
                return False
            if found.error is not UNSET:
                data = jsonrpc.encode(Response(call.id, error=found.error))
                call.exchange.offer(ServerMessage(data, is_response=True))
                return True
        log.warning("[%s] an answer cannot be read (%s): %s", self.name, why, shown(line))
        _fail(call, BackendError(f"The server's answer cannot be read: {why}"))
        return True

    def _take(self, message: Message) -> Exchange | None:
        """Delivers one message of the child and returns its exchange, None if it went to none."""
        if isinstance(message, Response):
            return self._take_response(message)
        if self.on_notice is not None and _is_taken(message, self.on_notice):
            return None
        with self._lock:
            is_heard = self._has_answered and self._switchboard.can_deliver()
            if _is_ping(message) and not is_heard:
                exchange, dropped = None, [message]
            else:
                exchange = self._switchboard.deliver(message)
                dropped = self._switchboard.overflow()
        self._give_up(dropped)
        if self._switchboard.lines:
            self._write_lines()
        return exchange

    def _take_response(self, response: Response) -> Exchange | None:
        with self._lock:
            call = self._switchboard.pop_answered(response.id)
            if call is not None:
                self.last_used = time.monotonic()
                if response.error is not UNSET:
                    response = Response(response.id, error=mending.error_of(response.error))
                    if not self._child.may_refuse:
                        response = refusals.without(response)
                if call.method == INITIALIZE:
                    self._has_answered = True
                    self._is_initializing = response.result is not UNSET
                    self._note_initialized()
                if call.method == LIST and (tools := self._tools()) is not None:
                    response = _visible(response, tools)
                data = self._switchboard.encoded(response, call)
                if data is not None:
                    call.exchange.offer(ServerMessage(data, is_response=True))
                self._switchboard = self._switchboard.successor or self._switchboard
        if call is None:
            if self._undelivered.allows():
                log.info(
                    "[%s] nobody waits for the answer with the id %.64r", self.name, response.id
                )
            return None
        if self._switchboard.lines:
            self._write_lines()
        return call.exchange

    def _give_up(self, undelivered: Sequence[Request | Notification]) -> None:
        """Logs the messages that no client could take, and answers the requests among them."""
        for message in undelivered:
            if isinstance(message, Notification):
                if self._undelivered.allows():
                    log.warning("[%s] no client listens; dropped a %s", self.name, message.method)
                continue
            # The proxy can answer a ping; any other request only a client can.
            answer = Response(message.id, result=jsonrpc.as_payload({}))
            if not _is_ping(message):
                if self._undelivered.allows():
                    log.warning("[%s] no client listens; refused a %s", self.name, message.method)
                answer = Response(message.id, error=jsonrpc.error_payload(PROXY_ERROR, _NOBODY))
            with contextlib.suppress(BackendError):
                self._write(jsonrpc.encode(answer))

    def _on_mute(self) -> None:
        """The child has closed its output and lives on; the supervisor stops it."""
        if self._is_closed:
            return
        log.error("[%s] the server has closed its output; stopping it", self.name)
        failure = BackendLost("The server closed its output")
        untaken = self._fail_all(failure)
        self._report_lost()
        _send_elsewhere(untaken, failure)

    def _on_exit(self, how: str) -> None:
        self._noise.flush()
        self._undelivered.flush()
        if not self._is_closed:
            self._lost = None  # the exit status is a better reason
        failure = BackendLost(f"{self._child.end_sentence} ({how})")
        untaken = self._fail_all(failure, self._child.untaken)
        self._has_exited.set()
        if not self._is_closed:
            log.warning("[%s] %s (%s)", self.name, self._child.end_in_log, how)
        self._report_lost()
        _send_elsewhere(untaken, failure)  # now that another backend can be found

    def _fail_all(self, failure: BackendLost, spared: Collection[RequestId] = ()) -> list[Exchange]:
        """Ends every exchange but those that are held back, and those of the calls with these ids:
        it returns them. Those that are just being written are left to their writers.

        From now on the backend is lost.
        """
        with self._lock:
            self._set_lost(failure.message)
            self._note_initialized()
            calls, stream = self._switchboard.clear()
            untaken, self._held_back = list(self._held_back), {}
            lost = []
            for call in calls:
                unanswered = type(failure)(f"{failure.message} before it answered")
                if call.wire_id in spared and len(call.exchange.requests) == 1:
                    untaken.append(call.exchange)
                elif call.exchange in self._unwritten:
                    left = self._left_to_writers.setdefault(call.exchange, [])
                    left.append((call, unanswered))
                else:
                    lost.append((call, unanswered))
        for call, unanswered in lost:
            _fail(call, unanswered)
        if stream is not None:
            stream.end()
        return untaken

    # --- from exchanges --------------------------------------------------------------------------

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """Answers the overdue calls with `failure`, and cancels them at the child."""
        self._answer_held_back(exchange, failure)
        with self._lock:
            overdue = self._switchboard.pop_overdue(exchange, time.monotonic())
            due = self._switchboard.next_deadline(exchange)
        if due is not None:
            was_cancelled, timeout = isinstance(failure, Cancelled), exchange.timeout or 0.0
            exchange.set_deadline(due, lambda: no_answer(timeout) if was_cancelled else failure)
        for call in overdue:
            _fail(call, failure)
            if not isinstance(failure, Cancelled):
                self._cancel_at_child(call, "The proxy's time limit has passed")
        self._write_lines(_nobody_waits)

    def _take_back(self, exchange: Exchange) -> None:
        """Cancels the calls of an exchange whose client wants no answer any more."""
        with self._lock:
            self.last_used = time.monotonic()
            self._held_back.pop(exchange, None)
            calls = self._switchboard.pop_exchange(exchange)
        for call in calls:
            self._cancel_at_child(call, "The client has left")
        self._write_lines(_nobody_waits)

    def _cancel_at_child(self, call: PendingCall, reason: str) -> None:
        if call.method == INITIALIZE or not call.is_at_child or not self.is_alive:
            return
        params = jsonrpc.as_payload({"requestId": call.wire_id, "reason": reason})
        # A server that takes nothing need not know, and one that stops does not.
        with contextlib.suppress(BackendError, ClientLeft):
            self._write(jsonrpc.encode(Notification(jsonrpc.CANCELLED, params)), _nobody_waits)

    def leave(self, exchange: Exchange) -> None:
        """Detaches an exchange whose client has left; its calls go on, its other messages wait.

        A disconnect is no cancellation (MCP 2025-11-25, transports, "Sending Messages to the
        Server"), unless the exchange `cancels`.
        """
        if exchange.cancels:
            self._take_back(exchange)
            return
        with self._lock:
            self.last_used = time.monotonic()
            self._held_back.pop(exchange, None)
            self._switchboard.leave(exchange)
            dropped = self._switchboard.overflow()
        self._give_up(dropped)

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: the child need not know."""

    def expire_left_calls(self) -> None:
        with self._lock:
            left = self._switchboard.left_exchanges()
            self._switchboard.do_overdue()
        for exchange in left:
            exchange.expire_if_due()
        self._write_lines()

    def ask_open(self) -> None:
        """Asks a client what the child has asked it; what that makes the child hear waits."""
        with self._lock:
            self._switchboard.ask_open()

    def end_parked(self, state: str) -> None:
        """Ends a call that waits for its client's answer."""
        with self._lock:
            self._switchboard.end_parked(state)
        self._write_lines()

    def _write_lines(self, has_left: Callable[[], bool] | None = None) -> None:
        """Writes what the switchboard has for the child."""
        with self._lock:
            pause, lines = self._switchboard.pause, self._switchboard.take_lines()
        if pause:
            self._has_exited.wait(pause)
        line = _joined(lines)
        if line:
            with contextlib.suppress(BackendError, ClientLeft):
                self._write(line, has_left)


def _send_elsewhere(exchanges: Iterable[Exchange], failure: BackendLost) -> None:
    """Has exchanges of which the child got nothing sent to another backend."""
    for exchange in exchanges:
        exchange.refuse(BackendUnreached(failure.message))


def _all_tools() -> None:
    """None is hidden."""


def _admitted(exchange: Exchange, tools: ToolFilter) -> list[Request]:
    """The requests of an exchange that the child may get; the others are answered."""
    admitted: list[Request] = []
    for request in exchange.requests:
        try:
            admitted.append(tools.admitted(request))
        except ClientError as error:
            exchange.offer(_refusal(request, error))
    return admitted


def _refusal(request: Request, error: ClientError) -> ServerMessage:
    """The answer to a request that the child does not get."""
    data = jsonrpc.encode_error(error.code, error.message, request.id, error.data)
    return ServerMessage(data, is_response=True)


def _visible(response: Response, tools: ToolFilter) -> Response:
    """A list of tools as clients may see it; one that cannot be read is an error."""
    try:
        return tools.visible(response)
    except ClientError:
        reason = "The server's list of tools cannot be read"
        return Response(response.id, error=jsonrpc.error_payload(PROXY_ERROR, reason))


def _of_a_line(reason: ClientError) -> str:
    """The sentence about a client's body, said of a line."""
    return reason.message.replace("The body", "the line")


def _joined(lines: Sequence[bytes]) -> bytes:
    """Lines that are written together; empty ones are none."""
    return lines[0] if len(lines) == 1 else b"\n".join(filter(None, lines))


def _nobody_waits() -> bool:
    return True


def _is_taken(message: Message, take: Callable[[Notification], bool]) -> bool:
    return isinstance(message, Notification) and take(message)


def _is_ping(message: Message) -> bool:
    return isinstance(message, Request) and message.method == "ping"


def _fail(call: PendingCall, failure: BackendError) -> None:
    data = jsonrpc.encode_error(PROXY_ERROR, failure.message, call.id)
    call.exchange.offer(ServerMessage(data, is_response=True, failure=failure))
