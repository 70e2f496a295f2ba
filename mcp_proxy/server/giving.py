"""What a worker gives to the others of its gunicorn, until one of them has begun it.

Where the workers share a store, a request that nobody begins is taken back and relayed. Where the
sessions are in the workers' memory there is no other way: the request is offered again, until
`client_timeout` is over, and then refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mcp_proxy.errors import Draining, Unpassable
from mcp_proxy.server.answers import Gathering
from mcp_proxy.server.connection import Connection
from mcp_proxy.server.passing import Offer, Receipt, can_be_passed, give, rebuilt
from mcp_proxy.server.slot import Slot

log = logging.getLogger(__name__)

#: Seconds between two looks at whether requests have been begun.
LOOK = 0.02

# Seconds between two offers of a request that could not be given.
_PAUSE = 0.05

# What the application calls: (replica or None, session, body, id of the request, is a stream, is
# counted).
Give = Callable[[str | None, str, bytes, str, bool, bool], bool]


class Giving:
    """The requests that one worker gives to others.

    `begin` has a request answered here after all, `refuse` says that nobody takes it, `forget`
    closes the copy of a connection that another worker has.
    """

    def __init__(
        self,
        slot: Slot,
        client_timeout: float,
        max_header_bytes: int,
        begin: Callable[[Connection], object],
        refuse: Callable[[Connection, str], object],
        forget: Callable[[Connection], object],
    ) -> None:
        self._slot = slot
        self._client_timeout = client_timeout
        self._max_header_bytes = max_header_bytes
        self._begin = begin
        self._refuse = refuse
        self._forget = forget
        self._given: dict[Connection, Offer] = {}
        self._next_look = 0.0

    def __repr__(self) -> str:
        return f"<Giving {len(self._given)}>"

    def __bool__(self) -> bool:
        return bool(self._given)

    # --- in a thread of the pool -----------------------------------------------------------------

    def seam(self, conn: Connection, req: Any, response: Any) -> Give:
        """What the application calls to have this request answered where its session is."""
        return partial(self._give, conn, req, response)

    def _give(
        self,
        conn: Connection,
        req: Any,
        response: Any,
        replica_id: str | None,
        session: str,
        body: bytes,
        request_id: str,
        is_stream: bool,
        is_counted: bool,
    ) -> bool:
        """Gives a request to the worker that is a replica, or has the session; whether it was.

        Without either it goes to one that has clearly fewer sessions, if there is such a one. The
        application calls this when it has read the body, and before it does anything. From then on
        the connection is not touched, and nobody gets what the application answers. Raises
        Unpassable where no other worker could answer a request of this form, and Draining where the
        worker that has the session may have ended before this one, since all of them are stopped.
        """
        number = self._number_for(conn, replica_id, session, is_stream)
        is_only_way = replica_id is None and bool(session)
        if number is None:
            if is_only_way and self._slot.is_stopping:
                raise Draining
            return False
        head = rebuilt(req, len(body), request_id)
        is_whole = len(head) <= self._max_header_bytes and can_be_passed(req, len(body))
        if response.headers_sent or not is_whole:
            if is_only_way:
                raise Unpassable
            return False
        passed = conn.to_read_again(head + body, session, is_counted)
        offer = Offer(passed, is_stream, is_only_way, time.monotonic() + self._client_timeout)
        self._send(conn, offer, number)
        if offer.receipt is None and not is_only_way:
            conn.parser.unreader.unread(passed.data[len(head) + len(body) :])
            return False
        conn.offer = offer
        response.sock = Gathering()
        return True

    def _number_for(
        self, conn: Connection, replica_id: str | None, session: str, is_stream: bool
    ) -> int | None:
        """The slot of the worker that is to get a request; None where that stays here."""
        if not session:
            return None if conn.stays else self._slot.least_loaded()
        may_change = conn.names(session)
        if replica_id is not None:
            number = self._slot.find(replica_id) if may_change else None
            is_taken = number is not None and self._slot.takes(number, is_stream=is_stream)
            return number if is_taken else None
        if conn.stays and Slot.is_home(session):
            return None  # the other one would begin it here
        holder = self._slot.holder_of(session)
        if holder is None or (holder.number == self._slot.number and not holder.may_come):
            return None
        return holder.number

    def _send(self, conn: Connection, offer: Offer, number: int) -> None:
        """Sends a request if the worker can be expected to begin it at once."""
        if number == self._slot.number:
            return  # the session is to come here
        only = offer.is_only_way
        if self._slot.takes(number, is_stream=offer.is_stream, is_only_one=only):
            offer.receipt = give(self._slot.writer_to(number), conn.sock.fileno(), offer.passed)

    # --- in the main thread ----------------------------------------------------------------------

    def add(self, conn: Connection, offer: Offer) -> None:
        """A request has been given, and its thread has gone."""
        self._given[conn] = offer

    def look(self, now: float) -> None:
        """Forgets connections whose requests have been begun, and takes back what nobody begins."""
        if not self._given or now < self._next_look:
            return
        self._next_look = now + LOOK
        for conn, offer in list(self._given.items()):
            if (receipt := offer.receipt) is not None:
                if now >= receipt.until or receipt.is_taken:
                    self._settle(conn, offer, receipt)
            elif now >= offer.next_try:
                offer.next_try = now + _PAUSE
                self._offer_again(conn, offer, now)

    def _settle(self, conn: Connection, offer: Offer, receipt: Receipt) -> None:
        """The request is the other worker's, or nobody has begun it for long enough."""
        if not receipt.take_back():
            del self._given[conn]
            self._forget(conn)
            return
        log.info("A request is taken back from a worker that does not begin it")
        receipt.close()
        offer.receipt = None
        conn.may_have_copies = True
        if not offer.is_only_way:
            self._begin_here(conn, offer)

    def _offer_again(self, conn: Connection, offer: Offer, now: float) -> None:
        holder = self._slot.holder_of(offer.passed.session)
        if holder is None or holder.number == self._slot.number:
            self._begin_here(conn, offer)
            return
        self._send(conn, offer, holder.number)
        if offer.receipt is None and now >= offer.until:
            del self._given[conn]
            conn.take_back(offer.passed)
            self._refuse(conn, "The worker that has the session takes no request")

    def _begin_here(self, conn: Connection, offer: Offer) -> None:
        del self._given[conn]
        conn.take_back(offer.passed)
        self._begin(conn)
