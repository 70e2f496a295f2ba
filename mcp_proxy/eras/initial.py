"""The switchboard with which the child of a legacy session begins: it learns the server's era.

A legacy client's initialize is never preceded by a probe. Where the server refuses it the same
child gets `server/discover`; one that answers that as modern is served as a modern server from then
on, and the client's initialize is answered from what it said. Else its own refusal is passed on.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.switchboard import PendingCall, Switchboard
from mcp_proxy.eras.legacy_session import LegacyClient, LegacySessionSwitchboard
from mcp_proxy.errors import UNSUPPORTED_REVISION
from mcp_proxy.wire import jsonrpc, results, revisions
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.jsonrpc import Request, Response
from mcp_proxy.wire.modern import DISCOVER

#: Seconds that a server which has refused initialize has to say what it speaks.
DISCOVER_TIME = 10.0


class _Refused(NamedTuple):
    """An initialize that the server has refused, while it is asked what it speaks."""

    client: LegacyClient
    refusal: bytes
    wire_id: int  # of server/discover


class InitialSwitchboard(Switchboard):
    """The tables of a child of which nothing is known. Once it has accepted initialize, or has
    turned out to be modern, others are its `successor`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._params: Raw | UnsetType = UNSET  # of the client's initialize
        self._refused: _Refused | None = None

    def enter(self, request: Request, exchange: Exchange, deadline: float | None = None) -> bytes:
        if request.method == INITIALIZE:
            self._params = request.params
        return super().enter(request, exchange, deadline)

    def encoded(self, response: Response, call: PendingCall) -> bytes | None:
        refused = self._refused
        if refused is not None and call.wire_id == refused.wire_id:
            self._refused = None
            return self._decided(refused, response, call)
        encoded = super().encoded(response, call)
        if call.method != INITIALIZE or encoded is None:
            return encoded
        if response.error is UNSET:
            self.successor = Switchboard()
            self.successor.continue_from(self)
            return encoded
        if refused is not None or _is_legacy_by_its_word(response.error):
            return encoded
        self._discover(call, encoded)
        return None

    # --- the server's era ------------------------------------------------------------------------

    def _discover(self, call: PendingCall, refusal: bytes) -> None:
        """Asks the server what it speaks; the client's call waits for that, for a moment."""
        client = LegacyClient.of(self._params)
        wire_id = next(self._wire_ids)
        due = time.monotonic() + DISCOVER_TIME
        limits = (due, call.deadline, call.exchange.deadline)
        at = min(limit for limit in limits if limit is not None)
        asked = call._replace(wire_id=wire_id, method=DISCOVER, deadline=at)
        self._calls[wire_id] = asked
        if not call.exchange.is_closed:
            self._posts[call.exchange] = self._posts.get(call.exchange, 0) + 1
        self._refused = _Refused(client, refusal, wire_id)
        params = jsonrpc.as_payload({"_meta": client.meta})
        self.lines.append(jsonrpc.encode(Request(wire_id, DISCOVER, params)))
        call.exchange.set_deadline(at)

    def _decided(self, refused: _Refused, response: Response, call: PendingCall) -> bytes:
        """The answer to the client's initialize, now that the server has said what it speaks."""
        if not results.is_modern(response):
            return refused.refusal
        discovered = Raw(b"{}") if response.result is UNSET else response.result
        result = results.initialize_result(discovered, refused.client.version)
        capabilities = jsonrpc.fields_of(discovered).get("capabilities", UNSET)
        self.successor = LegacySessionSwitchboard(refused.client, capabilities)
        self.successor.continue_from(self)
        return jsonrpc.encode(Response(call.id, result))

    # --- a server that says nothing of it --------------------------------------------------------

    def pop_overdue(self, exchange: Exchange, now: float) -> list[PendingCall]:
        return self._without_refused(super().pop_overdue(exchange, now))

    def clear(self) -> tuple[list[PendingCall], Exchange | None]:
        calls, stream = super().clear()
        return self._without_refused(calls), stream

    def _without_refused(self, calls: list[PendingCall]) -> list[PendingCall]:
        """The calls that were removed but the one that the server has refused: that is told so."""
        refused = self._refused
        if refused is None:
            return calls
        for call in calls:
            if call.wire_id == refused.wire_id:
                self._refused = None
                call.exchange.offer(ServerMessage(refused.refusal, is_response=True))
        return [call for call in calls if call.wire_id != refused.wire_id]


def _is_legacy_by_its_word(error: Raw) -> bool:
    """Whether a refusal names the revisions that the server speaks, and those are legacy ones."""
    if results.code_of(error) != UNSUPPORTED_REVISION:
        return False
    named = results.supported_in(error)
    return bool(named) and not any(map(revisions.is_modern, named))
