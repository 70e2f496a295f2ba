"""Claims, by which exactly one of several callers restores a session's lost backend.

A caller swaps a claim with a deadline into the record, does the work, and swaps in the result. A
caller that loses the first swap waits for the winner. A session that is ended meanwhile stays
ended: the last swap finds no record, and the new backend has to be stopped.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import CLAIM, Session

#: Seconds for which a claim holds; after that, or when the claimant is gone, others may claim.
CLAIM_TIME = 60.0

_POLL = 0.05


def nobody_is_gone(claimant: str) -> bool:
    """Never true: for claims that end at their deadline only."""
    return False


def claim(
    manager: SessionManager,
    session: Session,
    claimant: str = "",
    is_gone: Callable[[str], bool] = nobody_is_gone,
) -> Session | None:
    """The record with a claim of `claimant`; None if another claimant was faster and has finished.

    Waits while another claim holds: until its deadline, or until `is_gone` says that its claimant
    is gone. Raises SessionEnded when the session ends meanwhile, StorageUnavailable.
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
    """Replaces the claim by the result of the work; False when the record is not `claimed` now."""
    return manager.swap(claimed, claimed.with_metadata(**{CLAIM: None, **result}))


def release(manager: SessionManager, claimed: Session) -> None:
    """Removes a claim whose work failed, so that the next request may try."""
    manager.swap(claimed, claimed.with_metadata(**{CLAIM: None}))


def unclaimed(
    manager: SessionManager,
    session: Session,
    is_gone: Callable[[str], bool] = nobody_is_gone,
) -> Session:
    """Waits until no claim holds, and returns the record; raises as `claim` does.

    Only its claimant may change a claimed record: another change would make the last swap fail.
    """
    while CLAIM in session.metadata and not _is_stale(session, is_gone):
        time.sleep(_POLL)
        session = manager.load(session.id)
    return session


def _is_stale(session: Session, is_gone: Callable[[str], bool]) -> bool:
    deadline, _, rest = session.metadata[CLAIM].partition(" ")
    claimant = rest.partition(" ")[2]
    return float(deadline) < time.time() or (claimant != "" and is_gone(claimant))
