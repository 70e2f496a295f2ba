"""The contract of mailboxes, by which replicas send each other envelopes, and those in memory.

Each replica has one mailbox, which is also its lease: a mailbox that is not renewed in time is
deleted with its envelopes, and envelopes to a missing mailbox are refused. So all replicas agree
whether a replica is gone, and a replica that was gone never reads the envelopes from before.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: Seconds that a mailbox lives without being renewed.
LEASE = 15.0


class Envelope(NamedTuple):
    """Bytes for the mailbox of one replica."""

    to: str
    data: bytes


class Mailboxes(ABC):
    """The mailboxes of all replicas that share a store. Every method may be called from any thread.

    Raises StorageUnavailable when the store cannot be reached. An accepted envelope arrives at most
    twice (a store's client may repeat a command whose answer was lost); the envelopes of one sender
    arrive in order.
    """

    #: Seconds that a mailbox lives without being renewed.
    lease: float = LEASE

    @abstractmethod
    def renew(self, replica: str) -> bool:
        """Renews a mailbox, or opens it; False where it had to be opened."""

    @abstractmethod
    def is_open(self, replica: str) -> bool:
        """Whether a replica has a mailbox."""

    def are_open(self, replicas: Sequence[str]) -> list[bool]:
        """The same of several; where they are far away in one round trip."""
        return [self.is_open(replica) for replica in replicas]

    @abstractmethod
    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        """Puts envelopes into their mailboxes; False for each whose mailbox does not exist."""

    @abstractmethod
    def collect(self, replica: str, timeout: float) -> list[bytes]:
        """Takes envelopes out of a mailbox, the oldest first; waits at most `timeout` seconds.

        Called by one thread only, of the replica that owns the mailbox.
        """

    @abstractmethod
    def remove(self, replica: str) -> list[bytes]:
        """Removes the mailbox of a replica that stops; returns what was left in it, oldest first.

        At once: what is posted is either returned here (or by `collect` before), or refused.
        """

    @abstractmethod
    def uptime(self) -> float:
        """Seconds since the store started, so since leases can be renewed."""

    @abstractmethod
    def close(self) -> None:
        """Frees the resources of this object; the mailboxes stay."""


# --- in memory ------------------------------------------------------------------------------------

_MAX_COLLECTED = 256  # envelopes


class _Mailbox:
    def __init__(self, expires: float) -> None:
        self.expires = expires
        self.envelopes: deque[bytes] = deque()


class LocalMailboxes(Mailboxes):
    """Mailboxes of replicas that share this object. `lease` in seconds; `clock` is for tests."""

    def __init__(self, lease: float = LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease = lease
        self._clock = clock
        self._started = clock()
        self._arrived = threading.Condition()  # guards and announces _boxes
        self._boxes: dict[str, _Mailbox] = {}

    def __repr__(self) -> str:
        return f"<LocalMailboxes {list(self._boxes)}>"

    def renew(self, replica: str) -> bool:
        with self._arrived:
            box, expires = self._box(replica), self._clock() + self.lease
            if box is None:
                self._boxes[replica] = _Mailbox(expires)
                return False
            box.expires = expires
            return True

    def is_open(self, replica: str) -> bool:
        with self._arrived:
            return self._box(replica) is not None

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        with self._arrived:
            accepted = [self._put(envelope) for envelope in envelopes]
            self._arrived.notify_all()
        return accepted

    def _put(self, envelope: Envelope) -> bool:
        box = self._box(envelope.to)
        if box is not None:
            box.envelopes.append(envelope.data)
        return box is not None

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._has_envelopes(replica), timeout)
            box = self._box(replica)
            count = 0 if box is None else min(_MAX_COLLECTED, len(box.envelopes))
            return [box.envelopes.popleft() for _ in range(count)] if box is not None else []

    def remove(self, replica: str) -> list[bytes]:
        with self._arrived:
            box = self._box(replica)
            self._boxes.pop(replica, None)
        return [] if box is None else list(box.envelopes)

    def uptime(self) -> float:
        return self._clock() - self._started

    def close(self) -> None:
        pass

    def _has_envelopes(self, replica: str) -> bool:
        box = self._box(replica)
        return box is not None and bool(box.envelopes)

    def _box(self, replica: str) -> _Mailbox | None:
        """The mailbox, None where there is none or it has expired; the lock is held."""
        box = self._boxes.get(replica)
        if box is not None and box.expires <= self._clock():
            del self._boxes[replica]
            return None
        return box
