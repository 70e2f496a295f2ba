"""The switchboard of a modern server: each message names the request that it belongs to.

MCP 2026-07-28 has no standing stream of a session and no requests of a server: a notification
carries a progress token or a subscription id. Only log messages name nothing, so they are delivered
while exactly one call in flight has asked for any.
"""

from __future__ import annotations

from msgspec import UNSET, Raw

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.switchboard import PROGRESS, PendingCall, Switchboard
from mcp_proxy.errors import RequestId
from mcp_proxy.wire import jsonrpc, listening, questions
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.modern import LISTEN, MAY_ASK

_LOG = "notifications/message"


class ModernSwitchboard(Switchboard):
    """The tables of one child that speaks 2026-07-28.

    With a `home_id` each `requestState` begins with it on its way to the client, so that the retry
    comes back to this child: what a server has sealed nobody else may be able to read.
    """

    def __init__(self, home_id: str = "") -> None:
        super().__init__()
        self._prefix = f"{home_id}." if home_id else ""
        self._logging: dict[int, Exchange] = {}  # of the calls that asked for logs, by wire id
        self._refused: list[Request | Notification] = []

    def enter(self, request: Request, exchange: Exchange, deadline: float | None = None) -> bytes:
        if self._prefix and request.method in MAY_ASK:
            request = self._without_prefix(request)
        line = super().enter(request, exchange, deadline)
        if request.meta.log_level is not UNSET:
            self._logging[next(reversed(self._calls))] = exchange
        return line

    def pop(self, wire_id: RequestId) -> PendingCall | None:
        call = super().pop(wire_id)
        if call is not None:
            self._logging.pop(call.wire_id, None)
        return call

    def encoded(self, response: Response, call: PendingCall) -> bytes | None:
        if call.method == LISTEN and response.result is not UNSET:
            response = Response(call.id, listening.listen_result(call.id))
        elif self._prefix and call.method in MAY_ASK and response.result is not UNSET:
            response = self._with_prefix(response, response.result)
        return super().encoded(response, call)

    def _with_prefix(self, response: Response, result: Raw) -> Response:
        found = questions.input_required_of(result)
        if found is None or found.state is None:
            return response
        state = jsonrpc.as_payload(self._prefix + found.state)
        edited = jsonrpc.edited(result, lambda fields: fields.update({questions.STATE: state}))
        return Response(response.id, edited)

    def _without_prefix(self, request: Request) -> Request:
        retry = questions.retry_of(request.params)
        if retry.state is None or not retry.state.startswith(self._prefix):
            return request
        retry = retry._replace(state=retry.state.removeprefix(self._prefix))
        return Request(request.id, request.method, questions.with_retry(request.params, retry))

    def deliver(self, message: Request | Notification) -> Exchange | None:
        if isinstance(message, Request):  # a modern server must not ask (2026-07-28, basic)
            self._refused.append(message)
            return None
        exchange, message = self._addressed(message)
        if exchange is not None:
            exchange.offer(ServerMessage(jsonrpc.encode(message), is_response=False))
        return exchange

    def overflow(self) -> list[Request | Notification]:
        refused, self._refused = self._refused, []
        return refused

    def end_listening(self) -> list[tuple[Exchange, ServerMessage]]:
        listens = [call for call in self._calls.values() if call.method == LISTEN]
        for call in listens:
            self.pop(call.wire_id)
        return [(call.exchange, _ended(call)) for call in listens]

    def _addressed(self, message: Notification) -> tuple[Exchange | None, Notification]:
        """The exchange that a notification is for, and the notification as that knows it."""
        if message.method == PROGRESS:
            return self._route_progress(message)
        if message.method == _LOG:
            return self._route(message), message
        if message.method == jsonrpc.CANCELLED:
            self._end_listening(message)
            return None, message
        call = self._calls.get(as_key(listening.subscription_id_of(message)))
        if call is None or call.method != LISTEN:
            return None, message
        return call.exchange, listening.tagged(message, call.id)

    def _end_listening(self, message: Notification) -> None:
        """A server that ends a subscription sends its result or, on stdio, takes it back."""
        wire_id = as_key(jsonrpc.cancelled_id_of(message))
        call = self._calls.get(wire_id)
        if call is not None and call.method == LISTEN:
            self.pop(wire_id)
            call.exchange.offer(_ended(call))

    def _route(self, message: Request | Notification) -> Exchange | None:
        exchanges = set(self._logging.values())
        is_log = message.method == _LOG
        exchange = exchanges.pop() if is_log and len(exchanges) == 1 else None
        return exchange if exchange is not None and exchange.accepts_stream else None


def _ended(call: PendingCall) -> ServerMessage:
    """The answer to a subscription that ends in order."""
    result = listening.listen_result(call.id)
    return ServerMessage(jsonrpc.encode(Response(call.id, result)), is_response=True)


def as_key(wire_id: object) -> int:
    """A wire id as it stands in the table of calls; some servers make a text of the number."""
    if isinstance(wire_id, str) and wire_id.isdecimal() and len(wire_id) < 19:
        return int(wire_id)
    return wire_id if isinstance(wire_id, int) else 0
