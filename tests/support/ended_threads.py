"""Threads that end as no code of ours ends them: by an exception that comes from outside."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from mcp_proxy.background import Worker

_PATIENCE = 10.0

#: For tests in which threads end by SystemExit: pytest would report each.
threads_end = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def end_thread(thread: threading.Thread, wake: Callable[[], object]) -> None:
    """Raises SystemExit in a thread, wherever it is, and waits for its end.

    `wake` has it look up from a wait, which no exception interrupts.
    """
    assert thread.ident is not None
    ident, kind = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind) == 1
    wake()
    thread.join(_PATIENCE)
    assert not thread.is_alive()


def end_worker(worker: Worker) -> None:
    """The same for the thread of a worker of ours."""
    assert worker._thread is not None
    end_thread(worker._thread, worker.wake)
