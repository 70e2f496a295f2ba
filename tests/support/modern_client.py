"""The least that a client of MCP 2026-07-28 does, with everything in the test's hands."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcp_proxy.wire import headers as header_names
from tests.support.front import Answer, Front, Json
from tests.support.waiting import eventually

REVISION = "2026-07-28"
PREFIX = "io.modelcontextprotocol/"
SUBSCRIPTION = f"{PREFIX}subscriptionId"

#: Everything that a client can be asked for.
ASKABLE: Json = {"elicitation": {"form": {}, "url": {}}, "sampling": {}, "roots": {}}

#: What a client answers to each kind of question.
FORM: Json = {"action": "accept", "content": {"answer": "ten"}}
SAMPLED: Json = {"role": "assistant", "content": {"type": "text", "text": "hm"}, "model": "m"}
ROOTS: Json = {"roots": [{"uri": "file:///here"}]}

ANSWERS: Mapping[str, Json] = {
    "elicitation/create": FORM,
    "sampling/createMessage": SAMPLED,
    "roots/list": ROOTS,
}

_NAMED_BY = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_SERVERS = Path(__file__).parents[1] / "servers"


def server_of(era: str, *options: str) -> tuple[str, ...]:
    """The command of a server of one era: `modern` or `legacy`."""
    return (sys.executable, "-I", "-S", str(_SERVERS / f"{era}.py"), *options)


class ModernClient:
    """Sends requests that each stand for themselves.

    `capabilities` and `authorization` are those of every request that says nothing else.
    """

    def __init__(
        self,
        front: Front,
        capabilities: Json | None = None,
        authorization: str | None = None,
        path: str = "/mcp",
        ids: Iterator[int] | None = None,
    ) -> None:
        self.front = front
        self.capabilities = {} if capabilities is None else capabilities
        self.authorization = authorization
        self.path = path
        self.ids = itertools.count(1) if ids is None else ids

    def at(self, front: Front) -> ModernClient:
        """The same client by another way in."""
        return ModernClient(front, self.capabilities, self.authorization, self.path, self.ids)

    def declaring(self, **capabilities: Any) -> ModernClient:
        """The same client with other capabilities."""
        return ModernClient(self.front, capabilities, self.authorization, self.path, self.ids)

    def known_as(self, authorization: str | None) -> ModernClient:
        """The same client with another Authorization."""
        return ModernClient(self.front, self.capabilities, authorization, self.path, self.ids)

    # --- requests --------------------------------------------------------------------------------

    def meta(self, token: Any = None, log_level: str | None = None) -> Json:
        """What a request says of itself."""
        meta: Json = {
            f"{PREFIX}protocolVersion": REVISION,
            f"{PREFIX}clientInfo": {"name": "test", "version": "1"},
            f"{PREFIX}clientCapabilities": self.capabilities,
        }
        if token is not None:
            meta["progressToken"] = token
        if log_level is not None:
            meta[f"{PREFIX}logLevel"] = log_level
        return meta

    def request(
        self,
        method: str,
        params: Json | None = None,
        key: Any = None,
        token: Any = None,
        log_level: str | None = None,
    ) -> Json:
        """A request as it stands in a body."""
        key = next(self.ids) if key is None else key
        params = {"_meta": self.meta(token, log_level), **(params or {})}
        return {"jsonrpc": "2.0", "id": key, "method": method, "params": params}

    def call(
        self,
        method: str,
        params: Json | None = None,
        key: Any = None,
        token: Any = None,
        log_level: str | None = None,
        **headers: str,
    ) -> Answer:
        """Sends a request with the headers that belong to it; other `headers` win."""
        return self.post(self.request(method, params, key, token, log_level), **headers)

    def tool(self, name: str, /, *, retry: Json | None = None, **arguments: Any) -> Answer:
        """Calls a tool that needs nothing but arguments."""
        return self.call("tools/call", {**called(name, **arguments), **(retry or {})})

    def told(self, name: str, /, **arguments: Any) -> Json:
        """The structured content of what a tool returns."""
        message = self.tool(name, **arguments).message()
        assert "result" in message, message
        told: Json = message["result"]["structuredContent"]
        return told

    def done(self, name: str, /, **arguments: Any) -> None:
        """Calls a tool that tells nothing; an error fails the test."""
        message = self.tool(name, **arguments).message()
        assert "result" in message, message

    def pid(self) -> int:
        """The process that answers."""
        pid: int = self.told("pid")["pid"]
        return pid

    def post(self, message: Any, **headers: str) -> Answer:
        """Posts any body, with the headers that a decent client sends with it.

        Headers are given with _ for -; an empty one is left out.
        """
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        own = headers_of(message) if isinstance(message, dict) else {}
        return self.send("POST", body, {**own, **_named(headers)})

    def send(self, method: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Any HTTP request."""
        everything = {
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": REVISION,
            **({"Content-Type": "application/json"} if body is not None else {}),
            **({"Authorization": self.authorization} if self.authorization else {}),
            **headers,
        }
        wanted = {name: value for name, value in everything.items() if value}
        return self.front.request(method, self.path, wanted, body)

    # --- questions -------------------------------------------------------------------------------

    def asked(self, name: str, /, **arguments: Any) -> Json:
        """The result of a tool that asks: it is `input_required`."""
        return asked_in(self.tool(name, **arguments))

    def listen(self, key: Any = None, /, **wanted: Any) -> Answer:
        """Opens a subscription."""
        return self.call("subscriptions/listen", {"notifications": wanted}, key)


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    names = {"Mcp_Protocol_Version": "MCP-Protocol-Version"}
    return {names.get(name, name.replace("_", "-")): value for name, value in headers.items()}


def headers_of(message: Json) -> dict[str, str]:
    """The headers that mirror a request."""
    method, params = message.get("method"), message.get("params")
    found = {"Mcp-Method": method} if isinstance(method, str) and "id" in message else {}
    name = params.get(_NAMED_BY.get(str(method), "")) if isinstance(params, dict) else None
    if isinstance(name, str):
        found["Mcp-Name"] = header_names.encode_value(name)
    arguments = (params or {}).get("arguments") if isinstance(params, dict) else None
    if name == "header" and isinstance(arguments, dict) and "region" in arguments:
        found["Mcp-Param-Region"] = header_names.encode_value(str(arguments["region"]))
    return found


def called(name: str, /, **arguments: Any) -> Json:
    """The params of a tools/call."""
    return {"name": name, "arguments": arguments}


def asked_in(answer: Answer) -> Json:
    """The questions in an answer."""
    message = answer.message()
    assert "result" in message, message
    result: Json = message["result"]
    assert result["resultType"] == "input_required", result
    return result


def answering(asked: Json, **others: Json) -> Json:
    """What a retry adds to the params: an answer to each question, by its kind."""
    answers = {
        key: others.get(question["method"].partition("/")[0], ANSWERS[question["method"]])
        for key, question in asked["inputRequests"].items()
    }
    return {"inputResponses": answers, "requestState": asked["requestState"]}


# --- what a server tells of itself ----------------------------------------------------------------


class Trace:
    """The file in which a server writes what happens in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self, beginning: str = "") -> list[str]:
        """The lines that begin so."""
        text = self.path.read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.startswith(beginning)]

    def wait(self, beginning: str, count: int = 1, end: str = "") -> list[str]:
        """The lines that begin, and end, so, once there are so many."""

        def found() -> list[str]:
            lines = [line for line in self.lines(beginning) if line.endswith(end)]
            return lines if len(lines) >= count else []

        return eventually(found, message=f"{beginning!r} x{count} not in {self.lines()}")
