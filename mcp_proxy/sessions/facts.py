"""What the replicas of one store tell each other besides their sessions.

Each fact is a record, so that every store can keep it, under an id with a space: no client can send
that as the id of a session.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable

from mcp_proxy.errors import SessionExists, SessionNotFound, StorageError, StorageUnavailable
from mcp_proxy.storage.records import Storage
from mcp_proxy.storage.session import Session, new_session

log = logging.getLogger(__name__)

#: Seconds for which the era of a server is taken from another replica.
ERA_TIME = 600.0

_KEY_ID = "caller key"

#: The length of a key.
KEY_BYTES = 32

# Looks at the key in the time that its record lives, the seconds between two at most, and those
# until the next where the store was away.
_LOOKS_PER_TTL = 4
_MAX_LOOK = 60.0
_RETRY = 5.0


# At most one: the key of this process.
_keys: list[bytes] = []


def process_key() -> bytes:
    """A key of this process; processes that are forked from it later have the same."""
    if not _keys:
        _keys.append(secrets.token_bytes(KEY_BYTES))
    return _keys[0]


def use_key(key: bytes) -> None:
    """Has this be the key of this process: for one that goes on where another has ended."""
    _keys[:] = [key]


class CallerKey:
    """The key of the digests that stand for callers, the same for all replicas. Thread-safe.

    In a shared store the first that is written is everybody's. It is read again now and then, which
    keeps its record, and where the store has lost that it is written anew. Else the key is that of
    the process.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._key = b""
        self._is_agreed = False
        self._until = 0.0  # monotonic
        self._interval = min(_MAX_LOOK, storage.ttl / _LOOKS_PER_TTL)

    def __repr__(self) -> str:
        return f"<CallerKey is_agreed={self._is_agreed}>"

    def digest(self, text: bytes) -> str:
        """What stands for a caller who shows this.

        Raises StorageError where the key has never been read.
        """
        if time.monotonic() >= self._until:
            self._look()
        return hmac.digest(self._key, text, "sha256").hex()

    def _look(self) -> None:
        own = self._key or process_key()
        try:
            self._key = self._kept(own) if self._storage.is_shared else own
        except StorageError as error:
            if not self._is_agreed:
                raise
            log.debug("the key of callers was not read: %s", error)
            self._until = time.monotonic() + min(_RETRY, self._interval)
        else:
            self._is_agreed = True
            self._until = time.monotonic() + self._interval

    def _kept(self, own: bytes) -> bytes:
        """The key in the store, which is our own where there was none."""
        for _ in range(2):
            with contextlib.suppress(SessionNotFound):
                return bytes.fromhex(self._storage.load(_KEY_ID).metadata["key"])
            with contextlib.suppress(SessionExists):
                self._storage.create(new_session(_KEY_ID, "key", key=own.hex()))
                return own
        raise StorageUnavailable


class SharedEra:
    """Which era a stdio server speaks, as the last replica that has asked it says. Thread-safe.

    `command` is what starts the server: another one starts another server.
    """

    def __init__(self, storage: Storage, command: Iterable[str]) -> None:
        self._storage = storage
        digest = hashlib.sha256("\0".join(command).encode("utf-8", "surrogateescape")).hexdigest()
        self.record_id = f"era {digest}"

    def __repr__(self) -> str:
        return f"<SharedEra {self.record_id}>"

    def is_modern(self) -> bool | None:
        """Whether the server speaks 2026-07-28; None where nobody has asked it for a while.

        Raises StorageError.
        """
        record = self._storage.peek(self.record_id)
        if record is None or not 0.0 <= time.time() - record.created_at <= ERA_TIME:
            return None
        return record.metadata["era"] == "modern"

    def note(self, is_modern: bool) -> None:
        """This replica has asked the server; raises StorageError."""
        record = self._record(is_modern)
        older = self._storage.peek(self.record_id)
        if older is not None:
            self._storage.swap(older, record)
        else:
            with contextlib.suppress(SessionExists):  # somebody else was faster
                self._storage.create(record)

    def _record(self, is_modern: bool) -> Session:
        return new_session(self.record_id, "era", era="modern" if is_modern else "legacy")
