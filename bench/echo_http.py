"""An MCP server over HTTP that does next to nothing: what is behind the transparent proxy.

    python echo_http.py PORT [--modern]

It says what `echo_server.py` says, with sessions; any id is one. A legacy one refuses requests of
2026-07-28, and a modern one all others. GET opens a stream that stays silent. One thread, asyncio,
standard library only: this must not be what is measured.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
from typing import Any

from echo_server import FILLER, answer_to

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MODERN = re.compile(rb"\r\nmcp-protocol-version: *2026-07-28", re.IGNORECASE)
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_PIECE = 64 * 1024
_OPENING, _CLOSING = (
    '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"',
    '"}]}}',
)

_is_modern = "--modern" in sys.argv


class Connection(asyncio.Protocol):
    """One client; its requests are answered one after the other."""

    def __init__(self) -> None:
        self._data = b""
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._large: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        if self._large is not None:
            self._large.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._data, 0, end)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self._data) < whole:
                return
            head, body = self._data[:end], self._data[end + 4 : whole]
            self._data = self._data[whole:]
            self._serve(head, body)

    def _serve(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET "):
            self._transport.write(_STREAM)
        elif head.startswith(b"DELETE "):
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif bool(_MODERN.search(head)) != _is_modern:
            self._reply(400, refusal(body))
        elif b'"bytes":' in body:
            self._large = asyncio.create_task(self._write_large(json.loads(body)))
        else:
            self._reply(200, answer_to(body, _is_modern).encode(), b'"initialize"' in body)

    def _reply(self, status: int, body: bytes, is_new: bool = False) -> None:
        if not body:
            self._transport.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
            return
        session = f"Mcp-Session-Id: {secrets.token_hex(16)}\r\n" if is_new else ""
        head = (
            f"HTTP/1.1 {status} .\r\nContent-Type: application/json\r\n{session}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)

    async def _write_large(self, message: dict[str, Any]) -> None:
        size = message["params"]["arguments"]["bytes"]
        opening = (_OPENING % json.dumps(message["id"])).encode()
        length = len(opening) + size + len(_CLOSING)
        head = f"HTTP/1.1 200 .\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        self._transport.write(head.encode() + b"\r\n" + opening)
        piece = FILLER.encode() * _PIECE
        while size:
            await self._may_write.wait()
            self._transport.write(piece[:size])
            size -= min(size, _PIECE)
        self._transport.write(_CLOSING.encode())


def refusal(body: bytes) -> bytes:
    """What a server says to a client of the other era."""
    error: dict[str, Any] = {"code": -32000, "message": "Bad Request: Server not initialized"}
    if _is_modern:
        data = {"supported": ["2026-07-28"]}
        error = {"code": -32022, "message": "2026-07-28 only", "data": data}
    return json.dumps({"jsonrpc": "2.0", "id": json.loads(body).get("id"), "error": error}).encode()


async def main() -> None:
    """Serves until it is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
