"""The share of one session: however many calls it makes at once, threads are left to the others.

A call that is over the share goes back to the main loop, with its body. It is read once more when a
call of its session has ended, or when it was cancelled itself, which the application then learns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mcp_proxy.errors import Cancelled, Overloaded, RequestId
from mcp_proxy.server.answers import Gathering
from mcp_proxy.server.connection import Connection
from mcp_proxy.server.passing import Held, can_be_passed, rebuilt

# What the application calls: (session, body, id of the request, is counted, id of the call). A
# batch has none.
Admit = Callable[[str, bytes, str, bool, RequestId | None], bool]


class Shares:
    """The calls of each session that have a thread, and the requests that wait for them to end.

    `limit` says how many of one session may have a thread at once, `resume` is called in any thread
    with a connection whose request is to be read once more.
    """

    def __init__(self, limit: Callable[[], int], resume: Callable[[Connection], object]) -> None:
        self._limit = limit
        self._resume = resume
        self._lock = threading.Lock()  # guards the fields below
        self._calls: dict[str, int] = {}
        self._waiting: dict[str, dict[Connection, Held]] = {}
        # The calls that were put off, by session and id, until they are read once more.
        self._put_off: dict[Connection, tuple[str, RequestId | None]] = {}
        # Those of them that were cancelled. Each operation is atomic.
        self._cancelled: set[Connection] = set()
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
        call: RequestId | None,
    ) -> bool:
        """Whether a call may go on; else nobody gets what the application answers.

        Raises Overloaded for one that cannot be read once more, Cancelled for one that was
        cancelled while it waited.
        """
        if (self._put_off or self._cancelled) and self._was_cancelled(conn):
            raise Cancelled
        if conn.share is not None or self._counts(conn, session):
            return True
        head = rebuilt(req, len(body), request_id)
        is_whole = len(head) <= conn.max_header_bytes and can_be_passed(req, len(body))
        if response.headers_sent or not is_whole:
            raise Overloaded("The session has as many calls under way as it may have at once")
        again = conn.to_read_again(head + body, session, is_counted)
        conn.held = Held(again, time.monotonic())
        with self._lock:
            self._put_off[conn] = (session, call)
        response.sock = Gathering()
        return False

    def _was_cancelled(self, conn: Connection) -> bool:
        """Whether a call was cancelled while it was put off; from now on it no longer is."""
        with self._lock:
            self._put_off.pop(conn, None)
            was_cancelled = conn in self._cancelled
            self._cancelled.discard(conn)
        return was_cancelled

    def cancel(self, session: str, call: RequestId | None) -> bool:
        """Has the call of that id be answered as a cancelled one; False where none is put off."""
        with self._lock:
            wanted = (session, call)
            conn = next((one for one, its in self._put_off.items() if its == wanted), None)
            if call is None or conn is None:
                return False
            del self._put_off[conn]
            self._cancelled.add(conn)
            waits = conn in self._waiting.get(session, ())
            if waits:
                self._take_out(conn, session)
        if waits:
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
        if (self._put_off or self._cancelled) and conn.held is None:
            self._was_cancelled(conn)  # nobody asks any more
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
            count = self._calls.get(session, 0)
            if conn in self._cancelled:  # it needs no place
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
