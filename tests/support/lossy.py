"""A TCP forwarder that can lose an answer: the request is carried out, then the connection ends."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from types import TracebackType

_POLL = 0.01
_CHUNK = 65536


class LossyProxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`; `lose_answer_to` arms the next loss."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.lost = 0
        self._word: bytes | None = None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL,))

    @property
    def port(self) -> int:
        """The port that this listens on."""
        return int(self._server.server_address[1])

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

    def __enter__(self) -> LossyProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    proxy: LossyProxy


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        """Carries bytes both ways until either side ends or an answer is lost."""
        address = ("127.0.0.1", self.server.proxy.target)
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
                is_losing = is_losing or self.server.proxy.is_to_be_lost(request)
                upstream.sendall(request)
            if upstream in readable:
                answer = upstream.recv(_CHUNK)
                if not answer or is_losing:
                    return
                client.sendall(answer)
