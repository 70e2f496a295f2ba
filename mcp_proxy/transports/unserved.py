"""What stands in place of a server that is named in the file and not served.

Its path exists, so that a client is told why nothing is there and does not take it for a mistake of
its own.
"""

from __future__ import annotations

from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.guard import require_own_site
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ProxyError, ServerDisabled, ServerMisconfigured
from mcp_proxy.servers import UnservedServer
from mcp_proxy.transports.base import Transport
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request


class UnservedProxy(Transport):
    """A transport that refuses everything, whichever path below its mount a request is for.

    A POST that carries a request gets a JSON-RPC error, anything else 503.
    """

    def __init__(self, server: UnservedServer, edge: Edge, options: ProxyOptions) -> None:
        self.server = server
        self.server_name = server.name
        self.edge = edge
        self.options = options

    def __repr__(self) -> str:
        return f"<UnservedProxy {self.server.name}>"

    @property
    def is_shared(self) -> bool:
        return True  # there is no session that a replica could lack

    def handle(self, request: ClientRequest) -> Reply:
        if "HTTP_SEC_FETCH_SITE" in request.environ:
            require_own_site(request.environ)
        if request.method == "POST":
            message = jsonrpc.parse(request.read_body(self.options.max_body_bytes))
            parts = message if isinstance(message, list) else [message]
            if any(isinstance(part, Request) for part in parts):
                request.message = message
            if isinstance(message, Request):
                request.rpc = message.method
        raise self._refusal()

    def _refusal(self) -> ProxyError:
        if self.server.is_disabled:
            return ServerDisabled(self.server.name)
        return ServerMisconfigured(self.server.name, self.server.reason)

    @property
    def is_busy(self) -> bool:
        return False

    def end_streams(self) -> None:
        """There is none."""

    def end_unless_busy(self) -> bool:
        return True

    def give_way(self) -> None:
        """There are no sessions."""

    def shut_down(self) -> None:
        """Nothing was started."""

    def threads_reason(self) -> str | None:
        return None

    def server_reason(self) -> str | None:
        return self.server.reason
