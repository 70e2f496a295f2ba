"""Which connections a process holds, read from /proc."""

from __future__ import annotations

import contextlib
import os
import re

_SOCKET = re.compile(r"socket:\[(\d+)\]")


def peers_of(pid: int, port: int) -> frozenset[int]:
    """The ports on the other side of the process's connections to its own `port` (IPv4)."""
    inodes = _inodes(pid)
    found: set[int] = set()
    with open(f"/proc/{pid}/net/tcp", encoding="ascii") as table:
        next(table)
        for line in table:
            _, local, remote, _, *rest = line.split()
            if int(local.rpartition(":")[2], 16) == port and rest[5] in inodes:
                found.add(int(remote.rpartition(":")[2], 16))
    return frozenset(found)


def _inodes(pid: int) -> set[str]:
    found: set[str] = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if match := _SOCKET.fullmatch(os.readlink(entry.path)):
                found.add(match[1])
    return found
