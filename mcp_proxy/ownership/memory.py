"""The sessions that a worker has in its memory alone, and how they move to another one's.

A session moves while nobody waits for it. Its server ends first, and is started again where it
went, at its next request, as after a crash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec
from msgspec import Raw

from mcp_proxy.errors import SessionExists, StorageError
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.storage.records import LocalStorage
from mcp_proxy.storage.session import MOVED, Session, decode, encode

log = logging.getLogger(__name__)


class _Servers(NamedTuple):
    storages: Mapping[str, LocalStorage]
    owners: Mapping[str, Owner]


class Memory:
    """The sessions of all servers, by the servers' names; stdio servers have an owner, too.

    Thread-safe.
    """

    def __init__(self, storages: Mapping[str, LocalStorage], owners: Mapping[str, Owner]) -> None:
        self.serve(storages, owners)

    def __repr__(self) -> str:
        return f"<Memory of {self.session_count} sessions>"

    def serve(self, storages: Mapping[str, LocalStorage], owners: Mapping[str, Owner]) -> None:
        """Has the sessions of these servers from now on."""
        self._servers = _Servers(storages, owners)  # replaced as a whole, so no lock guards it

    @property
    def session_count(self) -> int:
        """How many sessions there are."""
        return sum(storage.count for storage in self._servers.storages.values())

    @property
    def owned_count(self) -> int:
        """How many of them need this worker, since their servers are its children."""
        storages, owners = self._servers
        return sum(storages[server].count for server in owners)

    def homes(self) -> tuple[str, ...]:
        """The ids of the homes that are here."""
        return tuple(home for owner in self._servers.owners.values() for home in owner.homes())

    def take_out_idle(self) -> bytes:
        """Records of sessions with stdio servers for which nobody waits; the servers end, and they
        are here no longer. Nor are homes for which nobody waits.
        """
        storages, owners = self._servers
        for owner in owners.values():
            owner.hand_over()
        return _taken_out(
            {server: (storages[server], owners[server].may_move) for server in owners}
        )

    def take_out_all(self) -> bytes:
        """Records of all sessions that can go on elsewhere, or later; none is here any longer."""
        storages = self._servers.storages.items()
        return _taken_out({server: (storage, lambda session: True) for server, storage in storages})

    def put_in(self, data: bytes) -> list[str]:
        """Has the sessions that were taken out elsewhere; the ids of those that are here now.

        Their time to live begins anew; the events of their streams have stayed behind. What has
        expired, belongs to no server any more, or cannot be read is dropped.
        """
        found, dropped = _decode(data)
        ids: list[str] = []
        storages = self._servers.storages
        for server, session, expires in found:
            storage = storages.get(server)
            try:
                if storage is None or expires <= time.time():
                    dropped += 1
                else:
                    storage.create(session.with_metadata(**{MOVED: "yes"}))
                    ids.append(session.id)
            except (SessionExists, StorageError):
                dropped += 1
        if dropped:
            log.warning("%d records of sessions cannot be used any more", dropped)
        return ids


def _taken_out(
    storages: Mapping[str, tuple[LocalStorage, Callable[[Session], bool]]],
) -> bytes:
    """Records that may go, of each server's storage."""
    now = time.time()
    return _encode(
        _Moved(server, session, now + seconds)
        for server, (storage, may_go) in storages.items()
        for session, seconds in storage.take_out(may_go)
        if _can_go_on(session)
    )


def _can_go_on(session: Session) -> bool:
    """Whether a session needs nothing but its record: none whose client holds its stream does."""
    return session.type in ("streamable", "mcp")


# --- records on their way -------------------------------------------------------------------------


class _Moved(NamedTuple):
    """A session of a server, and when it expires (seconds since the epoch)."""

    server: str
    session: Session
    expires: float


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    server: str
    expires: float
    session: Raw


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Line)


def _encode(moved: Iterable[_Moved]) -> bytes:
    """A line of JSON for each."""
    lines = (_Line(each.server, each.expires, Raw(encode(each.session))) for each in moved)
    return b"".join(_encoder.encode(line) + b"\n" for line in lines)


def _decode(data: bytes) -> tuple[list[_Moved], int]:
    """What the lines hold, and how many of them cannot be read."""
    found: list[_Moved] = []
    unreadable = 0
    for line in filter(None, data.split(b"\n")):
        try:
            read = _decoder.decode(line)
            found.append(_Moved(read.server, decode(bytes(read.session)), read.expires))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, StorageError):
            unreadable += 1
    return found, unreadable
