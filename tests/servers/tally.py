"""A stdio MCP server that proves, with each answer, whose it is; standard library only.

    python -I -S tests/servers/tally.py [--executions FILE] [--gate FILE] [--heard FILE]

The name that the client gave itself in `initialize` is the session's token, which a server that
takes a lost one's place learns as well. The tools `plain`, `progress` and `sample` take a `token`,
a call `number` and the `seconds` that they last. Each answer is a text of JSON: the session's
token, what the call has brought, how often this process has executed that number, this process, and
the proxy's worker that started it. Every execution is first a line of a file: token, number,
process. A call that is `gated` lasts until the gate is there. The last file has a line for each
notification, its method.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from typing import Any

Json = dict[str, Any]

#: Notifications of a call with progress.
STEPS = 3

#: Seconds between two looks at the gate.
POLL = 0.02

#: Seconds for the client to answer a question.
ANSWER_TIME = 20.0

TOOLS = ("plain", "progress", "sample")


class Server:
    """One session."""

    def __init__(
        self, executions: str | None, gate: str | None = None, heard: str | None = None
    ) -> None:
        self.worker = os.getppid()
        self.token = ""
        self.counts: Counter[int] = Counter()
        self.answers: dict[str, queue.SimpleQueue[Json]] = {}
        self.lock = threading.Lock()  # guards counts and standard output
        self.executions = opened(executions)
        self.gate = gate
        self.heard = opened(heard)

    def run(self) -> None:
        """Serves until the input ends; each call in a thread of its own."""
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if self.heard is not None and "id" not in message:
                os.write(self.heard, f"{message['method']}\n".encode())
            if "method" not in message:
                if message["id"] in self.answers:
                    self.answers[message["id"]].put(message)
            elif message["method"] == "tools/call":
                threading.Thread(target=self.call, args=(message,), daemon=True).start()
            elif "id" in message:
                self.send({"id": message["id"], **self.outcome(message)})

    def send(self, message: Json) -> None:
        """Writes one message."""
        data = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
        with self.lock:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def outcome(self, message: Json) -> Json:
        """The answer to everything but a call."""
        if message["method"] == "initialize":
            self.token = message["params"]["clientInfo"]["name"]
            version = message["params"]["protocolVersion"]
            about = {"name": "tally", "version": "1"}
            capabilities: Json = {"tools": {}}
            result: Json = {"protocolVersion": version, "capabilities": capabilities}
            return {"result": {**result, "serverInfo": about}}
        if message["method"] == "tools/list":
            return {"result": {"tools": [{"name": n, "inputSchema": _ANY} for n in TOOLS]}}
        if message["method"] == "ping":
            return {"result": {}}
        return {"error": {"code": -32601, "message": f"Unknown method {message['method']}"}}

    # --- the tools -------------------------------------------------------------------------------

    def call(self, message: Json) -> None:
        """Counts, does what the tool does, and answers."""
        params = message["params"]
        given = params["arguments"]
        executions = self.count(given["number"])
        said = ""
        if params["name"] == "progress":
            self.progress(params["_meta"]["progressToken"], given)
        if params["name"] == "sample":
            said = self.ask(given)
        time.sleep(given.get("seconds", 0))
        while given.get("gated") and self.gate is not None and not os.path.exists(self.gate):
            time.sleep(POLL)
        answer = {
            "token": self.token,
            "given": given["token"],
            "number": given["number"],
            "executions": executions,
            "said": said,
            "pid": os.getpid(),
            "worker": self.worker,
        }
        content = [{"type": "text", "text": json.dumps(answer)}]
        self.send({"id": message["id"], "result": {"content": content}})

    def count(self, number: int) -> int:
        """How often a number was executed here, this time included."""
        with self.lock:
            self.counts[number] += 1
            if self.executions is not None:
                line = f"{self.token} {number} {os.getpid()}\n"
                os.write(self.executions, line.encode())
            return self.counts[number]

    def progress(self, token: Any, given: Json) -> None:
        """Notifications that name the session and the call."""
        for step in range(1, STEPS + 1):
            text = f"{self.token} {given['number']} {step}"
            params = {"progressToken": token, "progress": step, "total": STEPS, "message": text}
            self.send({"method": "notifications/progress", "params": params})

    def ask(self, given: Json) -> str:
        """What the client answers to a question that names the session and the call."""
        key = f"question-{os.getpid()}-{given['number']}"
        question = f"{self.token} {given['number']}"
        content = {"type": "text", "text": question}
        self.answers[key] = queue.SimpleQueue()
        params = {"messages": [{"role": "user", "content": content}], "maxTokens": 10}
        self.send({"id": key, "method": "sampling/createMessage", "params": params})
        try:
            answer = self.answers[key].get(timeout=ANSWER_TIME)
        except queue.Empty:
            return "no answer"
        finally:
            del self.answers[key]
        text: str = answer["result"]["content"]["text"] if "result" in answer else str(answer)
        return text


_ANY = {"type": "object"}


def opened(path: str | None) -> int | None:
    """The file to whose end lines are written, where there is one."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return None if path is None else os.open(path, flags, 0o600)


def main() -> None:
    """Runs the server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--executions", help="a file that many servers may share")
    parser.add_argument("--gate", help="a file whose presence ends gated calls")
    parser.add_argument("--heard", help="a file for notifications")
    given = parser.parse_args()
    Server(given.executions, given.gate, given.heard).run()


if __name__ == "__main__":
    main()
