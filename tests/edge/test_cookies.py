"""Several Cookie headers of a client reach an HTTP server as one list, whoever serves the proxy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

from mcp_proxy import TransparentProxy
from tests.edge.test_request_targets import by_the_command, under_waitress, under_wsgiref
from tests.servers.http_backend import HttpBackend, reply
from tests.support.proxy_process import COMMAND, ProxyProcess

_PATIENCE = 20.0


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        for path in ("/healthz", "/x"):
            backend.on("GET", path, reply(200))
        yield backend


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, type: str, message: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def under_werkzeug(url: str) -> Iterator[int]:
    with TransparentProxy(url) as app:
        made = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made.server_port
        finally:
            made.shutdown()
            thread.join(_PATIENCE)
            made.server_close()


@contextmanager
def under_gunicorns_own(url: str) -> Iterator[int]:
    way = ("-m", "gunicorn", "-k", "sync", f'mcp_proxy:TransparentProxy("{url}")')
    with ProxyProcess(way=way) as process:
        yield process.port


@contextmanager
def under_gevent(url: str) -> Iterator[int]:
    options = ["--target-url", url, "--worker-class", "gevent"]
    with ProxyProcess(way=COMMAND, options=options) as process:
        yield process.port


SERVERS = [by_the_command, under_gunicorns_own, under_gevent]
SERVERS += [under_werkzeug, under_waitress, under_wsgiref]


@pytest.mark.parametrize("served", SERVERS)
def test_several_cookie_headers_are_one_list(
    backend: HttpBackend, served: Callable[[str], AbstractContextManager[int]]
) -> None:
    with served(backend.url) as port:
        head = b"GET /x HTTP/1.1\r\nHost: localhost\r\nCookie: a=1,2\r\nCookie: b=3; c=4\r\n"
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as sock:
            sock.sendall(head + b"Cookie: d=5\r\nConnection: close\r\n\r\n")
            sock.settimeout(_PATIENCE)
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.split()[1] == b"200"
    assert backend.last.header("Cookie") == "a=1,2; b=3; c=4; d=5"


@pytest.mark.parametrize("served", [by_the_command, under_gevent])
def test_our_workers_know_which_commas_are_the_clients(
    backend: HttpBackend, served: Callable[[str], AbstractContextManager[int]]
) -> None:
    with served(backend.url) as port:
        head = b"GET /x HTTP/1.1\r\nHost: localhost\r\nCookie: a=1,b=2\r\nCookie: c=3\r\n"
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as sock:
            sock.sendall(head + b"Connection: close\r\n\r\n")
            sock.settimeout(_PATIENCE)
            assert sock.recv(100)
    assert backend.last.header("Cookie") == "a=1,b=2; c=3"
