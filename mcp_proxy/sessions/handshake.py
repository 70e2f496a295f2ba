"""The handshake in a session's record, from which a lost backend is restored."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec

from mcp_proxy.errors import ClientLeft, SessionNotFound, StorageError
from mcp_proxy.replica import has_ended
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    CLAIM,
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    UNSENT,
    Session,
    new_session,
)
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.handshake import INITIALIZED, Change, decode_resume
from mcp_proxy.wire.jsonrpc import Request, Response

log = logging.getLogger(__name__)

# Tries to record a change while others change the record too, each time one of them with success.
_ROUNDS = 100

_MAX_UNSENT = 10_000

#: The longest initialize request that is recorded, in bytes; a longer one cannot be replayed.
MAX_INIT_BODY = 64 * 1024


def opened(
    session_id: str,
    kind: str,
    request: Request,
    response: Response | None,
    binding: Mapping[str, str] = {},
) -> Session:
    """The record of a session that `request` opened; `response` is the answer, if known.

    `binding` says whose it is (`SessionManager.binding`).
    """
    metadata = dict(binding)
    if response is not None:
        metadata[PROTOCOL_VERSION] = jsonrpc.protocol_version_of(response.result) or ""
    body = jsonrpc.encode(request)
    if len(body) <= MAX_INIT_BODY:
        metadata[INIT_BODY] = body.decode()
    return new_session(session_id, kind, **metadata)


def remember(
    manager: SessionManager,
    session_id: str,
    change: Change,
    has_left: Callable[[], bool] | None = None,
) -> None:
    """Adds a change to the session's record, for the time when the child is lost.

    Waits while the record is claimed, unless `has_left` says that the client has left, which then
    has not heard that the server agreed: raises ClientLeft. Raises StorageUnavailable; an ended
    session is no error.
    """

    def changed(session: Session) -> Session | None:
        try:
            resume = decode_resume(session.metadata.get(RESUME)).after(change)
        except msgspec.DecodeError:
            log.warning("what a session's record keeps of its state cannot be read")
            return None
        return session.with_metadata(**{RESUME: resume.encode()})

    _record(manager, session_id, changed, has_left)


class UnsentInitialized:
    """The sessions of which `notifications/initialized` did not reach the server. Thread-safe.

    Many servers refuse everything until it came, so it is sent ahead of the next message. The
    session's record says so, for every replica; `ids` are those of this process whose record could
    not be changed, the oldest forgotten first.
    """

    def __init__(self, manager: SessionManager) -> None:
        self._manager = manager
        self._lock = threading.Lock()  # guards changes of ids
        self.ids: OrderedDict[str, None] = OrderedDict()

    def keep(
        self,
        session_id: str,
        has_left: Callable[[], bool] | None = None,
        principal: str | None = None,
    ) -> None:
        """The notification is to be sent to the server from now on, if the session is the caller's.

        Where `has_left` says that the client has left while the record is claimed, or where the
        store is away, this process alone knows; nobody does where it is not known whose it is.
        """

        def changed(session: Session) -> Session | None:
            if not self._manager.is_own(session, principal):
                return None
            return session.with_metadata(**{UNSENT: INITIALIZED})

        try:
            _record(self._manager, session_id, changed, has_left)
        except (StorageError, ClientLeft):
            if principal is not None:
                return
            with self._lock:
                self.ids[session_id] = None
                if len(self.ids) > _MAX_UNSENT:
                    self.ids.popitem(last=False)

    def sent(self, session: Session) -> None:
        """The server has it. Where others change the record now, it will get it once more."""
        with self._lock:
            self.ids.pop(session.id, None)
        if UNSENT in session.metadata and CLAIM not in session.metadata:
            self._manager.swap(session, session.with_metadata(**{UNSENT: None}))


def _record(
    manager: SessionManager,
    session_id: str,
    change: Callable[[Session], Session | None],
    has_left: Callable[[], bool] | None,
) -> None:
    """Swaps `change` into the record, if it has one; as `remember`."""
    for _ in range(_ROUNDS):
        try:
            session = claims.unclaimed(manager, manager.load(session_id), has_ended, has_left)
        except SessionNotFound:
            return
        changed = change(session)
        if changed is None or manager.swap(session, changed):
            return
    log.warning("a session's state was not recorded: others keep changing the record")
