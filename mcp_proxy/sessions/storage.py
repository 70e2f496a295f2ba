"""The contract of a session store."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mcp_proxy.sessions.events import EventLog
from mcp_proxy.sessions.session import Session

#: How long a store remembers that it issued an id, in seconds.
ISSUED_TTL = 7 * 24 * 3600


class Storage(ABC):
    """Keeps session records, each for its time to live after it was last written or loaded.

    Every method may be called from any thread and raises StorageUnavailable when the store cannot
    be reached, never an error of the library underneath. Every change is atomic on its record.
    """

    @abstractmethod
    def create(self, session: Session) -> None:
        """Stores a new record and remembers for seven days that its id was issued.

        Of an id of our own form nothing needs to be remembered: the form says it.

        Raises SessionExists if the id is taken, StorageError if the record is too large.
        """

    @abstractmethod
    def load(self, session_id: str) -> Session:
        """The record, its time to live started anew by the same command; or SessionNotFound."""

    @abstractmethod
    def exists(self, session_id: str) -> bool:
        """Whether there is a record; its time to live runs on."""

    @abstractmethod
    def peek(self, session_id: str) -> Session | None:
        """The record, None where there is none; its time to live runs on."""

    @abstractmethod
    def swap(self, old: Session, new: Session) -> bool:
        """Replaces `old` by `new` if `old` is what is stored; False if it is not, or nothing is.

        Of several callers with the same `old` and different `new` exactly one wins. Never brings
        back a record that is gone.
        """

    @abstractmethod
    def delete(self, session_id: str) -> None:
        """Removes the record; it may be absent."""

    @abstractmethod
    def issued(self, session_id: str) -> bool:
        """Whether `create` was ever called with this id (within seven days)."""

    @abstractmethod
    def event_log(self) -> EventLog:
        """A log of events for the sessions of this store, shared by whoever shares the store."""

    @abstractmethod
    def check(self) -> None:
        """Returns if the store answers, raises StorageUnavailable otherwise."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the store holds; harmless when repeated."""
