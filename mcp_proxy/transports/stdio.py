"""What the transports in front of stdio servers have in common: the server, and its sessions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Self

from msgspec.structs import replace

from mcp_proxy.auth import caller_env
from mcp_proxy.auth.access_tokens import AccessTokens
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.auth.caller_env import EnvFor, Values
from mcp_proxy.auth.principal import Authenticate
from mcp_proxy.backends.owned import called_by, caller_headers
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.caller_limit import CallerLimit
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.forwarded import mount_of
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import PASS_TO, ClientRequest
from mcp_proxy.errors import ClientError, ConfigError, NotFound
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.servers import StdioServer, as_command
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import Session
from mcp_proxy.transports.base import Transport, scoped, storage_for
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Response


class StdioTransport(Transport):
    """A transport in front of a stdio server, wherever its children are.

    `command` is a list of arguments, a string, or a StdioServer. Without `session_storage` sessions
    live in memory; with a Redis one they are served by every replica that shares it. `name` tells
    the sessions of several transports over one store apart; without one a digest of the command
    does. `authenticate` says who calls; without it, and without `api_keys` and `jwt_issuer`,
    everybody is served. `env_for` says which variables the server gets of its caller; without it
    those of `env_from`. Nothing starts before the first request; `close` ends everything that did.
    The constructor raises ConfigError.
    """

    owner: Owner
    #: The headers of a client's request that the servers of a group may get.
    headers_of: Callable[[ClientRequest], Mapping[str, str]] | None = None

    def __init__(
        self,
        command: Sequence[str] | str | StdioServer,
        session_storage: Storage | None = None,
        *,
        name: str | None = None,
        options: ProxyOptions = ProxyOptions(),
        authenticate: Authenticate | None = None,
        env_for: EnvFor | None = None,
    ) -> None:
        storage = storage_for(session_storage, options)
        if options.asks:
            raise ConfigError("unknown_session_status=ask is for HTTP servers: take 400 or 404")
        server = as_server(command, name)
        if reason := options.reason_against(server):
            raise ConfigError(reason)
        if server.timeout is not None:
            options = replace(options, request_timeout=server.timeout)
        if server.rate_limit is not None:
            options = replace(options, rate_limit=server.rate_limit)
        env = [f"{variable}={value}" for variable, value in sorted(server.env.items())]
        manager = SessionManager(
            scoped(storage, name, [*server.argv, server.cwd or "", *env]),
            unknown_status=options.unknown_status,
        )
        parts = ReplicaParts(storage.mailboxes())
        self._own_parts: ReplicaParts | None = parts
        self.tokens = AccessTokens.of(options, parts.workers)
        authenticator = Authenticator.of(options, authenticate, parts.workers, self.tokens)
        edge = Edge(options, parts.workers, authenticator)
        owner = Owner(server, manager, parts, options, env_for=env_for)
        self._set_up(owner, edge, options)

    @classmethod
    def _shared(cls, owner: Owner, edge: Edge, options: ProxyOptions) -> Self:
        """A transport of an application, which shares sessions, edge and replica among several."""
        transport = cls.__new__(cls)
        transport._own_parts = None
        transport._set_up(owner, edge, options)
        return transport

    def _set_up(self, owner: Owner, edge: Edge, options: ProxyOptions) -> None:
        self.owner = owner
        self.server_name = owner.server.name
        self.scopes = owner.server.jwt_scopes
        self.manager = owner.manager
        self.edge = edge
        self.options = options
        self.rate_limit = CallerLimit.of(
            options, str(owner.server), owner.manager.storage.rate_counter
        )
        self._load = owner.manager.load if owner.relay is None else owner.load

    def change(self, options: ProxyOptions, is_other: bool) -> None:
        """Has other settings from the next request on; `is_other`: its processes are others, too.

        The owner has been changed before.
        """
        self.options = options
        if not self.owner.is_group:  # whose servers have them
            self.scopes = self.owner.server.jwt_scopes
        self.rate_limit = CallerLimit.of(
            options, str(self.owner.server), self.manager.storage.rate_counter
        )

    def end_unless_busy(self) -> bool:
        if self.owner.is_busy:
            return False
        self.owner.end_all()
        return True

    def give_way(self) -> None:
        self.owner.give_way()

    @property
    def is_shared(self) -> bool:
        return self.owner.relay is not None

    @property
    def is_busy(self) -> bool:
        return self.owner.is_busy or (self.owner.relay is not None and self.owner.relay.is_busy)

    def end_streams(self) -> None:
        self.owner.end_streams()

    def end_session(self, session_id: str) -> bool:
        session = self.manager.peek(session_id)
        if session is not None:
            self.owner.end(session)
        return session is not None

    def hand_over(self) -> None:
        if self.is_shared:
            self.owner.hand_over()
        else:
            self.owner.spares.close()

    def shut_down(self) -> None:
        self.edge.disconnects.stop()
        self.owner.close()
        if self._own_parts is not None:
            self.edge.close()
            self._own_parts.close()

    @property
    def has_sessions(self) -> bool:
        return self.owner.has_sessions

    def threads_reason(self) -> str | None:
        return self.owner.threads_reason()

    def server_reason(self) -> str | None:
        server = self.owner.server
        if not isinstance(server, StdioServer):
            return self.owner.full_reason()
        if server.cwd is not None and not os.path.isdir(server.cwd):
            return f"its working directory {server.cwd} does not exist"
        program = server.argv[0]
        if os.path.dirname(program) and server.cwd is not None:  # exec comes after chdir
            program = os.path.join(server.cwd, program)
        if shutil.which(program, path=server.env.get("PATH")) is None:
            return f"{server.argv[0]} is not an executable file"
        return self.owner.full_reason() or self.owner.backoff.not_ready_reason()

    def server_doubt(self) -> str | None:
        return self.owner.backoff.doubt()

    # --- what the server gets of its caller ------------------------------------------------------

    def for_caller(self, request: ClientRequest, serve: Callable[[ClientRequest], Reply]) -> Reply:
        """What `serve` answers, while children that are started have the variables of the caller.

        A request that lacks some of them begins nothing (`require_values`).
        """
        source, headers_of = self.owner.caller_env, self.headers_of
        values = None
        try:
            if source is not None:
                values = source.values_of(request.environ, request.principal)
        except ClientError as error:
            request.lacks = error
        headers = {} if headers_of is None else headers_of(request)
        with caller_env.on_behalf_of(values), called_by(headers):
            return serve(request)

    def on_behalf_of(self, request: ClientRequest) -> AbstractContextManager[None]:
        """Has what is done meanwhile be done for whoever has sent a request.

        Raises ClientError where that does not say all that the server has to get of its caller.
        """
        source = self.owner.caller_env
        values = None if source is None else source.values_of(request.environ, request.principal)
        if values is None and caller_env.current_values() is None and not caller_headers.get():
            return contextlib.nullcontext()  # as it is already; nearly always
        return _on_behalf_of(values)

    def require_values(self, request: ClientRequest) -> None:
        """Raises what the request lacks that the server has to get of its caller."""
        if request.lacks is not None:
            raise request.lacks

    def binding(self, request: ClientRequest) -> dict[str, str]:
        """The metadata that bind a session to the caller; raises StorageError."""
        return self.manager.binding(self.bound_to(request), self._values_as_text())

    def bound_to(self, request: ClientRequest) -> str | None:
        """What the sessions of a caller are bound to: its name and, in a group, the servers that it
        may use, so that no session outlives that. None where callers are unknown.
        """
        principal = request.principal
        if principal is None or principal.servers is None or not self.members:
            return request.principal_name
        return "\0".join((principal.name, *sorted(principal.servers)))

    def require_own(self, request: ClientRequest, session: Session) -> None:
        """Raises what an unknown id does unless the session is the caller's."""
        values = None if self.owner.caller_env is None else self._values_as_text()
        name = self.bound_to(request) if self.members else request.principal_name
        self.manager.require_own(session, name, values)

    @staticmethod
    def _values_as_text() -> bytes | None:
        values = caller_env.current_values()
        return None if values is None else caller_env.as_text(values)

    def not_found(self, request: ClientRequest) -> NotFound:
        """What is raised for a path at which nothing is served; it names all endpoints."""
        mount = mount_of(request.environ, self.options.trusted_proxies)
        own = f"{mount}{self.endpoint}"
        paths = self.edge.endpoints()
        of_application = [path for path in paths if own.endswith(path)]
        if not of_application:
            return NotFound([own or "/"])
        mount = own.removesuffix(max(of_application, key=len))
        return NotFound([f"{mount}{path}" for path in paths])

    def pass_on(
        self, request: ClientRequest, session: Session, message: Notification | Response
    ) -> None:
        """Passes on what wants no answer; raises BackendError, StorageUnavailable.

        What is about something that only the server which is lost knew brings none back.
        """
        has_left = request.has_left
        if isinstance(message, Response):
            self.owner.on_living_backend(session, lambda to: to.respond(message, has_left))
        elif message.method == jsonrpc.CANCELLED:
            if not request.cancels_waiting(session.id, message):
                self.owner.on_living_backend(session, lambda to: to.notify(message, has_left))
        else:
            self.owner.on_backend(session, lambda to: to.notify(message, has_left), has_left)


