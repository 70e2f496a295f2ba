"""Clients of both eras on raw HTTP: every request has a connection of its own.

So retries, and answers to questions, land on whichever worker accepts first. They are for threads:
a call returns when its answer is there, or raises Failed.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.proofs.labelled import LABEL, WAY

Json = dict[str, Any]

MODERN = "2026-07-28"
LEGACY = "2025-11-25"
PREFIX = "io.modelcontextprotocol/"

#: Everything that a client can be asked for.
CAPABILITIES: Json = {"elicitation": {"form": {}, "url": {}}, "sampling": {}}

PATIENCE = 60.0

_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}


class Failed(Exception):
    """No answer, or an HTTP error that is no answer."""


@dataclass
class Heard:
    """What came for one request: notifications, and the answer.

    `worker` is who served it, which another one has accepted where it `was_passed`.
    """

    status: int = 0
    worker: int = 0
    was_passed: bool = False
    told: list[Json] = field(default_factory=list)
    answer: Json = field(default_factory=dict)

    @property
    def result(self) -> Json:
        """The result; Failed where there is an error."""
        if "result" not in self.answer:
            raise Failed(f"{self.status} {self.answer}")
        result: Json = self.answer["result"]
        return result

    @property
    def is_question(self) -> bool:
        """Whether the client is asked."""
        return bool(self.answer.get("result", {}).get("resultType") == "input_required")

    @property
    def is_refused_state(self) -> bool:
        """Whether a requestState was refused, as it is to be."""
        error = self.answer.get("error", {})
        reason = (error.get("data") or {}).get("reason")
        return (self.status, error.get("code"), reason) == (200, -32602, "invalid_request_state")

    @property
    def structured(self) -> Json:
        """What a tool of tests/servers/two_eras.py returns."""
        structured: Json = self.result.get("structuredContent", {})
        return structured


class Wire:
    """Requests to one endpoint, with an Authorization or without."""

    def __init__(self, port: int, authorization: str | None = None) -> None:
        self.port = port
        self.authorization = authorization
        self.ids = itertools.count(1)
        self.ports: list[int] = []  # ours, of every connection so far

    @contextmanager
    def sent(
        self, method: str, message: Json | None, headers: Mapping[str, str], patience: float
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to one HTTP request, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience)
        body = None if message is None else json.dumps({"jsonrpc": "2.0", **message}).encode()
        sent = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Connection": "close",
            **headers,
        }
        if self.authorization is not None:
            sent["Authorization"] = self.authorization
        try:
            connection.connect()
            self.ports.append(connection.sock.getsockname()[1])
            connection.request(method, "/mcp", body, sent)
            with connection.getresponse() as response:
                yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


def messages_in(response: http.client.HTTPResponse) -> Iterator[Json]:
    """The messages of a response, as they come."""
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        text = response.read()
        if text.startswith(b"{"):
            yield json.loads(text)
        return
    for line in response:
        if line.startswith(b"data:") and line[5:].strip():
            yield json.loads(line[5:])


def heard_of(response: http.client.HTTPResponse) -> Heard:
    """What the head of a response says."""
    headers = response.headers
    return Heard(response.status, int(headers.get(LABEL, 0)), headers.get(WAY) == "passed")


def heard_in(response: http.client.HTTPResponse, request_id: int) -> Heard:
    """Everything up to the answer to a request."""
    heard = heard_of(response)
    for message in messages_in(response):
        if "method" in message:
            heard.told.append(message)
        elif message.get("id") in (request_id, None):
            heard.answer = message
            return heard
        else:
            raise Failed(f"an answer for {message.get('id')} came for {request_id}")
    raise Failed(f"{response.status} without an answer")


class Modern(Wire):
    """A client of 2026-07-28."""

    def __init__(
        self, port: int, authorization: str | None = None, capabilities: Json | None = None
    ) -> None:
        super().__init__(port, authorization)
        self.capabilities = CAPABILITIES if capabilities is None else capabilities

    def message(self, method: str, params: Json, token: Any = None) -> tuple[Json, dict[str, str]]:
        """A request and its headers."""
        meta: Json = {
            f"{PREFIX}protocolVersion": MODERN,
            f"{PREFIX}clientCapabilities": self.capabilities,
            f"{PREFIX}clientInfo": {"name": "proof", "version": "1"},
        }
        if token is not None:
            meta["progressToken"] = token
        headers = {"MCP-Protocol-Version": MODERN, "Mcp-Method": method}
        if method in _NAMED:
            headers["Mcp-Name"] = params[_NAMED[method]]
        request_id = next(self.ids)
        return {"id": request_id, "method": method, "params": {**params, "_meta": meta}}, headers

    def ask(
        self, method: str, params: Json, token: Any = None, patience: float = PATIENCE
    ) -> Heard:
        """The answer to a request; raises Failed."""
        message, headers = self.message(method, params, token)
        with self.sent("POST", message, headers, patience) as response:
            return heard_in(response, message["id"])

    def call(
        self,
        tool: str,
        arguments: Json,
        *,
        state: str | None = None,
        responses: Json | None = None,
        token: Any = None,
        patience: float = PATIENCE,
    ) -> Heard:
        """The answer to a tools/call, or to its retry."""
        params: Json = {"name": tool, "arguments": arguments}
        if state is not None:
            params |= {"requestState": state, "inputResponses": responses or {}}
        return self.ask("tools/call", params, token, patience)

    def listen(self, wanted: Json, hear: Callable[[Json], bool], patience: float) -> Heard:
        """subscriptions/listen, until `hear` returns False or the stream ends."""
        message, headers = self.message("subscriptions/listen", {"notifications": wanted})
        with self.sent("POST", message, headers, patience) as response:
            heard = heard_of(response)
            for told in messages_in(response):
                if "method" not in told:
                    heard.answer = told
                    return heard
                heard.told.append(told)
                if not hear(told):
                    return heard
            raise Failed(f"{response.status}: the stream has ended without a result")


class Legacy(Wire):
    """A client with a session, which answers questions while it waits for its answer."""

    def __init__(
        self, port: int, authorization: str | None = None, capabilities: Json | None = None
    ) -> None:
        super().__init__(port, authorization)
        self.capabilities = CAPABILITIES if capabilities is None else capabilities
        self.headers: dict[str, str] = {}

    def open(self, patience: float = PATIENCE) -> None:
        """The handshake."""
        self.headers = {}
        about = {"name": "proof", "version": "1"}
        params = {
            "protocolVersion": LEGACY,
            "capabilities": self.capabilities,
            "clientInfo": about,
        }
        message: Json = {"id": next(self.ids), "method": "initialize", "params": params}
        with self.sent("POST", message, {}, patience) as response:
            session = response.headers.get("Mcp-Session-Id")
            heard = heard_in(response, message["id"])
        revision = heard.result["protocolVersion"]
        if session is None:
            raise Failed("no session")
        self.headers = {"Mcp-Session-Id": session, "MCP-Protocol-Version": revision}
        self.tell({"method": "notifications/initialized"}, patience)

    def tell(self, message: Json, patience: float = PATIENCE) -> None:
        """Something that is accepted without an answer."""
        with self.sent("POST", message, self.headers, patience) as response:
            if response.status != 202:
                raise Failed(f"{response.status} {response.read()!r}")

    def call(
        self,
        tool: str,
        arguments: Json,
        *,
        answer: Callable[[Json], Json] | None = None,
        token: Any = None,
        patience: float = PATIENCE,
    ) -> Heard:
        """The answer to a tools/call; `answer` makes the results of what is asked meanwhile."""
        meta = {} if token is None else {"_meta": {"progressToken": token}}
        params = {"name": tool, "arguments": arguments, **meta}
        message = {"id": next(self.ids), "method": "tools/call", "params": params}
        with self.sent("POST", message, self.headers, patience) as response:
            heard = heard_of(response)
            for told in messages_in(response):
                if "method" in told and "id" in told:
                    heard.told.append(told)
                    if answer is not None:
                        self.tell({"id": told["id"], "result": answer(told)}, patience)
                elif "method" in told:
                    heard.told.append(told)
                elif told.get("id") in (message["id"], None):
                    heard.answer = told
                    return heard
                else:
                    raise Failed(f"an answer for {told.get('id')} came for {message['id']}")
            raise Failed(f"{response.status} without an answer")

    def close(self) -> None:
        """Ends the session, if that can be told."""
        with (
            contextlib.suppress(Failed),
            self.sent("DELETE", None, self.headers, PATIENCE) as response,
        ):
            response.read()
