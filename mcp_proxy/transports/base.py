"""What every transport is: a WSGI application over its edge, with an orderly end."""

from __future__ import annotations

import contextlib
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mcp_proxy.auth.access_tokens import AT_ONCE, AccessTokens
from mcp_proxy.auth.principal import NO_MEMBERS
from mcp_proxy.auth.protected_resource import MOUNT
from mcp_proxy.config import ProxyOptions, require_seconds
from mcp_proxy.edge.caller_limit import CallerLimit, MembersLimit
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest, with_path
from mcp_proxy.errors import (
    ConfigError,
    NoThread,
    Overloaded,
    ServerRemoved,
    SessionNotFound,
    StorageUnavailable,
)
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage, Storage, require_name
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

#: Why nothing begins where everything ends.
SHUTTING_DOWN = "shutting down"

_POLL = 0.1


class Transport(ABC):
    """One wire to clients. Every method may be called from any thread.

    As a context manager it is closed at the end of the block.
    """

    #: The path of its endpoint below its mount.
    endpoint = "/mcp"

    edge: Edge
    manager: SessionManager
    options: ProxyOptions

    #: The name of the server, as callers' permissions and metrics have it.
    server_name: str = "default"

    #: The scopes that an access token must have for it, beside those that each must have.
    scopes: tuple[str, ...] = ()
    #: The servers of a group, and the scopes that an access token must have for each.
    members: Mapping[str, tuple[str, ...]] = NO_MEMBERS

    #: The access tokens that it takes where it stands on its own, if any.
    tokens: AccessTokens | None = None

    #: How many requests a caller may have; None: as many as it sends.
    rate_limit: CallerLimit | MembersLimit | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not environ.get("PATH_INFO", "").startswith("/"):
            environ = with_path(environ)
        if self.tokens is not None:
            resource = self.tokens.resource
            environ[MOUNT] = environ.get("SCRIPT_NAME", "")
            endpoint = resource.endpoint_of(environ)
            if endpoint is not None:
                scopes = self.scopes if self.is_endpoint(endpoint) else None
                return self.edge.serve_metadata(environ, start_response, resource, endpoint, scopes)
        return self.edge.serve(
            environ,
            start_response,
            self.handle,
            server=self.server_name,
            scopes=self.scopes,
            members=self.members,
        )

    def overloaded(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answers a request that has arrived and for which no thread is free; waits for nothing."""
        environ[AT_ONCE] = True
        if self.tokens is not None:
            environ[MOUNT] = environ.get("SCRIPT_NAME", "")
        return self.edge.serve(
            environ,
            start_response,
            self.refuse,
            server=self.server_name,
            scopes=self.scopes,
            members=self.members,
        )

    def removed(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answers a request for a server that has been removed."""
        return self.edge.serve(
            environ,
            start_response,
            self.handle_removed,
            server=self.server_name,
            scopes=self.scopes,
            members=self.members,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, timeout: float = 0.0) -> None:
        """Ends everything that this transport started; harmless when repeated.

        Calls that are running get `timeout` seconds to end first, and no new work is taken. Raises
        ConfigError, and ends nothing, where that is no time.
        """
        require_seconds("timeout", timeout, or_zero=True)
        if timeout > 0:
            drain(lambda: [self], timeout)
        self.edge.is_draining = True
        self.shut_down()

    def is_endpoint(self, path: str) -> bool:
        """Whether clients may connect to a path below the mount of a transport on its own."""
        return path in ("", self.endpoint)

    @property
    def is_shared(self) -> bool:
        """Whether other replicas can serve the same sessions."""
        return self.manager.storage.is_shared

    @abstractmethod
    def handle(self, request: ClientRequest) -> Reply:
        """The answer to one request; raises ProxyError."""

    def refuse(self, request: ClientRequest) -> Reply:
        """The answer to a request for which no thread is free; raises ProxyError."""
        if request.method == "POST":
            request.message = jsonrpc.parse(request.read_body(self.options.max_body_bytes))
        raise NoThread

    def handle_removed(self, request: ClientRequest) -> Reply:
        """As `handle`, where nothing begins any more: what calls in flight may need is passed on.

        That is what wants no answer. Raises ServerRemoved for anything else.
        """
        if request.method == "POST":
            message = jsonrpc.parse(request.keep_body(self.options.max_body_bytes))
            if isinstance(message, Notification | Response):
                with contextlib.suppress(SessionNotFound, Overloaded):
                    return self.handle(request)
        raise ServerRemoved

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a client waits for an answer; a standing stream is none."""

    @abstractmethod
    def end_streams(self) -> None:
        """Ends the standing streams; their clients come back, to another replica."""

    def end_session(self, session_id: str) -> bool:
        """Ends a session as its client would; False where there is none of this id.

        Raises StorageError, BackendError.
        """
        return False

    def hand_over(self) -> None:  # noqa: B027  (only children of this replica have to be)
        """Lets go of sessions that another replica can serve, if nobody waits for an answer."""

    @abstractmethod
    def shut_down(self) -> None:
        """Ends what is this transport's; what an application shares the application ends."""

    @abstractmethod
    def end_unless_busy(self) -> bool:
        """Ends what is this transport's, unless a client waits for an answer; whether it did.

        No new requests reach it any more. Harmless when repeated.
        """

    @abstractmethod
    def give_way(self) -> None:
        """Has the sessions go on at others that stand in the place of this transport: they do not
        end with it.
        """

    @property
    def has_sessions(self) -> bool:
        """Whether sessions go on here although no new one can be expected to begin."""
        return False

    def not_ready_reason(self) -> str | None:
        """Why new sessions cannot be expected to begin, None if they can; waits for the store."""
        if self.edge.is_draining:
            return SHUTTING_DOWN
        return (
            self.threads_reason()
            or store_reason(self.manager.storage)
            or (self.tokens.not_ready_reason() if self.tokens is not None else None)
            or self.server_reason()
        )

    @abstractmethod
    def threads_reason(self) -> str | None:
        """Which threads of ours have ended that should run, None if none has."""

    @abstractmethod
    def server_reason(self) -> str | None:
        """Why the MCP server cannot be expected to begin a session, None if it can."""

    def server_doubt(self) -> str | None:
        """What is wrong with an MCP server that can be expected to begin a session, if anything."""
        return None


def drain(
    transports: Callable[[], Collection[Transport]],
    timeout: float,
    has_clients: Callable[[], bool] = lambda: False,
    hand_on: Callable[[], bool] | None = None,
) -> None:
    """Ends standing streams, takes no new work, and gives running calls `timeout` seconds.

    In that time requests are served for as long as `has_clients`: for a worker that accepts no
    connections any more but has some. Then sessions for which nobody waits are handed over, the
    others when their calls are done. `hand_on` is called after that, where another process gets the
    sessions out of this one's memory, and returns whether there are more: then requests are served
    until they are gone. `transports` is called again and again: a reload may bring others.
    """
    deadline = time.monotonic() + timeout
    has_more = hand_on is not None
    while (has_more or has_clients()) and time.monotonic() < deadline:
        for transport in transports():
            transport.end_streams()
        if hand_on is not None:
            has_more = hand_on()
        time.sleep(_POLL)
    for transport in transports():
        transport.edge.is_draining = True
    was_busy = True  # a request that was let in just before may not have reached its server yet
    while True:
        for transport in transports():
            transport.end_streams()
            transport.hand_over()
        is_busy = any(transport.is_busy for transport in transports())
        if not (is_busy or was_busy) or time.monotonic() >= deadline:
            return
        was_busy = is_busy
        time.sleep(_POLL)


def store_reason(storage: Storage) -> str | None:
    """Why a store cannot be written to, None if it can; waits for it."""
    try:
        storage.check()
    except StorageUnavailable as error:
        return error.detail
    return None


def storage_for(storage: Storage | None, options: ProxyOptions) -> Storage:
    """The store of a transport on its own: the given one, or one in memory.

    Raises ConfigError where either is something else.
    """
    if not isinstance(options, ProxyOptions):
        raise ConfigError(f"options must be ProxyOptions(...), not {type(options).__name__}")
    if storage is None:
        return LocalStorage(options.session_ttl)
    if not isinstance(storage, Storage):
        kind = type(storage).__name__
        raise ConfigError(
            f"session_storage must be a Storage, such as RedisStorage(url), not {kind}"
        )
    return storage


def scoped(storage: Storage, name: str | None, parts: Iterable[str]) -> Storage:
    """The part of a store that belongs to a transport of this name.

    Without a name it is made from `parts`, which say what is served: two transports over one store
    never meet unless they serve the same. A store that keeps no names apart is used as it is.
    """
    if name is not None:
        require_name(name)
        return storage.scoped(name)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        return storage.scoped(digest)
    except ConfigError:
        return storage
