"""Signals that come while gunicorn forks a worker wait until that can take them.

A worker begins with the handlers of its master. What it is sent before it has set its own would be
lost, and the master, which tells it to stop only once, would wait for all of `graceful_timeout`.
"""

from __future__ import annotations

import signal

# Those by which a worker is told to stop.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def hold_signals() -> None:
    """Has these signals wait, in this thread and in those that a fork begins with."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


def release_signals() -> None:
    """Takes them again, those that have waited first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
