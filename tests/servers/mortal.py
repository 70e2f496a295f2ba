"""A stdio MCP server that a tool kills: `ok` says how many calls it has had, `die` ends it.

`die` takes a `code` to exit with, or a `signal`; `wait` answers after so many `seconds`. `mute`
closes the output, `deaf` the input before it is answered; both go on living, against SIGTERM where
they are told to be `stubborn`.
Standard library alone; run by its path.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

Json = dict[str, Any]

TOOLS = ("ok", "die", "wait", "mute", "deaf")

_SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "integer"},
        "signal": {"type": "integer"},
        "seconds": {"type": "number"},
        "stubborn": {"type": "boolean"},
    },
}


def main() -> None:
    """Serves until the input ends, or a tool ends it."""
    calls = 0
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("method") == "tools/call":
            calls += 1
        if "id" in message and "method" in message:
            answer = {"jsonrpc": "2.0", "id": message["id"], "result": _result(message, calls)}
            print(json.dumps(answer), flush=True)
            if _is_call(message, "deaf"):
                time.sleep(600)


def _result(message: Json, calls: int) -> Json:
    params = message.get("params") or {}
    if message["method"] == "initialize":
        about = {"name": "mortal", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
    if message["method"] == "tools/list":
        return {"tools": [{"name": name, "inputSchema": _SCHEMA} for name in TOOLS]}
    if _is_call(message, "die"):
        _die(params.get("arguments") or {})
    if _is_call(message, "deaf") or _is_call(message, "mute"):
        _close(message["params"])
    if _is_call(message, "wait"):
        time.sleep(params["arguments"]["seconds"])
    return {"content": [{"type": "text", "text": f"call {calls}"}]}


def _is_call(message: Json, tool: str) -> bool:
    return message["method"] == "tools/call" and message["params"]["name"] == tool


def _close(params: Json) -> None:
    if (params.get("arguments") or {}).get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if params["name"] == "deaf":
        os.close(0)
        return
    os.close(1)
    time.sleep(600)


def _die(arguments: Json) -> None:
    if "signal" in arguments:
        os.kill(os.getpid(), arguments["signal"])
    os._exit(arguments["code"])


if __name__ == "__main__":
    main()
