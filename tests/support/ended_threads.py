"""Threads that end as no code of ours ends them: by an exception that no loop survives."""

from __future__ import annotations

import pytest

from mcp_proxy.background import Worker

_PATIENCE = 10.0

#: For tests in which threads end by SystemExit: pytest would report each.
threads_end = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def end_thread(*_: object) -> None:
    """Ends the thread that calls this."""
    raise SystemExit


def end_worker(worker: Worker) -> None:
    """Ends the thread of a worker in its next round, and waits for that.

    The worker can be started again.
    """
    assert worker.is_running
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_once", end_thread)
        worker.wake()
        worker.wait(_PATIENCE)
    assert not worker.is_running
