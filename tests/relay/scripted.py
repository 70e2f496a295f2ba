"""A backend for relays to serve: does what its scripts say, and counts what it executed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from mcp_proxy.backends.base import Backend, Delivery, Exchange
from mcp_proxy.backends.exchange import QueuedExchange
from mcp_proxy.errors import PROXY_ERROR, BackendError, BackendTimeout
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

#: Plays the part of the server in one exchange.
Script = Callable[["ScriptedExchange", Sequence[Request]], None]


class ScriptedExchange(QueuedExchange):
    """An exchange that also remembers that a stream was begun."""

    def __init__(self, owner: ScriptedBackend, expected: int | None, accepts_stream: bool) -> None:
        super().__init__(owner, expected, accepts_stream)
        self.ids: list[int | str] = []
        self.has_begun = threading.Event()
        self.was_left = threading.Event()

    def begin(self) -> None:
        self.has_begun.set()

    def say(self, data: bytes, event_id: str | None = None) -> None:
        """Delivers something before the answer."""
        self.offer(Delivery(data, is_response=False, event_id=event_id))

    def answer(self, result: object, request_id: int | str | None = None) -> None:
        """Delivers an answer, to the first request unless another is named."""
        key = self.ids[0] if request_id is None else request_id
        data = jsonrpc.encode(Response(key, result=jsonrpc.as_payload(result)))
        self.offer(Delivery(data, is_response=True))

    def fail(self, failure: BackendError) -> None:
        """Answers whatever is asked with a failure."""
        for request_id in self.ids:
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request_id)
            self.offer(Delivery(data, is_response=True, failure=failure))


class ScriptedBackend(Backend):
    """`executed` counts calls by their method; `scripts` are asked for by the method's name.

    A method without a script is answered at once by its own name.
    """

    def __init__(self, **scripts: Script) -> None:
        self.scripts = dict(scripts)
        self.executed: Counter[str] = Counter()
        self.exchanges: list[ScriptedExchange] = []
        self.streams: list[ScriptedExchange] = []
        self.requests: list[Request] = []
        self.told: list[Notification | Response] = []
        self.asked_after: list[str | None] = []
        self.refusal: Exception | None = None
        self.is_closed = threading.Event()
        self.on_tell: Callable[[], object] = lambda: None
        self.on_expire: Callable[[], object] = lambda: None

    def send(
        self, requests: Sequence[Request], accepts_stream: bool, timeout: float
    ) -> ScriptedExchange:
        self._refuse()
        exchange = ScriptedExchange(self, len(requests), accepts_stream)
        exchange.ids = [request.id for request in requests]
        exchange.set_deadline(timeout, lambda: BackendTimeout("The server is silent"))
        self.exchanges.append(exchange)
        self.requests.extend(requests)
        self.executed.update(request.method for request in requests)
        self.scripts.get(requests[0].method, _echo)(exchange, requests)
        return exchange

    def submit(self, request: Request, timeout: float) -> None:
        self._refuse()
        self.executed[request.method] += 1
        self.requests.append(request)
        self.streams[-1].answer(request.method, request.id)

    def notify(self, notification: Notification) -> None:
        self._refuse()
        self.told.append(notification)
        self.on_tell()

    def respond(self, response: Response) -> None:
        self._refuse()
        self.told.append(response)
        self.on_tell()

    def listen(self, after: str | None = None) -> ScriptedExchange:
        self._refuse()
        stream = ScriptedExchange(self, None, accepts_stream=True)
        self.asked_after.append(after)
        for older in self.streams[-1:]:
            older.end(replaced=True)
        self.streams.append(stream)
        return stream

    def close(self) -> None:
        self.is_closed.set()

    def expire(self, exchange: QueuedExchange, failure: BackendError) -> None:
        assert isinstance(exchange, ScriptedExchange)
        self.on_expire()
        exchange.fail(failure)

    def detach(self, exchange: QueuedExchange) -> None:
        assert isinstance(exchange, ScriptedExchange)
        exchange.was_left.set()

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal


def _echo(exchange: ScriptedExchange, requests: Sequence[Request]) -> None:
    for request in requests:
        exchange.answer(request.method, request.id)


def silent(exchange: ScriptedExchange, requests: Sequence[Request]) -> None:
    """A server that says nothing (until a test says it)."""


def call(method: str, key: int | str = 1, **params: object) -> Request:
    """A request."""
    return Request(key, method, jsonrpc.as_payload(params))


def result_of(delivery: Delivery | None) -> object:
    """The result in a delivery that is an answer."""
    assert delivery is not None, "nothing was delivered"
    assert delivery.is_response
    assert delivery.failure is None, delivery.failure
    message = jsonrpc.parse_message(delivery.data)
    assert isinstance(message, Response)
    return msgspec.json.decode(bytes(message.result))  # type: ignore[arg-type]


def received(exchange: Exchange, count: int) -> list[Delivery]:
    """The next deliveries; a silence fails the test."""
    found: list[Delivery] = []
    for _ in range(count):
        delivery = exchange.receive(10)
        assert delivery is not None, f"{len(found)} of {count} came"
        found.append(delivery)
    return found
