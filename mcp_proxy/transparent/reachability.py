"""Which HTTP backends are left out for now, and the thread that tries them again.

A backend that cannot be reached is asked last for ten seconds, then twice as long each time, up to
a minute. Whether it is back is found out by a connect of ours, with a handshake where calls have
TLS, so that no client waits for a host that swallows packets. Readiness is answered from what is
known here, and the log hears of each outage: at once, once a minute, and when it is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from mcp_proxy.background import KeyedExecutor, Periodic, Workers
from mcp_proxy.errors import BackendUnreached
from mcp_proxy.wire.urls import Address

log = logging.getLogger(__name__)

#: Seconds that a backend is left out for: at first, and at most.
FIRST_PAUSE = 10.0
LAST_PAUSE = 60.0

#: Seconds that readiness, and a request, wait for what is not known yet.
READY_WAIT = 0.4

_LOOK = 1.0  # seconds between looks at whose pause is over
_FRESH = 5.0  # seconds for which readiness believes that a backend can be reached
_FORGOTTEN = 3600.0  # seconds without a question, after which an address is: names change theirs
_MANY = 256
_WARNED = 60.0  # seconds between two lines about one backend
_PROBES = 8  # at a time; each waits for one silent host


class _Outage:
    """Why a backend is left out, since when, until when, and for how long this time.

    `reason` is for the operator, `told` for clients. `next_line` is when the log hears of it again,
    `asked` when somebody wanted to know of it last.
    """

    def __init__(self, now: float) -> None:
        self.reason = self.told = ""
        self.since = now
        self.pause = FIRST_PAUSE
        self.until = now + FIRST_PAUSE
        self.next_line = now
        self.asked = now


class Reachability:
    """The backends of one transport. Thread-safe.

    `probe` connects to a backend and returns why it cannot be reached, None if it can.
    """

    def __init__(
        self,
        probe: Callable[[Address], BackendUnreached | None],
        workers: Workers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._clock = clock
        self._thread = Periodic("mcp-backend-probe", _LOOK, self.look, workers)
        self._thread.is_essential = False
        self._probes = KeyedExecutor("mcp-backend-probes", _PROBES)
        self._changed = threading.Condition()  # guards and announces what follows
        self._outages: dict[Address, _Outage] = {}
        self._reached: dict[Address, float] = {}
        self._trying: set[Address] = set()

    def __repr__(self) -> str:
        return f"<Reachability left_out={sorted(address.url for address in self._outages)}>"

    def is_left_out(self, address: Address) -> bool:
        """Whether others are asked first."""
        outage = self._outages.get(address)
        if outage is None:
            return False
        outage.asked = self._clock()
        return True

    @property
    def count(self) -> int:
        """How many backends are left out."""
        return len(self._outages)

    def failure(self, addresses: Sequence[Address]) -> BackendUnreached:
        """What a client is told when all of these are left out: why the first one is."""
        found = [outage for address in addresses if (outage := self._outages.get(address))]
        return BackendUnreached(found[0].told if found else None)

    def failed(self, address: Address, reason: BackendUnreached) -> None:
        """The backend could not be reached: it is left out from now on, if it was not already."""
        with self._changed:
            now = self._clock()
            self._reached.pop(address, None)
            outage = self._outages.setdefault(address, _Outage(now))
            outage.reason, outage.told = reason.detail, reason.message
            is_due = outage.next_line <= now
            if is_due:
                outage.next_line = now + _WARNED
            self._changed.notify_all()
        if is_due:
            log.warning("a server cannot be reached: %s", reason.detail)
        self._thread.start()

    def reached(self, address: Address) -> None:
        """The backend could be reached."""
        with self._changed:
            outage = self._outages.pop(address, None)
            self._reached[address] = now = self._clock()
            if len(self._reached) > _MANY:
                self._reached = {a: t for a, t in self._reached.items() if t > now - _FRESH}
            self._changed.notify_all()
        if outage is not None:
            log.warning("%s is reachable again after %.0f s", address.shown, now - outage.since)

    def back(self, addresses: Sequence[Address]) -> list[Address]:
        """Which of these, all left out, can be reached again; waits `READY_WAIT` for the first.

        A thread of ours connects to each. One that is slower is found by the next question.
        """
        for address in addresses:
            self._submit(address)

        def is_known() -> bool:
            found = any(address not in self._outages for address in addresses)
            return found or self._trying.isdisjoint(addresses)

        with self._changed:
            self._changed.wait_for(is_known, READY_WAIT)
            return [address for address in addresses if address not in self._outages]

    def not_ready_reason(self, addresses: Sequence[Address]) -> str | None:
        """Why none of the backends can be reached, None if one can; waits `READY_WAIT` at most."""
        deadline = time.monotonic() + READY_WAIT
        if self._any_reached(addresses):
            return None
        for address in addresses:
            self._submit(address)  # those left out too, for the next question
        with self._changed:
            self._changed.wait_for(
                lambda: self._any_reached(addresses) or all(a in self._outages for a in addresses),
                deadline - time.monotonic(),
            )
            if self._any_reached(addresses):
                return None
            outages = [(address, self._outages.get(address)) for address in addresses]
        return "; ".join(
            outage.reason if outage else f"{address.url}: no answer yet"
            for address, outage in outages
        )

    def look(self) -> None:
        """Has every backend tried whose pause is over."""
        now = self._clock()
        with self._changed:
            kept = {a: o for a, o in self._outages.items() if o.asked > now - _FORGOTTEN}
            self._outages = kept
            due = [address for address, outage in kept.items() if outage.until <= now]
            for outage in map(kept.__getitem__, due):
                outage.pause = min(2 * outage.pause, LAST_PAUSE)
                outage.until = now + outage.pause
        for address in due:
            self._submit(address)

    def stop(self) -> None:
        """Ends the thread; harmless when repeated."""
        self._thread.stop()
        self._probes.close()

    def _submit(self, address: Address) -> None:
        with self._changed:
            if address in self._trying:
                return
            self._trying.add(address)
        try:
            self._probes.submit(address.url, lambda: self._try(address))
        except RuntimeError:  # no thread can be started; it is tried again later
            with self._changed:
                self._trying.discard(address)
            raise

    def _try(self, address: Address) -> None:
        try:
            reason = self._probe(address)
            if reason is None:
                self.reached(address)
            else:
                self.failed(address, reason)
        finally:
            with self._changed:
                self._trying.discard(address)
                self._changed.notify_all()

    def _any_reached(self, addresses: Sequence[Address]) -> bool:
        oldest = self._clock() - _FRESH
        return any(self._reached.get(address, float("-inf")) > oldest for address in addresses)
