"""The handshake in a session's record, from which a lost backend is restored."""

from __future__ import annotations

import logging

import msgspec

from mcp_proxy.errors import SessionNotFound
from mcp_proxy.replica import has_ended
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    INIT_BODY,
    PROTOCOL_VERSION,
    RESUME,
    Session,
    new_session,
)
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.handshake import Change, decode_resume
from mcp_proxy.wire.jsonrpc import Request, Response

log = logging.getLogger(__name__)

# Tries to record a change while others change the record too, each time one of them with success.
_ROUNDS = 100

#: The longest initialize request that is recorded, in bytes; a longer one cannot be replayed.
MAX_INIT_BODY = 64 * 1024


def opened(session_id: str, kind: str, request: Request, response: Response | None) -> Session:
    """The record of a session that `request` opened; `response` is the answer, if known."""
    metadata: dict[str, str] = {}
    if response is not None:
        metadata[PROTOCOL_VERSION] = jsonrpc.protocol_version_of(response.result) or ""
    body = jsonrpc.encode(request)
    if len(body) <= MAX_INIT_BODY:
        metadata[INIT_BODY] = body.decode()
    return new_session(session_id, kind, **metadata)


def remember(manager: SessionManager, session_id: str, change: Change) -> None:
    """Adds a change to the session's record, for the time when the child is lost.

    Waits while the record is claimed. Raises StorageUnavailable; an ended session is no error.
    """
    for _ in range(_ROUNDS):
        try:
            session = claims.unclaimed(manager, manager.load(session_id), has_ended)
        except SessionNotFound:
            return
        try:
            resume = decode_resume(session.metadata.get(RESUME)).after(change)
        except msgspec.DecodeError:
            log.warning("what a session's record keeps of its state cannot be read")
            return
        if manager.swap(session, session.with_metadata(**{RESUME: resume.encode()})):
            return
    log.warning("a log level or subscription was not recorded: others keep changing the record")
