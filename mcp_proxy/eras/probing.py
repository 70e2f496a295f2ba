"""Which era a stdio server speaks, and how a conversation with it begins.

MCP 2026-07-28, versioning, "Backward Compatibility": a server that answers `server/discover` is
modern; one that refuses it is legacy, and gets `initialize`. Silence says nothing, since a server
that npx or uvx has to fetch first takes half a minute: then both are asked, of two children, and
the first answer decides.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from msgspec import UNSET, Raw

from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Exchange, ServerMessage, wait_for
from mcp_proxy.backends.handshake import ask
from mcp_proxy.backends.modern_switchboard import ModernSwitchboard
from mcp_proxy.backends.switchboard import Switchboard
from mcp_proxy.eras.questions import QuestionSwitchboard
from mcp_proxy.errors import (
    BackendLost,
    BackendNotStarted,
    BadAnswer,
    ConnectionBroken,
)
from mcp_proxy.wire import jsonrpc, modern, refusals, results, revisions
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

log = logging.getLogger(__name__)

#: Seconds of silence after which a second child is asked as a legacy one.
SILENCE = 3.0

Spawn = Callable[[Switchboard], Bridge]


class Found(NamedTuple):
    """A child of which is known what it speaks; it has answered by `result`.

    That is a DiscoverResult of a modern server, the InitializeResult of a legacy one, which has
    also been told that it is initialized and has a `switchboard` for modern clients.
    """

    bridge: Bridge
    switchboard: QuestionSwitchboard | None
    result: Raw


def initialize_request(capabilities: Raw) -> Request:
    """An `initialize` of the proxy's own, with what its clients can be asked for."""
    params = {
        "protocolVersion": revisions.LEGACY[-1],
        "capabilities": capabilities,
        "clientInfo": modern.OWN_INFO,
    }
    return Request("mcp-proxy-initialize", INITIALIZE, jsonrpc.as_payload(params))


def initialized(bridge: Bridge, capabilities: Raw, timeout: float) -> Raw:
    """The InitializeResult of a child, which is told that it is initialized.

    Raises BackendError, BadAnswer where it refuses.
    """
    return handshake.initialized(bridge, initialize_request(capabilities), timeout)


def discovered(bridge: Bridge, timeout: float) -> Raw:
    """The DiscoverResult of a modern child; raises BackendError, BadAnswer where it refuses."""
    answer = ask(bridge, modern.discover_request(), timeout)
    if not results.is_modern(answer):
        raise BadAnswer("The server refused server/discover")
    return answer.result or Raw(b"{}")


def probe(
    spawn: Spawn,
    new_switchboard: Callable[[], QuestionSwitchboard],
    capabilities: Raw,
    timeout: float,
    has_left: Callable[[], bool] | None = None,
) -> Found:
    """A child, and what it speaks; a legacy one has one of `new_switchboard`.

    Takes `timeout` seconds at most. Raises BackendError where no child can be started or none
    answers, ClientLeft where `has_left` says so; then no child is left.
    """
    asked = _Asked(spawn, time.monotonic() + timeout, has_left)
    try:
        found = asked.found(new_switchboard, capabilities)
    except BaseException:
        asked.close_all_but(None)
        raise
    asked.close_all_but(found.bridge)
    return found


class _Asked:
    """The children that are asked, of which the first to say what it is decides."""

    def __init__(self, spawn: Spawn, until: float, has_left: Callable[[], bool] | None) -> None:
        self._spawn = spawn
        self._until = until
        self._has_left = has_left
        self._bridges: list[Bridge] = []
        self._has_news = threading.Event()

    def found(self, new_switchboard: Callable[[], QuestionSwitchboard], capabilities: Raw) -> Found:
        first = self._started(ModernSwitchboard())
        discover = self._ask(first, modern.discover_request())
        board = new_switchboard()
        if not wait_for(self._has_news, min(SILENCE, self._left), self._has_left):
            return self._raced(first, discover, board, capabilities)
        answer = discover.poll()
        assert answer is not None
        if answer.failure is None and results.is_modern(_response(answer)):
            return Found(first, None, _response(answer).result or Raw(b"{}"))
        if answer.failure is None:
            first.speak(board)
            with contextlib.suppress(BackendLost):
                return Found(first, board, initialized(first, capabilities, self._left))
            board = new_switchboard()  # the first child may still use the other one
        legacy = self._started(board)  # one that exits when it is asked is started anew
        return Found(legacy, board, initialized(legacy, capabilities, self._left))

    def _raced(
        self, first: Bridge, discover: Exchange, board: QuestionSwitchboard, capabilities: Raw
    ) -> Found:
        """Asks a second child as a legacy one, while the first may still be starting."""
        log.info("[%s] the server says nothing of its era; another one is started", first.name)
        second = self._started(board)
        initialize = self._ask(second, initialize_request(capabilities))
        reason = "The server did not answer when it was started"
        is_open = {discover: True, initialize: True}
        while any(is_open.values()):
            if not wait_for(self._has_news, self._left, self._has_left):
                break
            self._has_news.clear()
            for exchange, bridge in ((discover, first), (initialize, second)):
                answer = exchange.poll() if is_open[exchange] else None
                if answer is None:
                    continue
                is_open[exchange] = False
                if answer.failure is not None:
                    reason = answer.failure.message
                    continue
                response = _response(answer)
                if exchange is discover and results.is_modern(response):
                    return Found(first, None, response.result or Raw(b"{}"))
                if exchange is initialize and response.result is not UNSET:
                    bridge.notify(Notification(INITIALIZED))
                    return Found(second, board, response.result)
        raise BackendNotStarted(reason)

    @property
    def _left(self) -> float:
        return max(0.1, self._until - time.monotonic())

    def _started(self, switchboard: Switchboard) -> Bridge:
        bridge = self._spawn(switchboard)
        self._bridges.append(bridge)
        return bridge

    def _ask(self, bridge: Bridge, request: Request) -> Exchange:
        exchange = Exchange([request], accepts_stream=False, timeout=self._left)
        bridge.send(exchange)
        exchange.set_on_ready(self._has_news.set)
        return exchange

    def close_all_but(self, kept: Bridge | None) -> None:
        for bridge in self._bridges:
            if bridge is not kept:
                bridge.close()


def _response(answer: ServerMessage) -> Response:
    with contextlib.suppress(ConnectionBroken):  # that says nothing of the era
        refusals.require_none(answer.data)
    response = jsonrpc.parse_message(answer.data)
    assert isinstance(response, Response)
    return response
