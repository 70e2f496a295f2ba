"""An HTTP server as a child: it takes and gives lines of JSON, as a process on stdio does.

What bridges the eras stands in front of lines. So one that speaks HTTP is bridged by the same code:
each request is a POST of its own, whatever its answer brings is a line, and the lines of a legacy
server's GET stream come with them. References are to "Streamable HTTP" in the transports page.

A request holds a thread until its response begins; event streams are read as their events come.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from msgspec import UNSET, Raw

from mcp_proxy.backends.event_reader import EventReader
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.backends.owned import caller_headers
from mcp_proxy.backends.repeated_arguments import Page, RepeatedArguments, own_params
from mcp_proxy.background import KeyedExecutor, Workers
from mcp_proxy.errors import (
    HEADER_MISMATCH,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    MISSING_CAPABILITY,
    PROXY_ERROR,
    UNSUPPORTED_REVISION,
    BackendError,
    BackendLost,
    BackendUnreached,
    BadAnswer,
    ClientError,
    ParseError,
    ProxyError,
    RequestId,
)
from mcp_proxy.servers import Served
from mcp_proxy.wire import cookies, headers, jsonrpc, modern, param_headers, refusals, results, sse
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.jsonrpc import Message, Notification, Request, Response
from mcp_proxy.wire.urls import Address

log = logging.getLogger(__name__)

#: Requests of all conversations whose responses may be waited for at the same time, and GET streams
#: that are being opened.
WIDTH = 256

#: Seconds that a server has to take what wants no answer.
TAKE_TIME = 10.0

# The longest answer in JSON that is read, and what is shown of a refusal, in bytes.
_MAX_ANSWER = 64 * 1024 * 1024
_SHOWN = 200

#: Seconds between two attempts to open a GET stream, the first and the longest.
FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0

_LEFT = "it was left"
_FORGOTTEN = "it does not know the session any more"
_CANCELLED = "The call was cancelled"

# Conversations that end at the same time, and the seconds that the last ones have for it.
_ENDS_AT_ONCE = 16
_ONE_WAY_AT_ONCE = 16
_CLOSE_TIME = 2.0

_OURS = {"Accept": f"{headers.JSON}, {headers.EVENT_STREAM}", "Content-Type": headers.JSON}
_SET_LEVEL = "logging/setLevel"
_PING = jsonrpc.encode(Request("mcp-proxy-ping", "ping"))

# How a modern server refuses a request without metadata.
_MISSES_METADATA = frozenset({INVALID_PARAMS, HEADER_MISMATCH, UNSUPPORTED_REVISION})
_ANSWERS = (200, 400, 404)

# What a modern server may refuse a request of its own era with.
_MODERN_CODES = _MISSES_METADATA | {METHOD_NOT_FOUND, MISSING_CAPABILITY, INTERNAL_ERROR}


class Link(Protocol):
    """The way to one HTTP server: how it is reached, and where its endpoint is."""

    client: HttpClient
    timeout: float
    #: The names of cookies by which a balancer knows its backend again.
    sticky_cookies: tuple[str, ...]

    def address(self) -> Address:
        """A backend for a new conversation; raises BackendUnreached."""

    def target(self, address: Address) -> str:
        """Path and query of the endpoint at a backend."""

    def note_failure(self, address: Address, error: BackendUnreached) -> None:
        """A backend could not be reached."""


@dataclass
class _Answer:
    """The event stream that is to have the answer to a request, as far as it has come.

    `last` is the id of its last event, `heard` what that was when this response began, `pause` the
    seconds before it is asked for the rest.
    """

    request: Request
    own: Mapping[str, str]
    last: bytes | None = None
    heard: bytes | None = None
    pause: float = FIRST_PAUSE


@dataclass
class _Standing:
    """The GET stream of a session: its last event's id, and the pause before it is opened again."""

    own: Mapping[str, str]
    pause: float
    last: str = ""
    began: float = 0.0


