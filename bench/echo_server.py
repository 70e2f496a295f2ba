"""A stdio MCP server that does next to nothing: what the benchmark puts behind every proxy.

It knows `initialize`, `ping`, `tools/list` and `tools/call` of one tool, `echo`. Standard library
only, so that it starts fast as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

_PIECE = 256 * 1024

_CAPABILITIES: dict[str, Any] = {"tools": {}}
_TOOL = {
    "name": "echo",
    "description": "Says what it is told.",
    "inputSchema": {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
    },
}

# The answer to a call is put together from pieces: there is one shape only.
_ECHO = '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":%s}]}}'


def main() -> None:
    """Answers line by line until the input ends; lines that came together are answered together."""
    rest = b""
    while piece := os.read(0, _PIECE):
        *lines, rest = (rest + piece).split(b"\n")
        answers = [line for line in map(answer, lines) if line]
        if answers:
            write(("\n".join(answers) + "\n").encode())


def write(data: bytes) -> None:
    """Writes it all."""
    while data:
        data = data[os.write(1, data) :]


def answer(line: bytes) -> str:
    """The answer to a message, empty where there is none."""
    if not line.strip():
        return ""
    message = json.loads(line)
    if "id" not in message or "method" not in message:
        return ""
    if message["method"] == "tools/call":
        text = message["params"]["arguments"]["text"]
        return _ECHO % (json.dumps(message["id"]), json.dumps(text))
    return json.dumps({"jsonrpc": "2.0", "id": message["id"], **outcome(message)})


def outcome(message: Mapping[str, Any]) -> dict[str, Any]:
    """The result, or the error, of everything but a call."""
    method = message["method"]
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


if __name__ == "__main__":
    main()
