"""Starts what a test talks to, in one of the two ways, and ends it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from mcp_proxy import (
    Application,
    LocalStorage,
    ProxyConfig,
    ProxyOptions,
    RedisStorage,
    StreamableProxy,
    create_app,
)
from mcp_proxy.config import from_values
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.storage.mailboxes import LEASE, Envelope, LocalMailboxes, Mailboxes
from mcp_proxy.storage.records import Storage
from mcp_proxy.transports.stdio import StdioTransport
from tests.support.front import SCRIPTED, HttpFront, McpClient, RotatingFront, WsgiFront
from tests.support.proxy_process import ProxyProcess

T = TypeVar("T")


class Proxy(Protocol):
    """A proxy in front of the scripted server."""

    def client(self) -> McpClient:
        """A client without a session."""
        ...


class WsgiProxy:
    """An application in this process."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def client(self) -> McpClient:
        return McpClient(WsgiFront(self.app))


class GunicornProxy:
    """The real command in a process of its own."""

    def __init__(self, process: ProxyProcess) -> None:
        self.process = process

    def client(self) -> McpClient:
        return McpClient(HttpFront(self.process.base))


@contextlib.contextmanager
def running(
    way: str, command: Sequence[str] = SCRIPTED, **settings: Any
) -> Iterator[WsgiProxy | GunicornProxy]:
    """A proxy with `settings`, started in `way`: `wsgi` or `gunicorn`."""
    if way == "wsgi":
        app = create_app(configured(command, **settings))
        try:
            yield WsgiProxy(app)
        finally:
            app.close()
    else:
        with ProxyProcess(command, options=as_options(settings)) as process:
            yield GunicornProxy(process)


def configured(command: Sequence[str] = SCRIPTED, **settings: Any) -> ProxyConfig:
    """A checked configuration."""
    return msgspec.structs.replace(from_values(settings), command=tuple(command))


def as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    options: list[str] = []
    for name, value in settings.items():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            options += [f"--{name.replace('_', '-')}", str(item)]
    return options


# --- several replicas in this process -------------------------------------------------------------


class Line(Mailboxes):
    """One replica's way to the mailboxes, which can be cut: then nothing passes, either way."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.lease = mailboxes.lease
        self._mailboxes = mailboxes
        self._is_whole = threading.Event()
        self._is_whole.set()

    def __repr__(self) -> str:
        return f"<Line {self._mailboxes!r} whole={self._is_whole.is_set()}>"

    def cut(self) -> None:
        """From now on the store cannot be reached, and what it was about to answer is lost."""
        self._is_whole.clear()

    def mend(self) -> None:
        """The store can be reached again."""
        self._is_whole.set()

    def renew(self, replica: str) -> bool:
        return self._pass(lambda: self._mailboxes.renew(replica))

    def is_open(self, replica: str) -> bool:
        return self._pass(lambda: self._mailboxes.is_open(replica))

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        return self._pass(lambda: self._mailboxes.post(envelopes))

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        # A wait that is longer than the lease would make what comes late in it look stale.
        return self._pass(lambda: self._mailboxes.collect(replica, min(timeout, self.lease / 3)))

    def remove(self, replica: str) -> list[bytes]:
        return self._pass(lambda: self._mailboxes.remove(replica))

    def uptime(self) -> float:
        return self._pass(self._mailboxes.uptime)

    def close(self) -> None:
        self._mailboxes.close()

    def _pass(self, act: Callable[[], T]) -> T:
        self._require_whole()
        result = act()
        self._require_whole()
        return result

    def _require_whole(self) -> None:
        if not self._is_whole.is_set():
            raise StorageUnavailable


class Replicated:
    """A transport at one replica, its way in and its line to the others."""

    def __init__(self, app: StdioTransport, line: Line) -> None:
        self.app = app
        self.line = line
        self.front = WsgiFront(app)

    @property
    def children(self) -> int:
        """How many processes this replica holds."""
        return self.app.owner.supervisor.children


class Replicas:
    """Several replicas over one store."""

    def __init__(self, replicas: Sequence[Replicated], mailboxes: Sequence[Mailboxes]) -> None:
        self.each = list(replicas)
        self.mailboxes = list(mailboxes)

    def __getitem__(self, number: int) -> Replicated:
        return self.each[number]

    def client(self) -> McpClient:
        """A client without a session, each of whose requests goes to another replica."""
        return McpClient(RotatingFront([replica.front for replica in self.each]))

    def client_at(self, number: int) -> McpClient:
        """A client without a session that stays with one replica."""
        return McpClient(self.each[number].front)

    def opened(self, version: str = "2025-06-18") -> list[McpClient]:
        """A session of the first replica, as seen at each."""
        first = self.client_at(0).open(version)
        return [first, *(first.at(replica.front) for replica in self.each[1:])]


def with_mailboxes(storage: Storage, mailboxes: Mailboxes) -> Storage:
    """The same store, whose replicas reach each other by these mailboxes."""
    same = copy.copy(storage)
    same.mailboxes = lambda: mailboxes  # type: ignore[method-assign]
    return same


@contextlib.contextmanager
def replicas(
    count: int = 2,
    *,
    redis_url: str | None = None,
    redis_prefix: str = "mcp-proxy:",
    lease: float = LEASE,
    command: Sequence[str] = SCRIPTED,
    kind: type[StdioTransport] = StreamableProxy,
    **settings: Any,
) -> Iterator[Replicas]:
    """Transports of `count` replicas in this process, over Redis if there is a URL."""
    options = ProxyOptions(**settings)
    local = LocalStorage(options.session_ttl), LocalMailboxes(lease)
    started: list[Replicated] = []
    with contextlib.ExitStack() as stack:
        boxes: list[Mailboxes] = []
        for _ in range(count):
            storage: Storage = local[0]
            mailboxes: Mailboxes = local[1]
            if redis_url is not None:
                shared = RedisStorage(redis_url, options.session_ttl, redis_prefix, timeout=1)
                storage, mailboxes = shared, RedisMailboxes(shared.connection, redis_prefix, lease)
            line = Line(mailboxes)
            app = kind(command, with_mailboxes(storage, line), options=options)
            stack.callback(storage.close)
            stack.callback(app.close)
            boxes.append(mailboxes)
            started.append(Replicated(app, line))
        yield Replicas(started, boxes)
