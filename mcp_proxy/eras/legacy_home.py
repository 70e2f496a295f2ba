"""The home of modern calls in front of a legacy server on stdio: children that have numbers.

A call that may ask, or log, has a child to itself until it has its answer, the free one with the
lowest number: what a legacy server asks or logs names no call. Everything else goes to the first
child. So after calls that overlapped everything returns to that child and to what it remembers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import NamedTuple

from msgspec import Raw

from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.owned import HOME_IDLE, OwnedBackend
from mcp_proxy.background import KeyedExecutor, TimerWorker
from mcp_proxy.eras.questions import ROUND_TIME, KeptRoots, QuestionSwitchboard, may_ask
from mcp_proxy.eras.tool_headers import ToolHeaders, refuse
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendExited,
    BackendLost,
    BackendUnreached,
    ClientError,
    Overloaded,
    ProxyError,
)
from mcp_proxy.wire import jsonrpc, listening, modern, questions, results
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.listening import Filter

log = logging.getLogger(__name__)

#: Calls of one home that may wait for their client's answers; the oldest is given up beyond.
MAX_PARKED = 8

#: Seconds that a server has to answer that it tells of a resource, or no longer does.
WATCH_TIME = 60.0

#: Parked calls whose child has ended that are remembered for their retries.
MAX_ENDED = 256

#: Seconds after which a child that no call needed ends, the first one excepted.
FURTHER_TIME = 60.0

# Children that start at the same time.
STARTS_AT_ONCE = 4


class Started(NamedTuple):
    """A child that has been initialized, and its InitializeResult."""

    bridge: Bridge
    switchboard: QuestionSwitchboard
    result: Raw


#: Starts a child of a home and initializes it; raises BackendError, Overloaded.
StartChild = Callable[["LegacyHome"], Started]


class _Child:
    """A child of the home; `is_taken` while a call that may ask has it to itself."""

    def __init__(self, number: int, bridge: Bridge, switchboard: QuestionSwitchboard) -> None:
        self.number = number
        self.bridge = bridge
        self.switchboard = switchboard
        self.is_taken = False
        self.last_taken = time.monotonic()


class _Listener(NamedTuple):
    request: Request
    wanted: Filter

    def offer(self, exchange: Exchange, change: Notification) -> None:
        """Tells of a change, unless too much is unread."""
        if exchange.waiting < MAX_UNREAD:
            tagged = jsonrpc.encode(listening.tagged(change, self.request.id))
            exchange.offer(ServerMessage(tagged, is_response=False))


class LegacyHome(OwnedBackend):
    """A legacy server as modern clients of one key see it. Thread-safe.

    `kinds` are what these clients can be asked for. With `has_one_child` calls that may ask take
    turns. `on_lost` is called once when the last child has exited without being stopped.
    """

    def __init__(
        self,
        home_id: str,
        kinds: frozenset[str],
        start_child: StartChild,
        on_lost: Callable[[OwnedBackend], object],
        timer: TimerWorker,
        has_one_child: bool = False,
        input_timeout: float = 300.0,
        bound_parked: Callable[[], object] = lambda: None,
        ended: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._bound_parked = bound_parked
        self._ended = {} if ended is None else ended
        self.idle_limit = HOME_IDLE
        self.home_id = home_id
        self.kinds = kinds
        self._start_child = start_child
        self._on_lost = on_lost
        self._timer = timer
        self._has_one_child = has_one_child
        self._input_timeout = input_timeout
        self._lock = threading.Lock()  # guards what follows
        self._children: list[_Child] = []  # by number
        self._waiting: deque[Exchange] = deque()  # calls that may ask, for which no child is free
        self._starting = 0
        self._listeners: dict[Exchange, _Listener] = {}
        self._session_id = ""
        self._discovered = Raw(b"{}")
        self._capabilities = Raw(b"{}")
        self._tool_headers = ToolHeaders()
        self._roots = KeptRoots()
        self._starter = KeyedExecutor("mcp-home", STARTS_AT_ONCE)
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"<LegacyHome {self.home_id} children={len(self._children)}>"

    # --- children --------------------------------------------------------------------------------

    def new_switchboard(self) -> QuestionSwitchboard:
        """The switchboard of another child of this home."""
        board = QuestionSwitchboard(
            self.home_id,
            self.kinds,
            self._input_timeout,
            on_free=lambda: self._note_free(board),
            on_change=lambda change: self._pass_to_listeners(board, change),
            on_asked=lambda: self._timer.call_later(ROUND_TIME, lambda: self._ask_open(board)),
            roots=self._roots,
        )
        return board

    def _ask_open(self, board: QuestionSwitchboard) -> None:
        for child in self._children_copy():
            if child.switchboard is board:
                child.bridge.ask_open()

    def add(self, started: Started) -> None:
        """Has one more child."""
        fields = jsonrpc.fields_of(started.result)
        capabilities = fields.get("capabilities", Raw(b"{}"))
        started.switchboard.server_info = fields.get("serverInfo")
        started.switchboard.has_logging = "logging" in jsonrpc.fields_of(capabilities)
        with self._lock:
            taken = {child.number for child in self._children}
            number = next(each for each in range(1, len(taken) + 2) if each not in taken)
            child = _Child(number, started.bridge, started.switchboard)
            self._children.append(child)
            self._children.sort(key=lambda each: each.number)
            self._discovered = results.discover_result(started.result)
            self._capabilities = capabilities
            session_id = self._session_id
            is_closed = not self.is_alive
        if session_id:
            child.bridge.note_session(session_id)
        if is_closed:
            child.bridge.close()
        elif not child.bridge.is_alive:  # it exited before anybody could be told
            self.note_lost(child.bridge)

    def note_lost(self, bridge: OwnedBackend) -> bool:
        """A child has exited by itself; whether it was one of this home, which is lost with it
        where it was the last.
        """
        with self._lock:
            for child in self._children:
                if child.bridge is bridge:
                    self._note_ended(child)
            left = [child for child in self._children if child.bridge is not bridge]
            was_here = len(left) < len(self._children)
            was_first = was_here and self._children[0].bridge is bridge
            self._children = left
        if was_here:
            self._end_if_empty()
        if was_first and left:
            self._watch_anew()
        return was_here

    def _watch_anew(self) -> None:
        """Has another child tell of what the first one told, and listeners of all that they missed.

        By another thread: who notices that a child has exited waits for no other.
        """
        with self._lock:
            listeners = list(self._listeners.items())
        uris = {uri for _, listener in listeners for uri in listener.wanted.uris}
        with contextlib.suppress(RuntimeError):  # no thread: they are told nothing until later
            self._starter.submit(
                f"{self.child_id}-watch", partial(self._watch, uris, "resources/subscribe")
            )
        for exchange, listener in listeners:
            for change in listener.wanted.changes():
                listener.offer(exchange, change)

    def _note_ended(self, child: _Child) -> None:
        """Keeps why a child has ended for the retries of the calls that were parked there."""
        for state in child.switchboard.ended or list(child.switchboard.parked):
            self._ended[state] = child.bridge.lost_reason
        while len(self._ended) > MAX_ENDED:
            self._ended.pop(next(iter(list(self._ended))), None)

    def _end_if_empty(self) -> None:
        """The home is lost with its last child, unless another one is about to come."""
        with self._lock:
            is_lost = self.is_alive and not self._children and not self._starting
            if is_lost:
                self.is_alive = False
        if is_lost:
            self._end_all(BackendLost("The server exited"))
            self._on_lost(self)

    def _first(self) -> _Child:
        with self._lock:
            if not self._children:
                raise BackendExited("The server has exited")
            return self._children[0]

    def _children_copy(self) -> list[_Child]:
        with self._lock:
            return list(self._children)

    # --- from the client -------------------------------------------------------------------------

    def send(self, exchange: Exchange) -> None:
        try:
            self._send(exchange)
        except BackendUnreached:
            # A child fails its calls before it tells of its end: whoever sends this once more is
            # not to find that child again.
            for child in self._children_copy():
                if not child.bridge.is_alive:
                    self.note_lost(child.bridge)
            raise

    def _send(self, exchange: Exchange) -> None:
        if not (self.is_alive and self._first().bridge.is_alive):
            raise BackendExited("The server has exited")
        self.last_used = time.monotonic()
        self.was_called = True
        (request,) = exchange.requests
        if request.method == modern.DISCOVER:
            exchange.attach(self)
            exchange.offer(_answer(request, self._discovered))
        elif request.method == modern.LISTEN:
            self._listen(exchange, request)
        elif request.method in modern.MAY_ASK:
            self._call(exchange, request)
        elif may_ask(request, self.kinds):
            self._send_exclusive(exchange)
        else:
            self._first().bridge.send(exchange)

    def _call(self, exchange: Exchange, request: Request) -> None:
        """Sends what a legacy server may answer with a question."""
        try:
            retry = questions.retry_of(request.params)
        except ClientError as error:
            refuse(exchange, error)
            return
        if retry.state is not None:
            child = self._parked_at(retry.state, request)
            if child is None:
                self._answer_for_nobody(exchange, request, retry.state)
                return
            pages = child.switchboard.take_fresh(retry.state)
            if pages is None:
                child.bridge.send(exchange)
                return
            exchange.pages = pages
            request = Request(request.id, request.method, questions.without_retry(request.params))
            exchange.requests = [request]
        if self._tool_headers.has_refused(self._first().bridge, exchange):
            return
        if may_ask(request, self.kinds):
            self._bound_parked()
            self._send_exclusive(exchange)
        else:
            self._first().bridge.send(exchange)

    def _answer_for_nobody(self, exchange: Exchange, request: Request, state: str) -> None:
        """Answers a retry for which no call waits any more."""
        exchange.attach(self)
        reason = self._ended.pop(state, None)
        if reason is not None:
            _refuse(exchange, BackendLost(f"{reason} while its question was open"))
        else:
            exchange.offer(ServerMessage(questions.invalid_state(request.id), is_response=True))

    def _parked_at(self, state: str, request: Request) -> _Child | None:
        for child in self._children_copy():
            if child.switchboard.is_retry_of(state, request):
                return child
        return None

    # --- a child for one call --------------------------------------------------------------------

    def _send_exclusive(self, exchange: Exchange) -> None:
        child = self._taken()
        if child is not None:
            self._send_to(child, exchange)
            return
        exchange.attach(self)
        with self._lock:
            self._waiting.append(exchange)
        self._serve_waiting()  # a child may have become free meanwhile
        self._grow_if_wanted()
        if not self.is_alive:  # the last one exited meanwhile
            self._refuse_waiting(BackendLost("The server exited"))

    def _taken(self) -> _Child | None:
        """The free child with the lowest number, which is free no more; None where none is."""
        with self._lock:
            if not self._children:
                raise BackendExited("The server has exited")
            for child in self._children:
                if not child.is_taken and child.bridge.is_alive:
                    child.is_taken = True
                    child.last_taken = time.monotonic()
                    return child
        return None

    def _send_to(self, child: _Child, exchange: Exchange) -> None:
        try:
            child.bridge.send(exchange)
        except BaseException:
            self._note_free(child.switchboard)
            raise

    def _note_free(self, board: QuestionSwitchboard) -> None:
        """The call that had a child to itself is over. Called under the bridge's lock: quick."""
        with self._lock:
            for child in self._children:
                if child.switchboard is board:
                    child.is_taken = False
                    child.last_taken = time.monotonic()
            is_wanted = bool(self._waiting)
        if is_wanted:
            with contextlib.suppress(RuntimeError):  # closed, or no thread: the sweep tries again
                self._starter.submit(self.child_id, self._serve_waiting)

    def _serve_waiting(self) -> None:
        """Gives free children to calls that wait for one, the oldest first."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
            try:
                child = self._taken()
            except BackendError as error:
                self._refuse_waiting(error)
                return
            if child is None:
                return
            with self._lock:
                exchange = self._waiting.popleft() if self._waiting else None
            if exchange is None:
                self._note_free(child.switchboard)
                return
            try:
                self._send_to(child, exchange)
            except ProxyError as error:
                _refuse(exchange, error)
            if exchange.is_closed:  # its client has left before the child had it
                child.bridge.leave(exchange)

    def _grow_if_wanted(self) -> None:
        """Has another child started where more calls wait than children are being started."""
        with self._lock:
            is_wanted = self.is_alive and self._starting < len(self._waiting)
            grows = is_wanted and not self._has_one_child
            self._starting += grows
        if not grows:
            return
        grow = partial(copy_context().run, self._grow)
        try:
            self._starter.submit(f"{self.child_id}-{next(self._numbers)}", grow)
        except RuntimeError as error:  # no thread: they wait for a child that is free
            log.warning("[%s] no further server can be started: %s", self.name, error)
            with self._lock:
                self._starting -= 1
            self._end_if_empty()

    def _grow(self) -> None:
        """Starts another child, unless enough calls are parked: then the oldest gives way."""
        failure: ProxyError | None = None
        has_room = False
        try:
            if self._waiting:  # else their clients have left
                has_room = self._has_made_room()
                if not has_room:
                    self.add(self._start_child(self))
        except ProxyError as error:
            failure = error
        finally:
            with self._lock:
                self._starting -= 1
                has_child = bool(self._children)
        if failure is not None:
            log.warning("[%s] no further server could be started: %s", self.name, failure)
            if not has_child:
                self._refuse_waiting(failure)
            elif isinstance(failure, Overloaded):
                self.end_oldest()
        self._end_if_empty()
        self._serve_waiting()
        if has_room:  # a newer call may have taken the child that was made free
            self._grow_if_wanted()

    def _has_made_room(self) -> bool:
        """Gives up the oldest parked calls where there are as many as may be; whether there were.

        Those that still ran had a child to itself, which is free now.
        """
        has_made_room = False
        while self.parked >= MAX_PARKED and self.end_oldest():
            has_made_room = True
        return has_made_room

    @property
    def parked(self) -> int:
        return sum(len(child.switchboard.parked) for child in self._children_copy())

    @property
    def parked_since(self) -> float:
        boards = [child.switchboard for child in self._children_copy()]
        times = [parked.until for board in boards for parked in list(board.parked.values())]
        return min(times, default=math.inf) - self._input_timeout

    def end_oldest(self) -> bool:
        parked = [
            (call.until, state, child)
            for child in self._children_copy()
            for state, call in list(child.switchboard.parked.items())
        ]
        if not parked:
            return False
        _, state, child = min(parked, key=lambda each: each[0])
        child.bridge.end_parked(state)
        return True

    def _refuse_waiting(self, failure: ProxyError) -> None:
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
        for exchange in waiting:
            _refuse(exchange, failure)

    # --- listening -------------------------------------------------------------------------------

    def _listen(self, exchange: Exchange, request: Request) -> None:
        """Tells a client of changes, from the first child (MCP 2026-07-28, subscriptions)."""
        try:
            wanted = listening.filter_of(request.params).honoured(self._capabilities)
        except ClientError as error:
            refuse(exchange, error)
            return
        exchange.attach(self)
        acknowledged = listening.acknowledged(wanted, request.id)
        exchange.offer(ServerMessage(jsonrpc.encode(acknowledged), is_response=False))
        if wanted.is_empty:
            exchange.offer(_answer(request, listening.listen_result(request.id)))
            return
        with self._lock:
            known = {uri for one in self._listeners.values() for uri in one.wanted.uris}
            self._listeners[exchange] = _Listener(request, wanted)
        self._watch(set(wanted.uris) - known, "resources/subscribe")
        if not self.is_alive:  # the server has exited meanwhile
            self.end_stream()

    def _watch(self, uris: set[str], method: str) -> None:
        for uri in sorted(uris):
            request = Request("mcp-proxy-watch", method, jsonrpc.as_payload({"uri": uri}))
            with contextlib.suppress(BackendError):
                exchange = Exchange([request], accepts_stream=False, timeout=WATCH_TIME)
                self._first().bridge.send(exchange)
                exchange.close()  # nobody reads the answer; the sweep applies the time limit

    def _pass_to_listeners(self, board: QuestionSwitchboard, change: Notification) -> None:
        """Passes a change of the first child on. Called under its bridge's lock: quick."""
        with self._lock:
            if not self._children or self._children[0].switchboard is not board:
                return
            listeners = list(self._listeners.items())
        for exchange, listener in listeners:
            if listener.wanted.wants(change):
                listener.offer(exchange, change)

    # --- from exchanges that wait here -----------------------------------------------------------

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: there is no log."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """A call has waited for a free child for all of its time."""
        if self._forget(exchange):
            _refuse(exchange, failure)

    def leave(self, exchange: Exchange) -> None:
        """The client of a call that waits, or of a listener, has left."""
        self._forget(exchange)
        with self._lock:
            listener = self._listeners.pop(exchange, None)
            known = {uri for one in self._listeners.values() for uri in one.wanted.uris}
        if listener is not None:
            self._watch(set(listener.wanted.uris) - known, "resources/unsubscribe")

    def _forget(self, exchange: Exchange) -> bool:
        """Takes a call out of the line; whether it was there."""
        with self._lock:
            if exchange not in self._waiting:
                return False
            self._waiting.remove(exchange)
            return True

    # --- what a modern client never sends --------------------------------------------------------

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        raise BackendError("A home has no standing stream")

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        raise BackendError("A home takes no notifications")

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        raise BackendError("A home takes no responses")

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        raise BackendError("A home has no standing stream")

    # --- for the owner ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        children = self._children_copy()
        return children[0].bridge.name if children else "home"

    @property
    def size(self) -> int:
        return max(1, len(self._children))  # the owner counts those that are about to begin

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting) or any(child.bridge.is_busy for child in self._children_copy())

    @property
    def is_watched(self) -> bool:
        return bool(self._listeners) or self.is_busy

    def note_session(self, session_id: str) -> None:
        self._session_id = session_id
        for child in self._children_copy():
            child.bridge.note_session(session_id)

    def is_idle(self, seconds: float) -> bool:
        if not self.is_alive or self._listeners or self._waiting:
            return False
        children = self._children_copy()
        return all(child.bridge.is_idle(0) for child in children) and (
            time.monotonic() - self._last_used() >= seconds
        )

    def _last_used(self) -> float:
        return max(
            self.last_used, *(child.bridge.last_used for child in self._children_copy()), 0.0
        )

    def stop_if_idle(self, seconds: float) -> bool:
        with self._lock:
            if not self.is_alive:
                return False
        if not self.is_idle(seconds):
            return False
        self.close(BackendLost("The server was stopped while nobody used it"))
        return True

    def hand_over(self) -> bool:
        if self.is_busy:
            return False
        self.close(BackendLost("The calls go to another replica"))
        return True

    def end_between_calls(self) -> bool:
        with self._lock:
            is_growing = bool(self._waiting or self._starting)
        if is_growing or any(child.bridge.is_busy for child in self._children_copy()):
            return False
        ended = [child for child in self._children_copy() if child.bridge.end_between_calls()]
        if len(ended) < len(self._children_copy()):
            for child in ended:  # the home lives on with the others
                self.note_lost(child.bridge)
            return False
        self.close()
        return True

    def end_stream(self) -> None:
        with self._lock:
            listeners, self._listeners = self._listeners, {}
        for exchange, (request, _) in listeners.items():
            exchange.offer(_answer(request, listening.listen_result(request.id)))

    def expire_left_calls(self) -> None:
        for child in self._children_copy():
            child.bridge.expire_left_calls()
        self._serve_waiting()
        self._end_further()

    def _end_further(self) -> None:
        """Ends the children that no call has needed for a while, but for the first."""
        oldest = time.monotonic() - FURTHER_TIME
        for child in self._children_copy()[1:]:
            with self._lock:
                is_needed = child.is_taken or child.switchboard.parked or self._waiting
                if is_needed or child.last_taken > oldest:
                    continue
                self._children.remove(child)
            child.bridge.close()

    def close(self, failure: BackendLost | None = None) -> None:
        on_close, self.on_close = self.on_close, None
        with self._lock:
            self.is_alive = False
            children, self._children = self._children, []
        if on_close is not None:
            on_close()
        self._end_all(failure or BackendLost("The server was stopped"))
        for child in children:
            child.bridge.close(failure)

    def _end_all(self, failure: BackendLost) -> None:
        self._starter.close()
        self.end_stream()
        self._refuse_waiting(failure)


#: Changes that may wait for a listener that reads nothing; what comes then is left out.
MAX_UNREAD = 256


def _answer(request: Request, result: Raw) -> ServerMessage:
    return ServerMessage(jsonrpc.encode(Response(request.id, result)), is_response=True)


def _refuse(exchange: Exchange, failure: ProxyError) -> None:
    """Answers a call that no child has got."""
    (request,) = exchange.requests
    data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
    cause = failure if isinstance(failure, BackendError) else BackendError(failure.message)
    exchange.offer(ServerMessage(data, is_response=True, failure=cause))
