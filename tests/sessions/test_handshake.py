"""What is recorded of a handshake while somebody has a claim on the record."""

from __future__ import annotations

import pytest

from mcp_proxy import LocalStorage, Session, SessionManager
from mcp_proxy.errors import ClientLeft
from mcp_proxy.sessions import claims, handshake
from mcp_proxy.storage.session import RESUME, UNSENT, new_session
from mcp_proxy.wire.handshake import change_of
from mcp_proxy.wire.jsonrpc import Request, as_payload


@pytest.fixture
def manager() -> SessionManager:
    return SessionManager(LocalStorage())


@pytest.fixture
def claimed(manager: SessionManager) -> Session:
    """A session on which another replica has a claim."""
    session = new_session("mcp-00000000-" + "0" * 32, "streamable", backend_url="old")
    manager.create(session)
    claimed = claims.claim(manager, session, "another", lambda claimant: False)
    assert claimed is not None
    return claimed


def test_a_change_waits_for_no_claim_once_its_client_has_left(
    manager: SessionManager, claimed: Session
) -> None:
    change = change_of(Request(1, "logging/setLevel", as_payload({"level": "debug"})))
    assert change is not None
    with pytest.raises(ClientLeft):
        handshake.remember(manager, claimed.id, change, lambda: True)
    assert claims.settle(manager, claimed)
    handshake.remember(manager, claimed.id, change, lambda: True)
    assert "debug" in manager.load(claimed.id).metadata[RESUME]


def test_a_lost_notification_is_kept_here_where_its_client_does_not_wait_for_a_claim(
    manager: SessionManager, claimed: Session
) -> None:
    unsent = handshake.UnsentInitialized(manager)
    unsent.keep(claimed.id, lambda: True)
    assert list(unsent.ids) == [claimed.id]
    assert UNSENT not in manager.load(claimed.id).metadata
