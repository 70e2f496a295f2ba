"""The switchboard of a legacy server whose clients are modern: calls are translated on their way.

A legacy server asks its client by requests of its own (sampling, elicitation, roots). A modern
client has no stream that could carry them: the answer to its call is then `input_required` with the
questions, and it calls again with the answers (MCP 2026-07-28, multi round-trip requests). Between
the two the call is parked: it goes on at the child, and what the child says of it waits.

Who holds the child sees to it that at most one call that may ask is in flight, so a question, or a
log message, belongs to that call. As in every switchboard: no I/O, no threads, no lock.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.modern_switchboard import as_key
from mcp_proxy.backends.switchboard import PROGRESS, PendingCall, Switchboard
from mcp_proxy.errors import METHOD_NOT_FOUND, PROXY_ERROR, RequestId
from mcp_proxy.wire import capabilities, jsonrpc, modern, questions, results
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.questions import Retry

#: Seconds after a question in which others come that its client is asked together with it.
ROUND_TIME = 0.02

#: Seconds that a question outside any call waits for one, and how many may wait.
STRAY_TIME = 30.0
MAX_STRAYS = 16

#: What is said of a call that is parked, and of which the log waits for the retry.
MAX_LOGS = 64
MAX_LOG_BYTES = 256 * 1024

#: Calls that the child has answered and whose clients may call again; beyond, the oldest is given
#: up.
MAX_OVER = 16

#: Times in a row that one call may have its client open pages (-32042); then it fails.
MAX_PAGES = 10

#: Seconds for which a client's answer to roots/list holds for its whole home.
ROOTS_TIME = 300.0

_LOG = "notifications/message"
_ROOTS = "roots/list"
_SET_LEVEL = "logging/setLevel"
_URL_REQUIRED = -32042

_KINDS = {
    "sampling/createMessage": capabilities.SAMPLING,
    _ROOTS: capabilities.ROOTS,
}

_list = msgspec.json.Decoder(list[Raw])


class Parked(NamedTuple):
    """A call that waits for its client's answers; `until` is monotonic.

    `asked` are the child's requests that are not answered, by their keys, which the child may wait
    for although it has answered the call; what it says meanwhile is in `waiting`. Without a
    `wire_id` the retry is a new call, before which its client opens a page for the `pages`th time.
    """

    wire_id: int | None
    digest: bytes
    until: float
    waiting: Exchange
    asked: dict[str, Request]
    pages: int


class KeptRoots:
    """The roots of the clients of one home, as one of them has told last. Thread-safe."""

    def __init__(self) -> None:
        self._kept: tuple[Raw, float] | None = None  # until when, monotonic

    @property
    def answer(self) -> Raw | None:
        """The answer to roots/list; None where a client has to be asked."""
        kept = self._kept
        return None if kept is None or kept[1] < time.monotonic() else kept[0]

    def keep(self, answer: Raw) -> None:
        """A client has answered; what is no list of roots is not kept."""
        if "roots" in jsonrpc.fields_of(answer):
            self._kept = answer, time.monotonic() + ROOTS_TIME


class QuestionSwitchboard(Switchboard):
    """The tables of one legacy child of a home.

    `kinds` are what the home's clients can be asked for; `home_id` begins each state. `on_free` is
    called when the call that may ask is over, `on_change` with what listeners are told of.
    `on_asked` is called when a client has to be asked: `ask_open` is to follow after ROUND_TIME. It
    raises RuntimeError where nobody could see to that. `roots` are those of the home.
    """

    def __init__(
        self,
        home_id: str,
        kinds: frozenset[str],
        input_timeout: float,
        on_free: Callable[[], object],
        on_change: Callable[[Notification], object],
        on_asked: Callable[[], object],
        roots: KeptRoots,
    ) -> None:
        super().__init__()
        self.parked: dict[str, Parked] = {}  # by state, oldest first
        self.ended: list[str] = []  # the states of those that the child's end has ended
        self.server_info: Raw | None = None
        #: Whether the child takes a log level.
        self.has_logging = False
        self._home_id = home_id
        self._kinds = kinds
        self._input_timeout = input_timeout
        self._on_free = on_free
        self._on_change = on_change
        self._on_asked = on_asked
        self._roots = roots
        self._asking: int | None = None  # the wire id of the call that may ask
        self._request: Request | None = None  # that call
        self._wants_logs = False
        self._level = ""
        self._open: dict[str, Request] = {}  # what that call's client is asked, by key
        self._strays: list[tuple[float, Request]] = []

    # --- calls -----------------------------------------------------------------------------------

    def enter(self, request: Request, exchange: Exchange, deadline: float | None = None) -> bytes:
        """As promised; a retry adds nothing but the answers to what the child has asked.

        Raises InvalidParams.
        """
        lines: list[bytes] = []
        if request.method in modern.MAY_ASK:
            retry = questions.retry_of(request.params)
            if retry.state is not None:
                return self._resume(request, exchange, retry, retry.state)
        plain = modern.without_meta(questions.without_retry(request.params))
        level = log_level_of(request)
        if level and self.has_logging and level != self._level:
            self._level = level
            lines.append(self._set_level(level))
        lines.append(super().enter(Request(request.id, request.method, plain), exchange, deadline))
        if may_ask(request, self._kinds):
            self._asking = next(reversed(self._calls))
            self._request = request
            self._wants_logs = bool(level)
            for _, stray in self._current_strays():
                self._add_question(stray)
            lines += self.take_lines()  # the answers to those that need no client
        return b"\n".join(lines)

    def _set_level(self, level: str) -> bytes:
        """A request whose answer nobody waits for."""
        params = jsonrpc.as_payload({"level": level})
        return jsonrpc.encode(Request(next(self._wire_ids), _SET_LEVEL, params))

    def pop(self, wire_id: RequestId) -> PendingCall | None:
        call = super().pop(wire_id)
        if call is not None and call.wire_id == self._asking:
            self._asking = None
            if not is_parked(call.exchange):  # else those that are left belong to the parked call
                self.lines += [_no_answer(question) for question in self._open.values()]
            self._open = {}
            self._on_free()
        return call

    def pop_answered(self, wire_id: RequestId) -> PendingCall | None:
        """As promised; its client is asked first what it was about to be asked."""
        if as_key(wire_id) == self._asking:
            self.ask_open()
        return self.pop(wire_id)

    def encoded(self, response: Response, call: PendingCall) -> bytes:
        if response.error is not UNSET:
            needed = _urls_required(response.error) if self._may_need_page(call.exchange) else {}
            if needed:
                state = self._park_call(None, {}, call.exchange.pages + 1)
                return jsonrpc.encode(Response(call.id, questions.input_required(needed, state)))
            error = results.upgraded_error(response.error)
            return jsonrpc.encode(Response(call.id, error=error))
        assert response.result is not UNSET
        result = results.upgraded_result(call.method, response.result, self.server_info)
        return jsonrpc.encode(Response(call.id, result))

    def _may_need_page(self, exchange: Exchange) -> bool:
        """Whether the client of a call can be told to open a page and to call anew."""
        can_open = capabilities.URL in self._kinds and not is_parked(exchange)
        return can_open and exchange.pages < MAX_PAGES

    def _is_waiting(self, exchange: Exchange) -> bool:
        return not exchange.is_standing  # it is where a parked call waits

    # --- questions -------------------------------------------------------------------------------

    def deliver(self, message: Request | Notification) -> Exchange | None:
        if isinstance(message, Request):
            self._take_question(message)
            return None
        if message.method == PROGRESS:
            return super().deliver(message)
        if message.method == _LOG:
            return self._deliver_log(message)
        if message.method == jsonrpc.CANCELLED:
            self._withdraw(jsonrpc.cancelled_id_of(message))
        else:
            self._on_change(message)
        return None

    def _route_progress(self, progress: Notification) -> tuple[Exchange | None, Notification]:
        token = jsonrpc.progress_token_of(progress)
        call = None if token is None else self._tokens.get(token)
        if call is None or call.token is None or is_parked(call.exchange):
            return None, progress
        return super()._route_progress(progress)

    def _deliver_log(self, message: Notification) -> Exchange | None:
        call = self._calls.get(self._asking or 0)
        if call is None or not self._wants_logs or not call.exchange.accepts_stream:
            return None
        waiting = call.exchange
        is_full = waiting.waiting >= MAX_LOGS or waiting.backlog > MAX_LOG_BYTES
        if is_parked(waiting) and is_full:
            return None
        call.exchange.offer(ServerMessage(jsonrpc.encode(message), is_response=False))
        return call.exchange

    def _take_question(self, question: Request) -> None:
        kind = _kind_of(question)
        if question.method == "ping":
            self._reply(Response(question.id, jsonrpc.as_payload({})))
        elif kind is None or kind not in self._kinds:
            sentence = f"No client can be asked here: {question.method}"
            self._refuse(question.id, METHOD_NOT_FOUND, sentence)
        elif self._has_answered(question):
            pass
        elif self._asking is not None:
            self._add_question(question)
        else:
            self._strays.append((time.monotonic() + STRAY_TIME, question))
            self._drop_strays()

    def _has_answered(self, question: Request) -> bool:
        """Whether the child has its answer, since a client has given it before."""
        known = self._roots.answer if question.method == _ROOTS else None
        if known is not None:
            self._reply(Response(question.id, known))
        return known is not None

    def _current_strays(self) -> list[tuple[float, Request]]:
        self._drop_strays()
        strays, self._strays = self._strays, []
        return strays

    def _drop_strays(self) -> None:
        """Refuses the questions outside any call for which none has come, or answers them."""
        now = time.monotonic()
        strays = [stray for stray in self._strays if not self._has_answered(stray[1])]
        kept = [stray for stray in strays[-MAX_STRAYS:] if stray[0] > now]
        for stray in strays:
            if stray not in kept:
                self._refuse(stray[1].id, PROXY_ERROR, "No call came that could carry the question")
        self._strays = kept

    def _add_question(self, question: Request) -> None:
        """Has the client of the call that may ask asked soon or, where it is parked, next time."""
        assert self._asking is not None
        self._open[f"question-{secrets.token_hex(4)}"] = question
        if len(self._open) > 1 or is_parked(self._calls[self._asking].exchange):
            return
        try:
            self._on_asked()
        except RuntimeError:
            self.ask_open()

    def ask_open(self) -> None:
        call = self._calls.get(self._asking or 0)
        if self._open and call is not None and not is_parked(call.exchange):
            self._ask(call)

    def _ask(self, call: PendingCall) -> None:
        """Answers a call by its open questions; it is parked until its client calls again."""
        state = self._park_call(call.wire_id, self._open)
        asked = {key: _as_modern(question) for key, question in self._open.items()}
        payload = questions.input_required(asked, state)
        self._move(call, call._replace(exchange=self.parked[state].waiting))
        encoded = jsonrpc.encode(Response(call.id, payload))
        call.exchange.offer(ServerMessage(encoded, is_response=True))

    def _park_call(self, wire_id: int | None, asked: dict[str, Request], pages: int = 0) -> str:
        state = f"{self._home_id}.{secrets.token_urlsafe(16)}"
        known = list(self.parked.items())
        over = [each for each, parked in known if parked.wire_id not in self._calls]
        for each in over[: max(0, len(over) + 1 - MAX_OVER)]:
            self.end_parked(each)
        until = time.monotonic() + self._input_timeout
        assert self._request is not None
        digest = questions.digest(self._request)
        waiting = Exchange(cancels=True)  # the child's reader waits for nobody who reads it
        self.parked[state] = Parked(wire_id, digest, until, waiting, asked, pages)
        return state

    def _move(self, call: PendingCall, moved: PendingCall) -> None:
        """Has a call answered to another exchange from now on."""
        self._calls[call.wire_id] = moved
        if call.wire_token is not None:
            self._tokens[call.wire_token] = moved
        self._posts.pop(call.exchange, None)
        self._posts[moved.exchange] = 1

    def _withdraw(self, asked_id: RequestId | None) -> None:
        """The child no longer waits for the answer to one of its questions."""
        self._strays = [stray for stray in self._strays if stray[1].id != asked_id]
        for asked in (self._open, *(parked.asked for parked in list(self.parked.values()))):
            for key, question in list(asked.items()):
                if question.id == asked_id:
                    del asked[key]

    # --- the client calls again ------------------------------------------------------------------

    def is_retry_of(self, state: str, request: Request) -> bool:
        """Whether a request repeats the call that is parked under a state."""
        parked = self.parked.get(state)
        if parked is None or parked.until < time.monotonic():
            return False
        return secrets.compare_digest(parked.digest, questions.digest(request))

    def take_fresh(self, state: str) -> int | None:
        """Where the retry under a state is a new call, how many pages its client has opened for it
        in a row; from now on the state is used. None where it is none.
        """
        parked = self.parked.get(state)
        if parked is None or parked.wire_id is not None:
            return None
        return None if self.parked.pop(state, None) is None else parked.pages

    def _resume(self, request: Request, exchange: Exchange, retry: Retry, state: str) -> bytes:
        """Gives a parked call to the client that has called again, and the child its answers."""
        if not self.is_retry_of(state, request):
            exchange.offer(ServerMessage(questions.invalid_state(request.id), is_response=True))
            return b""
        parked = self.parked.pop(state)
        call = None if parked.wire_id is None else self._calls.get(parked.wire_id)
        _pass_on(parked.waiting, exchange, request.id)
        lines = self._answers(parked, retry.responses or {})
        if call is None:  # its answer was among it
            return b"\n".join(lines + [_no_answer(each) for each in parked.asked.values()])
        found = request.meta.progress_token
        token = None if found is UNSET else found
        resumed = call._replace(id=request.id, exchange=exchange, token=token)
        self._move(call, resumed)
        if self._open:
            self._ask(resumed)
        return b"\n".join(lines)

    def _answers(self, parked: Parked, responses: Mapping[str, Raw]) -> list[bytes]:
        """What the child gets of a client's answers: those to questions that are still open."""
        lines: list[bytes] = []
        for key, answer in responses.items():
            question = parked.asked.pop(key, None)
            if question is None:
                continue
            if question.method == _ROOTS:
                self._roots.keep(answer)
            lines.append(jsonrpc.encode(Response(question.id, answer)))
        return lines

    # --- calls that nobody repeats ---------------------------------------------------------------

    def end_parked(self, state: str) -> None:
        """Ends a parked call: the child hears that nobody answers, and of the cancellation.

        Harmless where it was taken or ended meanwhile.
        """
        parked = self.parked.pop(state, None)
        if parked is None:
            return
        self.lines += [_no_answer(question) for question in parked.asked.values()]
        wire_id = parked.wire_id
        if wire_id is None or wire_id not in self._calls:
            return
        params = {"requestId": wire_id, "reason": "The client has not answered a question"}
        notice = Notification(jsonrpc.CANCELLED, jsonrpc.as_payload(params))
        self.lines.append(jsonrpc.encode(notice))
        self.pop(wire_id)

    def do_overdue(self) -> None:
        """Ends the parked calls whose time is over."""
        now = time.monotonic()
        self._drop_strays()
        for state in [each for each, parked in list(self.parked.items()) if parked.until < now]:
            self.end_parked(state)

    def clear(self) -> tuple[list[PendingCall], Exchange | None]:
        self.ended = list(self.parked)
        self.parked.clear()
        self._open = {}
        self._strays.clear()
        self._asking = None
        return super().clear()

    def _refuse(self, asked_id: RequestId, code: int, sentence: str) -> None:
        self._reply(Response(asked_id, error=jsonrpc.error_payload(code, sentence)))

    def _reply(self, response: Response) -> None:
        self.lines.append(jsonrpc.encode(response))


