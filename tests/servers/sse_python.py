"""An HTTP+SSE server made with the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python tests/servers/sse_python.py NAME [PORT]

Its tool `prove` says which session, and which call of it, was answered. stderr says where it
listens, and has one line of JSON for each session that begins.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from collections import Counter
from typing import Any

import uvicorn

try:
    from mcp.server.fastmcp import Context, FastMCP  # type: ignore[attr-defined]
except ImportError:
    from mcp.server.mcpserver import Context
    from mcp.server.mcpserver import MCPServer as FastMCP

Json = dict[str, Any]


class Memory:
    """What a server remembers of its sessions: the first call's marker, and how many came."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.markers: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def prove(self, marker: str, said: str, ctx: Context) -> str:
        """This server, its session as it knows it, and the call."""
        session = ctx.request_context.request.query_params["session_id"]
        self.markers.setdefault(session, marker)
        self.calls[session] += 1
        proof = {
            "name": self.name,
            "pid": os.getpid(),
            "session": session,
            "counter": self.calls[session],
            "marker": self.markers[session],
            "said": said,
            "id": ctx.request_id,
        }
        return json.dumps(proof)


def echo(message: str) -> str:
    """What was said."""
    return f"Echo: {message}"


def main(name: str, port: int) -> None:
    """Serves until a signal."""
    warnings.simplefilter("ignore")
    server = FastMCP(name, log_level="WARNING")
    server.add_tool(Memory(name).prove)
    server.add_tool(echo)
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            server.sse_app(), log_level="warning", timeout_graceful_shutdown=1, lifespan="off"
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
