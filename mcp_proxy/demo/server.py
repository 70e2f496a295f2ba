"""A small MCP server over stdio, with the standard library alone; run by its path.

Tools: `echo`, `add`, `count` (slow, with progress, can be cancelled), `log` (a log message to the
client) and `ask` (asks the client by elicitation, or by sampling where it has only that).
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}

Json = dict[str, Any]


class ToolError(Exception):
    """A tool call failed; the model reads the message."""


class Call:
    """A running tool call and its progress notifications."""

    def __init__(self, server: DemoServer, params: Json) -> None:
        self.server = server
        self.arguments: Json = params.get("arguments") or {}
        self.cancelled = threading.Event()
        self._token = (params.get("_meta") or {}).get("progressToken")

    def progress(self, done: int, total: int) -> None:
        """Sends progress to the client, if the client gave a progress token."""
        if self._token is not None:
            params = {"progressToken": self._token, "progress": done, "total": total}
            self.server.send({"method": "notifications/progress", "params": params})


class DemoServer:
    """One client over one pair of streams. Each tool call has a thread of its own."""

    def __init__(self) -> None:
        self._output = threading.Lock()
        self._ids = itertools.count(1)
        self._answers: dict[str, queue.SimpleQueue[Json]] = {}
        self._calls: dict[Any, Call] = {}
        self._client: Json = {}

    def run(self) -> None:
        """Serves until the input ends."""
        for line in sys.stdin.buffer:
            if line.strip():
                self._receive(json.loads(line))

    def send(self, message: Json) -> None:
        """Writes one message. Thread-safe."""
        line = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False) + "\n"
        with self._output:
            # Half a character, which UTF-8 has no bytes for, stays the escape that it was.
            sys.stdout.buffer.write(line.encode("utf-8", "backslashreplace"))
            sys.stdout.buffer.flush()

    def ask(self, method: str, params: Json) -> Json:
        """The client's answer to a request of ours; raises ToolError when it refuses."""
        key = f"demo-{next(self._ids)}"
        answers = self._answers[key] = queue.SimpleQueue()
        self.send({"id": key, "method": method, "params": params})
        answer = answers.get()
        if "error" in answer:
            raise ToolError(f"the client refused: {answer['error'].get('message')}")
        result: Json = answer["result"]
        return result

    def client_can(self, capability: str) -> bool:
        """Whether the client declared a capability."""
        return capability in self._client

    def _receive(self, message: Json) -> None:
        method = message.get("method")
        if method is None:
            waiting = self._answers.pop(str(message.get("id")), None)
            if waiting is not None:
                waiting.put(message)
        elif "id" not in message:
            self._notified(method, message.get("params") or {})
        elif method == "tools/call":
            threading.Thread(target=self._call, args=(message,), daemon=True).start()
        else:
            self._answer(message, method)

    def _notified(self, method: str, params: Json) -> None:
        if method == "notifications/cancelled":
            call = self._calls.get(params.get("requestId"))
            if call is not None:
                call.cancelled.set()

    def _answer(self, message: Json, method: str) -> None:
        answers: dict[str, Callable[[Json], Json]] = {
            "initialize": self._initialize,
            "ping": lambda params: {},
            "tools/list": lambda params: {"tools": [tool for tool, _ in TOOLS.values()]},
            "logging/setLevel": lambda params: {},
        }
        if method in answers:
            self.send({"id": message["id"], "result": answers[method](message.get("params") or {})})
        else:
            error = {"code": -32601, "message": f"Method not found: {method}"}
            self.send({"id": message["id"], "error": error})

    def _initialize(self, params: Json) -> Json:
        self._client = params.get("capabilities") or {}
        wanted = params.get("protocolVersion")
        return {
            "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
            "capabilities": {"tools": {}, "logging": {}},
            "serverInfo": {"name": "mcp-wsgi-proxy demo", "version": "1"},
        }

    def _call(self, message: Json) -> None:
        params = message.get("params") or {}
        call = self._calls[message["id"]] = Call(self, params)
        try:
            result = self._result(params.get("name"), call)
        finally:
            del self._calls[message["id"]]
        if not call.cancelled.is_set():
            self.send({"id": message["id"], "result": result})

    def _result(self, name: Any, call: Call) -> Json:
        try:
            if name not in TOOLS:
                raise ToolError(f"no such tool: {name}")
            return {"content": [{"type": "text", "text": TOOLS[name][1](call)}]}
        except (ToolError, KeyError, TypeError, ValueError) as error:
            return {"content": [{"type": "text", "text": f"Error: {error}"}], "isError": True}


# --- tools ---------------------------------------------------------------------------------------


def echo(call: Call) -> str:
    """Returns the text."""
    return str(call.arguments["text"])


def add(call: Call) -> str:
    """The sum of two numbers."""
    return str(call.arguments["a"] + call.arguments["b"])


def count(call: Call) -> str:
    """Counts slowly and reports progress; stops early when the call is cancelled."""
    total, pause = int(call.arguments.get("to", 5)), float(call.arguments.get("pause", 0.5))
    for number in range(1, total + 1):
        if call.cancelled.wait(pause):
            return f"cancelled at {number}"
        call.progress(number, total)
    return f"counted to {total}"


def log(call: Call) -> str:
    """Sends the client a log message."""
    params = {"level": call.arguments.get("level", "info"), "data": call.arguments["text"]}
    call.server.send({"method": "notifications/message", "params": params})
    return "logged"


def ask(call: Call) -> str:
    """Asks the user, or the model of the client, a question."""
    question = str(call.arguments.get("question", "What is your name?"))
    if call.server.client_can("elicitation"):
        schema = {"type": "object", "properties": {"answer": _TEXT}, "required": ["answer"]}
        asked = {"message": question, "requestedSchema": schema}
        return json.dumps(call.server.ask("elicitation/create", asked))
    if call.server.client_can("sampling"):
        prompt = {"role": "user", "content": {"type": "text", "text": question}}
        return json.dumps(
            call.server.ask("sampling/createMessage", {"messages": [prompt], "maxTokens": 100})
        )
    raise ToolError("the client declared neither elicitation nor sampling")


def _tool(name: str, run: Callable[[Call], str], required: list[str], **properties: Json) -> None:
    schema = {"type": "object", "properties": properties, "required": required}
    TOOLS[name] = ({"name": name, "description": run.__doc__, "inputSchema": schema}, run)


TOOLS: dict[str, tuple[Json, Callable[[Call], str]]] = {}
_tool("echo", echo, ["text"], text=_TEXT)
_tool("add", add, ["a", "b"], a=_NUMBER, b=_NUMBER)
_tool("count", count, [], to=_NUMBER, pause=_NUMBER)
_tool("log", log, ["text"], text=_TEXT, level=_TEXT)
_tool("ask", ask, [], question=_TEXT)


if __name__ == "__main__":
    DemoServer().run()
