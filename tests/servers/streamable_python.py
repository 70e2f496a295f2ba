"""A streamable HTTP server of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python tests/servers/streamable_python.py PORT

Its tool `echo` says what was said. stderr says where it listens.
"""

from __future__ import annotations

import socket
import sys
import warnings

import uvicorn

try:
    from mcp.server.fastmcp import FastMCP  # type: ignore[attr-defined]
except ImportError:
    from mcp.server.mcpserver import MCPServer as FastMCP


def echo(message: str) -> str:
    """What was said."""
    return f"Echo: {message}"


def main(port: int) -> None:
    """Serves until a signal."""
    warnings.simplefilter("ignore")
    server = FastMCP("streamable", log_level="WARNING")
    server.add_tool(echo)
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            server.streamable_http_app(), log_level="warning", timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(int(sys.argv[1]))
