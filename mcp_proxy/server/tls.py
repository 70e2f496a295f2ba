"""TLS on the connections of our worker class: how it begins, and what is said where it fails."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from gunicorn.sock import ssl_context

from mcp_proxy.edge.logs import OnceAMinute


def with_tls(sock: socket.socket, cfg: Any) -> ssl.SSLSocket:
    """Takes over a client's socket as gunicorn is set to; the handshake is still to be done.

    The certificate is read anew, so a renewed one is used at once. Raises what gunicorn's hook
    `ssl_context` raises, OSError where a file cannot be read or the client has left.
    """
    context: ssl.SSLContext = ssl_context(cfg)
    return context.wrap_socket(
        sock,
        server_side=True,
        suppress_ragged_eofs=cfg.suppress_ragged_eofs,
        do_handshake_on_connect=False,
    )


class HandshakeFailures:
    """Logs which clients' TLS fails: the first at once, then how many, once a minute.

    For one thread, which calls `report` now and then.
    """

    def __init__(self, log: Any) -> None:
        self._log = log
        self._line = OnceAMinute()
        self._count = 0
        self._latest = ""

    def add(self, client: Any, reason: object) -> None:
        """One more; `client` is its address as sockets tell it, empty for a unix socket."""
        self._count += 1
        self._latest = f"TLS with {client[0] if client else 'a unix socket'} failed: {reason}"
        self.report()

    def report(self) -> None:
        """Says what has not been said, if its time has come."""
        if self._count and self._line.is_due():
            others = f" (the last of {self._count})" if self._count > 1 else ""
            self._log.warning("%s%s", self._latest, others)
            self._count = 0
