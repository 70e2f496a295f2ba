"""What the transports in front of stdio servers have in common: the server, and its sessions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from mcp_proxy.backends.base import Backend, Exchange
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.edge import Edge
from mcp_proxy.ownership.owner import StdioSessions
from mcp_proxy.relay.calls import RemoteExchange
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer, as_command
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import Session
from mcp_proxy.transports.base import Transport
from mcp_proxy.transports.relaying import relay_for
from mcp_proxy.transports.second_try import SecondTry
from mcp_proxy.wire.jsonrpc import Notification, Response


class StdioTransport(Transport):
    """A transport in front of a stdio server, wherever its children are.

    `command` is a list of arguments, a string, or a StdioServer. Without `session_storage` sessions
    live in memory; with a Redis one they are served by every replica that shares it, over `relay`,
    which is made for it if none is given. `manager`, `replica`, `edge` and `sessions` are given by
    an application that shares them among transports. Nothing starts before the first request;
    `close` ends everything that did.
    """

    def __init__(
        self,
        command: Sequence[str] | str | StdioServer,
        session_storage: Storage | None = None,
        settings: ProxyConfig | None = None,
        *,
        manager: SessionManager | None = None,
        replica: Replica | None = None,
        edge: Edge | None = None,
        relay: Relay | None = None,
        sessions: StdioSessions | None = None,
    ) -> None:
        self.settings = settings or ProxyConfig()
        self.server = (
            command
            if isinstance(command, StdioServer)
            else StdioServer("default", as_command(command))
        )
        self.manager = manager or SessionManager(
            session_storage, self.settings.session_ttl, self.settings.unknown_session_status
        )
        self.replica = replica or Replica()
        self.edge = edge or Edge(self.settings)
        self.relay = relay or relay_for(self.manager.storage, self.replica)
        self.sessions = sessions or StdioSessions(
            self.server, self.manager, self.replica, self.settings, self.relay
        )

    def close(self) -> None:
        """Ends every child of this replica; for a transport that is used on its own."""
        self.sessions.close()
        if self.relay is not None:
            self.relay.close()
        self.replica.close()

    @property
    def is_shared(self) -> bool:
        return self.relay is not None

    @property
    def is_busy(self) -> bool:
        return self.sessions.is_busy or (self.relay is not None and self.relay.is_busy)

    def end_streams(self) -> None:
        self.sessions.end_streams()

    def hand_over(self) -> None:
        if self.is_shared:
            self.sessions.hand_over()

    def shut_down(self) -> None:
        """Ends the sessions' servers; the replica is closed by who shares it."""
        self.sessions.close()

    def trouble(self) -> str | None:
        program = self.server.argv[0]
        if shutil.which(program, path=self.server.env.get("PATH")) is None:
            return f"{program} is not an executable file"
        return self.sessions.restarts.trouble()

    # --- to the backend --------------------------------------------------------------------------

    def pass_on(self, session: Session, message: Notification | Response) -> None:
        """Passes on what wants no answer; raises BackendError, StorageUnavailable."""
        self.sessions.on_backend(session, lambda backend: _pass_on(backend, message))

    def open_exchange(self, session: Session, act: Callable[[Backend], Exchange]) -> Exchange:
        """The exchange that `act` opens; opened anew if the backend turns out to be unreachable."""
        exchange = self.sessions.on_backend(session, act)
        if isinstance(exchange, RemoteExchange):
            return SecondTry(exchange, lambda: self.sessions.on_new_backend(session, act))
        return exchange


def _pass_on(backend: Backend, message: Notification | Response) -> None:
    if isinstance(message, Notification):
        backend.notify(message)
    else:
        backend.respond(message)
