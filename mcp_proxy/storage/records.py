"""The contract of a session store, and the store in memory."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from mcp_proxy.config import require_seconds
from mcp_proxy.errors import ConfigError, SessionExists, SessionNotFound
from mcp_proxy.rate_buckets import CountEverywhere
from mcp_proxy.storage.event_log import KEPT, EventLog, LocalEventLog, ScopedEventLog
from mcp_proxy.storage.mailboxes import Mailboxes
from mcp_proxy.storage.session import Session, encode, minted_by

#: Seconds for which a store remembers that it issued an id.
ISSUED_TTL = 7 * 24 * 3600


class Storage(ABC):
    """Keeps session records, each for its time to live after it was last written or loaded.

    Every method may be called from any thread and raises StorageUnavailable when the store cannot
    be reached, never an error of the library underneath. Every change is atomic on its record.
    """

    #: Seconds that a record lives after it was last written or loaded.
    ttl: float = 7200

    #: Whether other processes see the same records.
    is_shared: bool = True

    @abstractmethod
    def create(self, session: Session) -> None:
        """Stores a new record and remembers for seven days that its id was issued.

        An id of our own form is not remembered: its form shows that it was issued.

        Raises SessionExists if the id is taken, StorageError if the record is too large.
        """

    @abstractmethod
    def load(self, session_id: str) -> Session:
        """The record, its time to live restarted by the same command. Raises SessionNotFound."""

    @abstractmethod
    def exists(self, session_id: str) -> bool:
        """Whether there is a record; does not restart its time to live."""

    @abstractmethod
    def peek(self, session_id: str) -> Session | None:
        """The record, None where there is none; does not restart its time to live."""

    @abstractmethod
    def swap(self, old: Session, new: Session) -> bool:
        """Replaces `old` by `new` if `old` is stored; False if it is not.

        Of several callers with the same `old` and different `new` exactly one succeeds. Never
        restores a deleted or expired record.
        """

    @abstractmethod
    def delete(self, session_id: str) -> None:
        """Removes the record; it may be absent."""

    @abstractmethod
    def issued(self, session_id: str) -> bool:
        """Whether `create` was called with this id in the last seven days."""

    def keep(self, name: str, value: str, ttl: float) -> str:
        """Keeps a text of the deployment for `ttl` seconds, and returns it.

        Where there is one of that name the first writer's stands, and is returned. A store that
        keeps none returns what it was given.
        """
        return value

    def kept(self, name: str) -> str | None:
        """The text of that name, None where there is none, or no longer."""
        return None

    @abstractmethod
    def event_log(self) -> EventLog:
        """The event log of this store's sessions; processes that share the store share it."""

    def scoped(self, name: str) -> Storage:
        """This store for the sessions of one server: each name has sessions of its own.

        Raises ConfigError where the store does not separate names, or for what is no name.
        """
        raise ConfigError(
            f"{type(self).__name__} keeps all sessions under one name; leave name out"
        )

    def rate_counter(self) -> CountEverywhere | None:
        """What counts requests for all processes that share the store; None where nothing does.

        Raises ConfigError where what it needs is not installed.
        """
        return None

    def mailboxes(self) -> Mailboxes | None:
        """The mailboxes of the replicas that share this store.

        None where the store has none: then a replica that is asked for a stdio session of another
        one takes it over, as after a crash. Run one process on such a store.
        """
        return None

    @abstractmethod
    def check(self) -> None:
        """Returns if the store can be written to; raises StorageUnavailable, which says why not."""

    @abstractmethod
    def close(self) -> None:
        """Frees the resources of this object; harmless when repeated."""


