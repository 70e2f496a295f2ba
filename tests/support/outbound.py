"""An outbound HTTP proxy: it forwards absolute-form requests and tunnels what CONNECT asks for.

It alone knows the names of the servers behind it.
"""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import socketserver
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tests.support.startable import ServerThread

_CHUNK = 65536
_PATIENCE = 30.0

#: What a proxy does to a CONNECT instead.
Act = Callable[[socket.socket], None]


class OutboundProxy(ServerThread):
    """`names` are the hosts that it knows, each a port of 127.0.0.1; any other host is 502.

    `asked` has the request lines that came. With `password` (`user:secret`) others are 407.
    """

    def __init__(self, names: dict[str, int], password: str = "") -> None:
        super().__init__(_Handler)
        self.names = names
        self.password = password
        self.asked: list[str] = []
        self.on_connect: Act | None = None
        self.is_over = False
        self._open: set[object] = set()

    @property
    def url(self) -> str:
        """Its URL, with the password."""
        user = f"{self.password}@" if self.password else ""
        return f"http://{user}127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """How many connections of clients are open: one that is not counted has been closed."""
        return len(self._open)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._open.discard(request)

    def close(self) -> None:
        self.is_over = True
        super().close()


class _Handler(socketserver.StreamRequestHandler):
    server: OutboundProxy

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self._serve():
                pass

    def _serve(self) -> bool:
        """Serves one request; whether another one may follow."""
        line = self.rfile.readline().decode("latin-1").strip()
        if not line:
            return False
        fields: list[str] = []
        while (field := self.rfile.readline().decode("latin-1").strip()) != "":
            fields.append(field)
        self.server.asked.append(line)
        given = {
            name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        method, target, _ = line.split()
        if method == "CONNECT" and self.server.on_connect is not None:
            self.server.on_connect(self.connection)
            return False
        wanted = base64.b64encode(self.server.password.encode()).decode()
        if wanted and given.get("proxy-authorization") != f"Basic {wanted}":
            return self._refuse("407 Proxy Authentication Required")
        there = urlsplit(f"//{target}" if method == "CONNECT" else target)
        port = self.server.names.get(there.hostname or "")
        try:
            upstream = socket.create_connection(("127.0.0.1", port or 0))
        except OSError:
            return self._refuse("502 Bad Gateway")
        with upstream:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                return self._carry(upstream, is_tunnel=True)
            path = f"{there.path or '/'}?{there.query}" if there.query else there.path or "/"
            kept = [f for f in fields if not f.lower().startswith("proxy-")]
            head = "\r\n".join([f"{method} {path} HTTP/1.1", *kept, "", ""]).encode("latin-1")
            upstream.sendall(head + self.rfile.read(int(given.get("content-length", 0))))
            return self._carry(upstream, is_tunnel=False)

    def _refuse(self, status: str) -> bool:
        self.wfile.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        return False

    def _carry(self, upstream: socket.socket, is_tunnel: bool) -> bool:
        """Carries bytes until either side ends, or until the next request comes."""
        client: Any = self.connection
        while not self.server.is_over:
            readable, _, _ = select.select([client, upstream], [], [], 0.1)
            if client in readable:
                if not is_tunnel:
                    return bool(client.recv(1, socket.MSG_PEEK))
                data = client.recv(_CHUNK)
                if not data:
                    return False
                upstream.sendall(data)
            if upstream in readable:
                data = upstream.recv(_CHUNK)
                if not data:
                    return False
                client.sendall(data)
        return False


def silent(client: socket.socket) -> None:
    """Never answers."""
    client.settimeout(_PATIENCE)
    client.recv(1)


def dripping(client: socket.socket) -> None:
    """Answers a byte now and then, for ever."""
    client.sendall(b"HTTP/1.1 200 OK\r\nX-Drops: ")
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        client.sendall(b"x")
        time.sleep(0.1)


def refusing(client: socket.socket) -> None:
    """Allows nobody."""
    client.sendall(b"HTTP/1.1 403 Not allowed here\r\nContent-Length: 0\r\n\r\n")


def breaking(client: socket.socket) -> None:
    """Breaks off."""
