"""A TCP forwarder that can lose an answer: the request is carried out, then the connection ends."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver

from tests.support.startable import ServerThread

_CHUNK = 65536


class LossyProxy(ServerThread):
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`; `lose_answer_to` arms the next loss."""

    def __init__(self, target: int) -> None:
        super().__init__(_Handler)
        self.target = target
        self.lost = 0
        self._word: bytes | None = None

    def lose_answer_to(self, word: bytes) -> None:
        """The answer to the next request that contains `word` is lost, with its connection."""
        self._word = word

    def is_to_be_lost(self, request: bytes) -> bool:
        """Whether the answer to `request` is the one to be lost."""
        if self._word is None or self._word not in request:
            return False
        self._word = None
        self.lost += 1
        return True


class _Handler(socketserver.BaseRequestHandler):
    server: LossyProxy

    def handle(self) -> None:
        """Carries bytes both ways until either side ends or an answer is lost."""
        address = ("127.0.0.1", self.server.target)
        with socket.create_connection(address) as upstream, contextlib.suppress(OSError):
            self._carry(self.request, upstream)

    def _carry(self, client: socket.socket, upstream: socket.socket) -> None:
        is_losing = False
        while True:
            readable, _, _ = select.select([client, upstream], [], [])
            if client in readable:
                request = client.recv(_CHUNK)
                if not request:
                    return
                is_losing = is_losing or self.server.is_to_be_lost(request)
                upstream.sendall(request)
            if upstream in readable:
                answer = upstream.recv(_CHUNK)
                if not answer or is_losing:
                    return
                client.sendall(answer)
