"""A text that gunicorn's master publishes to its workers: memory that all of them have.

It is anonymous, so only who was forked from the master has it, and nothing of it is ever on a disk:
the text may have secrets in it. There are two halves. The master writes the idle one and then the
generation, which says which half holds; a reader looks at the generation again once it has read,
and reads anew where that has changed. So nobody gets a half of one text and a half of another.

`server/` makes the text before the first fork and sets it as the `current` one, where applications
find it. Under other servers there is none.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from mcp_proxy.errors import ConfigError

#: The most bytes of a text. Memory that is not written to takes none.
MAX_BYTES = 1024 * 1024

# The bytes of a cell, and the cells before the halves: the generation, the bytes of each half, and
# two times.
_CELL = 8
_CELLS = 5
_WANTED, _LOOKED = 3, 4


class Published(NamedTuple):
    """A text, and its number among all that were published: the first one is 1."""

    generation: int
    data: bytes


class SharedText:
    """The memory of one text; to be made before the first fork.

    The master alone publishes. Every other method may be called from any thread and process, and
    waits for nobody. Times are in seconds by the machine's monotonic clock.
    """

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, _CELLS * _CELL + 2 * MAX_BYTES))
        self._cells = memory[: _CELLS * _CELL].cast("Q")
        self._times = memory[: _CELLS * _CELL].cast("d")
        begin = _CELLS * _CELL
        self._halves = (
            memory[begin : begin + MAX_BYTES],
            memory[begin + MAX_BYTES : begin + 2 * MAX_BYTES],
        )

    def __repr__(self) -> str:
        return f"<SharedText generation={self.generation}>"

    @property
    def generation(self) -> int:
        """The number of the text that holds now; 0 before the first one."""
        return int(self._cells[0])

    def publish(self, data: bytes) -> None:
        """Has everybody read this from now on; raises ConfigError where it is too large."""
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"the servers take {len(data)} bytes, and workers can be told {MAX_BYTES}"
            )
        generation = self.generation + 1
        half = generation % 2
        self._halves[half][: len(data)] = data
        self._cells[1 + half] = len(data)
        self._cells[0] = generation

    def read(self) -> Published:
        """The text that holds; it is empty before the first one."""
        while True:
            generation = self.generation
            half = generation % 2
            data = bytes(self._halves[half][: self._cells[1 + half]])
            if self.generation == generation:
                return Published(generation, data)

    # --- what workers want of the master ---------------------------------------------------------

    def want(self, at: float) -> None:
        """Has the master make the text anew, from what there is at that time or later."""
        if self._times[_WANTED] < at:
            self._times[_WANTED] = at

    @property
    def is_wanted(self) -> bool:
        """Whether somebody wants what is newer than the master's last look."""
        return bool(self._times[_WANTED] > self._times[_LOOKED])

    def looked_at(self) -> float:
        """When the master last began to look at what it makes the text of, and has published it."""
        return float(self._times[_LOOKED])

    def note_look(self, at: float) -> None:
        """In the master: what there was at that time is published, or why it is not."""
        self._times[_LOOKED] = at


_current: SharedText | None = None


def current() -> SharedText | None:
    """The text of this process's master; None where no master publishes any."""
    return _current


def set_current(text: SharedText | None) -> None:
    """Has applications find this text, here and in processes that are forked from now on."""
    global _current
    _current = text
