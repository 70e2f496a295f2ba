"""What stands in front of the servers: the transports of each, by their paths, as they change.

A change makes what is new first, and puts it in the place of what was by one assignment, so that a
request meets the servers as they were or as they are. What has not changed is not touched. A stdio
server that has changed keeps its transports and sessions, its children end between two calls. An
HTTP server that has changed gets other transports over the same records. What is served no more
ends once no call needs it; until then what those calls may need is passed on.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy.auth.caller_env import EnvFor
from mcp_proxy.auth.protected_resource import MOUNT, ProtectedResource
from mcp_proxy.backends.group import Group
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.forwarded import mount_of
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ConfigError, NotFound, ServerRemoved
from mcp_proxy.group_mounts import GroupMounts
from mcp_proxy.ownership.memory import Memory
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.server_table import is_other_process
from mcp_proxy.servers import (
    HttpServer,
    Served,
    Server,
    ServerGroup,
    StdioServer,
    UnservedServer,
)
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.transparent.proxy import TransparentProxy
from mcp_proxy.transports.base import Transport
from mcp_proxy.transports.sse import STREAM_PATH, SSEProxy
from mcp_proxy.transports.stdio import StdioTransport
from mcp_proxy.transports.streamable import StreamableProxy
from mcp_proxy.transports.unserved import UnservedProxy

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

# By their names in the configuration: the path below a server's mount, and the class.
_STDIO_TRANSPORTS: dict[str, tuple[str, type[StdioTransport]]] = {
    "streamable": ("/mcp", StreamableProxy),
    "sse": ("", SSEProxy),
}

# Where a client looks for a document about `/servers/<name>/...` or a group (RFC 9728 section 3.1).
_ABOUT_A_SERVER = re.compile(
    r"(/\.well-known/[^/]+)(/(?:servers|groups)/[^/]+)((?:/.*)?)", re.DOTALL
)

# Seconds in which a request may still reach transports in whose place others stand by now.
_ON_ITS_WAY = 2.0

# The transports of one server, by their paths below its mount.
_Transports = dict[str, Transport]


class Composition(NamedTuple):
    """Everything at one moment. It is replaced as a whole, never changed.

    `owners` are those of the stdio servers. `removed` are servers that were there, with the
    transports of those that were there lately.
    """

    servers: Mapping[str, Server]
    transports: Mapping[str, _Transports]
    owners: Mapping[str, Owner]
    removed: Mapping[str, _Transports]
    front: WSGIApplication
    refusing: WSGIApplication


class _Leaving(NamedTuple):
    """The transports of a server that has others now or, where it `is_removed`, none.

    One that was removed and is back, as the same kind of server, has others: its sessions go on.
    """

    server: Server
    transports: _Transports
    is_removed: bool
    since: float  # monotonic


class Mounts:
    """The transports of an application. Every method may be called from any thread.

    `resource` says where clients get the tokens that are wanted, if any are; `env_for` which
    variables stdio servers get of their caller. The constructor raises ConfigError.
    """

    def __init__(
        self,
        config: ProxyConfig,
        storage: Storage,
        parts: ReplicaParts,
        edge: Edge,
        servers: Sequence[Server],
        resource: ProtectedResource | None = None,
        env_for: EnvFor | None = None,
    ) -> None:
        self._config = config
        self._env_for = env_for
        self._resource = resource
        self._storage = storage
        self._parts = parts
        self._edge = edge
        self._lock = threading.Lock()  # guards changes
        self._leaving: tuple[_Leaving, ...] = ()
        self._keeps_spares = False
        self._groups = GroupMounts(config, parts, edge)
        made = {server.name: self._transports_of(server) for server in servers}
        #: What serves requests just now.
        self.current = self._composed({server.name: server for server in servers}, made, {})
        #: The sessions, where they are in the memory of this process alone.
        self.memory = Memory({}, {}) if isinstance(storage, LocalStorage) else None
        self._note_memory()

    def __repr__(self) -> str:
        return f"<Mounts {list(self.proxies.values())!r} leaving={len(self._leaving)}>"

    # --- what there is ---------------------------------------------------------------------------

    @property
    def transports(self) -> list[Transport]:
        """All of them, those included that are about to end."""
        found = [*self.current.transports.values(), *(each.transports for each in self._leaving)]
        return [transport for of_server in found for transport in of_server.values()]

    @property
    def proxies(self) -> dict[str, Transport]:
        """The transports that are asked for a server's health, by the server's name."""
        now = self.current
        return {
            name: next(iter(now.transports[name].values()))
            for name, server in now.servers.items()
            if not (isinstance(server, UnservedServer) and server.is_disabled)
        }

    def endpoints(self) -> list[str]:
        """The paths of all MCP endpoints, below the mount of the application."""
        return [
            f"{self._config.path_of(name)}{path}{transport.endpoint}"
            for name, transports in self.current.transports.items()
            for path, transport in transports.items()
        ]

    def keep_spares(self) -> None:
        """Has servers started ahead from now on (`spare_children`), not from their first use on."""
        self._keeps_spares = True
        for owner in self.current.owners.values():
            owner.spares.keep()

    # --- changes ---------------------------------------------------------------------------------

    def change(self, servers: Sequence[Server], removed: Sequence[str]) -> None:
        """Serves these from now on; `removed` are names of servers that were there.

        Raises ConfigError, and then nothing is different.
        """
        with self._lock:
            before = self.current
            after = {server.name: server for server in servers}
            for server in servers:
                if isinstance(server, Served):
                    _options_for(server, self._config)  # before anything is different
            made = self._made([one for one in servers if not self._goes_on(one)])
            transports = {
                name: made[name] if name in made else before.transports[name] for name in after
            }
            for server in servers:
                is_there = server.name not in made and before.servers[server.name] != server
                if is_there and isinstance(server, StdioServer):
                    self._change_stdio(server)
            gone = {
                name: before.transports.get(name) or before.removed.get(name, {})
                for name in removed
            }
            self.current = self._composed(after, transports, gone)
            self._note_memory()
            self._let_leave(before, made)
            self._announce_changes()
        if self._keeps_spares:
            self.keep_spares()

    def restart(self, name: str) -> None:
        """Has other processes of a server take the place of those that there are.

        Each ends between two calls and is brought back as after a crash. Raises ConfigError for
        what is no stdio server that is served here.
        """
        with self._lock:
            owner = self.current.owners.get(name)
            if owner is None or owner.is_group:
                raise ConfigError(f"{name!r} is no stdio server that is served")
            owner.restart()
            for transport in self.current.transports[name].values():
                assert isinstance(transport, StdioTransport)
                transport.change(transport.options, is_other=True)

    def end_leaving(self) -> None:
        """Ends what is served no more, where no call needs it any longer."""
        for leaving in self._leaving:
            if time.monotonic() < leaving.since + _ON_ITS_WAY:
                continue
            if not all(transport.end_unless_busy() for transport in leaving.transports.values()):
                continue
            with self._lock:
                self._leaving = tuple(each for each in self._leaving if each is not leaving)
                if leaving.is_removed and _is_unserved(self.current, leaving.server.name):
                    self._drop_records(leaving.server.name)
            if leaving.is_removed:
                name = leaving.server.name
                log.info("[%s] the server was removed, and its sessions have ended", name)

    def _goes_on(self, server: Server) -> bool:
        """Whether the transports of a server stay."""
        before = self.current.servers.get(server.name)
        kinds = (StdioServer, ServerGroup)
        stays = any(isinstance(before, kind) and isinstance(server, kind) for kind in kinds)
        return before == server or stays

    def _announce_changes(self) -> None:
        """Has clients of groups told of lists that are others now."""
        for owner in self.current.owners.values():
            for backend in owner.backends:
                if isinstance(backend, Group):
                    backend.announce_changes()
        for transport in self.transports:
            if isinstance(transport, StreamableProxy) and transport.together is not None:
                transport.together.announce_changes()

    def close(self) -> None:
        """Asks no server for its lists any more."""
        self._groups.close()

    def _made(self, servers: Sequence[Server]) -> dict[str, _Transports]:
        """New transports in front of these; raises ConfigError, and then there are none."""
        made: dict[str, _Transports] = {}
        try:
            for server in servers:
                made[server.name] = self._transports_of(server)
        except BaseException:
            for transports in made.values():
                for transport in transports.values():
                    transport.end_unless_busy()
            raise
        return made

    def _change_stdio(self, server: StdioServer) -> None:
        """Has the transports of a stdio server go on in front of another form of it."""
        options = _options_for(server, self._config)
        is_other = is_other_process(self.current.servers[server.name], server)
        for transport in self.current.transports[server.name].values():
            assert isinstance(transport, StdioTransport)
            if transport.owner.server != server:  # several have one owner
                transport.owner.change(server, options)
            transport.change(options, is_other)

    def _let_leave(self, before: Composition, made: Mapping[str, _Transports]) -> None:
        """Has those end that were replaced or removed. The lock is held."""
        now = time.monotonic()
        after = self.current.servers
        was_unserved = [name for name in made if _is_unserved(before, name)]
        self._leaving = tuple(
            self._given_way(each) if each.server.name in was_unserved else each
            for each in self._leaving
        )
        for name, transports in before.transports.items():
            server = before.servers[name]
            if isinstance(server, UnservedServer):
                continue  # it has nothing that would have to end
            if name in made or name not in after:
                is_removed = type(server) is not type(after.get(name))
                if not is_removed:
                    _give_way(transports)
                leaving = _Leaving(server, transports, is_removed, now)
                self._leaving = (*self._leaving, leaving)
        for leaving in self._leaving:
            name = leaving.server.name
            if leaving.is_removed and name in made and not _is_unserved(self.current, name):
                self._drop_records(name)  # they are not for a server of another kind

    def _given_way(self, leaving: _Leaving) -> _Leaving:
        """One whose server is back, perhaps as one of another kind, which has no use for its
        sessions.
        """
        if type(leaving.server) is not type(self.current.servers[leaving.server.name]):
            return leaving
        _give_way(leaving.transports)
        return leaving._replace(is_removed=False)

    def _drop_records(self, name: str) -> None:
        """The sessions of a server that was removed have ended; in a shared store they expire."""
        storage = self._storage.scoped(name)
        if isinstance(storage, LocalStorage):
            storage.take_out(lambda session: True)

    def _note_memory(self) -> None:
        if self.memory is not None and isinstance(self._storage, LocalStorage):
            scopes = {name: self._storage.scoped(name) for name in self.current.servers}
            self.memory.serve(scopes, self.current.owners)

    # --- putting together ------------------------------------------------------------------------

    def _transports_of(self, server: Server) -> _Transports:
        """The transports in front of a server, by the path below the server's mount.

        An HTTP server gets every path, and so does what is left of a stdio server's beside `/mcp`,
        and what stands for a server that is not served.
        """
        if isinstance(server, UnservedServer):
            return {"": UnservedProxy(server, self._edge, self._config)}
        storage = self._storage.scoped(server.name)
        manager = SessionManager(storage, unknown_status=self._config.unknown_status)
        manager.replica = self._parts.replica
        if isinstance(server, ServerGroup):
            made = self._in_front_of(self._groups.owner(server, manager), self._config)
            for transport in made.values():
                if isinstance(transport, StreamableProxy):
                    transport.together = self._groups.front(server.name)
            return made
        options = _options_for(server, self._config)
        if isinstance(server, StdioServer):
            owner = Owner(server, manager, self._parts, options, env_for=self._env_for)
            return self._in_front_of(owner, options)
        proxy = TransparentProxy._shared(
            server.urls,
            manager,
            self._edge,
            options,
            allowed_backends=self._config.allowed_backends,
            verify=self._config.ca_file or True,
            parts=self._parts,
            tools=server.tools,
        )
        proxy.server_name, proxy.scopes = server.name, server.jwt_scopes
        return {"": proxy}

    def _in_front_of(self, owner: Owner, options: ProxyConfig) -> _Transports:
        """The transports of what has a process for each session."""
        made: _Transports = {}
        for name in self._config.stdio_transports:
            path, kind = _STDIO_TRANSPORTS[name]
            made[path] = kind._shared(owner, self._edge, options)
        return made

    def _composed(
        self,
        servers: Mapping[str, Server],
        transports: Mapping[str, _Transports],
        removed: Mapping[str, _Transports],
    ) -> Composition:
        for server in servers.values():
            if isinstance(server, ServerGroup):
                self._groups.fit(server, servers, transports)
        front = self._dispatcher(
            transports, removed, lambda transport: transport, lambda transport: transport.removed
        )
        refusing = self._dispatcher(
            transports,
            removed,
            lambda transport: transport.overloaded,
            lambda transport: self._nothing_any_more,
        )
        firsts = {name: next(iter(of_server.values())) for name, of_server in transports.items()}
        owners = {n: one.owner for n, one in firsts.items() if isinstance(one, StdioTransport)}
        return Composition(servers, transports, owners, removed, front, refusing)

    def _dispatcher(
        self,
        transports: Mapping[str, _Transports],
        removed: Mapping[str, _Transports],
        app_of: Callable[[Transport], WSGIApplication],
        app_of_removed: Callable[[Transport], WSGIApplication],
    ) -> WSGIApplication:
        """One server at the root; those of a file each under its name, documents about it too."""
        mounts: dict[str, WSGIApplication] = {}
        for name, of_server in removed.items():
            prefix = self._config.path_of(name)
            if prefix:
                mounts[prefix] = self._nothing_any_more
            mounts |= {f"{prefix}{path}": app_of_removed(each) for path, each in of_server.items()}
        for name, of_server in transports.items():
            prefix = self._config.path_of(name)
            mounts |= {f"{prefix}{path}": app_of(each) for path, each in of_server.items()}
        front = DispatcherMiddleware(mounts.pop("", self._nothing), mounts)
        if self._resource is not None:
            return self._with_metadata(front, self._resource)
        if not self._config.config:
            return front
        return lambda environ, start_response: front(_at_its_server(environ), start_response)

    def _with_metadata(
        self, front: WSGIApplication, resource: ProtectedResource
    ) -> WSGIApplication:
        """In front of what wants a token: who asks where to get one is told."""

        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            environ[MOUNT] = environ.get("SCRIPT_NAME", "")
            endpoint = resource.endpoint_of(environ)
            if endpoint is None:
                return front(environ, start_response)
            scopes = self._scopes_at(endpoint)
            return self._edge.serve_metadata(environ, start_response, resource, endpoint, scopes)

        return serve

    def _scopes_at(self, path: str) -> tuple[str, ...] | None:
        """The scopes that the server at a path wants; None where clients cannot connect to it.

        They can at that of a server, or of one of its transports. An HTTP server may have its
        endpoint anywhere.
        """
        for name, transports in self.current.transports.items():
            base = self._config.path_of(name)
            if f"{path}/".startswith(f"{base}/"):
                known = {"", *transports, *([STREAM_PATH] if "" in transports else [])}
                is_anywhere = isinstance(transports.get(""), TransparentProxy | UnservedProxy)
                if is_anywhere or path.removeprefix(base) in known:
                    return next(iter(transports.values())).scopes
                return None
        return None

    def _nothing(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def handle(request: ClientRequest) -> Reply:
            mount = mount_of(environ, self._config.trusted_proxies)
            raise NotFound([f"{mount}{path}" for path in self.endpoints()])

        return self._edge.serve(environ, start_response, handle)

    def _nothing_any_more(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        return self._edge.serve(environ, start_response, _removed)


def _give_way(transports: _Transports) -> None:
    for transport in transports.values():
        transport.give_way()


def _is_unserved(composition: Composition, name: str) -> bool:
    """Whether a server is not served, since it is disabled, described wrongly, or not there."""
    return isinstance(composition.servers.get(name), UnservedServer | None)


def _options_for(server: Served, config: ProxyConfig) -> ProxyConfig:
    """The settings of one server, which may have some of its own. Raises ConfigError."""
    reason = config.reason_against(server)
    if reason is not None:
        raise ConfigError(f"{server.name}: {reason}")
    if server.timeout is not None:
        config = replace(config, request_timeout=server.timeout)
    if server.rate_limit is not None:
        config = replace(config, rate_limit=server.rate_limit)
    if isinstance(server, HttpServer) and server.headers:
        config = replace(config, forward_headers=(*config.forward_headers, *server.headers))
    return config


def _at_its_server(environ: WSGIEnvironment) -> WSGIEnvironment:
    """The environ with the path of a document about a server below that server's mount."""
    found = _ABOUT_A_SERVER.fullmatch(environ.get("PATH_INFO", ""))
    if found is None:
        return environ
    document, mount, rest = found.groups()
    return {**environ, "PATH_INFO": f"{mount}{document}{rest}"}


def _removed(request: ClientRequest) -> Reply:
    raise ServerRemoved
