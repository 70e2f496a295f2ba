"""A bridge without a process: a test says what the child says, and sees what it is told."""

from __future__ import annotations

import json
from typing import Any

from msgspec import UNSET

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.switchboard import PendingCall, Switchboard
from mcp_proxy.eras.initial import InitialSwitchboard
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

Json = dict[str, Any]

PREFIX = "io.modelcontextprotocol/"
TIME_LIMIT = 60.0

#: What a client says that can be asked anything.
EVERYTHING: Json = {"elicitation": {"form": {}, "url": {}}, "sampling": {}, "roots": {}}

#: What a server can do that does everything.
SERVER: Json = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
    "logging": {},
}


class Unheard:
    """A source that is told of nothing."""

    def stream_begun(self, exchange: Exchange) -> None:
        """Nothing."""

    def expire(self, exchange: Exchange, failure: Any) -> None:
        """Nothing."""

    def leave(self, exchange: Exchange) -> None:
        """Nothing."""


class Child:
    """What a bridge does for its switchboard; the child is the test."""

    def __init__(self) -> None:
        self.board: Switchboard = InitialSwitchboard()
        self.told: list[Json] = []  # what the child has got and the test has not looked at

    # --- the client ------------------------------------------------------------------------------

    def send(
        self, method: str, params: Json | None = None, key: Any = 1, stream: bool = True
    ) -> Exchange:
        """A request of the client; its exchange."""
        payload = UNSET if params is None else jsonrpc.as_payload(params)
        request = Request(key, method, payload)
        exchange = Exchange([request], stream, TIME_LIMIT)
        exchange.attach(Unheard())
        self._write(self.board.enter(request, exchange))
        return exchange

    def notify(self, method: str, params: Json | None = None) -> None:
        """A notification of the client."""
        payload = UNSET if params is None else jsonrpc.as_payload(params)
        self._write(self.board.notice(Notification(method, payload)))

    def respond(self, key: Any, result: Any = None, error: Json | None = None) -> bool:
        """An answer of the client; whether somebody waited for it."""
        given = UNSET if error is not None else jsonrpc.as_payload(result)
        refused = UNSET if error is None else jsonrpc.as_payload(error)
        line = self.board.take_answer(Response(key, given, refused))
        self._write(line or b"")
        return line is not None

    def listen(self) -> Exchange:
        """The client opens a standing stream."""
        stream = Exchange()
        stream.attach(Unheard())
        self.board.set_stream(stream)
        self._write_lines()
        return stream

    def leave(self, exchange: Exchange) -> None:
        """The client of an exchange leaves."""
        exchange.is_closed = True
        self.board.leave(exchange)

    # --- the child -------------------------------------------------------------------------------

    def say(self, message: Json) -> None:
        """A line of the child."""
        parsed = jsonrpc.parse_message(json.dumps({"jsonrpc": "2.0", **message}).encode())
        if isinstance(parsed, Response):
            call = self.board.pop(parsed.id)
            if call is not None:
                self._answer(parsed, call)
        else:
            self.board.deliver(parsed)
        self._write_lines()

    def _answer(self, response: Response, call: PendingCall) -> None:
        data = self.board.encoded(response, call)
        if data is not None:
            call.exchange.offer(ServerMessage(data, is_response=True))
        self.board = self.board.successor or self.board

    def answer(self, asked: Json, result: Json) -> None:
        """The result of a request that the child has got."""
        self.say({"id": asked["id"], "result": result})

    def refuse(self, asked: Json, code: int, message: str = "no", **more: Any) -> None:
        """The error that a request leads to."""
        self.say({"id": asked["id"], "error": {"code": code, "message": message, **more}})

    def ask(self, asked: Json, questions: Json | None = None, state: str | None = None) -> None:
        """A request is answered by questions."""
        result: Json = {"resultType": "input_required"}
        if questions is not None:
            result["inputRequests"] = questions
        if state is not None:
            result["requestState"] = state
        self.answer(asked, result)

    def acknowledge(self, listen: Json, **honoured: Any) -> None:
        """A subscriptions/listen is acknowledged, by default all of it."""
        told = honoured or listen["params"]["notifications"]
        self.change(listen, "notifications/subscriptions/acknowledged", notifications=told)

    def change(self, listen: Json, method: str, **params: Any) -> None:
        """A notification on a stream of changes."""
        meta = {f"{PREFIX}subscriptionId": listen["id"]}
        self.say({"method": method, "params": {**params, "_meta": meta}})

    # --- what the test sees ----------------------------------------------------------------------

    def next(self) -> Json:
        """The next message that the child has got."""
        return self.told.pop(0)

    def _write(self, lines: bytes) -> None:
        self.told += [json.loads(line) for line in lines.split(b"\n") if line]

    def _write_lines(self) -> None:
        for line in self.board.take_lines():
            self._write(line)


def initialize(
    version: str = "2025-11-25", capabilities: Json | None = None, **params: Any
) -> Json:
    """Params of a client's initialize."""
    declared = EVERYTHING if capabilities is None else capabilities
    info = {"name": "client", "version": "7"}
    return {
        "protocolVersion": version,
        "capabilities": declared,
        "clientInfo": info,
        **params,
    }


def discovered(**capabilities: Any) -> Json:
    """A DiscoverResult."""
    return {
        "resultType": "complete",
        "supportedVersions": ["2026-07-28"],
        "capabilities": capabilities,
        "instructions": "Be nice.",
        "ttlMs": 0,
        "cacheScope": "public",
        "_meta": {f"{PREFIX}serverInfo": {"name": "server", "version": "9"}},
    }


def opened(
    version: str = "2025-11-25", capabilities: Json | None = None, server: Json | None = None
) -> Child:
    """A session in front of a modern child, all of the handshake; nothing is listened to yet."""
    child = Child()
    exchange = child.send("initialize", initialize(version, capabilities), 0)
    child.refuse(child.next(), -32601)
    child.answer(child.next(), discovered(**(SERVER if server is None else server)))
    assert got(exchange)[-1]["result"]["protocolVersion"] == version
    return child


def listening(child: Child) -> Json:
    """The stream of changes that is open once the client has said that it is initialized."""
    child.notify("notifications/initialized")
    listen = child.next()
    child.acknowledge(listen)
    return listen


def got(exchange: Exchange) -> list[Json]:
    """Everything that a client has been sent."""
    found: list[Json] = []
    while (message := exchange.poll()) is not None:
        if message.data:
            found.append(json.loads(message.data))
    return found


def call(child: Child, name: str = "tool", key: Any = 1, stream: bool = True) -> Exchange:
    """A tools/call of the client."""
    return child.send("tools/call", {"name": name, "arguments": {"a": 1}}, key, stream)
