"""What an operator tells all workers of one gunicorn to do: to end a session.

Whoever is told writes an order into memory that the workers share. Each of them looks once a
second while there are orders, does what is to be done there, and writes what came of it. Nobody
waits in between: whoever gave the order asks again for its outcome.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum

import msgspec

from mcp_proxy.metrics import MetricsPage

# Seconds for which an order stands, and for which workers look for more after one.
_STANDS = 20.0

# Orders of a worker, and outcomes at a worker, that are remembered.
_MOST = 32


class Outcome(StrEnum):
    """What a worker, or all of them, made of an order."""

    #: Not all workers have looked yet.
    PENDING = "pending"
    #: The session was there, and is ended.
    ENDED = "ended"
    #: There is no such session.
    UNKNOWN = "unknown"
    #: It is there and could not be ended; the log says why.
    FAILED = "failed"


class _Order(msgspec.Struct):
    """`slot` is that of the worker that was told; `at` is on the machine's monotonic clock."""

    id: str
    at: float
    slot: int
    session_id: str


_orders = msgspec.json.Decoder(list[_Order])
_outcomes = msgspec.json.Decoder(dict[str, Outcome])


class Orders:
    """The orders to workers, and what one of them makes of each. Thread-safe.

    `end_session` ends a session of the worker with the slot `number`; its second argument says
    whether that worker was told itself, as one of them has to end what all of them reach.
    """

    def __init__(self, end_session: Callable[[str, bool], Outcome]) -> None:
        self._end_session = end_session
        self._lock = threading.Lock()  # guards the fields below, and what is written
        self._given: list[_Order] = []
        self._done: OrderedDict[str, Outcome] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Orders given={len(self._given)} done={len(self._done)}>"

    def end(self, page: MetricsPage, slot: int, session_id: str) -> str:
        """Tells all workers to end a session; the id of the order. Waits for nothing."""
        now = time.monotonic()
        order = _Order(secrets.token_hex(8), now, slot, session_id)
        with self._lock:
            self._given = [each for each in self._given if each.at > now - _STANDS][-_MOST + 1 :]
            self._given.append(order)
            page.orders.write(slot, msgspec.json.encode(self._given))
            page.note_order(now)
        return order.id

    def look(self, page: MetricsPage, slot: int) -> None:
        """Does what is to be done at this worker."""
        now = time.monotonic()
        if now - page.ordered_at() > 2 * _STANDS:
            return
        for other in page.health():
            text = page.orders.read(other)
            for order in _orders.decode(text) if text else ():
                if order.at > now - _STANDS and order.id not in self._done:
                    self._do(page, slot, order)
        with self._lock:
            if now - page.ordered_at() > _STANDS:
                page.orders.clear(slot)  # a session id is a credential

    def _do(self, page: MetricsPage, slot: int, order: _Order) -> None:
        outcome = self._end_session(order.session_id, order.slot == slot)
        with self._lock:
            self._done[order.id] = outcome
            if len(self._done) > _MOST:
                self._done.popitem(last=False)
            page.outcomes.write(slot, msgspec.json.encode(self._done))

    @staticmethod
    def outcome(page: MetricsPage, order_id: str) -> Outcome:
        """What became of an order, as far as the workers have said."""
        found = []
        for slot in page.health():
            text = page.outcomes.read(slot)
            found.append(_outcomes.decode(text).get(order_id) if text else None)
        for decisive in (Outcome.ENDED, Outcome.FAILED):
            if decisive in found:
                return decisive
        return Outcome.PENDING if None in found else Outcome.UNKNOWN
