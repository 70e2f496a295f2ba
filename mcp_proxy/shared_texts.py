"""A text of each slot in memory that the workers of one gunicorn share.

The worker of a slot writes it as a whole, everybody reads it as a whole, and nobody waits. A text
has two halves: the one that is not shown is written, then a number says which is shown. Whoever
reads looks at the number again afterwards, since the writer may have come round.
"""

from __future__ import annotations

import mmap

#: The bytes that a text may have.
LONGEST = 32 * 1024 - 16

_CELL = 8
_HEAD = 2 * _CELL  # the number, and room
_ATTEMPTS = 4


class SharedTexts:
    """The texts of so many slots; to be made before the fork of those who share them.

    Each may have `longest` bytes, a multiple of eight. What is never written costs nothing but
    addresses.
    """

    def __init__(self, slot_count: int, longest: int = LONGEST) -> None:
        self._longest = longest
        self._half_size = longest + _CELL
        self._size = _HEAD + 2 * self._half_size
        self._bytes = memoryview(mmap.mmap(-1, slot_count * self._size))
        self._cells = self._bytes.cast("Q")

    def __repr__(self) -> str:
        return f"<SharedTexts {len(self._bytes) // self._size}>"

    def write(self, slot: int, text: bytes) -> None:
        """Shows a text that is not too long. For one thread of the worker of the slot."""
        if len(text) > self._longest:
            raise ValueError(f"a text of {len(text)} bytes is too long")
        cell = slot * self._size // _CELL
        number = self._cells[cell] + 1
        at = self._half(slot, number)
        self._cells[at // _CELL] = len(text)
        self._bytes[at + _CELL : at + _CELL + len(text)] = text
        self._cells[cell] = number

    def clear(self, slot: int) -> None:
        """Shows no text any more."""
        if self._cells[slot * self._size // _CELL]:  # else the memory would be used
            self.write(slot, b"")

    def read(self, slot: int) -> bytes:
        """The text of a slot; empty where there is none, or where it changes all the time."""
        cell = slot * self._size // _CELL
        for _ in range(_ATTEMPTS):
            number = self._cells[cell]
            at = self._half(slot, number)
            length = min(self._longest, self._cells[at // _CELL])
            text = bytes(self._bytes[at + _CELL : at + _CELL + length])
            if self._cells[cell] == number:
                return text
        return b""

    def _half(self, slot: int, number: int) -> int:
        """Where the half with this number begins."""
        return slot * self._size + _HEAD + number % 2 * self._half_size
