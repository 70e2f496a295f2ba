"""The slots of gunicorn's workers: each has a line of the shared page and a socket for requests.

The master makes them before it forks, so only its workers have them; nothing of it has a name. A
worker gets the lowest slot that no other has, reads that slot's socket and writes to all of them.
What lies in a socket outlives the worker that should have read it, so the master closes it.

Where sessions are in memory the page tells where each is, by its id: the worker that has minted it,
or that one's heir, or for a home the worker that has it.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from mcp_proxy.errors import ConfigError, RequestId
from mcp_proxy.replica import own_process, process_of
from mcp_proxy.server.passing import drain
from mcp_proxy.shared_page import Line, SharedPage, State
from mcp_proxy.storage.session import minted_by

#: Bytes that may wait in a slot's socket, as far as the system allows it.
QUEUED_BYTES = 1024 * 1024

#: Seconds after which a worker whose main loop has not gone around is not offered anything.
STALE = 1.5

#: Slots that there are at least: for workers that are added, and that replace others.
_FEWEST = 16

# By how many fewer sessions and requests another worker gets the next session of this one.
_CLEARLY_FEWER = 4

# The id of a home: its caller, and what of that caller's.
_HOME = re.compile(r"home-([0-9a-f]{20})[0-9a-f]{4}([0-9a-f]{16})")


class Holder(NamedTuple):
    """The slot whose worker has a session in its memory, or will have it if it `may_come` yet."""

    number: int
    may_come: bool = False


class SlotTable:
    """All slots, as the master has them."""

    def __init__(self, worker_count: int) -> None:
        count = max(_FEWEST, 2 * worker_count)
        self.page = SharedPage(count)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count)]
        self._readers = [reader for reader, _ in pairs]
        self._writers = [writer for _, writer in pairs]
        for reader, writer in pairs:
            reader.setblocking(False)
            writer.setblocking(False)
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUED_BYTES)

    def __repr__(self) -> str:
        return f"<SlotTable {self.page!r}>"

    def require_room(self, worker_count: int) -> None:
        """Raises ConfigError for too many workers: a reload needs twice as many slots."""
        most = len(self._readers) // 2
        if worker_count > most:
            raise ConfigError(f"this master can have {most} workers")

    def lowest_free(self, taken: Iterable[int | None]) -> int | None:
        """The number of the slot for the next worker; None where others have them all."""
        free = set(range(len(self._readers))).difference(taken)
        return min(free, default=None)

    def take(self, number: int) -> Slot:
        """In a worker just forked: its slot. What it has to itself of the others is closed."""
        for other, reader in enumerate(self._readers):
            if other != number:
                reader.close()
        return Slot(number, self.page, self._readers[number], self._writers)

    def close(self) -> None:
        """In a worker without a slot."""
        for end in (*self._readers, *self._writers):
            end.close()

    def free(self, number: int) -> None:
        """In the master: the slot's worker has ended.

        What lies in the socket is closed, unread: those who sent it take it back before a worker
        that is started now could read it, which may get another slot, too.
        """
        self.page.lines[number].clear()
        drain(self._readers[number])


class Slot:
    """The slot of one worker, and its way to those of the others."""

    def __init__(
        self, number: int, page: SharedPage, reader: socket.socket, writers: list[socket.socket]
    ) -> None:
        self.number = number
        self.reader = reader
        self._page = page
        self._lines = lines = page.lines
        self._writers = writers
        self._process = own_process()
        self._own_ids: set[str] = set()
        self.line = lines[number]
        self.line.clear()
        self.line.pid, self.line.start = self._process
        self.line.heartbeat = time.monotonic()

    def __repr__(self) -> str:
        return f"<Slot {self.number} {self.line!r}>"

    def serve(self, nonce: str) -> None:
        """This worker takes requests from now on; `nonce` is in the ids that it mints."""
        self.line.nonce = int(nonce or "0", 16)
        self.line.state = State.SERVING

    def find(self, replica_id: str) -> int | None:
        """The number of the slot of another worker, which is that replica; None where none is."""
        if replica_id in self._own_ids:
            return None
        process = process_of(replica_id)
        if process == self._process:
            self._own_ids.add(replica_id)
        elif process is not None:
            for number, line in enumerate(self._lines):
                if (line.pid, line.start) == process and line.state != State.FREE:
                    return number
        return None

    @staticmethod
    def is_home(session_id: str) -> bool:
        """Whether an id is that of a home, and of no client's session."""
        return session_id.startswith("home-")

    def holder_of(self, session_id: str) -> Holder | None:
        """The slot whose worker has a session, or home, in memory; None where nobody has it.

        A home that nobody has yet is for one and the same worker, whoever asks.
        """
        home = _HOME.fullmatch(session_id)
        if home is not None:
            return self._home(home[1], int(home[2], 16))
        nonce = minted_by(session_id)
        return None if nonce is None else self._minter(int(nonce, 16))

    def _minter(self, nonce: int) -> Holder | None:
        """The worker with this nonce, or its heir, or the heir of that.

        One that leaves is asked first while it has sessions: whoever answers a question of a call
        that runs there has to reach it. What it has sent on it passes on.
        """
        may_come = False
        for _ in self._lines:
            number = self._number_of(nonce)
            if number is not None and self._may_have(number):
                return Holder(number, may_come)
            heirs = (line.heir_of(nonce) for line in self._lines)
            heir = next((heir for heir in heirs if heir is not None), None)
            if heir is None:  # it may leave without one
                return None if number is None else Holder(number, may_come)
            may_come |= number is not None
            nonce = heir
        return None

    def _may_have(self, number: int) -> bool:
        """Whether a worker may have a session that this one has not."""
        line = self._lines[number]
        if line.state == State.LEAVING:
            return number != self.number and line.sessions > 0
        return line.state == State.SERVING

    def _number_of(self, nonce: int) -> int | None:
        for number, line in enumerate(self._lines):
            if line.nonce == nonce and line.state != State.FREE:
                return number
        return None

    def _home(self, caller: str, home: int) -> Holder | None:
        """The worker that has a home; else the one for its caller, as rendezvous hashing says."""
        number = self._page.find_home(home)
        if number is not None and self._lines[number].state == State.SERVING:
            return Holder(number)
        serving = [n for n, line in enumerate(self._lines) if line.state == State.SERVING]
        if not serving:
            return None
        return Holder(
            max(serving, key=lambda n: zlib.crc32(f"{caller}{self._lines[n].nonce}".encode()))
        )

    def least_loaded(self) -> int | None:
        """The slot of a worker that is clearly better for a new session than this one, if any is.

        Which worker accepts a connection is the kernel's choice, and may be the same for a crowd.
        """
        best = min(self._fit(), key=lambda number: self._lines[number].load, default=None)
        if best is None or self.line.load - self._lines[best].load < _CLEARLY_FEWER:
            return None
        return best

    def set_homes(self, homes: Iterable[str]) -> None:
        """The homes that this worker has, by their ids."""
        found = (_HOME.fullmatch(home) for home in homes)
        self.line.set_homes([int(home[2], 16) for home in found if home is not None])

    def note_cancelled(self, session: str, call: RequestId) -> None:
        """This worker has got a cancellation of a call that does not wait here: it may elsewhere.

        For one thread at a time.
        """
        self.line.add_cancellation(_as_number(session, call), time.monotonic())

    def was_cancelled(self, session: str, call: RequestId, since: float) -> bool:
        """Whether any worker has got a cancellation of a call since that (monotonic) time."""
        number = _as_number(session, call)
        return any(line.has_cancelled(number, since) for line in self._lines)

    @property
    def is_stopping(self) -> bool:
        """Whether all workers are told to stop, or have ended."""
        return self._page.is_stopping

    def choose_heir(self) -> int | None:
        """The slot that gets the sessions of this worker, which leaves; None where nobody can.

        It is the one with the fewest sessions. From now on it is asked for those of this worker.
        """
        if self._page.is_stopping:
            return None
        heir = min(self._fit(), key=lambda number: self._lines[number].sessions, default=None)
        if heir is None:
            return None
        self.line.add_heir(self.line.nonce, self._lines[heir].nonce)
        return heir

    def _fit(self) -> list[int]:
        """The slots whose workers go on and are not frozen, as far as can be seen."""
        after = time.monotonic() - STALE
        lines = enumerate(self._lines)
        return [n for n, line in lines if self._can_inherit(line) and line.heartbeat > after]

    def inherit(self, nonces: Iterable[str | None]) -> None:
        """Sessions with these nonces in their ids are at this worker now."""
        for nonce in nonces:
            if nonce is not None:
                self.line.add_heir(int(nonce, 16), self.line.nonce)

    def can_inherit(self, number: int) -> bool:
        """Whether the worker of a slot still takes sessions."""
        return self._can_inherit(self._lines[number])

    @staticmethod
    def _can_inherit(line: Line) -> bool:
        return line.state == State.SERVING and not line.is_replaced

    def takes(self, number: int, *, is_stream: bool, is_only_one: bool = False) -> bool:
        """Whether the worker of a slot can be expected to take a request at once.

        One that leaves does where nobody else could answer.
        """
        line = self._lines[number]
        is_open = line.state == State.SERVING or (is_only_one and line.state == State.LEAVING)
        if not is_open or line.free_threads <= 0:
            return False
        if is_stream and line.free_streams <= 0:
            return False
        return line.heartbeat > time.monotonic() - STALE

    def writer_to(self, number: int) -> socket.socket:
        """The socket whose other end the worker of that slot reads."""
        return self._writers[number]

    @property
    def is_leaving(self) -> bool:
        """Whether this worker has said that it leaves."""
        return self.line.state == State.LEAVING

    def leave(self) -> None:
        """Says that this worker takes nothing more that another one could answer."""
        self.line.state = State.LEAVING


def _as_number(session: str, call: RequestId) -> int:
    """What stands for a call of a session in the shared page."""
    digest = hashlib.blake2b(f"{session} {call!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1
