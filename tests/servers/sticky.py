"""An MCP server that remembers each session, so that a request which strays is noticed.

    python tests/servers/sticky.py PORT [--host ADDRESS] [--name NAME]

Streamable HTTP with stateful sessions; PORT 0 is any, stderr says which. Stderr also has one line
of JSON for each session that begins: `{"event": "session", "name": ..., "pid": ..., "id": ...}`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import mcp_types as types
import uvicorn
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError

Json = dict[str, Any]
Context = ServerRequestContext[Any, Any]
Asgi = Callable[..., Awaitable[None]]

_SESSION_ID = b"mcp-session-id"


@dataclass
class Memory:
    """What the server remembers of a session: its first call's marker, and how many calls came."""

    marker: str
    calls: int = 0


class Sticky:
    """The tools. `name` tells the servers apart, `os.getpid()` the lives of one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sessions: dict[str, Memory] = {}

    async def whoami(self, ctx: Context, arguments: Json) -> Json:
        """This server, the session's counter, and the marker that its first call has set."""
        memory = self.sessions.setdefault(_session_id(ctx), Memory(str(arguments.get("marker"))))
        memory.calls += 1
        return {
            "name": self.name,
            "pid": os.getpid(),
            "counter": memory.calls,
            "marker": memory.marker,
        }

    async def slow(self, ctx: Context, arguments: Json) -> Json:
        """The same after some seconds."""
        await anyio.sleep(float(arguments.get("seconds", 0.3)))
        return await self.whoami(ctx, arguments)

    async def announce(self, ctx: Context, arguments: Json) -> Json:
        """The same, and something is said on the session's standing stream."""
        await ctx.session.send_tool_list_changed()
        return await self.whoami(ctx, arguments)

    async def list_tools(self, ctx: Context, params: Any) -> types.ListToolsResult:
        """The three tools; all take what they like."""
        return types.ListToolsResult(
            tools=[
                types.Tool(name=name, input_schema={"type": "object"})
                for name in ("whoami", "slow", "announce")
            ]
        )

    async def call_tool(
        self, ctx: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """Runs a tool; its result is a text of JSON."""
        tools = {"whoami": self.whoami, "slow": self.slow, "announce": self.announce}
        if params.name not in tools:
            raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name}")
        answer = await tools[params.name](ctx, params.arguments or {})
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=json.dumps(answer))]
        )

    def app(self) -> Asgi:
        """The ASGI application; whatever address it is reached by is fine."""
        server = Server(self.name, on_list_tools=self.list_tools, on_call_tool=self.call_tool)
        security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        return self._noted(server.streamable_http_app(transport_security=security))

    def _noted(self, app: Asgi) -> Asgi:
        """The application, with a line on stderr for each session that begins."""

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                given = dict(message.get("headers", ()))
                if message["type"] == "http.response.start" and _SESSION_ID in given:
                    self._began(given[_SESSION_ID].decode())
                await send(message)

            is_new = scope["type"] == "http" and _SESSION_ID not in dict(scope["headers"])
            await app(scope, receive, sent if is_new else send)

        return noted

    def _began(self, session_id: str) -> None:
        event = {"event": "session", "name": self.name, "pid": os.getpid(), "id": session_id}
        print(json.dumps(event), file=sys.stderr, flush=True)


def _session_id(ctx: Context) -> str:
    request: Any = ctx.request
    return str(request.headers["mcp-session-id"])


def main() -> None:
    """Serves until a signal."""
    parser = argparse.ArgumentParser(description="MCP server that remembers its sessions")
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--name", default="sticky")
    given = parser.parse_args()
    warnings.simplefilter("ignore", MCPDeprecationWarning)
    with socket.create_server((given.host, given.port)) as listener:
        address, port = listener.getsockname()
        print(f"listening on http://{address}:{port}/mcp", file=sys.stderr, flush=True)
        app = Sticky(given.name).app()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
