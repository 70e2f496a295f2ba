"""A value of a context variable for the time of a block.

Such blocks are around every call to a server, so this is a class: a generator with
`contextlib.contextmanager` takes four times as long.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Generic, TypeVar

T = TypeVar("T")


class ContextValue(Generic[T]):
    """Within a `with` block the variable has this value, after it the one that it had before.

    For one block, in one thread.
    """

    __slots__ = ("_before", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable = variable
        self._value = value

    def __enter__(self) -> None:
        self._before: Token[T] = self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._before)
