"""The contract of mailboxes: how replicas send each other letters, and know who is there.

Each replica has one mailbox. That it is there is the replica's lease: it vanishes when it was not
renewed for the lease's time, with everything in it, and a letter to a mailbox that is not there is
refused. So nobody can be alive for one and dead for another, and what was sent to a replica that
was declared dead is never read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
