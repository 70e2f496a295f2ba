"""Two network namespaces with a wire between them, whose one end can fall silent.

Made with `ip` of iproute2, by root; a test that needs them fails where they cannot be made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.startable import Startable

_CLONE_NEWNET = 0x40000000

_SENTENCE = (
    "network namespaces are needed here, and could not be made: run this as root (CAP_SYS_ADMIN "
    "and CAP_NET_ADMIN) on Linux with iproute2 (`apt-get install iproute2`)"
)


class Network(Startable):
    """A host `server` at 10.99.0.1 and a host `client` at 10.99.0.2, seen by nobody else."""

    SERVER = "10.99.0.1"
    CLIENT = "10.99.0.2"

    def __init__(self) -> None:
        name = secrets.token_hex(3)
        self.server, self.client = f"test-s-{name}", f"test-c-{name}"

    def start(self) -> None:
        try:
            for space in (self.server, self.client):
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            ends = ("eth0", "netns", self.server, "type", "veth", "peer", "eth0", "netns")
            _ip("link", "add", *ends, self.client)
            for space, address in ((self.server, self.SERVER), (self.client, self.CLIENT)):
                _ip("-n", space, "address", "add", f"{address}/30", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.fail(f"{_SENTENCE}: {said.strip()}")

    def close(self) -> None:
        for space in (self.server, self.client):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "delete", space)

    def silence_client(self) -> None:
        """From now on nothing that the client sends arrives, not even an acknowledgement."""
        _ip("-n", self.client, "route", "add", "blackhole", f"{self.SERVER}/32")

    @contextlib.contextmanager
    def on(self, space: str) -> Iterator[None]:
        """This thread, and what it starts, is on one of the two hosts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns", space))
            yield
        finally:
            _setns(before)
            os.close(before)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _setns(descriptor)
    finally:
        os.close(descriptor)


def _setns(descriptor: int) -> None:
    """os.setns came with Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
