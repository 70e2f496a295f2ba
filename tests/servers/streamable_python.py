"""A streamable HTTP server of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python tests/servers/streamable_python.py PORT [KEY]

Its tool `echo` says what was said. stderr says where it listens. With a key it refuses every
request that has not this one as its `X-API-Key`.
"""

from __future__ import annotations

import socket
import sys
import warnings
from typing import Any

import uvicorn

try:
    from mcp.server.fastmcp import FastMCP  # type: ignore[attr-defined]
except ImportError:
    from mcp.server.mcpserver import MCPServer as FastMCP


def echo(message: str) -> str:
    """What was said."""
    return f"Echo: {message}"


def asking_for(key: str, app: Any) -> Any:
    """An application that answers 401 to whoever has another key, or none."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and headers.get(b"x-api-key") != key.encode():
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    return answer


def main(port: int, key: str | None = None) -> None:
    """Serves until a signal."""
    warnings.simplefilter("ignore")
    server = FastMCP("streamable", log_level="WARNING")
    server.add_tool(echo)
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
        print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        app = server.streamable_http_app()
        config = uvicorn.Config(
            app if key is None else asking_for(key, app),
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
