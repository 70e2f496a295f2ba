"""The contract of a session store."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from mcp_proxy.errors import SessionExists, SessionNotFound
from mcp_proxy.storage.event_log import KEPT, EventLog, LocalEventLog
from mcp_proxy.storage.session import Session, encode, minted_by

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


# --- local: Sessions in memory: the default, and the reference for every other store.

#: Issued ids that are remembered at the most, the oldest forgotten first: about 20 MB.
MAX_ISSUED = 100_000


class _Entry(NamedTuple):
    session: Session
    expires: float


class LocalStorage(Storage):
    """Records of this process only. `ttl` in seconds; `clock` is for tests."""

    def __init__(self, ttl: float = 7200, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()  # guards _entries and _issued
        # Every write and load moves its record to the end, so the next to expire is the first.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._issued: OrderedDict[str, float] = OrderedDict()
        self._events = LocalEventLog(min(ttl, KEPT), clock)

    def __repr__(self) -> str:
        return f"<LocalStorage sessions={len(self._entries)} issued={len(self._issued)}>"

    def create(self, session: Session) -> None:
        encode(session)  # the same size limit as everywhere
        with self._lock:
            now = self._sweep()
            if session.id in self._entries:
                raise SessionExists(f"Session {session.id} exists already")
            self._entries[session.id] = _Entry(session, now + self.ttl)
            if minted_by(session.id) is None:
                self._remember(session.id, now)

    def load(self, session_id: str) -> Session:
        with self._lock:
            now = self._sweep()
            entry = self._entries.get(session_id)
            if entry is None:
                raise SessionNotFound
            self._entries[session_id] = _Entry(entry.session, now + self.ttl)
            self._entries.move_to_end(session_id)
            return entry.session

    def exists(self, session_id: str) -> bool:
        with self._lock:
            self._sweep()
            return session_id in self._entries

    def peek(self, session_id: str) -> Session | None:
        with self._lock:
            self._sweep()
            entry = self._entries.get(session_id)
            return None if entry is None else entry.session

    def swap(self, old: Session, new: Session) -> bool:
        encode(new)
        with self._lock:
            now = self._sweep()
            entry = self._entries.get(old.id)
            if entry is None or entry.session != old:
                return False
            self._entries[old.id] = _Entry(new, now + self.ttl)
            self._entries.move_to_end(old.id)
            return True

    def delete(self, session_id: str) -> None:
        with self._lock:
            self._entries.pop(session_id, None)

    def issued(self, session_id: str) -> bool:
        with self._lock:
            return self._issued.get(session_id, 0.0) > self._clock()

    def event_log(self) -> EventLog:
        return self._events

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _sweep(self) -> float:
        """Drops what has expired and returns the time; the lock is held."""
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires <= now:
            self._entries.popitem(last=False)
        return now

    def _remember(self, session_id: str, now: float) -> None:
        self._issued[session_id] = now + ISSUED_TTL
        self._issued.move_to_end(session_id)
        while len(self._issued) > MAX_ISSUED:
            self._issued.popitem(last=False)
