"""A TCP forwarder that can forget its connections, as firewalls forget idle ones."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver

from tests.support.startable import ServerThread

_CHUNK = 65536


class Firewall(ServerThread):
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`.

    From `forget` on what the connections of that moment carry is lost, in both directions; new ones
    are served. `lost` has what they sent meanwhile.
    """

    def __init__(self, target: int) -> None:
        super().__init__(_Handler)
        self.target = target
        self.lost: list[bytes] = []
        self._generation = 0

    @property
    def generation(self) -> int:
        """How often connections were forgotten."""
        return self._generation

    def forget(self) -> None:
        """Forgets the connections that there are."""
        self._generation += 1


class _Handler(socketserver.BaseRequestHandler):
    server: Firewall

    def handle(self) -> None:
        """Carries bytes both ways until either side ends, or to nowhere."""
        generation = self.server.generation
        address = ("127.0.0.1", self.server.target)
        with socket.create_connection(address) as upstream, contextlib.suppress(OSError):
            self._carry(self.request, upstream, generation)

    def _carry(self, client: socket.socket, upstream: socket.socket, generation: int) -> None:
        others = {client: upstream, upstream: client}
        while True:
            for readable in select.select(list(others), [], [])[0]:
                data = readable.recv(_CHUNK)
                if not data:
                    return
                if generation == self.server.generation:
                    others[readable].sendall(data)
                elif readable is client:
                    self.server.lost.append(data)
