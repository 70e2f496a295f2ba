"""What the transports in front of stdio servers have in common: the server, and its sessions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Self

from msgspec.structs import replace

from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ConfigError
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
    does. Nothing starts before the first request; `close` ends everything that did. The constructor
    raises ConfigError.
    """

    owner: Owner

    def __init__(
        self,
        command: Sequence[str] | str | StdioServer,
        session_storage: Storage | None = None,
        *,
        name: str | None = None,
        options: ProxyOptions = ProxyOptions(),
    ) -> None:
        storage = storage_for(session_storage, options)
        if options.asks:
            raise ConfigError("unknown_session_status=ask is for HTTP servers: take 400 or 404")
        server = as_server(command, name)
        if server.timeout is not None:
            options = replace(options, request_timeout=server.timeout)
        env = [f"{variable}={value}" for variable, value in sorted(server.env.items())]
        manager = SessionManager(
            scoped(storage, name, [*server.argv, server.cwd or "", *env]),
            unknown_status=options.unknown_status,
        )
        parts = ReplicaParts(storage.mailboxes())
        self._own_parts: ReplicaParts | None = parts
        edge = Edge(options, parts.workers)
        self._set_up(Owner(server, manager, parts, options), edge, options)

    @classmethod
    def _shared(cls, owner: Owner, edge: Edge, options: ProxyOptions) -> Self:
        """A transport of an application, which shares sessions, edge and replica among several."""
        transport = cls.__new__(cls)
        transport._own_parts = None
        transport._set_up(owner, edge, options)
        return transport

    def _set_up(self, owner: Owner, edge: Edge, options: ProxyOptions) -> None:
        self.owner = owner
        self.manager = owner.manager
        self.edge = edge
        self.options = options

    @property
    def is_shared(self) -> bool:
        return self.owner.relay is not None

    @property
    def is_busy(self) -> bool:
        return self.owner.is_busy or (self.owner.relay is not None and self.owner.relay.is_busy)

    def end_streams(self) -> None:
        self.owner.end_streams()

    def hand_over(self) -> None:
        if self.is_shared:
            self.owner.hand_over()

    def shut_down(self) -> None:
        self.edge.disconnects.stop()
        self.owner.close()
        if self._own_parts is not None:
            self._own_parts.close()

    @property
    def has_sessions(self) -> bool:
        return self.owner.has_sessions

    def threads_reason(self) -> str | None:
        return self.owner.threads_reason()

    def server_reason(self) -> str | None:
        server = self.owner.server
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
            self.owner.on_living_backend(session, lambda to: to.notify(message, has_left))
        else:
            self.owner.on_backend(session, lambda to: to.notify(message, has_left), has_left)


def as_server(command: Sequence[str] | str | StdioServer, name: str | None) -> StdioServer:
    """The server that a command starts."""
    if isinstance(command, StdioServer):
        return command
    return StdioServer(name or "default", as_command(command))