class Upstream:
    """A conversation with one backend. Thread-safe.

    `headers` are those of the last client, which go along where it is not known for whom a message
    is. `on_exit` is called once when the server is lost, or was left.
    """

    def __init__(
        self,
        link: Link,
        threads: Threads,
        label: str,
        on_exit: Callable[[str], object],
    ) -> None:
        self.label = label
        self.may_refuse = True
        self.stderr_tail: list[str] = []
        self.session = ""
        self.end_sentence = "The server was lost"
        self.end_in_log = "the server was lost"
        self.pid = 0
        self.headers = caller_headers.get()
        #: Requests of which the server certainly got nothing.
        self.untaken: set[RequestId] = set()
        self.on_line: Callable[[bytes], object] = lambda line: None
        self.address = link.address()
        self._link = link
        self._threads = threads
        self._on_exit = on_exit
        self._numbers = itertools.count(1)
        self._session_id: str | None = None  # of a legacy server
        self._version: str | None = None
        self._is_modern = False  # a modern request has had a result
        self._cookies = ""
        self._repeated = RepeatedArguments(label)
        self._is_over = threading.Event()
        self._is_told = threading.Event()  # what a legacy server has to hear first
        self._is_told.set()
        self._lock = threading.Lock()  # guards _calls and untaken
        # With the id of the request, if any; one that was cancelled has none any more.
        self._calls: dict[HttpCall, RequestId | None] = {}

    def __repr__(self) -> str:
        return f"<Upstream {self.address.url} calls={len(self._calls)}>"

    # --- from the bridge -------------------------------------------------------------------------

    def write(
        self,
        line: bytes,
        timeout: float,
        has_left: Callable[[], bool] | None = None,
        hand_on: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Sends messages, a line each, in order as far as nothing waits for an answer.

        Raises BackendUnreached where the conversation is over.
        """
        if self._is_over.is_set():
            raise BackendUnreached("The server was lost")
        own = caller_headers.get() or self.headers
        first: list[Message] = []
        for one in line.split(b"\n"):
            message = jsonrpc.parse_message(one)
            first.append(message)
            if isinstance(message, Notification):
                self._note(message)
            elif isinstance(message, Request):
                with self._lock:
                    self.untaken.add(message.id)
                if message.method != _SET_LEVEL:
                    self._submit(first, own)
                    first = []
        if first:
            self._submit(first, own)

    def _note(self, message: Notification) -> None:
        if message.method == INITIALIZED:
            self._is_told.clear()
        elif message.method == jsonrpc.CANCELLED:
            self._cancel(jsonrpc.cancelled_id_of(message))

    def _submit(self, messages: list[Message], own: Mapping[str, str]) -> None:
        has_request = any(isinstance(message, Request) for message in messages)
        executor = self._threads.calls if has_request else self._threads.one_way
        key = f"{id(self)}-{next(self._numbers)}"
        executor.submit(key, partial(self._send_all, messages, own))

    def close(self) -> None:
        """Ends the conversation, and a legacy server's session; harmless when repeated."""
        self._end(_LEFT)

    def _end(self, how: str) -> None:
        with self._lock:
            if self._is_over.is_set():
                return
            self._is_over.set()
            calls = list(self._calls)
        self._is_told.set()
        for call in calls:
            call.abort(BackendLost("The server was left"))
        self._threads.ends.submit(f"{id(self)}", partial(self._say_end, how))

    def _say_end(self, how: str) -> None:
        """Tells a legacy server that its session is over, and the bridge."""
        if self._session_id is not None and how == _LEFT:
            try:
                own, given = self.headers, self._session_headers()
                self._done(self._sent("DELETE", b"", own, given, TAKE_TIME))
            except ProxyError as error:
                log.debug("[%s] a session was not ended at its server: %s", self.label, error)
        self._on_exit(how)

    # --- messages --------------------------------------------------------------------------------

    def _send_all(self, messages: list[Message], own: Mapping[str, str]) -> None:
        for message in messages:
            if self._is_over.is_set():
                return
            if isinstance(message, Request):
                self._ask(message, own)
            elif self._version is not None or not _is_cancellation(message):
                self._pass_on(message, own)

    def _pass_on(self, message: Message, own: Mapping[str, str]) -> None:
        """Sends what wants no answer. After the handshake the GET stream begins."""
        is_initialized = isinstance(message, Notification) and message.method == INITIALIZED
        try:
            body = jsonrpc.encode(message)
            call = self._sent("POST", body, own, self._session_headers(), TAKE_TIME)
            self._done(call)
            if self._has_forgotten(call):
                self._end(_FORGOTTEN)
            elif call.status >= 400:
                log.info("[%s] a message was refused with %d", self.label, call.status)
        except BackendUnreached as error:
            self._lose(error)
        except ProxyError as error:
            level = logging.DEBUG if self._is_over.is_set() else logging.WARNING
            log.log(level, "[%s] a message was not delivered: %s", self.label, error)
        if is_initialized:
            self._is_told.set()
            standing = _Standing(own, FIRST_PAUSE)
            self._threads.streams.submit(f"{id(self)}", partial(self._listen, standing))

    def _ask(self, request: Request, own: Mapping[str, str]) -> None:
        """Sends a request; everything that its answer brings becomes a line."""
        try:
            if request.meta.protocol_version is UNSET:
                self._is_told.wait(TAKE_TIME)
                self._await(request, own, self._session_headers())
            else:
                self._await(request, own, self._modern_headers(request, own))
        except BackendUnreached as error:
            with self._lock:
                self.untaken.add(request.id)
            self._lose(error)
        except ProxyError as error:
            self._give_up(request, error)

    def _give_up(self, request: Request, error: ProxyError) -> None:
        self._fail(request, error.message, has_answered=error.message == _CANCELLED)

    def _lose(self, error: BackendUnreached) -> None:
        self._link.note_failure(self.address, error)
        self._end(error.message.replace("The server", "it"))

    def _await(self, request: Request, own: Mapping[str, str], given: Mapping[str, str]) -> None:
        call = self._called(request, own, given)
        is_stream = call.media_type == headers.EVENT_STREAM and call.status < 300
        try:
            if request.method == INITIALIZE and call.status < 300:
                self._session_id = call.header(headers.SESSION_ID)
                names = self._link.sticky_cookies
                self._cookies = cookies.kept("", call.headers, names, time.time())
            if self._has_forgotten(call) or self._is_another(request, call, own):
                with self._lock:
                    self.untaken.add(request.id)
                self._end(_FORGOTTEN)
            elif call.status in refusals.STATUSES:
                self.on_line(refusals.encode(call.status, call.headers, request.id))
            elif not is_stream:
                body = jsonrpc.one_line(call.read(_MAX_ANSWER)).strip()
                if not body or not self._take_line(request, body, call.status):
                    sentence = f"The server answered {call.status} without an answer"
                    self._fail(request, sentence, 400 <= call.status < 500)
        finally:
            if not is_stream:
                self._done(call)
        if is_stream:
            self._read(_Answer(request, own), call)

    def _called(
        self, request: Request, own: Mapping[str, str], given: Mapping[str, str]
    ) -> HttpCall:
        """The call of a request; one that is refused for its headers is made again with those that
        belong to the tools as they are now, once.
        """
        body, timeout, began = jsonrpc.encode(request), self._link.timeout, time.monotonic()
        call = self._sent("POST", body, own, given, timeout, request.id)
        try:
            if not self._is_outdated(request, call, began):
                return call
            self._take_back(call, request.id)
        except ProxyError:
            self._done(call)
            raise
        given = self._modern_headers(request, own)
        return self._sent("POST", body, own, given, timeout, request.id)

    def _is_outdated(self, request: Request, call: HttpCall, began: float) -> bool:
        """Whether a call was refused for its headers, which are those of tools as they were."""
        if request.method != "tools/call" or request.meta.protocol_version is UNSET:
            return False
        is_refused = call.status == 400 and _code_in(call) == HEADER_MISMATCH
        return is_refused and self._repeated.may_have_changed(began)

    def _take_back(self, call: HttpCall, key: RequestId) -> None:
        """Closes a call that the server has refused: from now on it has got nothing of the request.

        Raises BackendLost where that was cancelled meanwhile.
        """
        with self._lock:
            if self._calls.get(call) != key:
                raise BackendLost(_CANCELLED)
            self.untaken.add(key)
        self._done(call)

    def _has_forgotten(self, call: HttpCall) -> bool:
        """Whether an answer says that the session is over: nothing was done then."""
        return call.status == 404 and self._session_id is not None

    def _is_another(self, request: Request, call: HttpCall, own: Mapping[str, str]) -> bool:
        """Whether a server of the other era has taken the place of the one that there was."""
        if request.meta.protocol_version is UNSET:
            return self._version is not None and self._is_modern_now(call, own)
        return self._is_modern and self._is_legacy_now(request, call, own)

    def _is_modern_now(self, call: HttpCall, own: Mapping[str, str]) -> bool:
        """A modern server misses what modern requests say of themselves, knows neither sessions nor
        `ping`, and says that it is one: there are legacy servers without `ping`.
        """
        if call.status not in _ANSWERS or _code_in(call) not in _MISSES_METADATA:
            return False
        if not self._is_refused(_PING, own, self._session_headers()):
            return False
        discover = modern.discover_request()
        given = dict(modern.headers_of(discover))
        try:
            with self._own_call(jsonrpc.encode(discover), own, given) as asked:
                answer = _response(asked, _MAX_ANSWER)
        except ProxyError:  # nothing says so
            return False
        return answer is not None and results.is_modern(answer)

    def _is_legacy_now(self, request: Request, call: HttpCall, own: Mapping[str, str]) -> bool:
        """A legacy server misses a session, and has no code of modern ones for it; it does not know
        `server/discover` either.
        """
        if not _is_unknown(call) or _code_in(call) in _MODERN_CODES:
            return False
        discover = Request("mcp-proxy-discover", modern.DISCOVER, own_params(request))
        given = dict(modern.headers_of(discover))
        return self._is_refused(jsonrpc.encode(discover), own, given)

    def _is_refused(self, body: bytes, own: Mapping[str, str], given: Mapping[str, str]) -> bool:
        """Whether the server has no result for a request of ours that wants nothing of it."""
        try:
            with self._own_call(body, own, given) as call:
                has_none = call.status == 200 and _result(call, _MAX_ANSWER) is None
                return has_none or _is_unknown(call)
        except ProxyError:  # nothing says so
            return False

    @contextmanager
    def _own_call(
        self,
        body: bytes,
        own: Mapping[str, str],
        given: Mapping[str, str],
        timeout: float = TAKE_TIME,
        is_new: bool = True,
    ) -> Iterator[HttpCall]:
        """The call of a request of ours, as `_sent` makes it, closed at the end."""
        call = self._sent("POST", body, own, given, timeout, is_new=is_new)
        try:
            yield call
        finally:
            self._done(call)

    def _read(self, answer: _Answer, call: HttpCall) -> None:
        """Takes a stream up to the answer, by whichever thread is there when something comes."""
        answer.heard = answer.last
        take = partial(self._take_event, answer)
        self._threads.events.read(call, _MAX_ANSWER, take, partial(self._note_end, answer, call))

    def _take_event(self, answer: _Answer, event: sse.Event) -> bool:
        """Passes an event on; whether it was the answer."""
        answer.last = event.id or answer.last
        if event.retry is not None:
            answer.pause = event.retry / 1000
        if not event.data:
            return False
        return self._take_line(answer.request, jsonrpc.one_line(event.data))

    def _note_end(
        self, answer: _Answer, call: HttpCall, is_answered: bool, failure: BackendError | None
    ) -> None:
        """A stream has ended; one that can be resumed goes on where it was."""
        self._done(call)
        is_stuck = answer.last == answer.heard
        if is_answered:
            return
        if failure is not None and (is_stuck or self._is_over.is_set()):
            self._give_up(answer.request, failure)
        elif is_stuck or self._session_id is None:
            self._fail(answer.request, "The server's stream ended without the answer")
        else:
            key = f"{id(self)}-{next(self._numbers)}"
            self._threads.calls.submit(key, partial(self._resume, answer))

    def _resume(self, answer: _Answer) -> None:
        self._is_over.wait(min(answer.pause, _LAST_PAUSE))
        try:
            call = self._resumed(answer.last, answer.own, answer.request.id)
        except ProxyError as error:
            self._give_up(answer.request, error)
        else:
            self._read(answer, call)

    def _resumed(
        self, last: bytes | None, own: Mapping[str, str], key: RequestId | None
    ) -> HttpCall:
        """The rest of a stream (MCP 2025-11-25, "Resumability and Redelivery")."""
        given = {
            **self._session_headers(),
            "Last-Event-ID": (last or b"").decode("utf-8", "replace"),
        }
        try:
            call = self._sent("GET", b"", own, given, self._link.timeout, key, is_new=False)
        except BackendUnreached as error:
            raise BackendLost(error.message) from error  # it has begun with the request
        if call.status >= 300 or call.media_type != headers.EVENT_STREAM:
            self._done(call)
            raise BadAnswer(f"The server did not resume its stream, but answered {call.status}")
        return call

    def _take_line(self, request: Request, line: bytes, status: int = 200) -> bool:
        """Passes a line on; whether it was the answer to the request.

        With an error status it is, under whatever id.
        """
        try:
            message = jsonrpc.parse_message(line)
        except ClientError:
            if status < 400:
                self.on_line(line)
                return False
            shown = line[:_SHOWN].decode("utf-8", "replace")
            self._fail(request, f"The server answered {status}: {shown}", status < 500)
            return True
        if not isinstance(message, Response) or (status < 400 and message.id != request.id):
            self.on_line(line)
            return False
        if message.result is not UNSET and request.method == INITIALIZE:
            self._version = jsonrpc.protocol_version_of(message.result)
        elif message.result is not UNSET and not self._is_modern:
            self._is_modern = request.meta.protocol_version is not UNSET
        self.on_line(jsonrpc.encode(message, request.id))
        return True

    def _listen(self, standing: _Standing) -> None:
        """Opens what a legacy server says outside any request, for as long as the session is."""
        while not self._is_over.is_set():
            standing.began = time.monotonic()
            resumed = {"Last-Event-ID": standing.last} if standing.last else {}
            given = {**self._session_headers(), **resumed}
            own = self.headers or standing.own
            try:
                call = self._sent("GET", b"", own, given, self._link.timeout)
            except ProxyError as error:
                self._note_stream_end(error)
            else:
                if call.status < 300 and call.media_type == headers.EVENT_STREAM:
                    take = partial(self._take_standing, standing)
                    end = partial(self._note_standing_end, standing, call)
                    self._threads.events.read(call, _MAX_ANSWER, take, end)
                    return
                self._done(call)
                if self._has_forgotten(call):
                    self._end(_FORGOTTEN)
                if call.status < 500:
                    return  # it has no such stream
            self._wait_before(standing)

    def _take_standing(self, standing: _Standing, event: sse.Event) -> bool:
        if event.id:
            standing.last = event.id.decode("utf-8", "replace")
        if event.data:
            self.on_line(jsonrpc.one_line(event.data))
        return False

    def _note_standing_end(
        self, standing: _Standing, call: HttpCall, _: bool, failure: BackendError | None
    ) -> None:
        self._done(call)
        self._note_stream_end(failure)
        self._threads.streams.submit(f"{id(self)}", partial(self._listen_again, standing))

    def _note_stream_end(self, error: ProxyError | None) -> None:
        how = "in order" if error is None else error.message
        log.debug("[%s] the stream of a session has ended: %s", self.label, how)

    def _listen_again(self, standing: _Standing) -> None:
        self._wait_before(standing)
        self._listen(standing)

    def _wait_before(self, standing: _Standing) -> None:
        """Waits before the next attempt, longer after each that was soon over."""
        pause = standing.pause
        is_short = time.monotonic() - standing.began < pause
        self._is_over.wait(pause)
        standing.pause = min(_LAST_PAUSE, 2 * pause) if is_short else FIRST_PAUSE

    def _fail(self, request: Request, sentence: str, has_answered: bool = False) -> None:
        """Answers a request that has no answer in JSON; whether the server gave any at all."""
        with self._lock:
            self.untaken.discard(request.id)
        if not self._is_over.is_set():
            plain = jsonrpc.encode_error(PROXY_ERROR, sentence, request.id)
            self.on_line(plain if has_answered else refusals.failed(sentence, request.id))

    # --- calls -----------------------------------------------------------------------------------

    def _sent(
        self,
        method: str,
        body: bytes,
        own: Mapping[str, str],
        given: Mapping[str, str],
        timeout: float,
        key: RequestId | None = None,
        is_new: bool = True,
    ) -> HttpCall:
        """A call whose head has come, redirects followed; raises BackendError.

        It is aborted when the conversation is over, or the request of the id `key` is cancelled;
        one that is not reached is sent once more where no session holds it at its backend.
        """
        kept = {n: v for n, v in own.items() if not n.lower().startswith("mcp-")}
        if self._cookies:
            kept["Cookie"] = cookies.sent_with(kept.get("Cookie"), self._cookies)
        all_headers = {**kept, **_OURS, **given}
        try:
            return self._followed(method, body, all_headers, timeout, key, is_new)
        except BackendUnreached as error:
            if self._session_id is not None or self._is_over.is_set() or not is_new:
                raise
            self._link.note_failure(self.address, error)
            self.address = self._link.address()
            if key is not None:
                with self._lock:
                    self.untaken.add(key)
            return self._followed(method, body, all_headers, timeout, key, is_new)

    def _followed(
        self,
        method: str,
        body: bytes,
        all_headers: Mapping[str, str],
        timeout: float,
        key: RequestId | None,
        is_new: bool,
    ) -> HttpCall:
        target = self._link.target(self.address)
        call = HttpCall(self._link.client, self.address, method, target, all_headers, body)
        while True:
            try:
                self._register(call, key, is_new)
                call.send(timeout)
                successor = call.redirected()
            except BaseException:
                self._done(call)
                raise
            if successor is None:
                return call
            self._done(call)
            call, is_new = successor, False

    def _register(self, call: HttpCall, key: RequestId | None, is_new: bool) -> None:
        """Raises BackendLost where nothing is to be sent any more."""
        with self._lock:
            if self._is_over.is_set() and call.method != "DELETE":
                raise BackendLost("The server was left")
            if is_new and key is not None:
                if key not in self.untaken:
                    raise BackendLost(_CANCELLED)
                self.untaken.discard(key)
            self._calls[call] = key

    def _done(self, call: HttpCall) -> None:
        with self._lock:
            self._calls.pop(call, None)
        call.close()

    def _cancel(self, key: RequestId | None) -> None:
        """Closes the response to a request, which takes it back (2026-07-28, "Cancellation")."""
        if key is None:
            return
        with self._lock:
            self.untaken.discard(key)
            calls = [call for call, its in self._calls.items() if its == key]
            self._calls.update(dict.fromkeys(calls))
        for call in calls:
            call.abort(BackendLost(_CANCELLED))

    def _session_headers(self) -> dict[str, str]:
        """What a legacy server is told with each message."""
        given = {}
        if self._session_id is not None:
            given[headers.SESSION_ID] = self._session_id
        if self._version is not None:
            given[headers.PROTOCOL_VERSION] = self._version
        return given

    def _modern_headers(self, request: Request, own: Mapping[str, str]) -> dict[str, str]:
        """What repeats the body for a modern server."""
        given = dict(modern.headers_of(request))
        if request.method == "tools/call":
            fields = jsonrpc.fields_of(request.params)
            name = jsonrpc.text_of(fields.get("name", UNSET)) or ""
            ask = partial(self._page, own)
            annotations = self._repeated.of(request, ask).get(name, {})
            arguments = fields.get("arguments", UNSET)
            given |= dict(param_headers.headers_for(annotations, arguments))
        return given

    def _page(self, own: Mapping[str, str], page: Page) -> Raw | None:
        """A page of the server's list of tools, None without one.

        No further page goes elsewhere where its backend cannot be reached.
        """
        body, given = jsonrpc.encode(page.request), dict(modern.headers_of(page.request))
        with self._own_call(body, own, given, page.seconds, page.is_first) as call:
            return _result(call, page.size)


def _is_unknown(call: HttpCall) -> bool:
    """Whether a server says that it does not know a request, and not that it wants a token."""
    return 400 <= call.status < 500 and call.status not in refusals.STATUSES


def _code_in(call: HttpCall) -> int | None:
    """The code of the JSON-RPC error that is the whole answer, None without one."""
    if call.media_type != headers.JSON:
        return None
    try:
        error = jsonrpc.fields_of(Raw(call.read(_MAX_ANSWER).strip())).get("error")
    except ParseError:
        return None
    return None if error is None else results.code_of(error)


def _is_cancellation(message: Message) -> bool:
    return isinstance(message, Notification) and message.method == jsonrpc.CANCELLED


def _events(call: HttpCall, limit: int) -> Iterator[sse.Event]:
    """The events of a stream; raises BackendError where it breaks."""
    decoder = sse.Decoder(limit)
    for piece in call.pieces():
        yield from decoder.feed(piece)


def _response(call: HttpCall, limit: int) -> Response | None:
    """The response in an answer of so many bytes at most; None without one. Raises ProxyError."""
    if call.media_type == headers.EVENT_STREAM:
        lines: Iterator[bytes] = (e.data for e in _events(call, limit) if e.data)
    else:
        lines = iter([call.read(limit)])
    for line in lines:
        message = jsonrpc.parse_message(jsonrpc.one_line(line))
        if isinstance(message, Response):
            return message
    return None


def _result(call: HttpCall, limit: int) -> Raw | None:
    """As `_response`, its result; None without one."""
    answer = _response(call, limit)
    return None if answer is None or answer.result is UNSET else answer.result


class Threads(NamedTuple):
    """Who does the work of all conversations. Calls wait for responses that may take long, so
    what wants no answer does not wait for a thread of theirs, nor do standing streams and ends.
    `events` reads what has begun to come.
    """

    events: EventReader
    calls: KeyedExecutor
    one_way: KeyedExecutor
    streams: KeyedExecutor
    ends: KeyedExecutor


class Upstreams:
    """Begins conversations, in place of a supervisor that starts processes. Thread-safe."""

    def __init__(self, link: Link, workers: Workers | None = None) -> None:
        self._link = link
        self._threads = Threads(
            EventReader("mcp-upstream-event", workers),
            KeyedExecutor("mcp-upstream", WIDTH),
            KeyedExecutor("mcp-upstream-one-way", _ONE_WAY_AT_ONCE),
            KeyedExecutor("mcp-upstream-stream", WIDTH),
            KeyedExecutor("mcp-upstream-end", _ENDS_AT_ONCE),
        )
        self._changed = threading.Condition()  # guards and announces _open
        self._open = 0

    def __repr__(self) -> str:
        return f"<Upstreams open={self._open} {self._threads!r}>"

    def spawn(
        self,
        server: Served,
        max_message: int,
        on_exit: Callable[[str], None],
        on_mute: Callable[[], None] | None = None,
    ) -> Upstream:
        """A conversation with a backend that can be reached; raises BackendUnreached."""

        def ended(how: str) -> None:
            try:
                on_exit(how)
            finally:
                self._count(-1)

        upstream = Upstream(self._link, self._threads, server.name, ended)
        self._count(1)
        return upstream

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def read(self, child: Upstream, on_line: Callable[[bytes], None]) -> None:
        """Has every line of a conversation go to `on_line`."""
        child.on_line = on_line

    def stop_child(self, child: Upstream) -> None:
        """Ends a conversation; returns before its server knows."""
        child.close()

    def close(self) -> None:
        """Nothing begins any more; gives the servers a moment to hear of what was left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, _CLOSE_TIME)
        for each in self._threads:
            each.close()
