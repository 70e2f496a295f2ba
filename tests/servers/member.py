"""A stdio server as one of several: it says who it is. Standard library only.

`--name` is what it calls itself. Its tools are `who`, which tells that, its process and how often
it was called; `exit`, `ask` (a question by elicitation), `grow` (one more tool), `link` (a link to
a resource), and those of `--tool`; `challenge`, `ask-later`, `roots` (it asks for the client's),
`slow`, `large` and `touch` (its first resource has changed) are not listed unless named so.
`--resource` are the URIs of its resources, `--template` those of its templates. `--delay` are
seconds before it answers initialize, `--mute`
has it never answer.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import secrets
import sys
import threading
import time
from typing import Any

Json = dict[str, Any]

output = threading.Lock()
answers: dict[Any, queue.SimpleQueue[Json]] = {}


def send(message: Json) -> None:
    """Writes one message to the proxy."""
    with output:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


class Member:
    """What the server is, and has done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name = options.name
        self.delay = options.delay
        self.is_mute = options.mute
        self.tools = ["who", "exit", "ask", "grow", "link", *options.tool]
        self.resources = options.resource
        self.templates = options.template
        self.calls = 0
        self.born = secrets.token_hex(8)  # no other process has it
        self.seen: list[Json] = []

    def answer(self, message: Json) -> Json:
        """The result of a request; raises KeyError for one that is not known."""
        method, params = message["method"], message.get("params") or {}
        if method == "initialize":
            time.sleep(self.delay)
            return self.initialized(params)
        known: Json = {
            "ping": dict,
            "tools/list": lambda: {"tools": [tool(name) for name in self.tools]},
            "prompts/list": lambda: {"prompts": [{"name": "greet"}]},
            "resources/list": lambda: {
                "resources": [{"uri": uri, "name": uri} for uri in self.resources]
            },
            "resources/templates/list": lambda: {
                "resourceTemplates": [{"uriTemplate": t, "name": t} for t in self.templates]
            },
            "resources/read": lambda: {
                "contents": [{"uri": params["uri"], "text": f"{self.name} has {params['uri']}"}]
            },
            "resources/subscribe": dict,
            "resources/unsubscribe": dict,
            "prompts/get": lambda: {"messages": [], "description": f"{self.name} {params['name']}"},
            "completion/complete": lambda: {"completion": {"values": [self.name]}},
            "logging/setLevel": dict,
            "tools/call": lambda: self.called(params),
        }
        found: Json = known[method]()
        return found

    def initialized(self, params: Json) -> Json:
        """The InitializeResult."""
        capabilities: Json = {"tools": {"listChanged": True}, "prompts": {}, "logging": {}}
        capabilities["completions"] = {}
        if self.resources or self.templates:
            capabilities["resources"] = {"subscribe": True}
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": capabilities,
            "serverInfo": {"name": self.name, "version": "1"},
            "instructions": f"This is {self.name}.",
        }

    def called(self, params: Json) -> Json:
        """What a tool answers."""
        self.calls += 1
        name = params["name"]
        if name == "exit":
            os._exit(3)
        if name == "ask":
            return text(json.dumps(question(f"Is it {self.name}?")))
        if name == "grow":
            self.tools.append(f"grown{self.calls}")
            send({"method": "notifications/tools/list_changed"})
        if name == "challenge":
            raise Refused({"mcpProxyRefusal": {"status": 401, "headers": [["Set-Cookie", "a=b"]]}})
        if name == "ask-later":
            threading.Thread(target=question, args=(f"Is it {self.name}?",), daemon=True).start()
        if name == "roots":
            return text(json.dumps(asked("roots/list")))
        if name == "slow":
            time.sleep(60)
        if name == "large":
            return text("x" * 5_000_000)
        if name == "touch":
            send(
                {"method": "notifications/resources/updated", "params": {"uri": self.resources[0]}}
            )
        if name == "link":
            uri = self.resources[0]
            return {"content": [{"type": "resource_link", "uri": uri, "name": uri}]}
        if name not in self.tools:
            raise KeyError(name)
        told = {"name": self.name, "pid": os.getpid(), "calls": self.calls, "seen": self.seen}
        told |= {"token": os.environ.get("TOKEN"), "born": self.born}
        return text(json.dumps({**told, "tool": name}))


class Refused(Exception):
    """An error with data."""

    def __init__(self, data: Json) -> None:
        super().__init__("refused")
        self.data = data


def tool(name: str) -> Json:
    """An entry of the list of tools."""
    return {"name": name, "inputSchema": {"type": "object"}}


def text(said: str) -> Json:
    """A result that says something."""
    return {"content": [{"type": "text", "text": said}]}


def question(message: str) -> Json:
    """The client's answer to a question of people."""
    schema = {"type": "object", "properties": {}}
    return asked("elicitation/create", message=message, requestedSchema=schema)


def asked(method: str, **params: Any) -> Json:
    """The client's answer to a request, whose id is the same in every server."""
    answers[1] = queue.SimpleQueue()
    send({"id": 1, "method": method, "params": params})
    return answers[1].get(timeout=30)


def serve(member: Member, message: Json) -> None:
    """Answers one request."""
    try:
        send({"id": message["id"], "result": member.answer(message)})
    except Refused as error:
        said = {"code": -32000, "message": "refused", "data": error.data}
        send({"id": message["id"], "error": said})
    except KeyError as error:
        send({"id": message["id"], "error": {"code": -32601, "message": f"unknown: {error}"}})


def main() -> None:
    """Reads messages until the proxy closes the input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="member")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--mute", action="store_true")
    for option in ("--tool", "--resource", "--template"):
        parser.add_argument(option, action="append", default=[])
    member = Member(parser.parse_args())
    for line in sys.stdin:
        message = json.loads(line)
        if "method" not in message:
            answers[message["id"]].put(message.get("result", {}))
        elif "id" in message and not member.is_mute:
            threading.Thread(target=serve, args=(member, message), daemon=True).start()
        if message.get("method") != "tools/call":
            member.seen.append({k: message[k] for k in ("method", "params") if k in message})


if __name__ == "__main__":
    main()
