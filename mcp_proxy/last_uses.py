"""When API keys were last used: a row a key, in memory that gunicorn's master shares with workers.

A row is the first 64 bits of a key's digest and a minute. Nobody waits: of two workers that begin a
row in the same moment one loses it, and gets another one with the next use of its key.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

# The bytes of a cell, and the cells of a row.
_CELL = 8
_ROW = 2

# The rows that a key may have, one after the other, the rows in all, and the hexadecimal digits
# that stand for a key.
_ATTEMPTS = 8
_ROWS = 4096
_DIGITS = 16

_MINUTE = 60


class LastUses:
    """The last uses of 4,096 keys; several processes share them if it is made before their fork.

    Where other keys have all the rows that a key may have, the one that was not used for the
    longest time is forgotten. A time is in seconds since 1970, and is that of a whole minute.
    """

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, _ROWS * _ROW * _CELL)).cast("Q")

    def __repr__(self) -> str:
        return f"<LastUses {len(self.read())}/{_ROWS}>"

    def note(self, digest: str, now: float) -> None:
        """The key with this digest, in hexadecimal digits, is used now."""
        number, minute = int(digest[:_DIGITS], 16), int(now) // _MINUTE
        at = self._row_of(number)
        if self._cells[at] != number:
            self._cells[at] = number
        if self._cells[at + 1] != minute:
            self._cells[at + 1] = minute

    def read(self) -> Mapping[str, float]:
        """When each key was last used, by the first 16 digits of its digest."""
        return {
            f"{self._cells[at]:0{_DIGITS}x}": float(self._cells[at + 1] * _MINUTE)
            for at in range(0, len(self._cells), _ROW)
            if self._cells[at + 1]
        }

    def _row_of(self, number: int) -> int:
        """The first cell of a key's row, or of the row that it is to get."""
        rows = [(number + attempt) % _ROWS * _ROW for attempt in range(_ATTEMPTS)]
        for at in rows:
            if self._cells[at] == number:
                return at
        return min(rows, key=lambda at: self._cells[at + 1])


def short(digest: str) -> str:
    """The part of a key's digest by which its last use is told."""
    return digest[:_DIGITS]


def last_use_of(digest: str, uses: Mapping[str, float]) -> float | None:
    """When the key with this digest was last used; None where nobody knows."""
    return uses.get(short(digest))
