"""A session that is being opened: an initialize on its way."""

from __future__ import annotations

import msgspec

from mcp_proxy.backends.base import Delivery
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.ownership.owner import StdioSessions
from mcp_proxy.transports import handshake
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request, Response


class Opening:
    """A session that does not exist yet: recorded when the server accepts, given up otherwise."""

    def __init__(
        self, sessions: StdioSessions, bridge: Bridge, session_id: str, kind: str, message: Request
    ) -> None:
        self._sessions = sessions
        self._bridge = bridge
        self._session_id = session_id
        self._kind = kind
        self._message = message
        self._is_settled = False
        #: Whether the server, or we, said no: then there is no session and no id to tell.
        self.was_refused = False

    def on_response(self, delivery: Delivery) -> None:
        """Records the session, or ends the child that refused or failed."""
        self._is_settled = True
        answer = jsonrpc.parse_message(delivery.data)
        if isinstance(answer, Response) and answer.result is not msgspec.UNSET:
            session = handshake.opened(self._session_id, self._kind, self._message, answer)
            self._sessions.establish(session, self._bridge)
        else:
            self.was_refused = True
            self._sessions.abandon(self._bridge, delivery.failure)

    def on_close(self) -> None:
        """A client that left before the answer knows no session id: nobody could use the child."""
        if not self._is_settled:
            self._is_settled = True
            self._sessions.abandon(self._bridge)
