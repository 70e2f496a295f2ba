"""The record of a session that an HTTP backend has opened: it is pinned to that backend."""

from __future__ import annotations

from mcp_proxy.backends.choosing import BackendChooser
from mcp_proxy.errors import SessionExists
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    BACKEND_HOST,
    BACKEND_SID,
    BACKEND_URL,
    PROTOCOL_VERSION,
    Session,
)
from mcp_proxy.transports import handshake
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request, Response
from mcp_proxy.wire.targets import Address

KIND = "mcp"


class Pinning:
    """Writes, completes and drops records. Thread-safe; raises StorageError."""

    def __init__(self, manager: SessionManager, chooser: BackendChooser) -> None:
        self._manager = manager
        self._chooser = chooser

    def record(self, address: Address, session_id: str, message: Request) -> Session:
        """The session's record, before the client can use its id.

        A backend's id that another session has already (two backends that count from one) is given
        to the client under an id of our own.
        """
        place = {BACKEND_URL: address.url, BACKEND_HOST: address.name}
        session = handshake.opened(session_id, KIND, message, None).with_metadata(**place)
        try:
            self._manager.create(session)
        except SessionExists:
            minted = handshake.opened(self._manager.mint_id(), KIND, message, None)
            session = minted.with_metadata(**place, **{BACKEND_SID: session_id})
            self._manager.create(session)
        self._chooser.opened(session.id, address)
        return session

    def accept(self, session: Session, answer: Response | None) -> None:
        """Completes the record, or drops it when the server said no.

        An answer that could not be read (it is compressed, or enormous) has opened the session.
        """
        version = None if answer is None else jsonrpc.protocol_version_of(answer.result)
        if answer is not None and version is None:
            self.forget(session.id)
        elif version is not None:
            self._manager.swap(session, session.with_metadata(**{PROTOCOL_VERSION: version}))

    def forget(self, session_id: str) -> None:
        """The session is over."""
        self._manager.end(session_id)
        self._chooser.closed(session_id)
