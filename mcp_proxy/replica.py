"""This process as a replica: its id, and the supervisor of its children."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import threading
from pathlib import Path

from mcp_proxy.processes.supervisor import Supervisor

# The end of a replica's id, where everything about its process is known.
_PROCESS = re.compile(
    r".*-(?P<space>[0-9a-f]{8})-(?P<pid>[1-9][0-9]{0,9})-(?P<start>[1-9][0-9]{0,19})-[0-9a-f]{8}"
)


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
        """Host, process, its start and a nonce: unique among all replicas that ever were."""
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
            start = _start_of(self._pid) or "0"
            self._id = f"{host}-{_process_space()}-{self._pid}-{start}-{secrets.token_hex(4)}"
            self._supervisor = None


def has_ended(replica_id: str) -> bool:
    """Whether it is certain that a replica's process has ended: one on this machine, as /proc says.

    False where nothing is known, for example of another machine or another container.
    """
    parts = _PROCESS.fullmatch(replica_id)
    if parts is None or parts["space"] != _process_space():
        return False
    return _start_of(int(parts["pid"])) != parts["start"]


def _process_space() -> str:
    """What tells process ids of this machine and container from those of others; "" is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot; None where there is none that still runs."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # from the third field on: state, ..., start time
    return None if fields[0] in "ZX" else fields[19]
