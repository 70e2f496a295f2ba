"""What a request may ask for: a path, or a URL. Anything else never becomes part of another URL."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import waitress
from werkzeug.test import create_environ, run_wsgi_app

from mcp_proxy import StreamableProxy, TransparentProxy, create_app
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.config import from_values
from mcp_proxy.edge.request import path_as_sent
from mcp_proxy.errors import InvalidRequest
from mcp_proxy.wire.urls import Address
from tests.servers.http_backend import HttpBackend, reply
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.proxy_process import COMMAND, ProxyProcess

_PATIENCE = 20.0
_GUNICORN = ("-m", "gunicorn", "-c", "python:mcp_proxy.gunicorn_conf")

#: Each is completed by the address of a server that must hear nothing.
STRANGE = ["@{}/x", "@{}/x?x=://", "@{}", "x@{}/http://x", ":@{}/x", ".{}/x", "{}"]


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        backend.on("GET", "/healthz", reply(200))
        yield backend


@pytest.fixture
def other() -> Iterator[HttpBackend]:
    with HttpBackend() as other:
        yield other


# --- raw environs --------------------------------------------------------------------------------


def answer_to(app: Any, **environ: str) -> tuple[str, bytes]:
    given = create_environ("/", method="POST", data=b"{}", environ_overrides=environ)
    pieces, status, _ = run_wsgi_app(app, given)
    return status, b"".join(pieces)


@contextmanager
def transparent_proxy(url: str) -> Iterator[Any]:
    with TransparentProxy(url) as app:
        yield app


@contextmanager
def application(url: str) -> Iterator[Any]:
    with closing(create_app(from_values({"target_url": [url]}))) as app:
        yield app


@contextmanager
def streamable(url: str) -> Iterator[Any]:
    with StreamableProxy(SCRIPTED) as app:
        yield app


@pytest.mark.parametrize("made", [transparent_proxy, application, streamable])
@pytest.mark.parametrize("keys", [("PATH_INFO",), ("RAW_URI",), ("REQUEST_URI",), ("SCRIPT_NAME",)])
def test_a_strange_target_is_refused_whoever_tells_of_it(
    backend: HttpBackend,
    other: HttpBackend,
    made: Callable[[str], AbstractContextManager[Any]],
    keys: tuple[str, ...],
) -> None:
    with made(backend.url) as app:
        for target in STRANGE:
            named = target.format(f"127.0.0.1:{other.port}")
            status, body = answer_to(app, **dict.fromkeys(keys, named))
            assert status.startswith("400"), target
            assert json.loads(body)["error"]["code"] == -32600
    assert (backend.seen, other.seen) == ([], [])


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        ("/a%2Fb?x=://", "/a%2Fb"),
        ("//host/x", "//host/x"),
        ("http://host:8080/a%2Fb?x", "/a%2Fb"),
        ("HTTPS://user@host/a", "/a"),
        ("http://host", None),
        ("http://host?x=/y", None),
    ],
)
def test_the_path_is_taken_from_both_forms(sent: str, path: str | None) -> None:
    assert path_as_sent({"RAW_URI": sent}) == path


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("http://h:1/mcp", "202"),
        ("HTTP://h/mcp/", "202"),
        ("http://h/x", "404"),
        ("http://h", "404"),
    ],
)
def test_a_url_in_place_of_the_path_is_taken_apart(path: str, status: str) -> None:
    """As under wsgiref."""
    note = b'{"jsonrpc":"2.0","method":"notifications/x"}'
    with closing(create_app(from_values({}))) as app:
        client = McpClient(WsgiFront(app)).open()
        headers = {"Mcp-Session-Id": client.session, "Content-Type": "application/json"}
        environ = create_environ("/", method="POST", data=note, headers=headers)
        _, found, _ = run_wsgi_app(app, {**environ, "PATH_INFO": path, "HTTP_ACCEPT": "*/*"})
        assert found.startswith(status)


@pytest.mark.parametrize("path", ["http:///mcp", "ftp://h/mcp", "http://h#x/mcp", "h/mcp", "*"])
def test_anything_else_in_place_of_the_path_is_refused(path: str) -> None:
    with closing(create_app(from_values({}))) as app:
        assert answer_to(app, PATH_INFO=path)[0].startswith("400")


def test_a_call_to_a_backend_is_never_built_of_anything_else() -> None:
    client = HttpClient(1, 1)
    for target in ("@other:80/x", "x", "", "?x"):
        with pytest.raises(InvalidRequest):
            HttpCall(client, Address("http", "127.0.0.1", 1), "GET", target, {}, b"")
    client.close()


# --- real servers --------------------------------------------------------------------------------


@contextmanager
def under_waitress(url: str) -> Iterator[int]:
    with TransparentProxy(url) as app:
        server = waitress.create_server(app, listen="127.0.0.1:0", threads=4)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield int(server.effective_port)
        finally:
            server.trigger.pull_trigger(server.close)
            server.asyncore.close_all(server._map)
            thread.join(_PATIENCE)


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def under_wsgiref(url: str) -> Iterator[int]:
    with (
        TransparentProxy(url) as app,
        make_server("127.0.0.1", 0, app, handler_class=Quiet) as made,
    ):
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made.server_port
        finally:
            made.shutdown()
            thread.join(_PATIENCE)


@contextmanager
def under_gunicorn(url: str) -> Iterator[int]:
    way = (*_GUNICORN, f'mcp_proxy:TransparentProxy("{url}")')
    with ProxyProcess(way=way) as process:
        yield process.port


@contextmanager
def by_the_command(url: str) -> Iterator[int]:
    with ProxyProcess(way=COMMAND, options=["--target-url", url]) as process:
        yield process.port


def ask(port: int, target: str) -> tuple[int, bytes]:
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as sock:
        sock.sendall(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        sock.settimeout(_PATIENCE)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("served", [under_gunicorn, under_waitress, under_wsgiref, by_the_command])
def test_no_server_lets_a_strange_target_through(
    backend: HttpBackend,
    other: HttpBackend,
    served: Callable[[str], AbstractContextManager[int]],
) -> None:
    with served(backend.url) as port:
        backend.seen.clear()
        for target in STRANGE:
            status, answer = ask(port, target.format(f"127.0.0.1:{other.port}"))
            assert status == 400, (target, answer)
        assert (backend.seen, other.seen) == ([], [])
        assert ask(port, "/x?y=@z")[0] != 400
        ask(port, f"http://127.0.0.1:{other.port}/a%2Fb?c")
        # wsgiref tells nobody how a path was sent.
        assert backend.last.target == ("/a/b?c" if served is under_wsgiref else "/a%2Fb?c")
    assert backend.seen[0].target == "/x?y=@z"
    assert other.seen == []
