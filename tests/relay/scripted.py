"""A backend for relays to serve: does what its scripts say, and counts what it executed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.errors import PROXY_ERROR, BackendError, BackendLost
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

#: Plays the part of the server in one exchange.
Script = Callable[["ScriptedCall", Sequence[Request]], None]


class ScriptedCall:
    """The source of one exchange; remembers what it was told."""

    def __init__(self, exchange: Exchange, on_expire: Callable[[], object]) -> None:
        self.exchange = exchange
        self.has_begun = threading.Event()
        self.was_left = threading.Event()
        self._on_expire = on_expire
        exchange.attach(self)

    def say(self, data: bytes, event_id: str | None = None) -> None:
        """Delivers something before the answer."""
        self.exchange.offer(ServerMessage(data, is_response=False, event_id=event_id))

    def answer(self, result: object, request_id: int | str | None = None) -> None:
        """Delivers an answer, to the first request unless another is named."""
        key = self.exchange.requests[0].id if request_id is None else request_id
        data = jsonrpc.encode(Response(key, result=jsonrpc.as_payload(result)))
        self.exchange.offer(ServerMessage(data, is_response=True))

    def fail(self, failure: BackendError) -> None:
        """Answers whatever is asked with a failure."""
        for request in self.exchange.requests:
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
            self.exchange.offer(ServerMessage(data, is_response=True, failure=failure))

    def stream_begun(self, exchange: Exchange) -> None:
        self.has_begun.set()

    def leave(self, exchange: Exchange) -> None:
        self.was_left.set()

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        self._on_expire()
        self.fail(failure)


class ScriptedBackend(Backend):
    """`executed` counts calls by their method; `scripts` are asked for by the method's name.

    A method without a script is answered at once by its own name.
    """

    def __init__(self, **scripts: Script) -> None:
        self.scripts = dict(scripts)
        self.executed: Counter[str] = Counter()
        self.exchanges: list[ScriptedCall] = []
        self.streams: list[ScriptedCall] = []
        self.requests: list[Request] = []
        self.told: list[Notification | Response] = []
        self.asked_after: list[str | None] = []
        self.refusal: Exception | None = None
        self.is_closed = threading.Event()
        self.on_tell: Callable[[], object] = lambda: None
        self.on_expire: Callable[[], object] = lambda: None

    def send(self, exchange: Exchange) -> None:
        self._refuse()
        requests = exchange.requests
        played = ScriptedCall(exchange, lambda: self.on_expire())
        self.exchanges.append(played)
        self.requests.extend(requests)
        self.executed.update(request.method for request in requests)
        for request in requests[:1]:
            self.scripts.get(request.method, _echo)(played, requests)

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        self._refuse()
        self.executed[request.method] += 1
        self.requests.append(request)
        if not self.streams:
            raise BackendLost("There is no stream for the answer")
        self.streams[-1].answer(request.method, request.id)

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        self._refuse()
        self.told.append(notification)
        self.on_tell()

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        self._refuse()
        self.told.append(response)
        self.on_tell()

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        self._refuse()
        self.asked_after.append(after)
        for older in self.streams[-1:]:
            older.exchange.end(replaced=True)
        self.streams.append(ScriptedCall(exchange, lambda: self.on_expire()))

    def close(self) -> None:
        self.is_closed.set()

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal


def _echo(exchange: ScriptedCall, requests: Sequence[Request]) -> None:
    for request in requests:
        exchange.answer(request.method, request.id)


def silent(exchange: ScriptedCall, requests: Sequence[Request]) -> None:
    """A server that says nothing (until a test says it)."""


def call(method: str, key: int | str = 1, **params: object) -> Request:
    """A request."""
    return Request(key, method, jsonrpc.as_payload(params))


def result_of(delivery: ServerMessage | None) -> object:
    """The result in a delivery that is an answer."""
    assert delivery is not None, "nothing came"
    assert delivery.is_response
    assert delivery.failure is None, delivery.failure
    message = jsonrpc.parse_message(delivery.data)
    assert isinstance(message, Response)
    return msgspec.json.decode(bytes(message.result))  # type: ignore[arg-type]
