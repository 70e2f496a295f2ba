"""The transparent proxy in its two ways, its session store in the test's hands, a plain client."""

from __future__ import annotations

import contextlib
import http.client
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

from mcp_proxy import Application, RedisStorage, SessionManager, create_app
from mcp_proxy.config import from_values
from mcp_proxy.storage.session import Session, new_session
from tests.support.front import Answer, Json, McpClient, WsgiFront
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess

BOTH = ["wsgi", "gunicorn"]

_PATIENCE = 30.0


class PlainFront:
    """HTTP without headers of its own, redirects or patience for half a body."""

    def __init__(self, base: str) -> None:
        self._host = urlsplit(base).netloc
        self._closers: list[Callable[[], None]] = []

    def close(self) -> None:
        """Leaves all answers that a test did not read to their end."""
        while self._closers:
            self._closers.pop()()

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        connection = http.client.HTTPConnection(self._host, timeout=_PATIENCE)
        self._closers.append(connection.close)
        connection.putrequest(method, path, skip_accept_encoding=True, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        sock = connection.sock

        def close() -> None:
            response.close()
            connection.close()
            if sock is not None:
                sock.close()

        self._closers.append(close)
        found = http.client.HTTPMessage()
        for name, value in response.getheaders():
            found[name] = value
        return Answer(response.status, found, _pieces(response, method), close)


def _pieces(response: http.client.HTTPResponse, method: str) -> Iterator[bytes]:
    length = response.getheader("Content-Length")
    expected = int(length) if length and method != "HEAD" and response.status != 204 else None
    received = 0
    while piece := response.read1():
        received += len(piece)
        yield piece
    if expected is not None and received < expected:
        raise http.client.IncompleteRead(b"", expected - received)


#: All that there are; each test closes the answers of those that it has made.
FRONTS: WeakSet[LocalFront] = WeakSet()


class LocalFront(WsgiFront):
    """The application, its answers closed in the end."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        FRONTS.add(self)
        self._answers: list[Answer] = []

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        self._answers.append(super().request(method, path, headers, body))
        return self._answers[-1]

    def close(self) -> None:
        """Leaves all answers that a test did not read to their end."""
        while self._answers:
            self._answers.pop().close()


class Transparent:
    """A running proxy, and the manager of the sessions that it shares with the test."""

    def __init__(self, way: str, front: PlainFront | LocalFront, manager: SessionManager) -> None:
        self.way = way
        self.front = front
        self.manager = manager
        self.app: Application | None = None
        self.process: ProxyProcess | None = None

    def client(self, path: str = "/mcp") -> McpClient:
        """A client without a session."""
        return McpClient(self.front, path)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Any request, with no headers but these."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.front.request(method, path, given, body)

    def leave(self) -> None:
        """Ends the answers that were not read."""
        self.front.close()

    def record(self, **metadata: str) -> Session:
        """A session that the test writes into the store."""
        session = new_session(f"s-{uuid.uuid4().hex}", "mcp", **metadata)
        self.manager.create(session)
        return session

    def in_record(self, **metadata: str) -> McpClient:
        """A client in such a session."""
        client = self.client()
        client.session = self.record(**metadata).id
        return client


@contextlib.contextmanager
def transparent(
    way: str, targets: str | Sequence[str], redis_url: str, **settings: Any
) -> Iterator[Transparent]:
    """A proxy in front of `targets`; in gunicorn its store is Redis, here it is memory."""
    urls = [targets] if isinstance(targets, str) else list(targets)
    if way == "wsgi":
        app = create_app(from_values({"target_url": urls, **settings}))
        front = LocalFront(app)
        try:
            proxy = Transparent(way, front, app.proxies["default"].manager)
            proxy.app = app
            yield proxy
        finally:
            front.close()
            app.close()
        return
    prefix = f"test-{uuid.uuid4().hex}:"
    options = {"target_url": urls, "redis_url": redis_url, "redis_prefix": prefix, **settings}
    storage = RedisStorage(redis_url, prefix=f"{prefix}default:")
    with contextlib.closing(storage), ProxyProcess(options=as_options(options)) as process:
        front = PlainFront(process.base)
        proxy = Transparent(way, front, SessionManager(storage))
        proxy.process = process
        try:
            yield proxy
        finally:
            front.close()
