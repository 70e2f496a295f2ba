"""The share of one session: however many calls it makes at once, threads are left to the others.

A call that is over the share goes back to the main loop, with its body. It is read once more when a
call of its session has ended, or when it was cancelled itself, which the application then learns. A
batch is one call here, and each of its requests can be cancelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mcp_proxy.errors import Overloaded, RequestId
from mcp_proxy.server.answers import Gathering
from mcp_proxy.server.connection import Connection
from mcp_proxy.server.passing import Held, can_be_passed, rebuilt
from mcp_proxy.server.slot import Slot

# What the application calls: (session, body, id of the request, is counted, ids of the calls).
Admit = Callable[[str, bytes, str, bool, Collection[RequestId]], frozenset[RequestId] | None]


@dataclass
class PutOff:
    """A request that is to be read once more, with the calls in it, and those that were cancelled
    since it was put off for the first time.
    """

    session: str
    calls: Collection[RequestId]
    since: float  # monotonic
    cancelled: set[RequestId] = field(default_factory=set)

    def has(self, session: str, call: RequestId) -> bool:
        """Whether this is to be made: a call of that session and id."""
        return self.session == session and call in self.calls and call not in self.cancelled

    @property
    def is_cancelled(self) -> bool:
        """Whether nothing of it is to be made."""
        return bool(self.cancelled) and self.cancelled.issuperset(self.calls)


class Shares:
    """The calls of each session that have a thread, and the requests that wait for them to end.

    `limit` says how many of one session may have a thread at once, `resume` is called in any thread
    with a connection whose request is to be read once more.
    """

    def __init__(self, limit: Callable[[], int], resume: Callable[[Connection], object]) -> None:
        self._limit = limit
        self._resume = resume
        #: By which workers of one master hear of cancellations that another one has got.
        self.slot: Slot | None = None
        self._lock = threading.Lock()  # guards the fields below
        self._calls: dict[str, int] = {}
        self._waiting: dict[str, dict[Connection, Held]] = {}
        # Until they are read once more.
        self._put_off: dict[Connection, PutOff] = {}
        #: How many requests wait, and their size.
        self.waiting = 0
        self.waiting_bytes = 0

    def __repr__(self) -> str:
        return f"<Shares {sum(self._calls.values())} calls of {len(self._calls)} sessions>"

    # --- in a thread of the pool -----------------------------------------------------------------

    def seam(self, conn: Connection, req: Any, response: Any) -> Admit:
        """What the application calls before a call of a session takes anything."""
        return partial(self._admit, conn, req, response)

    def _admit(
        self,
        conn: Connection,
        req: Any,
        response: Any,
        session: str,
        body: bytes,
        request_id: str,
        is_counted: bool,
        calls: Collection[RequestId],
    ) -> frozenset[RequestId] | None:
        """Which calls of a request were cancelled while it waited: none of one that may go on now.

        None where it has to wait: nobody gets what the application answers. Raises Overloaded for
        one that cannot be read once more.
        """
        put_off = self._put_off.get(conn)
        if put_off is not None:
            self._look_elsewhere(put_off)
        is_over = put_off is not None and put_off.is_cancelled
        if is_over or conn.share is not None or self._counts(conn, session):
            return self._taken_on(conn)
        head = rebuilt(req, len(body), request_id)
        is_whole = len(head) <= conn.max_header_bytes and can_be_passed(req, len(body))
        if response.headers_sent or not is_whole:
            raise Overloaded("The session has as many calls under way as it may have at once")
        again = conn.to_read_again(head + body, session, is_counted)
        conn.held = Held(again, time.monotonic())
        if put_off is None:
            with self._lock:
                self._put_off[conn] = PutOff(session, calls, conn.held.since)
        response.sock = Gathering()
        return None

    def _look_elsewhere(self, put_off: PutOff) -> None:
        """Notes what other workers were told of the calls of a request, ever since it was put off.

        A worker remembers the last ones that it was told, whoever told it.
        """
        if self.slot is None:
            return
        session, since = put_off.session, put_off.since
        found = [call for call in put_off.calls if self.slot.was_cancelled(session, call, since)]
        with self._lock:
            put_off.cancelled.update(found)

    def _taken_on(self, conn: Connection) -> frozenset[RequestId]:
        """The calls that were cancelled while their request was put off; from now on it is not."""
        with self._lock:
            put_off = self._put_off.pop(conn, None)
        return frozenset() if put_off is None else frozenset(put_off.cancelled)

    def cancel(self, session: str, call: RequestId | None) -> bool:
        """Has the call of that id be answered as a cancelled one; False where none is put off here.

        One that waits at another worker is answered so when its turn comes.
        """
        if call is None:
            return False
        with self._lock:
            found = ((conn, one) for conn, one in self._put_off.items() if one.has(session, call))
            conn, put_off = next(found, (None, None))
            if conn is None or put_off is None:
                if self.slot is not None:
                    self.slot.note_cancelled(session, call)
                return False
            put_off.cancelled.add(call)
            resumes = put_off.is_cancelled and conn in self._waiting.get(session, ())
            if resumes:
                self._take_out(conn, session)
        if resumes:
            self._resume(conn)
        return True

    def _counts(self, conn: Connection, session: str) -> bool:
        with self._lock:
            count = self._calls.get(session, 0)
            if count >= self._limit():
                return False
            self._calls[session] = count + 1
        conn.share = session
        return True

    def leave(self, conn: Connection) -> None:
        """A request has been answered; the oldest one that waits gets the place of a call."""
        session, conn.share = conn.share, None
        if self._put_off and conn.held is None:
            self._taken_on(conn)  # nobody asks any more
        if session is None:
            return
        with self._lock:
            following = next(iter(self._waiting.get(session, ())), None)
            if following is None:
                self._count_out(session)
            else:
                self._take_out(following, session)
                following.share = session
        if following is not None:
            self._resume(following)

    def _count_out(self, session: str) -> None:
        if self._calls[session] > 1:
            self._calls[session] -= 1
        else:
            del self._calls[session]

    def _take_out(self, conn: Connection, session: str) -> None:
        waiting = self._waiting[session]
        self.waiting -= 1
        self.waiting_bytes -= len(waiting.pop(conn).request.data)
        if not waiting:
            del self._waiting[session]

    # --- in the main thread ----------------------------------------------------------------------

    def add(self, conn: Connection, held: Held) -> None:
        """A request waits from now on, unless a call of its session has ended meanwhile."""
        session = held.request.session
        with self._lock:
            count, put_off = self._calls.get(session, 0), self._put_off.get(conn)
            if put_off is not None and put_off.is_cancelled:  # it needs no place
                is_full = False
            elif is_full := count >= self._limit():
                self._waiting.setdefault(session, {})[conn] = held
                self.waiting += 1
                self.waiting_bytes += len(held.request.data)
            else:
                self._calls[session] = count + 1
                conn.share = session
        if not is_full:
            self._resume(conn)

    def take_expired(self, before: float) -> Iterator[Connection]:
        """The requests that have waited since before that time; they wait no longer."""
        with self._lock:
            found = [
                (conn, session)
                for session, waiting in self._waiting.items()
                for conn, held in waiting.items()
                if held.since < before
            ]
            for conn, session in found:
                self._take_out(conn, session)
        return (conn for conn, _ in found)
