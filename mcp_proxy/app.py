"""The composition root: everything that is configured is put together here, and ended here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy.backends.replica import Replica
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge import health
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.edge.surround import Edge
from mcp_proxy.errors import MethodNotAllowed, NotFound, StorageUnavailable
from mcp_proxy.servers import HttpServer, Server
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.sessions.storage import Storage
from mcp_proxy.sharing import Sharing
from mcp_proxy.transports.base import DRAIN_TIME, Transport, drain
from mcp_proxy.transports.streamable import StreamableProxy
from mcp_proxy.transports.transparent import TransparentProxy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)


class Application:
    """The proxy as one WSGI application: `/mcp` or `/servers/<name>/mcp`, and health.

    Nothing starts before the first request. `drain` and `close` may be called from any thread.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self.config = config
        self.edge = Edge(config)
        self.replica = Replica()
        self._sharing = Sharing(config)
        self._relay = self._sharing.relay(self.replica)
        self._stores: list[Storage] = []
        self.proxies = {server.name: self._proxy(server) for server in config.servers()}
        self._transports = self._mounted()
        self._endpoints: dict[str, Callable[[], Reply]] = {
            "/healthz": health.alive,
            "/readyz": self._ready,
            "/health": self._ready,
        }

    def __repr__(self) -> str:
        return f"<Application {list(self.proxies.values())!r} {self.replica!r}>"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        endpoint = self._endpoints.get(environ.get("PATH_INFO", ""))
        if endpoint is None:
            return self._transports(environ, start_response)
        return self._serve_own(environ, start_response, endpoint)

    @property
    def is_shared(self) -> bool:
        """Whether other replicas can serve the same sessions."""
        return all(proxy.is_shared for proxy in self.proxies.values())

    def drain(self, timeout: float = DRAIN_TIME, linger: float = 0.0) -> None:
        """The orderly end: streams ended, no new work, running calls given time, then `close`.

        All times in seconds; see `mcp_proxy.transports.base.drain`.
        """
        drain(self.proxies.values(), timeout, linger)
        self.close()

    def close(self) -> None:
        """Ends every child and connection of this process; harmless when repeated."""
        self.edge.is_draining = True
        for proxy in self.proxies.values():
            proxy.shut_down()
        if self._relay is not None:
            self._relay.close()
        self.replica.close()
        self._sharing.close()

    # --- putting together ------------------------------------------------------------------------

    def _proxy(self, server: Server) -> Transport:
        storage = self._sharing.storage(server.name)
        self._stores.append(storage)
        manager = SessionManager(storage, unknown_status=self.config.unknown_session_status)
        if isinstance(server, HttpServer):
            return TransparentProxy(
                server.urls,
                settings=self.config,
                allowed_backends=self.config.allowed_backends,
                manager=manager,
                edge=self.edge,
            )
        return StreamableProxy(
            server,
            settings=self.config,
            manager=manager,
            replica=self.replica,
            edge=self.edge,
            relay=self._relay,
        )

    def _mounted(self) -> WSGIApplication:
        """One server at the root; those of a file each under its name.

        An HTTP server gets every path below its mount, a stdio server has one endpoint.
        """
        mounts: dict[str, WSGIApplication] = {}
        for name, proxy in self.proxies.items():
            prefix = f"/servers/{name}" if self.config.config else ""
            if isinstance(proxy, TransparentProxy) and not prefix:
                return proxy
            mounts[prefix if isinstance(proxy, TransparentProxy) else f"{prefix}/mcp"] = proxy
        return DispatcherMiddleware(self._nothing, mounts)

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
            return answer()

        return self.edge.serve(environ, start_response, handle, is_own=True)

    def _ready(self) -> Reply:
        probes: dict[str, health.Probe] = {"worker": self._draining}
        for (name, proxy), store in zip(self.proxies.items(), self._stores, strict=True):
            probes[f"sessions of {name}"] = _store_probe(store)
            probes[f"server {name}"] = proxy.trouble
        return health.ready(probes)

    def _draining(self) -> str | None:
        return "shutting down" if self.edge.is_draining else None


def create_app(config: ProxyConfig | None = None) -> Application:
    """The application for `config`, or for the environment. Raises ConfigError with a sentence."""
    return Application(config or ProxyConfig.from_env())


def _store_probe(store: Storage) -> health.Probe:
    def probe() -> str | None:
        try:
            store.check()
        except StorageUnavailable as error:
            return str(error)
        return None

    return probe
