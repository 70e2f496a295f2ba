"""The end of a worker: streams end, calls get their time, sessions go to other workers.

gunicorn has no hook for the moment at which it stops a worker, and then waits for open streams. So
a thread of ours learns of it, by the signal, or by looking where there is none: after
`max_requests`, or when the master has exited.

A worker whose sessions others can serve stops accepting first, and serves the connections that it
has until their clients are told to leave. So does one that has served `max_requests`, or is
replaced as gunicorn reloads. One that is told to stop otherwise, and has its sessions in memory,
accepts and refuses, since nobody else would answer; unless systemd keeps the socket, where who
connects then waits for the next start. Where another worker of the same gunicorn goes
on, that gets the sessions out of the memory of the one that leaves, each as soon as it is idle.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from mcp_proxy.server.passing import give_records

#: Seconds of gunicorn's `graceful_timeout` that calls do not get, from the signal on: gunicorn has
#: two for kept connections, children have five to end, and the last answers have to go out.
RESERVED = 8.0

# Seconds between looks whether the worker stops without a signal.
_LOOK = 1.0

# Seconds for which requests are served by a worker that cannot say whether it has clients.
_LINGER = 2.5


class Leaving:
    """The orderly end of one worker and its application, in a thread that waits for it.

    `keep` is called with the worker and the records of sessions that no other one has got.
    """

    def __init__(
        self, worker: Any, app: Any, keep: Callable[[Any, bytes], object] | None = None
    ) -> None:
        self._worker = worker
        self._app = app
        self._keep = keep
        self._memory: Any = getattr(app, "memory", None)
        self._heir: int | None = None  # the slot of the worker that gets the sessions
        self._told = threading.Event()
        self._told_at: float | None = None
        self._stop: Any = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._leave, name="mcp-drain", daemon=True)

    def start(self) -> None:
        """Takes SIGTERM in gunicorn's place; called in the main thread."""
        self._stop = signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.siginterrupt(signal.SIGTERM, False)
        self._thread.start()

    def leave_at_once(self) -> None:
        """Ends everything without waiting for any call."""
        self._has_ended = True
        self._app.close()

    def wait(self) -> None:
        """Returns when the application has ended; the worker's main loop has."""
        if not self._has_ended:
            self._has_ended = True
            self._told.set()
            self._thread.join()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        # gunicorn repeats the signal, and an event must not be set while this thread is setting it.
        if self._told_at is None and not self._has_ended:
            self._told_at = time.monotonic()
            self._told.set()

    def _leave(self) -> None:
        worker = self._worker
        while not self._told.wait(_LOOK) and worker.alive and os.getppid() == worker.ppid:
            pass
        if (slot := getattr(worker, "slot", None)) is not None:
            slot.leave()
            if self._memory is not None:
                self._heir = slot.choose_heir()
        since = self._told_at or time.monotonic()
        until = since + max(0.0, worker.cfg.graceful_timeout - RESERVED)
        is_alone = self._told_at is not None and not self._is_replaced()
        is_kept = getattr(worker, "has_kept_socket", False)
        refuses = is_alone and not is_kept and not self._app.is_shared and self._heir is None
        if not refuses:
            self._stop_accepting()
        has_heirs = slot is not None and self._memory is not None and not refuses
        self._app.drain(
            until - time.monotonic(),
            lambda: not refuses and self._has_clients(since),
            partial(self._hand_on, slot) if has_heirs else None,
        )
        self._stop_accepting()
        self._app.close()
        if self._memory is not None:
            self._hand_on_rest(slot)

    def _hand_on(self, slot: Any) -> bool:
        """Sends the sessions that are idle now to the heir; whether there are more."""
        if self._heir is None or not slot.can_inherit(self._heir):
            self._heir = slot.choose_heir()
        if self._heir is None:  # a worker that replaces this one may not have begun yet
            return self._is_replaced() and self._memory.session_count > 0
        records = self._memory.take_out_idle()
        if records and not give_records(slot.writer_to(self._heir), records):
            self._memory.put_in(records)
        return bool(self._memory.owned_count)

    def _hand_on_rest(self, slot: Any) -> None:
        """Sends what is left to the heir, or has it kept: sessions of HTTP servers, which need no
        worker, and those that were busy to the end.
        """
        records = self._memory.take_out_all()
        if slot is not None:
            slot.line.sessions = 0  # nobody asks here first any more
        if not records:
            return
        has_heir = self._heir is not None and slot.can_inherit(self._heir)
        if has_heir and give_records(slot.writer_to(self._heir), records):
            return
        if self._keep is not None:
            self._keep(self._worker, records)

    def _is_replaced(self) -> bool:
        """Whether a reload has begun another worker in place of this one."""
        found = getattr(self._worker, "is_replaced", None)
        return found is not None and bool(found())

    def _stop_accepting(self) -> None:
        """Has gunicorn stop the worker; harmless when repeated, or where it does so already."""
        if callable(self._stop):
            self._stop(signal.SIGTERM, None)

    def _has_clients(self, since: float) -> bool:
        """Whether requests are to be served, of clients that had a connection before the end."""
        if self._has_ended:
            return False
        found: bool | None = getattr(self._worker, "has_clients", None)
        return time.monotonic() < since + _LINGER if found is None else found
