"""This process as a replica: its id, and the supervisor of its children."""

from __future__ import annotations

import os
import secrets
import socket
import threading

from mcp_proxy.backends.supervisor import Supervisor


class Replica:
    """Begins at its first use, in the process that uses it; a fork becomes a replica of its own.

    `affinity` is the set of CPUs for children, None for those of this process. Thread-safe.
    """

    def __init__(self) -> None:
        self.affinity: frozenset[int] | None = None
        self._lock = threading.Lock()  # guards what follows
        self._pid: int | None = None
        self._id = ""
        self._supervisor: Supervisor | None = None

    def __repr__(self) -> str:
        return f"<Replica {self._id or 'not started'} {self._supervisor!r}>"

    @property
    def id(self) -> str:
        """Host, process and a nonce: unique among all replicas that ever were."""
        with self._lock:
            self._begin()
            return self._id

    @property
    def supervisor(self) -> Supervisor:
        """The keeper of this replica's children, started when first asked for."""
        with self._lock:
            self._begin()
            if self._supervisor is None:
                self._supervisor = Supervisor(self._id, self.affinity)
                self._supervisor.start()
            return self._supervisor

    def close(self) -> None:
        """Stops every child, in order, and waits for that."""
        with self._lock:
            supervisor = self._supervisor if self._pid == os.getpid() else None
            self._supervisor = None
        if supervisor is not None:
            supervisor.close()

    def _begin(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
            self._id = f"{host}-{self._pid}-{secrets.token_hex(4)}"
            self._supervisor = None
