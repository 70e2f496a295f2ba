"""The switchboard of a modern server whose client is legacy: one session, translated on its way.

MCP 2026-07-28 knows no sessions: every request says what the client said once, a log level comes
with each, changes are listened to by `subscriptions/listen`, and a server that needs something
answers a call by `input_required` instead of asking. Here each such question becomes a request on
the stream of the call; when all are answered the call is sent again, with the answers and the
server's state. As in every switchboard: no I/O, no threads, no lock.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.modern_switchboard import ModernSwitchboard, as_key
from mcp_proxy.backends.switchboard import PROGRESS, PendingCall, Switchboard
from mcp_proxy.errors import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    ParseError,
    RequestId,
)
from mcp_proxy.wire import capabilities, jsonrpc, listening, modern, questions, results, revisions
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.listening import Filter
from mcp_proxy.wire.modern import LISTEN
from mcp_proxy.wire.questions import InputRequired, Retry

#: How often a server may answer one call by questions, or have it sent again without any.
MAX_ROUNDS = 32

#: The resources that one session may subscribe to.
MAX_SUBSCRIPTIONS = 256

#: Seconds that a stream of changes has to last to be opened anew at once when it ends.
MIN_LISTENING = 5.0

# Seconds before a call is sent again without any questions: the rounds so far times the first, at
# most the second. The child's reader waits, as for a server that says nothing of use.
_PAUSE = 0.05
_MAX_PAUSE = 0.5

_LOG = "notifications/message"
_ELICIT = "elicitation/create"
_COMPLETE = "notifications/elicitation/complete"
_SET_LEVEL = "logging/setLevel"
_SUBSCRIBE = "resources/subscribe"
_UNSUBSCRIBE = "resources/unsubscribe"

# What only a legacy server has to hear.
_SWALLOWED = frozenset({INITIALIZED, PROGRESS, _COMPLETE, "notifications/roots/list_changed"})

# What a legacy client cannot ask: the proxy does.
_OURS = frozenset({modern.DISCOVER, LISTEN})

_KINDS = {
    "sampling/createMessage": capabilities.SAMPLING,
    "roots/list": capabilities.ROOTS,
}

# The first revisions in which a client can be asked so.
_FORMS_SINCE = "2025-06-18"
_URLS_SINCE = "2025-11-25"

_EMPTY = Raw(b"{}")
_CANCELLED_ANSWER = Raw(b'{"action":"cancel"}')


class LegacyClient(NamedTuple):
    """What a client said of itself by its initialize.

    `meta` is how its requests say it to a modern server; `kinds` are what it can be asked.
    """

    version: str
    meta: Mapping[str, Raw]
    kinds: frozenset[str]

    @classmethod
    def of(cls, params: Raw | UnsetType) -> LegacyClient:
        """The client that sends these params; an unknown revision gives the newest legacy one."""
        asked = jsonrpc.protocol_version_of(params) or ""
        version = asked if revisions.is_legacy(asked) else revisions.LEGACY[-1]
        fields = jsonrpc.fields_of(params)
        declared = _declared(fields.get("capabilities", UNSET), version)
        meta = {
            modern.PROTOCOL_VERSION: jsonrpc.as_payload(modern.REVISION),
            modern.CLIENT_CAPABILITIES: declared,
        }
        info = fields.get("clientInfo", UNSET)
        if info is not UNSET and jsonrpc.is_object(info):
            meta[modern.CLIENT_INFO] = info
        return cls(version, meta, capabilities.kinds_of(declared))


def _declared(given: Raw | UnsetType, version: str) -> Raw:
    """The capabilities that a client at this revision can have, for a modern server."""

    def drop_unknown(declared: dict[str, Raw]) -> None:
        if version < _FORMS_SINCE:
            declared.pop("elicitation", None)
        elif version < _URLS_SINCE and "elicitation" in declared:
            declared["elicitation"] = _EMPTY

    return jsonrpc.edited(capabilities.modern_capabilities_of(given), drop_unknown)


@dataclass
class _Asking:
    """A call that a modern server may answer by questions, and the round that it is in."""

    request: Request
    rounds: int = 0
    state: str | None = None
    exchange: Exchange | None = None  # where the questions are asked
    open: dict[str, tuple[str, str]] = field(default_factory=dict)  # key, method
    answers: dict[str, Raw] = field(default_factory=dict)
    visits: dict[str, str] = field(default_factory=dict)  # elicitation ids of URLs, by key


class _Waiter(NamedTuple):
    """A call that waits for an acknowledgement, and the URI that it has added."""

    wire_id: int
    uri: str | None


@dataclass
class _Listen:
    """A `subscriptions/listen` of ours."""

    wanted: Filter
    opened: float
    waiters: list[_Waiter] = field(default_factory=list)
    is_acknowledged: bool = False
    is_honoured: bool = False


class LegacySessionSwitchboard(ModernSwitchboard):
    """The tables of one child that speaks 2026-07-28, for a session of `client`.

    `server` are the capabilities of its DiscoverResult.
    """

    def __init__(self, client: LegacyClient, server: Raw | UnsetType) -> None:
        super().__init__()
        self._client = client
        self._meta = dict(client.meta)
        self._server = server
        self._has_logging = "logging" in jsonrpc.fields_of(server)
        self._uris: dict[str, None] = {}
        self._listens: dict[int, _Listen] = {}  # by wire id: the one that is open, the next one
        self._has_to_listen = False  # the stream of changes has ended
        self._nobody = Exchange()
        self._questions: dict[RequestId, int] = {}  # wire ids of calls, by the ids of questions

    # --- from the client -------------------------------------------------------------------------

    def enter(self, request: Request, exchange: Exchange, deadline: float | None = None) -> bytes:
        """As promised; empty where the answer is there already, or comes with another one."""
        answer = self._answer_to(request)
        if answer is not None:
            exchange.offer(_message(answer))
            return b""
        if request.method in (_SUBSCRIBE, _UNSUBSCRIBE):
            return self._subscribe(request, exchange, deadline)
        params = modern.edited_meta(request.params, lambda meta: meta.update(self._meta))
        request = Request(request.id, request.method, params)
        kept = _Asking(request) if request.method in modern.MAY_ASK else None
        return self._send(request, exchange, deadline, kept)

    def _send(
        self,
        request: Request,
        exchange: Exchange,
        deadline: float | None,
        asking: _Asking | None,
    ) -> bytes:
        line = Switchboard.enter(self, request, exchange, deadline)
        if asking is not None:
            wire_id = next(reversed(self._calls))
            self._calls[wire_id] = self._calls[wire_id]._replace(kept=asking)
        if exchange.is_closed:
            self._posts.pop(exchange, None)
        return line

    def _answer_to(self, request: Request) -> Response | None:
        """The answer to what a modern server need not hear of; None where it has to."""
        method = request.method
        if method == "ping":
            return Response(request.id, _EMPTY)
        if method == INITIALIZE:
            return _refusal(request, INVALID_REQUEST, "The session is initialized already")
        if method in _OURS:
            return _refusal(request, METHOD_NOT_FOUND, f"Method not found: {method}")
        if method == _SET_LEVEL:
            return self._set_level(request)
        return None

    def _set_level(self, request: Request) -> Response:
        level = jsonrpc.fields_of(request.params).get("level", UNSET)
        if not self._has_logging:
            return _refusal(request, METHOD_NOT_FOUND, f"Method not found: {_SET_LEVEL}")
        if level is UNSET or jsonrpc.text_of(level) not in modern.LOG_LEVELS:
            names = ", ".join(sorted(modern.LOG_LEVELS))
            return _refusal(request, INVALID_PARAMS, f"params.level must be one of {names}")
        self._meta[modern.LOG_LEVEL] = level
        return Response(request.id, _EMPTY)

    def notice(self, notification: Notification) -> bytes:
        if notification.method == INITIALIZED:
            return b"" if self._listens else self._listen()
        return b"" if notification.method in _SWALLOWED else super().notice(notification)

    def _hold(self, call: PendingCall) -> PendingCall:
        """Keeps a call that the child is not to hear of yet, under a new id."""
        held = call._replace(
            wire_id=next(self._wire_ids), token=None, wire_token=None, is_at_child=False
        )
        self._calls[held.wire_id] = held
        if not held.exchange.is_closed:
            self._posts[held.exchange] = self._posts.get(held.exchange, 0) + 1
        return held

    def pop(self, wire_id: RequestId) -> PendingCall | None:
        call = super().pop(wire_id)
        if call is None and as_key(wire_id) in self._listens:
            key = as_key(wire_id)
            return PendingCall(key, key, LISTEN, self._nobody, None, None)
        if call is not None and isinstance(call.kept, _Asking):
            self._withdraw(call.kept)
        return call

    def pop_only(self) -> PendingCall | None:
        at_child = [call.wire_id for call in self._calls.values() if call.is_at_child]
        return self.pop(at_child[0]) if len(at_child) == 1 else None

    # --- from the child --------------------------------------------------------------------------

    def encoded(self, response: Response, call: PendingCall) -> bytes | None:
        if call.exchange is self._nobody:
            self._note_ended(call.wire_id, response.error)
            return None
        if response.error is not UNSET:
            return jsonrpc.encode(Response(call.id, error=results.downgraded_error(response.error)))
        assert response.result is not UNSET
        kind = _type_of(response.result)
        asking = call.kept if isinstance(call.kept, _Asking) else None
        if asking is not None and kind == questions.INPUT_REQUIRED:
            found = questions.input_required_of(response.result)
            assert found is not None
            return self._ask(call, asking, found)
        if kind not in (None, "complete"):
            return _failed(call, f"The server's result is of a type that nobody asked for: {kind}")
        if asking is not None:
            self._complete_visits(asking, call)
        result = results.downgraded_result(call.method, response.result)
        return jsonrpc.encode(Response(call.id, result))

    def deliver(self, message: Request | Notification) -> Exchange | None:
        if isinstance(message, Request):
            return super().deliver(message)
        exchange, message = self._addressed(message)
        if message.method in (jsonrpc.CANCELLED, listening.ACKNOWLEDGED):
            return None
        line = ServerMessage(jsonrpc.encode(message), is_response=False)
        if exchange is self._nobody:
            self._park(line)
            return None
        if exchange is not None:
            exchange.offer(line)
        return exchange

    def _addressed(self, message: Notification) -> tuple[Exchange | None, Notification]:
        """As promised; `_nobody` where it waits for a standing stream."""
        if message.method == PROGRESS:
            return self._route_progress(message)
        if message.method == jsonrpc.CANCELLED:
            self._note_ended(as_key(jsonrpc.cancelled_id_of(message)), UNSET)
            return None, message
        if message.method == _LOG:
            if modern.LOG_LEVEL not in self._meta:
                return None, message
            return Switchboard._route(self, message) or self._nobody, message
        wire_id = as_key(listening.subscription_id_of(message))
        if wire_id not in self._listens:
            return None, message
        if message.method == listening.ACKNOWLEDGED:
            self._note_acknowledged(wire_id, message)
            return None, message
        exchange = self._stream or self._newest_streaming() or self._nobody
        return exchange, listening.untagged(message)

    def overflow(self) -> list[Request | Notification]:
        """As promised; a question that no stream has taken in time fails its call."""
        dropped = super().overflow()
        for message in Switchboard.overflow(self):
            if isinstance(message, Notification):
                dropped.append(message)
            elif message.id in self._questions:
                self._fail(self._questions[message.id], "Nobody has taken the server's question")
        return dropped

    def take_lines(self) -> list[bytes]:
        self.pause = 0.0
        return super().take_lines()

    def clear(self) -> tuple[list[PendingCall], Exchange | None]:
        for call in self._calls.values():
            if isinstance(call.kept, _Asking):
                self._withdraw(call.kept)
        self._listens.clear()
        return super().clear()

    # --- questions -------------------------------------------------------------------------------

    def _ask(self, call: PendingCall, asking: _Asking, found: InputRequired) -> bytes | None:
        """Asks the client, or sends the call again at once where nothing is asked.

        Returns the answer of the call where neither can be done.
        """
        asking.rounds += 1
        asking.state, asking.answers = found.state, {}
        self._complete_visits(asking, call, found)
        if asking.rounds > MAX_ROUNDS:
            return _failed(call, f"The server has asked for input more than {MAX_ROUNDS} times")
        if not found.requests and found.state is None:
            return _failed(call, "The server asks for input in a way that cannot be understood")
        if not found.requests:
            self.lines.append(self._send_again(call, asking))
            self.pause = min(_MAX_PAUSE, _PAUSE * asking.rounds)
            return None
        exchange = self._stream
        if call.exchange.accepts_stream and not call.exchange.is_closed:
            exchange = call.exchange
        for method, params in found.requests.values():
            if _kind_of(method, params) not in self._client.kinds:
                return _failed(call, f"The server asks what its client has not declared: {method}")
        if exchange is None:
            return _failed(call, "The server asks its client, which takes no event stream")
        asking.exchange = exchange
        self._put(self._hold(call), asking, exchange, found)
        return None

    def _put(
        self, call: PendingCall, asking: _Asking, exchange: Exchange, found: InputRequired
    ) -> None:
        """Puts the questions of a round to the client."""
        for key, (method, params) in found.requests.items():
            question_id = f"question-{secrets.token_hex(8)}"
            asking.open[question_id] = (key, method)
            self._questions[question_id] = call.wire_id
            if _kind_of(method, params) == capabilities.URL:
                asking.visits[key] = f"elicitation-{secrets.token_hex(8)}"
            params = self._as_legacy(params, asking.visits.get(key))
            line = jsonrpc.encode(Request(question_id, method, params))
            exchange.offer(ServerMessage(line, is_response=False))

    def _as_legacy(self, params: Raw | UnsetType, visit: str | None) -> Raw | UnsetType:
        """The params of a question as the client's revision knows them.

        Some clients break where params are absent, which the schema allows.
        """
        plain = modern.without_meta(Raw(b"{}") if params is UNSET else params)
        if visit is not None:
            added = jsonrpc.as_payload(visit)
            return jsonrpc.edited(plain, lambda fields: fields.update(elicitationId=added))
        if plain is not UNSET and self._client.version < _URLS_SINCE:
            return jsonrpc.edited(plain, lambda fields: fields.pop("mode", None))
        return plain

    def take_answer(self, response: Response) -> bytes | None:
        wire_id = self._questions.pop(response.id, None)
        if wire_id is None:
            return None
        call = self._calls.get(wire_id)
        if call is None:  # the child has gone meanwhile
            return None
        asking = call.kept
        assert isinstance(asking, _Asking)
        key, method = asking.open.pop(str(response.id))
        answer = response.result
        if response.error is not UNSET and method == _ELICIT:
            answer = _CANCELLED_ANSWER
        elif response.error is not UNSET:
            self._end(wire_id, error=results.downgraded_error(response.error))
            return b""
        if answer is UNSET or not jsonrpc.is_object(answer):
            self._fail(wire_id, f"The client's answer is no object: {method}")
            return b""
        if key in asking.visits and not _is_accepted(answer):
            del asking.visits[key]
        asking.answers[key] = answer
        if asking.open:
            return b""
        self.pop(wire_id)
        return self._send_again(call, asking)

    def _send_again(self, call: PendingCall, asking: _Asking) -> bytes:
        """The call as it goes to the child once more, with what was answered."""
        retry = Retry(asking.answers or None, asking.state)
        params = questions.with_retry(asking.request.params, retry)
        request = Request(call.id, call.method, params)
        return self._send(request, call.exchange, call.deadline, asking)

    def _complete_visits(
        self, asking: _Asking, call: PendingCall, found: InputRequired | None = None
    ) -> None:
        """Tells the client that the server knows of the pages that it has shown."""
        again = found.requests if found is not None else {}
        for key in [key for key in asking.visits if key not in again]:
            params = jsonrpc.as_payload({"elicitationId": asking.visits.pop(key)})
            line = jsonrpc.encode(Notification(_COMPLETE, params))
            exchange = asking.exchange
            if exchange is not None and not exchange.is_closed:
                exchange.offer(ServerMessage(line, is_response=False))

    def _withdraw(self, asking: _Asking) -> None:
        """Nobody waits any more for the answers to the questions of a call."""
        for question_id in asking.open:
            self._questions.pop(question_id, None)
            params = jsonrpc.as_payload({"requestId": question_id})
            line = jsonrpc.encode(Notification(jsonrpc.CANCELLED, params))
            if asking.exchange is not None and not asking.exchange.is_closed:
                asking.exchange.offer(ServerMessage(line, is_response=False))
            else:
                self._drop_waiting(question_id.encode())
        asking.open.clear()

    def _drop_waiting(self, question_id: bytes) -> None:
        """A question that waits for a standing stream is not to be asked any more."""
        for message in [each for each in self._waiting if question_id in each.data]:
            self._waiting.remove(message)
            self._waiting_bytes -= len(message.data)

    def _fail(self, wire_id: int, sentence: str) -> None:
        self._end(wire_id, error=jsonrpc.error_payload(INTERNAL_ERROR, sentence))

    def _end(
        self, wire_id: int, result: Raw | UnsetType = UNSET, error: Raw | UnsetType = UNSET
    ) -> None:
        """Answers a call that is not at the child; one that was cancelled, or is out of time, has
        its answer.
        """
        call = self.pop(wire_id)
        if call is not None:
            call.exchange.offer(_message(Response(call.id, result, error)))

    # --- subscriptions ---------------------------------------------------------------------------

    def _subscribe(self, request: Request, exchange: Exchange, deadline: float | None) -> bytes:
        """Changes what is listened to; the call is answered when the server has acknowledged it."""
        uri = jsonrpc.text_of(jsonrpc.fields_of(request.params).get("uri", UNSET))
        is_more = request.method == _SUBSCRIBE
        if uri is None:
            return _refuse(exchange, request, INVALID_PARAMS, "params.uri must be a string")
        if not Filter(uris=(uri,)).honoured(self._server).uris:
            sentence = f"Method not found: {request.method}"
            return _refuse(exchange, request, METHOD_NOT_FOUND, sentence)
        is_new = is_more and uri not in self._uris
        if is_new and len(self._uris) >= MAX_SUBSCRIPTIONS:
            sentence = f"A session subscribes to {MAX_SUBSCRIPTIONS} resources at most"
            return _refuse(exchange, request, INVALID_PARAMS, sentence)
        if is_new:
            self._uris[uri] = None
        elif not is_more:
            self._uris.pop(uri, None)
        call = PendingCall(0, request.id, request.method, exchange, None, None, deadline)
        newest = next(reversed(self._listens.values()), None)
        is_told = newest is not None and newest.wanted == self._wanted()
        if is_told and newest is not None and newest.is_acknowledged:
            exchange.offer(_message(Response(request.id, _EMPTY)))
            return b""
        if self._wanted().is_empty:
            exchange.offer(_message(Response(request.id, _EMPTY)))
            return self._close_listens()
        waiter = _Waiter(self._hold(call).wire_id, uri if is_new else None)
        line = b"" if is_told else self._listen()
        next(reversed(self._listens.values())).waiters.append(waiter)
        return line

    def _wanted(self) -> Filter:
        """What the client is to hear of."""
        everything = Filter(tools=True, prompts=True, resources=True, uris=tuple(self._uris))
        return everything.honoured(self._server)

    def _listen(self) -> bytes:
        """Lines that open another stream of changes; the one that is open stays until that is."""
        wanted, waiters = self._wanted(), list[_Waiter]()
        if wanted.is_empty:
            return b""
        self._has_to_listen = False
        lines: list[bytes] = []
        for wire_id, listen in list(self._listens.items()):
            if not listen.is_acknowledged:  # it was overtaken
                waiters += listen.waiters
                lines.append(self._close_listen(wire_id))
        wire_id = next(self._wire_ids)
        self._listens[wire_id] = _Listen(wanted, time.monotonic(), waiters)
        params = jsonrpc.as_payload({"notifications": wanted, "_meta": self._client.meta})
        return b"\n".join([*lines, jsonrpc.encode(Request(wire_id, LISTEN, params))])

    def _close_listen(self, wire_id: int) -> bytes:
        del self._listens[wire_id]
        params = jsonrpc.as_payload({"requestId": wire_id, "reason": "Another one has been opened"})
        return jsonrpc.encode(Notification(jsonrpc.CANCELLED, params))

    def _close_listens(self) -> bytes:
        """A line for each stream: there is nothing that the client is to hear of."""
        waiters = [waiter for listen in self._listens.values() for waiter in listen.waiters]
        lines = [self._close_listen(wire_id) for wire_id in list(self._listens)]
        for waiter in waiters:
            self._end(waiter.wire_id, _EMPTY)
        return b"\n".join(lines)

    def _note_acknowledged(self, wire_id: int, message: Notification) -> None:
        """From now on this stream has the changes; those before it are closed."""
        listen = self._listens[wire_id]
        honoured = listening.honoured_of(message)
        listen.is_acknowledged, listen.is_honoured = True, not honoured.is_empty
        for older in [each for each in self._listens if each < wire_id]:
            self.lines.append(self._close_listen(older))
        waiters, listen.waiters = listen.waiters, []
        for waiter in waiters:
            if waiter.uri in listen.wanted.uris and not honoured.uris:
                self._uris.pop(waiter.uri or "", None)
                self._fail(waiter.wire_id, "The server does not tell of changes of this resource")
            else:
                self._end(waiter.wire_id, _EMPTY)

    def _note_ended(self, wire_id: int, error: Raw | UnsetType) -> None:
        """The server has ended a stream of changes, or has refused it."""
        listen = self._listens.pop(wire_id, None)
        if listen is None:
            return
        for waiter in listen.waiters:
            self._uris.pop(waiter.uri or "", None)
            if error is UNSET:
                self._fail(waiter.wire_id, "The server has ended the subscription")
            else:
                self._end(waiter.wire_id, error=results.downgraded_error(error))
        if listen.is_honoured and not self._listens:
            self._has_to_listen = True
            if time.monotonic() - listen.opened >= MIN_LISTENING:
                self.do_overdue()

    def do_overdue(self) -> None:
        """Opens the stream of changes again where the server has ended it."""
        if self._has_to_listen:
            self.lines.append(self._listen())

    def set_stream(self, stream: Exchange | None) -> Exchange | None:
        if stream is not None and not self._listens:
            self.lines.append(self._listen())
        return super().set_stream(stream)


def _type_of(result: Raw) -> str | None:
    """The type of a result; None also where it cannot be read."""
    try:
        return jsonrpc.text_of(jsonrpc.fields_of(result).get("resultType", UNSET))
    except ParseError:
        return None


def _kind_of(method: str, params: Raw | UnsetType) -> str | None:
    """What a client must have declared to be asked this; None where no client can be."""
    if method == _ELICIT:
        mode = jsonrpc.text_of(jsonrpc.fields_of(params).get("mode", UNSET))
        return capabilities.URL if mode == "url" else capabilities.FORM
    return _KINDS.get(method)


def _is_accepted(answer: Raw) -> bool:
    return jsonrpc.text_of(jsonrpc.fields_of(answer).get("action", UNSET)) == "accept"


def _refusal(request: Request, code: int, sentence: str) -> Response:
    return Response(request.id, error=jsonrpc.error_payload(code, sentence))


def _refuse(exchange: Exchange, request: Request, code: int, sentence: str) -> bytes:
    """Answers a request of which the child gets nothing."""
    exchange.offer(_message(_refusal(request, code, sentence)))
    return b""


def _failed(call: PendingCall, sentence: str) -> bytes:
    """The answer to a call of whose result the client can make nothing."""
    return jsonrpc.encode_error(INTERNAL_ERROR, sentence, call.id)


def _message(answer: Response) -> ServerMessage:
    return ServerMessage(jsonrpc.encode(answer), is_response=True)