def require_name(name: object) -> None:
    """Raises ConfigError unless sessions can be kept under this name."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name must be a text that is not empty, not {name!r}")


# --- in memory -----------------------------------------------------------------------------------

#: The most issued ids that are remembered, about 20 MB; the oldest are forgotten first.
MAX_ISSUED = 100_000


#: The most texts of `keep`, about 20 MB; the oldest go first.
MAX_KEPT = 100_000

#: The most bytes of records, with what each costs besides; the least recently used end first.
MAX_RECORDS_BYTES = 64 * 1024 * 1024
#: What a record costs besides its bytes.
RECORD_COST = 1024


class _Entry(NamedTuple):
    session: Session
    expires: float
    size: int


class LocalStorage(Storage):
    """Records of this process only. `ttl` in seconds; `clock` is for tests.

    Their memory is bounded: when it is used up, the sessions that were not used for the longest
    time end.
    """

    is_shared = False

    def __init__(self, ttl: float = 7200, clock: Callable[[], float] = time.monotonic) -> None:
        require_seconds("ttl", ttl)
        self.ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()  # guards _scopes, _entries, _size, _issued and _kept
        self._scopes: dict[str, LocalStorage] = {}
        # Every write and load moves its record to the end, so the next to expire is the first.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._size = 0  # of all entries
        self._issued: OrderedDict[str, float] = OrderedDict()
        self._kept: OrderedDict[str, tuple[str, float]] = OrderedDict()  # and until when
        self._events: EventLog = LocalEventLog(min(ttl, KEPT), clock)

    def __repr__(self) -> str:
        kept = f"sessions={len(self._entries)} issued={len(self._issued)}"
        return f"<LocalStorage {kept} bytes={self._size}>"

    def create(self, session: Session) -> None:
        size = len(encode(session))  # raises StorageError for a record that is too large
        with self._lock:
            now = self._sweep()
            if session.id in self._entries:
                raise SessionExists(f"Session {session.id} exists already")
            self._put(session, now, size)
            if minted_by(session.id) is None:
                self._remember(session.id, now)

    def load(self, session_id: str) -> Session:
        with self._lock:
            now = self._clock()
            entry = self._entries.get(session_id)
            if entry is None or entry.expires <= now:
                self._sweep()
                raise SessionNotFound
            self._entries[session_id] = _Entry(entry.session, now + self.ttl, entry.size)
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
        size = len(encode(new))
        with self._lock:
            now = self._sweep()
            entry = self._entries.get(old.id)
            if entry is None or entry.session != old:
                return False
            self._put(new, now, size)
            return True

    def delete(self, session_id: str) -> None:
        with self._lock:
            self._drop(session_id)

    @property
    def count(self) -> int:
        """How many records there are; some may have expired."""
        return len(self._entries)

    def take_out(self, may_go: Callable[[Session], bool]) -> list[tuple[Session, float]]:
        """Removes the records that may go; each with the seconds that it has to live.

        `may_go` must be quick.
        """
        with self._lock:
            now = self._sweep()
            going = [entry for entry in self._entries.values() if may_go(entry.session)]
            for entry in going:
                self._drop(entry.session.id)
            return [(entry.session, entry.expires - now) for entry in going]

    def issued(self, session_id: str) -> bool:
        with self._lock:
            return self._issued.get(session_id, 0.0) > self._clock()

    def keep(self, name: str, value: str, ttl: float) -> str:
        with self._lock:
            now = self._clock()
            kept, until = self._kept.get(name, (value, 0.0))
            if until > now:
                return kept
            self._kept[name] = (value, now + ttl)
            self._kept.move_to_end(name)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return value

    def kept(self, name: str) -> str | None:
        with self._lock:
            value, until = self._kept.get(name, (None, 0.0))
            return value if until > self._clock() else None

    def event_log(self) -> EventLog:
        return self._events

    def scoped(self, name: str) -> LocalStorage:
        require_name(name)
        with self._lock:
            if name not in self._scopes:
                scope = self._scopes[name] = LocalStorage(self.ttl, self._clock)
                scope._events = ScopedEventLog(self._events, name)
            return self._scopes[name]

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _sweep(self) -> float:
        """Drops expired records and returns the time; the lock is held."""
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires <= now:
            self._drop(next(iter(self._entries)))
        return now

    def _put(self, session: Session, now: float, size: int) -> None:
        """Stores a record; those that were not used for the longest time make room for it."""
        self._drop(session.id)
        self._entries[session.id] = _Entry(session, now + self.ttl, size + RECORD_COST)
        self._size += size + RECORD_COST
        while self._size > MAX_RECORDS_BYTES and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))

    def _drop(self, session_id: str) -> None:
        entry = self._entries.pop(session_id, None)
        self._size -= 0 if entry is None else entry.size

    def _remember(self, session_id: str, now: float) -> None:
        self._issued[session_id] = now + ISSUED_TTL
        self._issued.move_to_end(session_id)
        while len(self._issued) > MAX_ISSUED:
            self._issued.popitem(last=False)
