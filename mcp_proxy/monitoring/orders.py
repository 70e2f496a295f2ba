"""What an operator tells all workers of one gunicorn to do, and what comes of it.

Whoever is told writes an order into memory that the workers share. Each of them looks once a
second while there are orders, does what is to be done there, and writes what came of it. Nobody
waits in between: whoever gave the order asks again for its outcome.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import StrEnum

import msgspec

from mcp_proxy.metrics import MetricsPage
from mcp_proxy.recent import SessionNote, shortened
from mcp_proxy.shared_texts import LONGEST

# Seconds after which a session is looked at anew for who asks again.
_SHOWN = 5.0

# Seconds for which an order stands, and for which workers look for more after one.
_STANDS = 20.0

# Orders of a worker, and outcomes at a worker, that are remembered: what has room in shared memory.
_MOST = 24


class Task(StrEnum):
    """What workers can be told to do."""

    #: To end a session, whose id is given.
    END = "end"
    #: To have other processes of a server, whose name is given.
    RESTART = "restart"
    #: To serve what is in the file of servers.
    RELOAD = "reload"
    #: To say what is known of a session, whose id is given.
    SHOW = "show"


class Outcome(StrEnum):
    """What a worker, or all of them, made of an order."""

    #: It is not done yet; it will be tried again.
    PENDING = "pending"
    #: It is done, and nobody else has to do anything.
    ENDED = "ended"
    #: It is done at this worker.
    DONE = "done"
    #: What it is about does not exist.
    UNKNOWN = "unknown"
    #: It could not be done.
    FAILED = "failed"


class Result(msgspec.Struct, frozen=True):
    """What came of an order; `reason` says why it has failed, `session` what one worker knows."""

    outcome: Outcome
    reason: str = ""
    session: SessionNote | None = None


class Order(msgspec.Struct, frozen=True):
    """`at` is on the machine's monotonic clock."""

    id: str
    at: float
    task: Task
    about: str = ""


_orders = msgspec.json.Decoder(list[Order])
_results = msgspec.json.Decoder(dict[str, Result])


class Orders:
    """The orders to workers, and what one of them makes of each. Thread-safe.

    `tasks` do what is ordered at this worker. The second argument says whether this worker was told
    itself, as one of them has to do what concerns all.
    """

    def __init__(self, tasks: Mapping[Task, Callable[[Order, bool], Result]]) -> None:
        self._tasks = tasks
        self._lock = threading.Lock()  # guards the fields below, and what is written
        self._given: list[Order] = []
        self._done: OrderedDict[str, Result] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Orders given={len(self._given)} done={len(self._done)}>"

    def give(self, page: MetricsPage, slot: int, task: Task, about: str = "") -> str:
        """Tells all workers to do something; the id of the order. Waits for nothing."""
        order_id = secrets.token_hex(8)
        self._give(page, slot, Order(order_id, time.monotonic(), task, about))
        return order_id

    def show(self, page: MetricsPage, slot: int, session_id: str) -> str:
        """As `give`, for what is known of a session.

        Who asks again soon, here or at another worker, gives the same order.
        """
        now = time.monotonic()
        text = f"{Task.SHOW} {session_id} {now // _SHOWN:.0f}"
        order_id = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
        if not any(order.id == order_id for order in self._given):
            self._give(page, slot, Order(order_id, now, Task.SHOW, session_id))
        return order_id

    def _give(self, page: MetricsPage, slot: int, order: Order) -> None:
        now = order.at
        with self._lock:
            self._given = [each for each in self._given if each.at > now - _STANDS][-_MOST + 1 :]
            self._given.append(order)
            page.orders.write(slot, msgspec.json.encode(self._given))
            page.note_order(now)

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

    def _do(self, page: MetricsPage, slot: int, order: Order) -> None:
        is_told = any(given.id == order.id for given in self._given)  # several may be told the same
        result = self._tasks[order.task](order, is_told)
        if result.outcome is Outcome.PENDING:
            return
        result = Result(result.outcome, shortened(result.reason), result.session)
        with self._lock:
            self._done[order.id] = result
            while len(self._done) > _MOST or len(text := msgspec.json.encode(self._done)) > LONGEST:
                self._done.popitem(last=False)
            page.outcomes.write(slot, text)

    @staticmethod
    def result(page: MetricsPage, order_id: str) -> Result:
        """What became of an order: what one worker is enough for, else what all have said."""
        found = _found(page, order_id)
        answers = {each.outcome: each for each in found if each is not None}
        if Outcome.ENDED not in answers and None in found:
            return Result(Outcome.PENDING)
        for outcome in (Outcome.ENDED, Outcome.FAILED, Outcome.DONE):
            if outcome in answers:
                return answers[outcome]
        return Result(Outcome.UNKNOWN)

    @staticmethod
    def shown(page: MetricsPage, order_id: str) -> Result:
        """What became of an order to show a session: what the workers know of it, put together.

        Nobody knows a session that has no record.
        """
        found = _found(page, order_id)
        notes = [each.session for each in found if each is not None and each.session is not None]
        record = next((note for note in notes if note.backend), None)
        if None in found:
            return Result(Outcome.PENDING)
        if record is None:
            failed = (each for each in found if each and each.outcome is Outcome.FAILED)
            return next(failed, Result(Outcome.UNKNOWN))
        last = max(notes, key=lambda note: note.last)
        session = msgspec.structs.replace(
            record,
            last=last.last,
            calls=sum(note.calls for note in notes),
            client=record.client or last.client,
            error=last.error,
        )
        return Result(Outcome.DONE, session=session)


def _found(page: MetricsPage, order_id: str) -> list[Result | None]:
    """What each worker has made of an order; None where it has not said so yet."""
    found = []
    for slot in page.health():
        text = page.outcomes.read(slot)
        found.append(_results.decode(text).get(order_id) if text else None)
    return found
