"""Claim before acting: of all who want to bring back a session's backend exactly one does.

Whoever acts first swaps the record to a claim with a deadline, does the work, and swaps in the
result. Who loses that swap waits for the winner. A session that is ended in between stays ended:
the last swap finds no record, and what was just started has to be stopped again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import CLAIM, Session

#: Seconds that the winner has; after that, or when it is known to be gone, somebody else may try.
CLAIM_TIME = 60.0

_POLL = 0.05


def nobody_is_gone(claimant: str) -> bool:
    """For claimants of whom nothing can be known."""
    return False


def claim(
    manager: SessionManager,
    session: Session,
    claimant: str = "",
    is_gone: Callable[[str], bool] = nobody_is_gone,
) -> Session | None:
    """The record with the claim of `claimant` on it; None when somebody else was faster, and is
    done by now.

    Waits for a claim that stands already, until its deadline, or until `is_gone` says that its
    claimant has ended. Raises SessionEnded when the session ends meanwhile, StorageUnavailable.
    """
    if CLAIM in session.metadata and not _is_stale(session, is_gone):
        unclaimed(manager, session, is_gone)
        return None
    mark = f"{time.time() + CLAIM_TIME:.3f} {secrets.token_hex(8)} {claimant}"
    claimed = session.with_metadata(**{CLAIM: mark})
    if manager.swap(session, claimed):
        return claimed
    unclaimed(manager, manager.load(session.id), is_gone)
    return None


def settle(manager: SessionManager, claimed: Session, **result: str | None) -> bool:
    """Swaps in the result of the work; False when the session is no longer ours to change."""
    return manager.swap(claimed, claimed.with_metadata(**{CLAIM: None, **result}))


def release(manager: SessionManager, claimed: Session) -> None:
    """Takes the claim back: the work failed, and the next request may try."""
    manager.swap(claimed, claimed.with_metadata(**{CLAIM: None}))


def unclaimed(
    manager: SessionManager,
    session: Session,
    is_gone: Callable[[str], bool] = nobody_is_gone,
) -> Session:
    """The record without anybody's claim, or with one whose time is over; waits for that.

    A claimed record is the claimant's to change: another change would make its last swap fail.
    """
    while CLAIM in session.metadata and not _is_stale(session, is_gone):
        time.sleep(_POLL)
        session = manager.load(session.id)
    return session


def _is_stale(session: Session, is_gone: Callable[[str], bool]) -> bool:
    deadline, _, rest = session.metadata[CLAIM].partition(" ")
    claimant = rest.partition(" ")[2]
    return float(deadline) < time.time() or (claimant != "" and is_gone(claimant))
