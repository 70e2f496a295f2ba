"""This process as a replica, with an id that no other replica ever has."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import threading
from functools import cache
from pathlib import Path

# A replica's id; it matches only where /proc told the process space and the start.
_PROCESS = re.compile(
    r".*-(?P<space>[0-9a-f]{8})-(?P<pid>[1-9][0-9]{0,9})-(?P<start>[1-9][0-9]{0,19})-[0-9a-f]{8}"
)

# Bytes of /proc/<pid>/stat, at the most: some fifty numbers, and a name of 64 bytes.
_MAX_STAT = 4096


class Replica:
    """The replica of this process: its id is made at its first use, and anew after a fork.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the fields below
        self._pid: int | None = None
        self._id = ""

    def __repr__(self) -> str:
        return f"<Replica {self._id or 'not started'}>"

    @property
    def nonce(self) -> str:
        """The eight hex digits at the end of the id."""
        return self.id[-8:]

    @property
    def id(self) -> str:
        """Host, process space, process, its start and a nonce: unique among all replicas ever."""
        if self._pid == os.getpid():
            return self._id
        with self._lock:
            if self._pid != os.getpid():
                pid = os.getpid()
                host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
                start = _start_of(pid) or "0"
                self._id = f"{host}-{_process_space()}-{pid}-{start}-{secrets.token_hex(4)}"
                self._pid = pid
            return self._id


def has_ended(replica_id: str) -> bool:
    """Whether /proc shows that a replica's process, on this machine, has exited.

    False where that is unknown, for example for another machine or another container.
    """
    parts = _PROCESS.fullmatch(replica_id)
    if parts is None or parts["space"] != _process_space():
        return False
    pid = int(parts["pid"])
    start = _start_of(pid)
    if start is None and _is_hidden(pid):
        return False
    return start != parts["start"]


def process_of(replica_id: str) -> tuple[int, int] | None:
    """The process of a replica, and its start; None where that is not known, or on another machine.

    No other process of this machine ever has both.
    """
    parts = _PROCESS.fullmatch(replica_id)
    if parts is None or parts["space"] != _process_space():
        return None
    return int(parts["pid"]), int(parts["start"])


def own_process() -> tuple[int, int]:
    """This process, and its start; that is 0 where it is not known."""
    pid = os.getpid()
    return pid, int(_start_of(pid) or 0)


@cache
def _process_space() -> str:
    """A digest of this machine's boot and of the PID namespace; "" where they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> str | None:
    """The start of a process, in ticks since boot; None where it does not run.

    Asked for each relayed call, where a file object would take three times as long.
    """
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(file, _MAX_STAT)
        finally:
            os.close(file)
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()  # from the third field on: state, ..., start time
    return None if fields[0] in b"ZX" else fields[19].decode()


def _is_hidden(pid: int) -> bool:
    """Whether a process runs although /proc does not show it, as under hidepid or ProtectProc."""
    if os.access(f"/proc/{pid}/stat", os.R_OK):  # a zombie
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