def _no_answer(question: Request) -> bytes:
    """What the child hears where its client has not answered."""
    error = jsonrpc.error_payload(PROXY_ERROR, "The client has not answered")
    return jsonrpc.encode(Response(question.id, error=error))


def _kind_of(question: Request) -> str | None:
    """What a client must have declared to be asked this; None where no client can be."""
    if question.method == "elicitation/create":
        mode = jsonrpc.text_of(jsonrpc.fields_of(question.params).get("mode", UNSET))
        return capabilities.URL if mode == "url" else capabilities.FORM
    return _KINDS.get(question.method)


def _as_modern(question: Request) -> questions.Question:
    """A question as a modern client knows it: nobody tells it how an elicitation has ended."""
    params = question.params
    if question.method == "elicitation/create":
        params = jsonrpc.edited(params, lambda fields: fields.pop("elicitationId", None))
    return question.method, params


def _urls_required(error: Raw) -> dict[str, questions.Question]:
    """The URLs that a legacy server wants its client to open first, by keys of ours.

    MCP 2025-11-25, elicitation, "URL Elicitation Required Error".
    """
    fields = jsonrpc.fields_of(error)
    if jsonrpc.id_of(fields.get("code", UNSET)) != _URL_REQUIRED:
        return {}
    data = jsonrpc.fields_of(fields.get("data", UNSET))
    try:
        listed = _list.decode(data.get("elicitations", b"[]"))
    except msgspec.DecodeError:
        return {}
    wanted = [Request(0, "elicitation/create", one) for one in listed if jsonrpc.is_object(one)]
    return {f"question-{number}": _as_modern(one) for number, one in enumerate(wanted)}


def _pass_on(waited: Exchange, exchange: Exchange, request_id: RequestId) -> None:
    """Offers what the child has said of a parked call to whoever has called again."""
    for message in waited.drain():
        if message.is_response:
            answer = jsonrpc.parse_message(message.data)
            message = message._replace(data=jsonrpc.encode(answer, request_id))
        exchange.offer(message)


def is_parked(exchange: Exchange) -> bool:
    """Whether an exchange is where a parked call waits."""
    return not exchange.requests


def log_level_of(request: Request) -> str:
    """The log level that a modern request asks for, empty where it asks for no logs."""
    level = request.meta.log_level
    return "" if level is UNSET else bytes(level).decode(errors="replace").strip('"')


def may_ask(request: Request, kinds: frozenset[str]) -> bool:
    """Whether a call needs a legacy child for itself: its server may ask, or log, meanwhile."""
    return bool(log_level_of(request)) or (bool(kinds) and request.method in modern.MAY_ASK)
