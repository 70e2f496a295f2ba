"""The composition root: everything that is configured is put together here, and ended here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from msgspec.structs import replace
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy.config import ProxyConfig, require_seconds, script_name
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.readiness import Part, Readiness, Weight, state_of
from mcp_proxy.edge.reply import Reply, json_reply
from mcp_proxy.edge.request import ClientRequest, with_path
from mcp_proxy.errors import ConfigError, MethodNotAllowed, NotFound, NoThread
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.servers import HttpServer, Server, StdioServer
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.transparent.proxy import TransparentProxy
from mcp_proxy.transports.base import SHUTTING_DOWN, Transport, drain, store_reason
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

    Nothing starts before the first request. `drain` and `close` may be called from any thread. As a
    context manager it is closed at the end of the block. The constructor raises ConfigError.
    """

    def __init__(self, config: ProxyConfig) -> None:
        if not isinstance(config, ProxyConfig):
            raise ConfigError(f"config must be ProxyConfig(...), not {type(config).__name__}")
        self.config = config
        self._storage = storage_of(config)
        #: What this process is to other replicas, and its children.
        self.parts = ReplicaParts(self._storage.mailboxes())
        self.edge = Edge(config, self.parts.workers)
        self._mounts = {server.name: self._transports_of(server) for server in config.servers()}
        #: The transports that are asked for a server's health, by the server's name.
        self.proxies = {name: next(iter(mounts.values())) for name, mounts in self._mounts.items()}
        self._front = self._dispatcher(lambda transport: transport)
        self._refusing = self._dispatcher(lambda transport: transport.overloaded)
        #: What /readyz says.
        self.readiness = Readiness(self._look, lambda: self.edge.is_draining)
        self._endpoints: dict[str, Callable[[ClientRequest], Reply]] = {
            "/healthz": _alive,
            "/readyz": self._ready,
            "/health": self._ready,
        }

    def __repr__(self) -> str:
        return f"<Application {list(self.proxies.values())!r} {self.parts!r}>"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not environ.get("PATH_INFO", "").startswith("/"):
            environ = with_path(environ)
        endpoint = self._endpoints.get(environ.get("PATH_INFO", ""))
        if endpoint is None:
            return self._front(environ, start_response)
        return self._serve_own(environ, start_response, endpoint)

    def answers_at_once(self, path: str) -> bool:
        """Whether a GET of this path is answered without waiting for anything.

        /readyz is once its first look is over, which is asked for by this.
        """
        endpoint = self._endpoints.get(path.removeprefix(script_name()))
        if endpoint is None:
            return False
        return endpoint is _alive or self.readiness.current() is not None

    def overloaded(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answers a request that has arrived and for which no thread is free; waits for nothing."""
        if environ.get("PATH_INFO", "") in self._endpoints:
            return self.edge.serve(environ, start_response, _no_thread, is_own=True)
        return self._refusing(environ, start_response)

    @property
    def is_shared(self) -> bool:
        """Whether other replicas can serve the same sessions."""
        return all(transport.is_shared for transport in self._transports())

    def has_call_since(self, before: float) -> bool:
        """Whether a client that is not this worker's own waits for an answer since before that
        (monotonic) time.
        """
        relay = self.parts.relay
        return relay is not None and relay.has_call_since(before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def not_ready_reason(self) -> str | None:
        """Why nothing can be served, None if something can; looks now, and waits for the store."""
        if self.edge.is_draining:
            return SHUTTING_DOWN
        parts = self._look()
        if state_of(parts).status < 400:
            return None
        return "; ".join(f"{part.name}: {part.reason}" for part in parts if part.reason)

    def drain(self, timeout: float, has_clients: Callable[[], bool] = lambda: False) -> None:
        """The first half of an orderly end; see `mcp_proxy.transports.base.drain`."""
        drain(self._transports(), timeout, has_clients)

    def close(self, timeout: float = 0.0) -> None:
        """Ends every child and connection of this process; harmless when repeated.

        Calls that are running get `timeout` seconds to end first, and no new work is taken. Raises
        ConfigError, and ends nothing, where that is no time.
        """
        require_seconds("timeout", timeout, or_zero=True)
        if timeout > 0:
            self.drain(timeout)
        self.edge.is_draining = True
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others raise
            stack.callback(self._storage.close)
            stack.callback(self.readiness.stop)
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
        options = _options_for(server, self.config)
        storage = self._storage.scoped(server.name)
        manager = SessionManager(storage, unknown_status=self.config.unknown_status)
        if isinstance(server, StdioServer):
            return self._in_front_of_stdio(server, manager, options)
        proxy = TransparentProxy._shared(
            server.urls,
            manager,
            self.edge,
            options,
            allowed_backends=self.config.allowed_backends,
            verify=self.config.ca_file or True,
            workers=self.parts.workers,
            replica=self.parts.replica,
        )
        return {"": proxy}

    def _in_front_of_stdio(
        self, server: StdioServer, manager: SessionManager, options: ProxyConfig
    ) -> dict[str, Transport]:
        owner = Owner(server, manager, self.parts, options)
        mounts: dict[str, Transport] = {}
        for name in self.config.stdio_transports:
            path, kind = _STDIO_TRANSPORTS[name]
            mounts[path] = kind._shared(owner, self.edge, options)
        return mounts

    def _dispatcher(self, app_of: Callable[[Transport], WSGIApplication]) -> WSGIApplication:
        """One server at the root; those of a file each under its name."""
        mounts: dict[str, WSGIApplication] = {}
        for name, transports in self._mounts.items():
            prefix = f"/servers/{name}" if self.config.config else ""
            mounts |= {f"{prefix}{path}": app_of(each) for path, each in transports.items()}
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
        answer: Callable[[ClientRequest], Reply],
    ) -> Iterable[bytes]:
        def handle(request: ClientRequest) -> Reply:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET, HEAD")
            return answer(request)

        return self.edge.serve(environ, start_response, handle, is_own=True)

    def _ready(self, request: ClientRequest) -> Reply:
        """/readyz: 200 while something can be served, else 503; each part with its reason."""
        state = self.readiness.wait_for_current()
        if state.status >= 400:
            request.reason = state.summary
        return json_reply(state.body(self.edge.allows_host(request.environ)), state.status)

    def _look(self) -> list[Part]:
        """How the parts of this worker are; waits for the store."""
        workers = self.parts.workers
        parts = [
            Part("threads", workers.ended(is_essential=True), Weight.ESSENTIAL),
            Part("other threads", workers.ended(is_essential=False), Weight.USEFUL),
            Part("sessions", store_reason(self._storage), Weight.ESSENTIAL),
        ]
        for name, proxy in self.proxies.items():
            reason = proxy.server_reason()
            is_usable = reason is None or proxy.has_sessions
            weight = Weight.USABLE if is_usable else Weight.ONE_OF_MANY
            parts.append(Part(f"server {name}", reason or proxy.server_doubt(), weight))
        return parts


def _options_for(server: Server, config: ProxyConfig) -> ProxyConfig:
    """The settings of one server, which may have some of its own."""
    if server.timeout is not None:
        config = replace(config, request_timeout=server.timeout)
    if isinstance(server, HttpServer) and server.headers:
        config = replace(config, forward_headers=(*config.forward_headers, *server.headers))
    return config


def create_app(config: ProxyConfig | None = None) -> Application:
    """The application for `config`, or for the environment. Raises ConfigError with a sentence."""
    return Application(ProxyConfig.from_env() if config is None else config)


def storage_of(config: ProxyConfig) -> Storage:
    """The store of all servers' sessions; nothing is sent before its first use.

    Raises ConfigError where `redis_url` cannot be read.
    """
    if config.redis_url is None:
        return LocalStorage(config.session_ttl)
    from mcp_proxy.redis.storage import RedisStorage

    return RedisStorage(
        config.redis_url, config.session_ttl, config.redis_prefix, config.connect_timeout
    )


def _no_thread(request: ClientRequest) -> Reply:
    raise NoThread


# --- health --------------------------------------------------------------------------------------


def _alive(request: ClientRequest) -> Reply:
    """/healthz: the process serves requests. Touches nothing, so nothing else can fail it."""
    return json_reply(b'{"status":"ok"}')
