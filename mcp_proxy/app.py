"""The composition root: everything that is configured is put together here, and ended here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.reply import Reply, json_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ConfigError, MethodNotAllowed, NotFound, StorageUnavailable
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.servers import Server, StdioServer
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.transparent.proxy import TransparentProxy
from mcp_proxy.transports.base import DRAIN_TIME, Transport, drain
from mcp_proxy.transports.sse import SSEProxy
from mcp_proxy.transports.stdio import StdioTransport
from mcp_proxy.transports.streamable import StreamableProxy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# By their names in the configuration: the path below a server's mount, and the class.
_STDIO_TRANSPORTS: dict[str, tuple[str, type[StdioTransport]]] = {
    "streamable": ("/mcp", StreamableProxy),
    "sse": ("", SSEProxy),
}


class Application:
    """The proxy as one WSGI application: `/mcp` or `/servers/<name>/mcp`, and health.

    Nothing starts before the first request. `drain` and `close` may be called from any thread.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self.config = config
        self.edge = Edge(config)
        self._storage = storage_of(config)
        #: What this process is to other replicas, and its children.
        self.parts = ReplicaParts(self._storage.mailboxes())
        self._mounts = {server.name: self._transports_of(server) for server in config.servers()}
        #: The transports that are asked for a server's health, by the server's name.
        self.proxies = {name: next(iter(mounts.values())) for name, mounts in self._mounts.items()}
        self._front = self._dispatcher()
        self._endpoints: dict[str, Callable[[], Reply]] = {
            "/healthz": _alive,
            "/readyz": self._ready,
            "/health": self._ready,
        }

    def __repr__(self) -> str:
        return f"<Application {list(self.proxies.values())!r} {self.parts!r}>"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        endpoint = self._endpoints.get(environ.get("PATH_INFO", ""))
        if endpoint is None:
            return self._front(environ, start_response)
        return self._serve_own(environ, start_response, endpoint)

    @property
    def is_shared(self) -> bool:
        """Whether other replicas can serve the same sessions."""
        return all(transport.is_shared for transport in self._transports())

    def drain(self, timeout: float = DRAIN_TIME, linger: float = 0.0) -> None:
        """The orderly end: streams ended, no new work, running calls given time, then `close`.

        All times in seconds; see `mcp_proxy.transports.base.drain`.
        """
        drain(self._transports(), timeout, linger)
        self.close()

    def close(self) -> None:
        """Ends every child and connection of this process; harmless when repeated."""
        self.edge.is_draining = True
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others raise
            stack.callback(self._storage.close)
            stack.callback(self.parts.close)
            for transport in self._transports():
                stack.callback(transport.shut_down)

    # --- putting together ------------------------------------------------------------------------

    def _transports(self) -> list[Transport]:
        return [transport for mounts in self._mounts.values() for transport in mounts.values()]

    def _transports_of(self, server: Server) -> dict[str, Transport]:
        """The transports in front of a server, by the path below the server's mount.

        An HTTP server gets every path, and so does what is left of a stdio server's beside `/mcp`.
        """
        storage = self._storage.scoped(server.name)
        manager = SessionManager(storage, unknown_status=self.config.unknown_status)
        if isinstance(server, StdioServer):
            return self._in_front_of_stdio(server, manager)
        proxy = TransparentProxy._shared(
            server.urls,
            manager,
            self.edge,
            self.config,
            allowed_backends=self.config.allowed_backends,
            workers=self.parts.workers,
            replica=self.parts.replica,
        )
        return {"": proxy}

    def _in_front_of_stdio(
        self, server: StdioServer, manager: SessionManager
    ) -> dict[str, Transport]:
        owner = Owner(server, manager, self.parts, self.config)
        mounts: dict[str, Transport] = {}
        for name in self.config.stdio_transports:
            path, kind = _STDIO_TRANSPORTS[name]
            mounts[path] = kind._shared(owner, self.edge, self.config)
        return mounts

    def _dispatcher(self) -> WSGIApplication:
        """One server at the root; those of a file each under its name."""
        mounts: dict[str, WSGIApplication] = {}
        for name, transports in self._mounts.items():
            prefix = f"/servers/{name}" if self.config.config else ""
            mounts |= {f"{prefix}{path}": transport for path, transport in transports.items()}
        return DispatcherMiddleware(mounts.pop("", self._nothing), mounts)

    def _nothing(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def handle(request: ClientRequest) -> Reply:
            raise NotFound

        return self.edge.serve(environ, start_response, handle)

    # --- our own endpoints -----------------------------------------------------------------------

    def _serve_own(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        answer: Callable[[], Reply],
    ) -> Iterable[bytes]:
        def handle(request: ClientRequest) -> Reply:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET, HEAD")
            reply = answer()
            if reply.status >= 400:
                request.reason = "not ready"
            return reply

        return self.edge.serve(environ, start_response, handle, is_own=True)

    def _ready(self) -> Reply:
        """/readyz: 200 when every part can do its work, else 503; each with its reason."""
        reasons: dict[str, str | None] = {
            "worker": "shutting down" if self.edge.is_draining else None,
            "threads": self.parts.workers.not_ready_reason(),
        }
        for name, proxy in self.proxies.items():
            reasons[f"sessions of {name}"] = _store_reason(proxy.manager.storage)
            reasons[f"server {name}"] = proxy.not_ready_reason()
        return _readiness(reasons)


def create_app(config: ProxyConfig | None = None) -> Application:
    """The application for `config`, or for the environment. Raises ConfigError with a sentence."""
    return Application(config or ProxyConfig.from_env())


def storage_of(config: ProxyConfig) -> Storage:
    """The store of all servers' sessions; nothing is sent before its first use.

    Raises ConfigError where `redis_url` cannot be read.
    """
    if config.redis_url is None:
        return LocalStorage(config.session_ttl)
    from mcp_proxy.redis.storage import RedisStorage

    try:
        return RedisStorage(
            config.redis_url, config.session_ttl, config.redis_prefix, config.connect_timeout
        )
    except ValueError as error:
        raise ConfigError(f"redis_url {error}") from None


# --- health --------------------------------------------------------------------------------------


def _alive() -> Reply:
    """/healthz: the process serves requests. Touches nothing, so nothing else can fail it."""
    return json_reply(b'{"status":"ok"}')


def _readiness(reasons: Mapping[str, str | None]) -> Reply:
    is_ready = not any(reasons.values())
    checks = {part: reason or "ok" for part, reason in reasons.items()}
    document = {"status": "ready" if is_ready else "not ready", "checks": checks}
    return json_reply(msgspec.json.encode(document), 200 if is_ready else 503)


def _store_reason(store: Storage) -> str | None:
    try:
        store.check()
    except StorageUnavailable as error:
        return str(error)
    return None
