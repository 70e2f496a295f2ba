"""The composition root: everything that is configured is put together here, and ended here."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mcp_proxy import metrics, shared_text, traces
from mcp_proxy.auth.access_tokens import AT_ONCE, AccessTokens
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.auth.caller_env import EnvFor
from mcp_proxy.auth.principal import Authenticate
from mcp_proxy.background import Periodic
from mcp_proxy.config import ProxyConfig, require_seconds, script_name
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.readiness import Part, Readiness, Weight, state_of
from mcp_proxy.edge.reply import Reply, json_reply
from mcp_proxy.edge.request import ClientRequest, with_path
from mcp_proxy.errors import ConfigError, NoThread, ProxyError
from mcp_proxy.metrics import Metric
from mcp_proxy.monitoring.endpoints import About, Monitoring, alive
from mcp_proxy.monitoring.front_page import front_page, is_for_browser
from mcp_proxy.monitoring.orders import Order, Orders, Outcome, Result, Task
from mcp_proxy.monitoring.status import note_of
from mcp_proxy.mounts import Mounts
from mcp_proxy.ownership.memory import Memory
from mcp_proxy.ownership.owner import ReplicaParts
from mcp_proxy.server_table import ServerTable, decode, require_servers
from mcp_proxy.servers import Server, UnservedServer
from mcp_proxy.shared_text import SharedText
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.traces import Tracing
from mcp_proxy.transports.base import SHUTTING_DOWN, Transport, drain, store_reason
from mcp_proxy.transports.unserved import UnservedProxy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

# Seconds between two looks at what the master has published, and at what is about to end.
_LOOK = 1.0

# Seconds before servers that could not be served are tried again: at first, and at most.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0


class Application:
    """The proxy as one WSGI application: `/mcp` or `/servers/<name>/mcp`, and health.

    `authenticate` says who calls; without it, and without `api_keys`, everybody is served.
    `env_for` says which variables stdio servers get of their caller, beside those of `env_from`.
    Nothing starts before the first request. `reload`, `drain` and `close` may be called from any
    thread. As a context manager it is closed at the end of the block. The constructor raises
    ConfigError.

    Under gunicorn with our hooks the servers of a file are those that gunicorn's master has
    published (`shared_text`): the file is read here only where no master has.
    """

    #: Whether this has begun to have calls traced, and is to end it.
    _is_traced = False

    def __init__(
        self,
        config: ProxyConfig,
        authenticate: Authenticate | None = None,
        env_for: EnvFor | None = None,
    ) -> None:
        if not isinstance(config, ProxyConfig):
            raise ConfigError(f"config must be ProxyConfig(...), not {type(config).__name__}")
        self.config = config
        self._storage = storage_of(config)
        #: What this process is to other replicas, and its children.
        self.parts = ReplicaParts(self._storage.mailboxes())
        workers = self.parts.workers
        self._tokens = AccessTokens.of(config, workers, config.ca_file or True, config.path_of)
        is_alone = authenticate is None and config.api_keys is None
        self._weight_of_tokens = Weight.ESSENTIAL if is_alone else Weight.USEFUL
        authenticator = Authenticator.of(config, authenticate, workers, self._tokens)
        self.edge = Edge(config, workers, authenticator)
        self._reloading = threading.Lock()  # guards changes of what follows
        self._generation = 0  # of the published text that was taken, or tried, last
        self._pause = _FIRST_PAUSE  # before it is tried again
        self._next_try: float | None = None  # monotonic; None: it was taken
        self._text = self._published()
        self._has_begun = False
        self._table = self._first_table()
        self._log_broken()
        self._looker = Periodic("mcp-reload", _LOOK, self._look_again, workers)
        self._looker.is_essential = False
        resource = None if self._tokens is None else self._tokens.resource
        #: The transports of all servers.
        self.mounts = Mounts(
            config, self._storage, self.parts, self.edge, self._table.servers, resource, env_for
        )
        self.edge.endpoints = self.endpoints
        #: The sessions, where they are in the memory of this process alone.
        self.memory: Memory | None = self.mounts.memory
        #: What /readyz says.
        self.readiness = Readiness(self._look, lambda: self.edge.is_draining)
        #: What the admin socket serves.
        self.monitoring = Monitoring(
            self.edge,
            self.readiness,
            self._gauges,
            self._about,
            self._orders(),
            self._storage,
            workers,
        )
        if config.counts:
            metrics.require_library()
            metrics.use_own()
        if config.traces:
            traces.require_library()
        self._endpoints = self._own_endpoints()

    def _own_endpoints(self) -> dict[str, Callable[[ClientRequest], Reply]]:
        """What is answered at paths of our own."""
        found: dict[str, Callable[[ClientRequest], Reply]] = {
            "/healthz": alive,
            "/readyz": self._ready,
            "/health": self._ready,
        }
        if self.config.metrics:
            found["/metrics"] = self.monitoring.metrics
        if self.config.counts and self.config.is_for_one_machine:
            found["/status"] = self.monitoring.with_token(self.monitoring.page)
            found["/status.json"] = self.monitoring.with_token(self.monitoring.status)
        return found

    def __repr__(self) -> str:
        return f"<Application {self.mounts!r} {self.parts!r}>"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not environ.get("PATH_INFO", "").startswith("/"):
            environ = with_path(environ)
        path = environ.get("PATH_INFO", "")
        endpoint = self._endpoints.get(path)
        if endpoint is None and path == "/" and self._has_front_page(environ):
            endpoint = self._front_page
        if endpoint is not None:
            return self.monitoring.serve(environ, start_response, endpoint)
        if not self._has_begun:
            self.follow()
        if self._text is not None and self._text.generation != self._generation:
            self._take_published(self._text)
        return self.mounts.current.front(environ, start_response)

    def answers_at_once(self, path: str) -> bool:
        """Whether a GET of this path is answered without waiting for anything.

        /readyz is once its first look is over, which is asked for by this.
        """
        endpoint = self._endpoints.get(path.removeprefix(script_name()))
        if endpoint is None:
            return False
        return endpoint is alive or (
            endpoint == self._ready and self.readiness.current() is not None
        )

    def endpoints(self) -> list[str]:
        """The paths of all MCP endpoints, below the mount of this application."""
        return self.mounts.endpoints()

    def free_streams(self) -> int:
        """How many more standing streams this worker can have."""
        return self.edge.streams.free

    def open_streams(self) -> int:
        """How many standing streams this worker has."""
        return self.edge.streams.open

    def overloaded(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answers a request that has arrived and for which no thread is free; waits for nothing."""
        if environ.get("PATH_INFO", "") in self._endpoints:
            return self.edge.serve(environ, start_response, _no_thread, is_own=True)
        environ[AT_ONCE] = True
        return self.mounts.current.refusing(environ, start_response)

    def is_draining(self) -> bool:
        """Whether nothing new is begun here any more."""
        return self.edge.is_draining

    @property
    def proxies(self) -> dict[str, Transport]:
        """The transports that are asked for a server's health, by the server's name."""
        return self.mounts.proxies

    def session_count(self) -> int:
        """How many sessions there are in memory, or with a server here where they are not."""
        if self.memory is not None:
            return self.memory.session_count
        return sum(len(owner.backends) for owner in self.mounts.current.owners.values())

    @property
    def nonce(self) -> str:
        """What the ids of sessions have that are begun here."""
        return self.parts.replica.nonce

    @property
    def is_shared(self) -> bool:
        """Whether other replicas can serve the same sessions."""
        return all(transport.is_shared for transport in self.mounts.transports)

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

    def keep_spares(self) -> None:
        """Has servers started ahead from now on (`spare_children`), not from their first use on."""
        self.mounts.keep_spares()

    def follow(self) -> None:
        """Serves what gunicorn's master has published, and looks for what it publishes next, and
        for changes of the keys.

        Done by the first request at the latest; harmless when repeated, and without a master.
        """
        if self.edge.authenticator is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # no thread: the first caller has it tried again
                self.edge.authenticator.start()
        with self._reloading:
            if self.config.traces and not self._is_traced:
                self._is_traced = True
                Tracing.begin()
            self._has_begun = True
            self._text = self._text or self._published()
        if self._text is not None:
            self._take_published(self._text)
            with contextlib.suppress(RuntimeError):  # no thread: requests look all the same
                self._looker.start()

    def reload(self, servers: Sequence[Server] | None = None) -> None:
        """Serves `servers` from now on; without them, what is in the file of `config` now.

        Servers that are the same keep their processes and sessions. Of one that has changed the
        sessions stay: its children are replaced between calls where another process is to be
        started, everything else holds from the next request on. One that is there no more ends as
        soon as no call needs it. A server without a file is one, and keeps its name.

        Raises ConfigError, and then nothing is different; under gunicorn's master, which is told
        by SIGHUP, always.
        """
        if self._text is not None:
            raise ConfigError("gunicorn's master reads the file of servers: send it SIGHUP")
        with self._reloading:
            try:
                read = self.config.listed() if servers is None else list(servers)
                require_servers(read, None if self.config.config else self._table.names())
                self._serve(self._table.renewed(read))
            except ConfigError as error:
                self._table = self._table.failed(error)
                raise
        if self._table.failure is not None:
            log.error("%s: %s", self.config.config, self._table.failure)
        with contextlib.suppress(RuntimeError):  # no thread: what is served no more stays longer
            self._looker.start()

    def not_ready_reason(self) -> str | None:
        """Why nothing can be served, None if something can; looks now, and waits for the store."""
        if self.edge.is_draining:
            return SHUTTING_DOWN
        parts = self._look()
        if state_of(parts).status < 400:
            return None
        return "; ".join(f"{part.name}: {part.reason}" for part in parts if part.reason)

    def drain(
        self,
        timeout: float,
        has_clients: Callable[[], bool] = lambda: False,
        hand_on: Callable[[], bool] | None = None,
    ) -> None:
        """The first half of an orderly end; see `mcp_proxy.transports.base.drain`."""
        drain(lambda: self.mounts.transports, timeout, has_clients, hand_on)

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
            stack.callback(self._end_traces)
            stack.callback(self._storage.close)
            stack.callback(self.readiness.stop)
            stack.callback(self.monitoring.close)
            stack.callback(self.edge.close)
            stack.callback(self.parts.close)
            stack.callback(self.mounts.close)
            for transport in self.mounts.transports:
                stack.callback(transport.shut_down)
            stack.callback(self._looker.stop)

    def _end_traces(self) -> None:
        with self._reloading:
            was_traced, self._is_traced = self._is_traced, False
        if was_traced:
            Tracing.end()

    # --- what is served --------------------------------------------------------------------------

    def _published(self) -> SharedText | None:
        """Where the master publishes the servers of our file; None where it does not."""
        text = shared_text.current() if self.config.config is not None else None
        if text is None or text.generation == 0:
            return None
        return text if decode(text.read().data).path == self.config.config else None

    def _first_table(self) -> ServerTable:
        if self._text is None:
            return ServerTable(self.config.config, self.config.servers())
        self._generation, data = self._text.read()
        return decode(data)

    def _log_broken(self) -> None:
        """Has the log say what is wrong in the file, unless gunicorn's master has said it."""
        if "mcp_proxy.server.gunicorn" not in sys.modules:
            for server in self._table.servers:
                if isinstance(server, UnservedServer) and not server.is_disabled:
                    log.error("%s: %s", self.config.config, server)

    def _take_published(self, text: SharedText) -> None:
        """Serves what the master has published; others that have come for the same wait for it.

        What cannot be served here changes nothing, and /readyz says why. It is tried again later,
        after longer and longer pauses, not at each request, which would meet the same failure.
        """
        with self._reloading:
            generation, data = text.read()
            if generation != self._generation:
                self._pause = _FIRST_PAUSE
            elif self._next_try is None or time.monotonic() < self._next_try:
                return
            try:
                self._serve(decode(data))
            except Exception as error:
                is_foreseen = isinstance(error, ConfigError)
                sentence = "the servers stay as they are here, for now: %s"
                log.error(sentence, error, exc_info=not is_foreseen)
                self._table = self._table.failed(error)
                self._next_try = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            else:
                self._next_try = None
            finally:  # not before: requests look at it, and wait here
                self._generation = generation

    def _serve(self, table: ServerTable) -> None:
        """Serves a table; raises ConfigError, and then nothing is different."""
        self.mounts.change(table.servers, table.removed)
        self._table = table

    def _look_again(self) -> None:
        if self._text is not None:
            self._take_published(self._text)
        self.mounts.end_leaving()

    # --- what is counted -------------------------------------------------------------------------

    def _about(self) -> About:
        """What an operator is told of the servers that there are just now."""
        servers = self.mounts.current.servers
        return About(
            self.config.threads,
            {n: "" if isinstance(one, UnservedServer) else str(one) for n, one in servers.items()},
            frozenset(servers).difference(self.proxies),
        )

    def _gauges(self) -> dict[Metric, float]:
        """The numbers of this worker as they are now."""
        streams = self.edge.streams
        reachabilities = (getattr(proxy, "reachability", None) for proxy in self.proxies.values())
        reloaded = {metrics.RELOADED: self._table.failure is None} if self.config.config else {}
        return {
            **reloaded,
            metrics.SESSIONS: self.session_count(),
            metrics.STREAMS: streams.open,
            metrics.STREAMS_LEFT: streams.free,
            metrics.CHILDREN: self.parts.supervisor.children,
            metrics.TARGETS_LEFT_OUT: sum(
                each.count for each in reachabilities if each is not None
            ),
            **metrics.of_process(),
        }

    # --- what an operator tells ------------------------------------------------------------------

    def _orders(self) -> Orders:
        return Orders(
            {
                Task.END: self._end_session,
                Task.RESTART: self._restart,
                Task.RELOAD: self._take_reload,
                Task.SHOW: self._show_session,
            }
        )

    def _end_session(self, order: Order, is_told: bool) -> Result:
        """Ends a session as its client would by DELETE, whichever server has it.

        Sessions that all workers reach are ended by the one that `is_told`.
        """
        if self._storage.is_shared and not is_told:
            return Result(Outcome.UNKNOWN)
        try:
            ended = [proxy.end_session(order.about) for proxy in self.proxies.values()]
        except ProxyError as error:
            log.warning("a session could not be ended: %s", error)
            return Result(Outcome.FAILED, str(error))
        return Result(Outcome.ENDED if any(ended) else Outcome.UNKNOWN)

    def _show_session(self, order: Order, is_told: bool) -> Result:
        """What this worker knows of a session.

        A record that all workers reach is read by the one that `is_told`.
        """
        counters = metrics.current()
        for name, transport in self.proxies.items():
            if counters is None or isinstance(transport, UnservedProxy):
                continue
            note = counters.recent.session(order.about, name)
            try:
                reads = is_told or not self._storage.is_shared
                record = transport.manager.peek(order.about) if reads else None
            except ProxyError as error:
                return Result(Outcome.FAILED, str(error))
            if record is not None:
                note = note_of(record, name, note)
            if note is not None:
                return Result(Outcome.DONE, session=note)
        return Result(Outcome.UNKNOWN)

    def _restart(self, order: Order, is_told: bool) -> Result:
        """Has other processes of a stdio server take the place of those that this worker has."""
        if order.about not in self.mounts.current.servers:
            return Result(Outcome.UNKNOWN)
        try:
            self.mounts.restart(order.about)
        except ConfigError as error:
            return Result(Outcome.FAILED, str(error))
        log.info("[%s] its processes are replaced, as an operator wants", order.about)
        return Result(Outcome.DONE)

    def _take_reload(self, order: Order, is_told: bool) -> Result:
        """Has the master read the file of servers, and serves what it has published then."""
        text = self._text
        if text is None:
            return Result(Outcome.FAILED, "there is no file of servers")
        if text.looked_at() < order.at:
            text.want(order.at)
            return Result(Outcome.PENDING)
        self._take_published(text)
        failure = self._table.failure
        return Result(Outcome.DONE) if failure is None else Result(Outcome.FAILED, failure)

    # --- our own endpoints -----------------------------------------------------------------------

    def _has_front_page(self, environ: WSGIEnvironment) -> bool:
        """Whether the root is for a browser; an HTTP server that is served alone has its own."""
        is_ours = self.config.config or not self.config.target_url
        return bool(is_ours) and self.config.is_for_one_machine and is_for_browser(environ)

    def _front_page(self, request: ClientRequest) -> Reply:
        """/ in a browser on this machine."""
        self.edge.require_allowed(request.environ)
        paths = {
            name: [f"{self.config.path_of(name)}{path}{at.endpoint}" for path, at in of.items()]
            for name, of in self.mounts.current.transports.items()
            if name in self.proxies
        }
        return front_page(request.environ.get("SCRIPT_NAME", ""), paths)

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
        if self.edge.authenticator is not None:
            parts.append(Part("callers", self.edge.authenticator.doubt(), Weight.USEFUL))
        if self._tokens is not None:
            reason = self._tokens.not_ready_reason()
            parts.append(Part("token keys", reason, self._weight_of_tokens))
        if self.config.config is not None:
            parts.append(Part("configuration", self._table.failure, Weight.USEFUL))
        for name, proxy in self.proxies.items():
            reason = proxy.server_reason()
            is_usable = reason is None or proxy.has_sessions
            weight = Weight.USABLE if is_usable else Weight.ONE_OF_MANY
            parts.append(Part(f"server {name}", reason or proxy.server_doubt(), weight))
        return parts


def create_app(
    config: ProxyConfig | None = None,
    authenticate: Authenticate | None = None,
    env_for: EnvFor | None = None,
) -> Application:
    """The application for `config`, or for the environment. Raises ConfigError with a sentence."""
    return Application(ProxyConfig.from_env() if config is None else config, authenticate, env_for)


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
