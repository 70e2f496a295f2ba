"""Claims, by which exactly one of several callers restores a session's lost backend.

A caller swaps a claim with its name into the record, does the work, and swaps in the result. A
caller that loses the first swap waits for the winner. A session that is ended meanwhile stays
ended: the last swap finds no record, and the new backend has to be stopped.

A claim ends when its claimant is gone, and otherwise by the clock of whoever waits: once it has
been seen for CLAIM_TIME. Clocks of machines differ, so what a claim says of the time counts only
where it is long over. One that could not be given back, as the store was away, holds up nobody in
this process; on the stdio side it is given back as soon as the store is there again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mcp_proxy.errors import BackendTimeout, ClientLeft, StorageError, in_seconds
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import CLAIM, Session

log = logging.getLogger(__name__)

#: Seconds for which a claim holds; after that, or when the claimant is gone, others may claim.
CLAIM_TIME = 60.0

# Seconds by which the clocks of two machines may differ.
_SKEW = 600.0

_POLL = 0.05


def claim(
    manager: SessionManager,
    session: Session,
    claimant: str,
    is_gone: Callable[[str], bool],
    has_left: Callable[[], bool] | None = None,
    limit: float = CLAIM_TIME,
) -> Session | None:
    """The record with a claim of `claimant`; None if another claimant was faster and has finished.

    Waits while another claim holds, until `is_gone` says that its claimant is gone and for
    CLAIM_TIME at most. Raises ClientLeft when `has_left` says so meanwhile, SessionEnded when the
    session ends, BackendTimeout after `limit` seconds of waiting or when others claim it again and
    again, StorageUnavailable.
    """
    if CLAIM in session.metadata and not _is_stale(manager, session, is_gone):
        current = unclaimed(manager, session, is_gone, has_left, limit)
        if CLAIM not in current.metadata:
            return None
        session = current
    value = f"{time.time() + CLAIM_TIME:.3f} {secrets.token_hex(8)} {claimant}"
    claimed = session.with_metadata(**{CLAIM: value})
    if manager.swap(session, claimed):
        return claimed
    unclaimed(manager, manager.load(session.id), is_gone, has_left, limit)
    return None


def settle(manager: SessionManager, claimed: Session, **result: str | None) -> bool:
    """Replaces the claim by the result of the work; False when the record is not `claimed` now."""
    return manager.swap(claimed, claimed.with_metadata(**{CLAIM: None, **result}))


def release(manager: SessionManager, claimed: Session) -> None:
    """Removes a claim whose work failed, so that the next request may try."""
    manager.swap(claimed, claimed.with_metadata(**{CLAIM: None}))


@contextmanager
def released_on_failure(manager: SessionManager, claimed: Session) -> Iterator[None]:
    """Gives the claim back if the work raises, whatever that is."""
    try:
        yield
    except BaseException:
        try:
            release(manager, claimed)
        except StorageError as error:
            log.warning("a claim could not be given back yet: %s", error)
            manager.leave_claim(claimed.metadata[CLAIM], claimed)
        raise


def give_back_left(manager: SessionManager) -> None:
    """Gives back what `released_on_failure` could not; raises StorageError, and then try again."""
    for value, claimed in manager.claims_left().items():
        release(manager, claimed)
        manager.forget_claim(value)


def unclaimed(
    manager: SessionManager,
    session: Session,
    is_gone: Callable[[str], bool],
    has_left: Callable[[], bool] | None = None,
    limit: float = CLAIM_TIME,
) -> Session:
    """Waits until no claim holds, and returns the record; raises as `claim` does.

    Only its claimant may change a claimed record: another change would make the last swap fail.
    """
    limit = min(limit, CLAIM_TIME)
    until = time.monotonic() + limit
    while CLAIM in session.metadata and not _is_stale(manager, session, is_gone):
        if time.monotonic() > until:
            raise BackendTimeout(
                f"The session's server was not brought back within {in_seconds(round(limit, 1))}"
            )
        if has_left is not None and has_left():
            raise ClientLeft
        time.sleep(_POLL)
        session = manager.load(session.id)
    return session


def _is_stale(manager: SessionManager, session: Session, is_gone: Callable[[str], bool]) -> bool:
    value = session.metadata[CLAIM]
    if value in manager.claims_left():
        return True
    if time.monotonic() - manager.first_seen(value) >= CLAIM_TIME:
        return True
    deadline, _, rest = value.partition(" ")
    claimant = rest.partition(" ")[2]
    return _is_long_over(deadline) or (claimant != "" and is_gone(claimant))


def _is_long_over(deadline: str) -> bool:
    try:
        return float(deadline) + _SKEW < time.time()
    except ValueError:
        return False
