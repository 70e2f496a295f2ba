"""Standing streams of stdio servers whose clients leave, in a real gunicorn."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.proxies import GunicornProxy, running
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def proxy() -> Iterator[GunicornProxy]:
    """One with keepalives that are too rare to help."""
    with running("gunicorn", keepalive_interval=60) as proxy:
        assert isinstance(proxy, GunicornProxy)
        yield proxy


def opened(proxy: GunicornProxy, path: str, session: str | None) -> socket.socket:
    """A connection with a stream that has begun."""
    sock = socket.create_connection(("127.0.0.1", proxy.process.port), timeout=20)
    named = f"Mcp-Session-Id: {session}\r\n" if session else ""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{named}\r\n"
    sock.sendall(head.encode())
    received = b""
    while b"\r\n\r\n" not in received or not received.endswith(b"\n\n\r\n"):
        piece = sock.recv(1000)
        assert piece
        received += piece
    assert received.startswith(b"HTTP/1.1 200 ")
    return sock


@pytest.mark.parametrize("path", ["/sse", "/mcp"])
@pytest.mark.parametrize("is_half", [True, False])
def test_who_leaves_is_noticed_long_before_the_next_keepalive(
    proxy: GunicornProxy, path: str, is_half: bool
) -> None:
    session = proxy.client().open().session if path == "/mcp" else None
    with closing(opened(proxy, path, session)) as sock:
        lines = proxy.process.log().count(f"GET {path} ")
        since = time.monotonic()
        if is_half:
            sock.shutdown(socket.SHUT_WR)
            rest = b""
            while piece := sock.recv(1000):
                rest += piece
                if rest.endswith(b"0\r\n\r\n"):  # a proper end
                    break
            assert piece
        else:
            sock.close()
        eventually(lambda: proxy.process.log().count(f"GET {path} ") > lines)
        assert time.monotonic() - since < 5
