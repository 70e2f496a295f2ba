"""A scripted HTTP/1.1 server for tests: raw sockets, every byte of an answer in the test's hands.

Without a script it is an MCP server over streamable HTTP that issues sessions and knows its own.
`on(method, path, act)` and `rpc[name] = act` replace single answers; an act gets the `Turn`.
As a script: `python http_backend.py [PORT]`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

_PATIENCE = 30.0

LOST_404 = "404"
LOST_400 = "400"


class Seen(NamedTuple):
    """One request as it came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name: str) -> str | None:
        """The value of a header, None where it is absent."""
        return next((v for n, v in self.headers if n.lower() == name.lower()), None)

    @property
    def names(self) -> set[str]:
        """The names of all headers, in lower case."""
        return {name.lower() for name, _ in self.headers}

    @property
    def json(self) -> Any:
        """The body as JSON, None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def rpc(self) -> str | None:
        """The JSON-RPC method."""
        return self.json.get("method") if isinstance(self.json, dict) else None


class Leave(Exception):
    """The connection is over."""


class Turn:
    """One request that is to be answered, on its connection."""

    def __init__(self, backend: HttpBackend, sock: socket.socket, seen: Seen) -> None:
        self.backend = backend
        self.seen = seen
        self.sock = sock

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        try:
            self.sock.sendall(data)
        except OSError:
            raise Leave from None

    def reply(self, status: int, body: bytes = b"", *headers: str, length: int = -1) -> None:
        """A complete answer; `length` is what Content-Length says, None leaves it out."""
        lines = [f"HTTP/1.1 {status} Whatever", *headers]
        if status not in (204, 304):
            lines.append(f"Content-Length: {len(body) if length < 0 else length}")
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self.send(head + (b"" if self.seen.method == "HEAD" else body))

    def result(self, result: Any, *headers: str) -> None:
        """A JSON-RPC result."""
        answer = {"jsonrpc": "2.0", "id": (self.seen.json or {}).get("id"), "result": result}
        self.reply(200, json.dumps(answer).encode(), "Content-Type: application/json", *headers)

    def error(self, status: int, code: int, message: str) -> None:
        """A JSON-RPC error."""
        answer = {"jsonrpc": "2.0", "id": "server-error", "error": {"code": code}}
        answer["error"]["message"] = message  # type: ignore[index]
        self.reply(status, json.dumps(answer).encode(), "Content-Type: application/json")

    def reset(self) -> None:
        """Breaks the connection by RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Leave

    def wait_until_gone(self) -> None:
        """Says nothing until the other side leaves; notes when that was."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self.backend.is_stopping:
            readable, _, _ = select.select([self.sock], [], [], 0.02)
            if readable and self._peek() == b"":
                break
        self.backend.gone.append(time.monotonic())
        raise Leave

    def is_gone(self) -> bool:
        """Whether the other side has closed."""
        readable, _, _ = select.select([self.sock], [], [], 0)
        return bool(readable) and self._peek() == b""

    def _peek(self) -> bytes:
        try:
            return self.sock.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # TLS cannot be peeked: nothing but its end is to come
            return b""


Act = Callable[[Turn], None]


class HttpBackend:
    """Listens on `host`:`port` until `stop`; `start` begins anew on the same port."""

    def __init__(
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        lost: str = LOST_404,
        issues_sessions: bool = True,
        requests_per_connection: int = 1_000_000,
        idle: float = _PATIENCE,
        tls: ssl.SSLContext | None = None,
        first_id: int | None = None,
        name: str = "backend",
    ) -> None:
        self.host = host
        self.port = port
        self.name = name
        self.lost = lost
        self.issues_sessions = issues_sessions
        self.requests_per_connection = requests_per_connection
        self.idle = idle
        self.tls = tls
        self._next_id = first_id
        self.reset()
        self._listener: socket.socket | None = None
        self.start()

    def __enter__(self) -> HttpBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forgets what was seen and scripted; sessions stay."""
        self.seen: list[Seen] = []
        self.executed: Counter[str] = Counter()
        self.acts: dict[tuple[str, str], Act] = {}
        self.rpc: dict[str, Act] = {}
        self.gone: list[float] = []
        self.connections = 0
        if not hasattr(self, "sessions"):
            self.sessions: set[str] = set()
            self.ended: set[str] = set()
            self.is_stopping = False

    # --- life ------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    def start(self) -> None:
        """Listens; a server that was stopped has forgotten its sessions."""
        self.is_stopping = False
        listener = socket.create_server((self.host, self.port), backlog=256)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """Ends every connection and refuses others from now on; harmless when repeated."""
        self.is_stopping = True
        if self._listener is not None:
            self.refuse_connections()
            self.drop_connections()
            self.sessions = set()

    def refuse_connections(self) -> None:
        """Refuses connections until `start`; those that there are stay."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def drop_connections(self) -> None:
        """Ends every connection."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                self.connections += 1
                threading.Thread(
                    target=self.serve, args=(sock, self.connections), daemon=True
                ).start()

    def serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(Leave, OSError):
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True)
            self._open.add(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = sock.makefile("rb")
            for _ in range(self.requests_per_connection):
                sock.settimeout(self.idle)
                seen = _read(reader, number)
                sock.settimeout(_PATIENCE)
                self.seen.append(seen)
                self._answer(Turn(self, sock, seen))
            reader.close()
        sock.close()
        self._open.discard(sock)

    @property
    def open_connections(self) -> int:
        """How many connections are open: one that is not counted any more has been closed."""
        return len(self._open)

    # --- answers ---------------------------------------------------------------------------------

    def on(self, method: str, path: str, act: Act) -> None:
        """What is to happen instead, on a method and a path without its query."""
        self.acts[(method, path)] = act

    def _answer(self, turn: Turn) -> None:
        path = turn.seen.target.partition("?")[0]
        act = self.acts.get((turn.seen.method, path))
        if act is not None:
            act(turn)
        elif turn.seen.method == "POST":
            self._post(turn)
        elif turn.seen.method == "GET":
            if self._knows(turn):
                stream(b": hello\n\n", turn_wait)(turn)
        elif turn.seen.method == "DELETE":
            if self._knows(turn):
                self.sessions.discard(turn.seen.header("Mcp-Session-Id") or "")
                self.ended.add(turn.seen.header("Mcp-Session-Id") or "")
                turn.reply(200)
        else:
            turn.reply(200, b"other")

    def _post(self, turn: Turn) -> None:
        name = turn.seen.rpc
        if name != "initialize" and not self._knows(turn):
            return
        if name is not None:
            self.executed[name] += 1
        if name in self.rpc:
            self.rpc[name](turn)
        elif name == "initialize":
            self.initialize(turn)
        elif name is not None and name.startswith("notifications/"):
            turn.reply(202)
        else:
            turn.result({"backend": self.name, "body": turn.seen.body.decode("utf-8", "replace")})

    def initialize(self, turn: Turn, *headers: str) -> None:
        """Accepts a session."""
        version = turn.seen.json["params"]["protocolVersion"]
        result = {
            "protocolVersion": version,
            "capabilities": {},
            "serverInfo": {"name": self.name, "version": "1"},
        }
        turn.result(result, *headers, *self.new_session())

    def new_session(self) -> list[str]:
        """The header that issues a session, if sessions are issued."""
        if not self.issues_sessions:
            return []
        if self._next_id is None:
            session = f"{self.name}-{len(self.sessions) + len(self.ended)}-{time.monotonic_ns()}"
        else:
            session, self._next_id = str(self._next_id), self._next_id + 1
        self.sessions.add(session)
        return [f"Mcp-Session-Id: {session}"]

    def _knows(self, turn: Turn) -> bool:
        session = turn.seen.header("Mcp-Session-Id")
        if not self.issues_sessions or session in self.sessions:
            return True
        if session is None and "2026-07-28" in turn.seen.body.decode() + str(turn.seen.headers):
            return True
        if self.lost == LOST_404:
            turn.error(404, -32001, "Session not found")
        else:
            turn.error(400, -32000, "Bad Request: No valid session ID provided")
        return False

    # --- what was seen ---------------------------------------------------------------------------

    def calls(self, rpc: str) -> list[Seen]:
        """The requests with this JSON-RPC method."""
        return [seen for seen in self.seen if seen.rpc == rpc]

    @property
    def last(self) -> Seen:
        """The last request."""
        return self.seen[-1]


# --- acts ----------------------------------------------------------------------------------------


def turn_wait(turn: Turn) -> bytes | None:
    """For `stream`: nothing more until the other side leaves."""
    turn.wait_until_gone()
    return None


class Feed:
    """What a stream is to send, as the test decides: `put` bytes, None to end, `BREAK` to break."""

    BREAK = b"\0break"

    def __init__(self) -> None:
        self._items: queue.Queue[bytes | None] = queue.Queue()

    def put(self, item: bytes | None) -> None:
        """The next piece."""
        self._items.put(item)

    def __call__(self, turn: Turn) -> bytes | None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not turn.backend.is_stopping:
            with contextlib.suppress(queue.Empty):
                item = self._items.get(timeout=0.02)
                if item == self.BREAK:
                    raise Leave
                return item
            if turn.is_gone():
                turn.wait_until_gone()
        return None


Piece = bytes | Callable[[Turn], "bytes | None"]


def stream(
    *pieces: Piece,
    framing: str = "chunked",
    content_type: str = "text/event-stream",
    length: int = 0,
    status: int = 200,
    headers: tuple[str, ...] = (),
) -> Act:
    """A stream: `chunked`, `close` (its end is the connection's) or `length`.

    A piece that is callable is asked again and again until it returns None.
    """

    def act(turn: Turn) -> None:
        frame = {
            "chunked": "Transfer-Encoding: chunked",
            "close": "Connection: close",
            "length": f"Content-Length: {length}",
        }[framing]
        lines = [f"HTTP/1.1 {status} OK", f"Content-Type: {content_type}", frame, *headers]
        turn.send("\r\n".join(lines).encode() + b"\r\n\r\n")
        for piece in pieces:
            _send_piece(turn, piece, framing)
        if framing == "chunked":
            turn.send(b"0\r\n\r\n")
        if framing == "close":
            raise Leave

    return act


def _send_piece(turn: Turn, piece: Piece, framing: str) -> None:
    while True:
        data = piece if isinstance(piece, bytes) else piece(turn)
        if data is None:
            return
        turn.send(b"%x\r\n%s\r\n" % (len(data), data) if framing == "chunked" else data)
        if isinstance(piece, bytes):
            return


def reply(status: int, body: bytes = b"", *headers: str, length: int = -1) -> Act:
    """A complete answer."""
    return lambda turn: turn.reply(status, body, *headers, length=length)


def raw(data: bytes) -> Act:
    """Any bytes, then the end of the connection."""

    def act(turn: Turn) -> None:
        turn.send(data)
        raise Leave

    return act


def reset(turn: Turn) -> None:
    """Breaks the connection before a byte was sent."""
    turn.reset()


def silent(turn: Turn) -> None:
    """Never answers."""
    turn.wait_until_gone()


def _read(reader: Any, number: int) -> Seen:
    first = reader.readline()
    if not first:
        raise Leave
    method, target, _ = first.decode("latin-1").split()
    headers: list[tuple[str, str]] = []
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    given = {name.lower(): value for name, value in headers}
    assert "transfer-encoding" not in given, "no request is sent in chunks"
    body = reader.read(int(given.get("content-length", 0)))
    return Seen(method, target, headers, body, number)


if __name__ == "__main__":
    backend = HttpBackend(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(backend.url, flush=True)
    threading.Event().wait()
