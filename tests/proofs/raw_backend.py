"""An HTTP server of the standard library that answers as an MCP server would, and no more.

Four ways to POST: initialize issues a session id, `tools/call` is answered with a line, `large`
with `BLOCK` times the number of blocks asked for, with its length or in chunks, and
`subscriptions/listen` with a stream that says nothing until its client or the server ends it, as
does a GET. `python -m tests.proofs.raw_backend` serves until standard input ends.
"""

from __future__ import annotations

import json
import select
import sys
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.startable import ServerThread

Json = dict[str, Any]

#: What a large response consists of.
BLOCK = bytes(range(256)) * 256

_VERSION = "2025-06-18"


class RawBackend(ServerThread):
    """The server, in threads of this process."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.is_over = threading.Event()
        self.sessions = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self.is_over.set()
        super().close()

    @property
    def url(self) -> str:
        """The MCP endpoint."""
        return f"http://127.0.0.1:{self.port}/mcp"

    def new_session(self) -> str:
        """An id that this server has not issued before."""
        with self._lock:
            self.sessions += 1
            return f"session-{self.port}-{self.sessions}"


class _Handler(BaseHTTPRequestHandler):
    server: RawBackend
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if message["method"] == "initialize":
            result: Json = {"protocolVersion": _VERSION, "capabilities": {}, "serverInfo": {}}
            self._answer(message, result, {"Mcp-Session-Id": self.server.new_session()})
        elif message["method"] == "large":
            self._answer_large(**message["params"])
        elif message["method"] == "subscriptions/listen":
            self._stand()
        elif "id" in message:
            self._answer(message, {"content": []}, {})
        else:
            self._begin(202, {"Content-Length": "0"})

    def do_GET(self) -> None:
        self._stand()

    def _stand(self) -> None:
        """A stream that says nothing until the other side leaves."""
        self._begin(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP | select.POLLHUP)
        while not self.server.is_over.is_set() and not poll.poll(200):
            pass
        self.close_connection = True

    def do_DELETE(self) -> None:
        self._begin(204, {})

    def _answer(self, message: Json, result: Json, headers: dict[str, str]) -> None:
        body = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode()
        about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._begin(200, {**about, **headers})
        self.wfile.write(body)

    def _answer_large(self, blocks: int, chunked: bool) -> None:
        length = {"Content-Length": str(blocks * len(BLOCK))}
        framing = {"Transfer-Encoding": "chunked"} if chunked else length
        self._begin(200, {"Content-Type": "application/json", **framing})
        piece = b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK
        for _ in range(blocks):
            self.wfile.write(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    with RawBackend() as backend:
        print(backend.url, flush=True)
        sys.stdin.read()
