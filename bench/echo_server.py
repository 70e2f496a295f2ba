"""A stdio MCP server that does next to nothing: what the benchmark puts behind every proxy.

    python echo_server.py [--modern]

It speaks legacy revisions or, with `--modern`, 2026-07-28 and nothing else. It knows `initialize`
or `server/discover`, `ping`, `tools/list`, and `tools/call` of one tool, `echo`: it says the text
that it is told, or so many `bytes` of one character. Standard library only, so that it starts fast
as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

_PIECE = 256 * 1024

_CAPABILITIES: dict[str, Any] = {"tools": {"listChanged": True}}
_TOOL = {
    "name": "echo",
    "description": "Says what it is told.",
    "inputSchema": {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
    },
}

#: What a large result is made of: a character that is nowhere else.
FILLER = "~"

# The answer to a call is put together from pieces: there is one shape only.
_ECHO = '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":%s}]}}'
_MODERN_ECHO = (
    '{"jsonrpc":"2.0","id":%s,"result":{"resultType":"complete",'
    '"content":[{"type":"text","text":%s}]}}'
)
_MODERN = "2026-07-28"
_UNSUPPORTED = -32022
_CACHING: dict[str, Any] = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}


def main() -> None:
    """Answers line by line until the input ends; lines that came together are answered together."""
    is_modern, rest = "--modern" in sys.argv, b""
    while piece := os.read(0, _PIECE):
        *lines, rest = (rest + piece).split(b"\n")
        answers = [line for line in (answer_to(one, is_modern) for one in lines) if line]
        if answers:
            write(("\n".join(answers) + "\n").encode())


def write(data: bytes) -> None:
    """Writes it all."""
    while data:
        data = data[os.write(1, data) :]


def answer_to(line: bytes, is_modern: bool) -> str:
    """The answer to a message, empty where there is none."""
    if not line.strip():
        return ""
    message = json.loads(line)
    if "id" not in message or "method" not in message:
        return ""
    if message["method"] == "tools/call":
        arguments = message["params"]["arguments"]
        text = arguments["text"] if "text" in arguments else FILLER * arguments["bytes"]
        return (_MODERN_ECHO if is_modern else _ECHO) % (
            json.dumps(message["id"]),
            json.dumps(text),
        )
    return json.dumps({"jsonrpc": "2.0", "id": message["id"], **outcome(message, is_modern)})


def outcome(message: Mapping[str, Any], is_modern: bool) -> dict[str, Any]:
    """The result, or the error, of everything but a call."""
    method = message["method"]
    if is_modern:
        return modern_outcome(method)
    if method == "initialize":
        version = message["params"]["protocolVersion"]
        about = {"name": "bench-echo", "version": "1"}
        return {
            "result": {
                "protocolVersion": version,
                "capabilities": _CAPABILITIES,
                "serverInfo": about,
            }
        }
    if method == "tools/list":
        return {"result": {"tools": [_TOOL]}}
    if method == "ping":
        return {"result": {}}
    return {"error": {"code": -32601, "message": f"Unknown method {method}"}}


def modern_outcome(method: str) -> dict[str, Any]:
    """The same of a server that knows no sessions."""
    if method == "server/discover":
        return {
            "result": {**_CACHING, "supportedVersions": [_MODERN], "capabilities": _CAPABILITIES}
        }
    if method == "tools/list":
        return {"result": {**_CACHING, "tools": [_TOOL]}}
    if method == "initialize":
        data = {"supported": [_MODERN]}
        refused = {"code": _UNSUPPORTED, "message": f"{_MODERN} only", "data": data}
        return {"error": refused}
    return {"error": {"code": -32601, "message": f"Unknown method {method}"}}


if __name__ == "__main__":
    main()
