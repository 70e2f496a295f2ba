"""A page of memory that gunicorn's master shares with its workers: a line for each slot.

It is anonymous, so only who was forked from the master has it. A line is written by the worker that
has the slot, and by the master while nobody has it. Each of its cells is eight bytes at an address
that eight divides, so nobody reads half of one; of several cells some may be newer than others.
"""

from __future__ import annotations

import enum
import mmap
import sys
from collections.abc import Iterable

# The bytes of a cell.
_CELL = 8

# Cells of a line: what a worker says of itself, the heirs of workers that had the slot before,
# cancellations that it has got, each with its time, and the homes that it has.
_NUMBERS = 16
HEIRS = 64
CANCELLATIONS = 64
HOMES = 512
_FIRST_CANCELLATION = _NUMBERS + HEIRS
_FIRST_HOME = _FIRST_CANCELLATION + 2 * CANCELLATIONS
_CELLS = _FIRST_HOME + HOMES

_NONCE_BITS = 32


class State(enum.IntEnum):
    """What the worker of a slot does."""

    FREE = 0
    SERVING = 1
    LEAVING = 2


class _Cell:
    """A whole number in a line."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __get__(self, line: Line, owner: type[Line]) -> int:
        return int(line.numbers[self._number])

    def __set__(self, line: Line, value: int) -> None:
        line.numbers[self._number] = value


class Line:
    """What one worker says of itself. Reading and writing take no lock."""

    #: The worker's process, and its start in ticks since boot: no other process ever has both.
    pid = _Cell(0)
    start = _Cell(1)
    #: One of `State`.
    state = _Cell(2)
    #: Threads that no request has, and standing streams that there may still be.
    free_threads = _Cell(3)
    free_streams = _Cell(4)
    #: Connections of clients, and sessions that are there.
    connections = _Cell(5)
    sessions = _Cell(6)
    #: What the ids of sessions have that the worker has minted; 0 before it serves.
    nonce = _Cell(7)
    #: Whether the worker is about to be replaced, and so inherits nothing.
    is_replaced = _Cell(9)
    # How many heirs were ever written; cell 8 is the heartbeat.
    _heir_count = _Cell(10)
    _cancellation_count = _Cell(11)

    def __init__(self, memory: memoryview) -> None:
        self.numbers = memory.cast("Q")
        self._seconds = memory.cast("d")

    def __repr__(self) -> str:
        return f"<Line {State(self.state).name} pid={self.pid} free_threads={self.free_threads}>"

    @property
    def load(self) -> int:
        """The sessions, and the requests that are answered just now, where all have equal threads.

        Only to be compared; it may be below zero.
        """
        return self.sessions - self.free_threads

    @property
    def heartbeat(self) -> float:
        """When the worker's main loop last went around, by the monotonic clock of the machine."""
        return float(self._seconds[8])

    @heartbeat.setter
    def heartbeat(self, now: float) -> None:
        self._seconds[8] = now

    def clear(self) -> None:
        """Nobody has the slot any more. Its heirs stay."""
        self.state = State.FREE
        for number in range(10):
            self.numbers[number] = 0
        self.set_homes(())

    # --- heirs -----------------------------------------------------------------------------------

    def add_heir(self, nonce: int, heir: int) -> None:
        """The sessions of the worker with the one nonce are at the worker with the other one.

        The last `HEIRS` of a slot are remembered.
        """
        self.numbers[_NUMBERS + self._heir_count % HEIRS] = nonce << _NONCE_BITS | heir
        self._heir_count += 1

    def heir_of(self, nonce: int) -> int | None:
        """The nonce of the worker that has the sessions of another one; None where none is known
        here.
        """
        for row in range(self._heir_count - 1, max(-1, self._heir_count - 1 - HEIRS), -1):
            pair = int(self.numbers[_NUMBERS + row % HEIRS])
            if pair >> _NONCE_BITS == nonce:
                return pair & (1 << _NONCE_BITS) - 1
        return None

    # --- cancellations ---------------------------------------------------------------------------

    def add_cancellation(self, call: int, now: float) -> None:
        """The worker has got a cancellation of a call, a number other than 0, that it knows nothing
        of. For one thread at a time. The last `CANCELLATIONS` of a slot are remembered.
        """
        at = _FIRST_CANCELLATION + 2 * (self._cancellation_count % CANCELLATIONS)
        self.numbers[at] = 0  # the time of the older one is not this one's
        self._seconds[at + 1] = now
        self.numbers[at] = call
        self._cancellation_count += 1

    def has_cancelled(self, call: int, since: float) -> bool:
        """Whether the worker has got a cancellation of a call since that time."""
        rows = range(_FIRST_CANCELLATION, _FIRST_HOME, 2)
        return any(self.numbers[at] == call and self._seconds[at + 1] >= since for at in rows)

    # --- homes -----------------------------------------------------------------------------------

    def set_homes(self, homes: Iterable[int]) -> None:
        """The homes that the worker has, each a number other than 0; those beyond `HOMES` are not
        found.
        """
        listed = list(homes)[:HOMES]
        for number, home in enumerate(listed, _FIRST_HOME):
            self.numbers[number] = home
        for number in range(_FIRST_HOME + len(listed), _CELLS):
            if not self.numbers[number]:
                break
            self.numbers[number] = 0


class SharedPage:
    """The lines of so many slots; to be made before the first fork."""

    def __init__(self, slot_count: int) -> None:
        self._size = _CELLS * _CELL
        self._memory = mmap.mmap(-1, slot_count * self._size + _CELL)
        memory = memoryview(self._memory)
        starts = range(0, slot_count * self._size, self._size)
        self.lines = [Line(memory[at : at + self._size]) for at in starts]

    def __repr__(self) -> str:
        taken = sum(line.state != State.FREE for line in self.lines)
        return f"<SharedPage {taken}/{len(self.lines)}>"

    @property
    def is_stopping(self) -> bool:
        """Whether the master has been told to stop, and so all workers are."""
        return bool(self._memory[-1])

    def replace_all(self) -> None:
        """In the master: every worker that there is now is about to be replaced."""
        for line in self.lines:
            line.is_replaced = int(line.state != State.FREE)

    def stop(self) -> None:
        """In the master: every worker is about to be told to stop."""
        self._memory[-1] = 1

    def find_home(self, home: int) -> int | None:
        """The number of the slot whose worker has a home; None where none is known."""
        cell = home.to_bytes(_CELL, sys.byteorder)
        at = self._memory.find(cell)
        while at >= 0:
            number, offset = divmod(at, self._size)
            if offset % _CELL == 0 and offset // _CELL >= _FIRST_HOME:
                return number
            at = self._memory.find(cell, at + 1)
        return None