@contextlib.contextmanager
def _on_behalf_of(values: Values | None) -> Iterator[None]:
    with caller_env.on_behalf_of(values), called_by({}):
        yield


def pass_to_owner(
    owner: Owner, request: ClientRequest, session: Session, is_stream: bool = False
) -> None:
    """Raises Passed where the request was given to the worker that has the session's child."""
    if PASS_TO in request.environ and owner.manager.storage.is_shared:
        replica_id = owner.replica_of(session)
        if replica_id is not None:
            request.pass_to(replica_id, session.id, is_stream)


def pass_new(request: ClientRequest, is_stream: bool = False) -> None:
    """Raises Passed where a request that begins a session was given to a worker with fewer."""
    if PASS_TO in request.environ:
        request.pass_to(None, "", is_stream)


def pass_by_id(
    owner: Owner, request: ClientRequest, session_id: str | None, is_stream: bool = False
) -> None:
    """Raises Passed where the request was given to the worker that has the session in its memory.

    Raises Unpassable where that can only be another one, and the request cannot go there.
    """
    if not session_id or owner.manager.storage.is_shared:
        return
    if PASS_TO in request.environ:
        request.pass_to(None, session_id, is_stream)
    else:
        owner.manager.warn_of_other_process(session_id)


def as_server(command: Sequence[str] | str | StdioServer, name: str | None) -> StdioServer:
    """The server that a command starts."""
    if isinstance(command, StdioServer):
        return command
    return StdioServer(name or "default", as_command(command))
