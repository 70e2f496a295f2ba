"""The contract of mailboxes: how replicas send each other letters, and know who is there.

Each replica has one mailbox. That it is there is the replica's lease: it vanishes when it was not
renewed for the lease's time, with everything in it, and a letter to a mailbox that is not there is
refused. So nobody can be alive for one and dead for another, and what was sent to a replica that
was declared dead is never read.
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


class Letter(NamedTuple):
    """What is sent: to which replica, and the bytes."""

    to: str
    data: bytes


class Mailboxes(ABC):
    """The mailboxes of all replicas that share a store. Every method may be called from any thread.

    Raises StorageUnavailable when the store cannot be reached. A letter that was accepted arrives
    at most twice (a store's client may repeat what it is not sure of), in the order of one sender.
    """

    #: Seconds that a mailbox lives without being renewed.
    lease: float = LEASE

    @abstractmethod
    def renew(self, replica: str) -> bool:
        """Prolongs the life of a mailbox, or opens it; False where it had to be opened."""

    @abstractmethod
    def is_open(self, replica: str) -> bool:
        """Whether a replica has a mailbox."""

    @abstractmethod
    def post(self, letters: Sequence[Letter]) -> list[bool]:
        """Puts letters into their mailboxes; False for each whose mailbox is not there."""

    @abstractmethod
    def collect(self, replica: str, timeout: float) -> list[bytes]:
        """Takes letters out of a mailbox, the oldest first; waits `timeout` seconds for the first.

        For one thread of the replica that owns the mailbox.
        """

    @abstractmethod
    def remove(self, replica: str) -> None:
        """Ends a mailbox at once: the replica is leaving."""

    @abstractmethod
    def uptime(self) -> float:
        """Seconds for which the store has been running, so for how long leases could be renewed."""

    @abstractmethod
    def close(self) -> None:
        """Frees what this object holds; the mailboxes stay."""


# --- local: Mailboxes in memory: for several replicas in one process, and the reference for every other.

_MAX_LETTERS = 256  # that one look takes out


class _Mailbox:
    def __init__(self, expires: float) -> None:
        self.expires = expires
        self.letters: deque[bytes] = deque()


class LocalMailboxes(Mailboxes):
    """Shared by handing the same object to each replica. `lease` in seconds; `clock` for tests."""

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

    def post(self, letters: Sequence[Letter]) -> list[bool]:
        with self._arrived:
            accepted = [self._put(letter) for letter in letters]
            self._arrived.notify_all()
        return accepted

    def _put(self, letter: Letter) -> bool:
        box = self._box(letter.to)
        if box is not None:
            box.letters.append(letter.data)
        return box is not None

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._has_letters(replica), timeout)
            box = self._box(replica)
            count = 0 if box is None else min(_MAX_LETTERS, len(box.letters))
            return [box.letters.popleft() for _ in range(count)] if box is not None else []

    def remove(self, replica: str) -> None:
        with self._arrived:
            self._boxes.pop(replica, None)

    def uptime(self) -> float:
        return self._clock() - self._started

    def close(self) -> None:
        pass

    def _has_letters(self, replica: str) -> bool:
        box = self._box(replica)
        return box is not None and bool(box.letters)

    def _box(self, replica: str) -> _Mailbox | None:
        """The mailbox, None where there is none or its time is over; the lock is held."""
        box = self._boxes.get(replica)
        if box is not None and box.expires <= self._clock():
            del self._boxes[replica]
            return None
        return box
