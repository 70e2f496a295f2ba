"""Which test opened a connection to Redis that nobody closed."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from tests.support.redis_server import ADDRESSES, FORMER
from tests.support.tls import CARRIED
from tests.support.waiting import eventually

_DESCRIPTORS = Path("/proc/self/fd")

_PATIENCE = 5.0


class Openers:
    """The tests of a module, by the connections to Redis that they opened.

    What fixtures of the module opened lasts from test to test, so that all are judged in the end.
    """

    def __init__(self) -> None:
        ADDRESSES.difference_update(FORMER)
        self._before = _connections()
        self._tests: dict[str, str] = {}

    def note(self, test: str) -> None:
        """Whatever is open now and was not known yet is from this test."""
        for connection in _connections() - self._before:
            self._tests.setdefault(connection, test)

    def judge(self) -> None:
        """Fails when a connection stays open, and says so once."""
        with contextlib.suppress(pytest.fail.Exception):
            eventually(lambda: not self._left, _PATIENCE)
        if left := self._left:
            tests = {self._tests.pop(connection) for connection in left}
            self._before |= left
            pytest.fail("connections to Redis stay open, begun in\n" + "\n".join(sorted(tests)))

    @property
    def _left(self) -> set[str]:
        return _connections() & self._tests.keys()


def _connections() -> set[str]:
    """Those of this process to the tests' servers, by the names that the kernel gives to sockets.

    One that the server has ended counts as well, as long as its client keeps it.
    """
    found = set()
    for descriptor in os.listdir(_DESCRIPTORS) if ADDRESSES else ():
        with contextlib.suppress(OSError):  # it is closed while we look
            name = os.readlink(_DESCRIPTORS / descriptor)
            if name.startswith("socket:") and _peer(int(descriptor)) in ADDRESSES:
                found.add(name)
    return found - CARRIED


def _peer(descriptor: int) -> int | str:
    """The other side's port, or the path of its unix socket."""
    with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as copy:
        address = copy.getpeername()
        return address if isinstance(address, str) else int(address[1])
