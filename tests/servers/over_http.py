"""Streamable HTTP for legacy.py and modern.py, with what belongs to their era alone.

A legacy endpoint has sessions: a POST without one is refused with 400, one with an unknown id with
404, GET is the session's stream, DELETE ends it. A modern one knows POST alone, checks the headers,
answers errors of the protocol with their status, and takes a call back whose response is closed.
Each request is traced as `http ` and a JSON object. `--deny STATUS` refuses all requests without
`Authorization: Bearer token`. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import json
import queue
import re
import secrets
import select
import socket
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from two_eras import ARGUMENTS, NOT_FOUND, Call, EraServer, Json

SESSION = "Mcp-Session-Id"
MISMATCH = -32020
INVALID = -32600

_META = "io.modelcontextprotocol/"
_STATUS = {NOT_FOUND: 404, MISMATCH: 400, -32021: 400, -32022: 400}
_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_ENCODED = re.compile(r"=\?base64\?(.*)\?=", re.S)

# Messages of a stream that wait for a client.
_KEPT = 1000

# Seconds without a message after which a stream says that it is there.
_PAUSE = 0.05

Messages = queue.Queue[Json]


class Endpoint:
    """What the requests of one era are answered with."""

    @abstractmethod
    def post(self, turn: Turn, message: Json) -> None:
        """One message of a client."""

    def get(self, turn: Turn) -> None:
        """A standing stream."""
        turn.refuse(405, INVALID, "Method Not Allowed")

    def delete(self, turn: Turn) -> None:
        """The end of a session."""
        turn.refuse(405, INVALID, "Method Not Allowed")

    @abstractmethod
    def trace(self, line: str) -> None:
        """Says what happens in here."""


class Turn(BaseHTTPRequestHandler):
    """One connection; its requests come one after the other."""

    protocol_version = "HTTP/1.1"
    endpoint: Endpoint
    options: Namespace

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: requests are traced."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        message = json.loads(body)
        if not self.is_denied(message.get("method", "response")):
            self.endpoint.post(self, message)

    def do_GET(self) -> None:
        if not self.is_denied("stream"):
            self.endpoint.get(self)

    def do_DELETE(self) -> None:
        if not self.is_denied("end"):
            self.endpoint.delete(self)

    def is_denied(self, rpc: str) -> bool:
        """Traces the request; whether it was refused for want of a token."""
        seen = {"verb": self.command, "rpc": rpc, **dict(self.headers.items())}
        self.endpoint.trace(f"http {json.dumps(seen)}")
        status: int | None = self.options.deny
        if status is None or self.headers.get("Authorization") == "Bearer token":
            return False
        given = {"WWW-Authenticate": 'Bearer realm="two-eras"'} if status == 401 else {}
        self.send_json(status, {"error": "denied"}, {"Retry-After": "7", **given})
        return True

    # --- answers ---

    def send_json(self, status: int, body: Json | None, headers: Json | None = None) -> None:
        """An answer with a JSON body, or none."""
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if data:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: int, message: str, request_id: Any = None) -> None:
        """An answer with a JSON-RPC error."""
        error = {"code": code, "message": message}
        self.send_json(status, {"jsonrpc": "2.0", "id": request_id, "error": error})

    def stream(
        self, messages: Messages, until: Any, headers: Json | None = None, first: Json | None = None
    ) -> bool:
        """Sends messages to the answer to `until`, as events; whether the client was there."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        message = first
        while True:
            if message is not None:
                text = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False)
                event = f"event: message\ndata: {text}\n\n".encode()
                try:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                except OSError:
                    return False
                if is_answer(message, until):
                    self.wfile.write(b"0\r\n\r\n")
                    return True
            message = self.next_of(messages)
            if message is None and self.has_left():
                self.close_connection = True
                return False

    def next_of(self, messages: Messages) -> Json | None:
        """The next message, None where there is none for a moment."""
        try:
            return messages.get(timeout=_PAUSE)
        except queue.Empty:
            return None

    def has_left(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


def is_answer(message: Json, request_id: Any) -> bool:
    """Whether a message is the answer to a request."""
    return request_id is not None and "method" not in message and message["id"] == request_id


# --- sessions ------------------------------------------------------------------------------------


class Session:
    """A server of its own for each client, and what it says outside any call."""

    def __init__(self, server: EraServer) -> None:
        self.server = server
        self.unasked: Messages = queue.Queue(_KEPT)
        server.send = self.unasked.put_nowait  # type: ignore[method-assign]


class LegacyEndpoint(Endpoint):
    """The revisions with `initialize`."""

    def __init__(self, new_server: Callable[[], EraServer]) -> None:
        self.new_server = new_server
        self.sessions: dict[str, Session] = {}
        self.tracer = new_server()

    def trace(self, line: str) -> None:
        self.tracer.trace(line)

    def session_of(self, turn: Turn) -> Session | None:
        """The session that a request names; None where that was answered."""
        named = turn.headers.get(SESSION)
        if named is None:
            turn.refuse(400, INVALID, "Bad Request: Missing session ID")
            return None
        session = self.sessions.get(named)
        if session is None:
            turn.refuse(404, -32001, "Session not found")
        return session

    def post(self, turn: Turn, message: Json) -> None:
        headers = {}
        if message.get("method") == "initialize":
            named = secrets.token_hex(8)
            session: Session | None = Session(self.new_server())
            assert session is not None
            self.sessions[named] = session
            headers[SESSION] = named
        else:
            session = self.session_of(turn)
        if session is None:
            return
        if "method" not in message or "id" not in message:
            session.server.receive(message)
            turn.send_json(202, None)
            return
        messages: Messages = queue.Queue()
        session.server.seen.append(message)
        session.server.begin(Call(session.server, message, messages.put))
        turn.stream(messages, message["id"], headers)

    def get(self, turn: Turn) -> None:
        session = self.session_of(turn)
        if session is not None:
            self.trace("stream opened")
            turn.stream(session.unasked, None)
            self.trace("stream closed")

    def delete(self, turn: Turn) -> None:
        if self.session_of(turn) is not None:
            del self.sessions[turn.headers[SESSION]]
            self.trace(f"session ended {turn.headers[SESSION]}")
            turn.send_json(204, None)


# --- no sessions ---------------------------------------------------------------------------------


class ModernEndpoint(Endpoint):
    """The revision 2026-07-28."""

    def __init__(self, server: EraServer) -> None:
        self.server = server

    def trace(self, line: str) -> None:
        self.server.trace(line)

    def post(self, turn: Turn, message: Json) -> None:
        self.server.seen.append(message)
        if "method" not in message or "id" not in message:
            turn.send_json(202, None)
            return
        call_id, params = message["id"], message.get("params") or {}
        wrong = mismatch(turn, message, params)
        if wrong is not None:
            turn.refuse(400, MISMATCH, wrong, call_id)
            return
        messages: Messages = queue.Queue()
        call = Call(self.server, message, messages.put)
        self.server.begin(call)
        first = None
        while first is None and not turn.has_left():
            first = turn.next_of(messages)
        if first is not None and is_answer(first, call_id):
            code = first.get("error", {}).get("code")
            says_nothing = "error" in first and version_in(params) is None
            status = 400 if says_nothing else _STATUS.get(code, 200)
            turn.send_json(status, {"jsonrpc": "2.0", **first})
        elif first is None or not turn.stream(messages, call_id, first=first):
            turn.close_connection = True
            self.server.stop(call)


def version_in(params: Json) -> Any:
    """The revision that a request says it is of."""
    return (params.get("_meta") or {}).get(f"{_META}protocolVersion")


def mismatch(turn: Turn, message: Json, params: Json) -> str | None:
    """What the headers of a modern request do not say as its body does."""
    version = version_in(params)
    if version is None:
        return None  # the server refuses what says nothing of itself
    method = message["method"]
    wanted = {"MCP-Protocol-Version": version, "Mcp-Method": method}
    if method in _NAMED:
        wanted["Mcp-Name"] = params.get(_NAMED[method])
    arguments = params.get("arguments") or {}
    if method == "tools/call":
        for name, schema in ARGUMENTS.get(params.get("name", ""), {}).items():
            if "x-mcp-header" in schema:
                wanted[f"Mcp-Param-{schema['x-mcp-header']}"] = arguments.get(name)
    for name, value in wanted.items():
        given = turn.headers.get(name)
        if (None if given is None else decoded(given)) != value:
            return f"{name} is not what the body says"
    return None


def decoded(value: str) -> str:
    """The value of a header that may be encoded."""
    found = _ENCODED.fullmatch(value)
    if found is None:
        return value
    try:
        return base64.b64decode(found[1], validate=True).decode()
    except (binascii.Error, ValueError):
        return value


class Listener(ThreadingHTTPServer):
    """Has room for many who connect at once, and waits for none of them at the end."""

    daemon_threads = True
    request_queue_size = 128


def serve(endpoint: Endpoint, options: Namespace) -> None:
    """Answers requests until the process is ended; says first where it listens."""
    handler = type("Handler", (Turn,), {"endpoint": endpoint, "options": options})
    with Listener(("127.0.0.1", options.http), handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/mcp", flush=True)
        server.serve_forever()
