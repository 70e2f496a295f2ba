"""The lease of this replica, and whether others are gone.

A replica is gone when its mailbox is, or when its process is (which only a neighbour on the same
machine can see, but at once). A missing mailbox proves nothing while the store has only just come
back, for us or at all: then everybody's mailbox is missing until its owner has renewed it. So
nobody is judged before one lease has passed since our own reconnect.

One thread renews the lease and looks after those whose leaving would matter to somebody here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.replica import has_ended
from mcp_proxy.storage.mailboxes import Mailboxes

log = logging.getLogger(__name__)

# Renewals of a lease, and looks at others in one.
_RENEWALS = 3
_LOOKS = 15

# Seconds between attempts to reach a store that is away, at the most.
_RETRY = 0.5

# The part of its lease that a replica does not rely on: the store counts in whole milliseconds from
# a time that it takes once for several commands, and clocks do not run at the same speed.
_MARGIN = 0.02

#: A clock (seconds) that goes on while the machine sleeps, as the store's does.
boottime = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease(Periodic):
    """Renews itself from `start` on. `on_look` is called now and then, `on_lapse` when the mailbox
    had gone, with whatever was in it, because it was not renewed in time.
    """

    def __init__(
        self,
        mailboxes: Mailboxes,
        replica: str,
        on_look: Callable[[], None],
        on_lapse: Callable[[], None],
        workers: Workers | None = None,
        can_serve: Callable[[], bool] = lambda: True,
    ) -> None:
        pause = min(_RETRY, mailboxes.lease / _LOOKS)
        super().__init__("mcp-relay-lease", pause, self._look_after, workers)
        self._mailboxes = mailboxes
        self._replica = replica
        self._on_look = on_look
        self._on_lapse = on_lapse
        self._can_serve = can_serve
        # Written by the thread (and before it starts), read by anybody.
        self._in_contact_since: float | None = None
        self._was_away = False  # ever
        self._lapses = 0
        self._renewed = 0.0

    def __repr__(self) -> str:
        return f"<Lease {self._replica} renewed={boottime() - self._renewed:.1f}s ago>"

    def start(self) -> None:
        """Opens the mailbox and starts the thread; raises StorageUnavailable."""
        self._mailboxes.renew(self._replica)
        self._renewed = self._in_contact_since = boottime()
        super().start()

    def end(self) -> list[bytes]:
        """Ends the thread and the mailbox: whoever asks learns at once that we are gone.

        Returns what nobody has read.
        """
        self.stop(2 * _RETRY)
        try:
            return self._mailboxes.remove(self._replica)
        except StorageUnavailable as error:
            log.info("the mailbox is left to expire: %s", error)
            return []

    # --- this replica ----------------------------------------------------------------------------

    @property
    def is_held(self) -> bool:
        """Whether nobody can have declared this replica dead: false after having been frozen."""
        return boottime() < self._renewed + self._mailboxes.lease * (1 - _MARGIN)

    @property
    def is_in_contact(self) -> bool:
        """Whether the store was there when it was last needed."""
        return self._in_contact_since is not None

    def freshness(self) -> Callable[[], bool]:
        """What tells, later, whether an envelope that is read from now on may be acted upon.

        It must not if this replica can have been declared dead since then. Where the lease is not
        held now there is no mailbox: what comes was sent to the next one.
        """
        lapses = self._lapses if self.is_held else self._lapses + 1
        return lambda: self.is_held and self._lapses <= lapses

    def _look_after(self) -> None:
        try:
            self.look()
        except StorageUnavailable as error:
            self._was_away = True
            self._in_contact_since = None
            log.debug("the lease is not renewed: %s", error)

    def look(self) -> None:
        """One look: renews the lease if it is time to, or lets it go where this replica can serve
        nobody, so that others need not wait for it; raises StorageUnavailable.
        """
        age = boottime() - self._renewed
        if not self._can_serve():
            self._let_go()
        elif self._in_contact_since is None or age > self._mailboxes.lease / _RENEWALS:
            self._renew()
        self._on_look()

    def _let_go(self) -> None:
        if self.is_held:
            self._mailboxes.remove(self._replica)
            self._renewed = -math.inf

    def _renew(self) -> None:
        began = boottime()
        had_lapsed = not self._mailboxes.renew(self._replica)
        self._lapses += had_lapsed  # before the lease counts as held again
        if had_lapsed or self._in_contact_since is None:
            self._in_contact_since = began
        self._renewed = began
        if had_lapsed:
            self._was_away = True
            log.warning("the mailbox of this replica had gone; it was opened again")
            self._on_lapse()

    # --- others ----------------------------------------------------------------------------------

    def is_gone(self, replica: str) -> bool:
        """Whether another replica is gone for good.

        Raises StorageUnavailable where that cannot be known yet.
        """
        if has_ended(replica):
            return True
        if self._mailboxes.is_open(replica):
            return False
        if self._may_judge():
            return True
        raise StorageUnavailable("The replica that holds the session is not back yet")

    def gone_among(self, replicas: Sequence[str]) -> set[str]:
        """Those of several replicas that are gone for good, as far as that can be known now."""
        gone = {replica for replica in replicas if has_ended(replica)}
        others = [replica for replica in replicas if replica not in gone]
        with contextlib.suppress(StorageUnavailable):
            are_open = self._mailboxes.are_open(others) if others else []
            missing = {one for one, is_open in zip(others, are_open, strict=True) if not is_open}
            if missing and self._may_judge():
                gone |= missing
        return gone

    def _may_judge(self) -> bool:
        since, lease = self._in_contact_since, self._mailboxes.lease
        if since is None:
            return False
        has_waited = boottime() - since > lease or not self._was_away
        # A store that came back faster than anybody noticed has lost every mailbox.
        return has_waited and self._mailboxes.uptime() > lease
