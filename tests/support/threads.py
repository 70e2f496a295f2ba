"""Threads that start at the same moment, for tests of races."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 60.0


@contextmanager
def _restless() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def run_together(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Runs each function in a thread of its own, all released at once; their results in order.

    The interpreter changes threads as often as it can meanwhile. The first exception among them is
    raised again here.
    """
    barrier = threading.Barrier(len(functions))

    def released(function: Callable[[], T]) -> T:
        barrier.wait(_PATIENCE)
        return function()

    with _restless(), ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(released, function) for function in functions]
        return [future.result(_PATIENCE) for future in futures]
