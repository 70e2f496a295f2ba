"""Session ids that no record has: whether a backend knows them (`unknown_session_status=ask`).

After a restart of a proxy that keeps its sessions in memory, or when Redis is emptied, the servers
still have their sessions. A ping of ours asks each in turn; what one knows is recorded anew.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mcp_proxy.edge.edge import RateLimit
from mcp_proxy.errors import (
    BackendError,
    BackendUnreached,
    ClientLeft,
    SessionEnded,
    SessionExists,
    SessionNotFound,
)
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import (
    BACKEND_HOST,
    BACKEND_URL,
    PROTOCOL_VERSION,
    Session,
    new_session,
)
from mcp_proxy.transparent.balancing import Balancer
from mcp_proxy.transparent.own_calls import OwnCalls, Watch, taken_along
from mcp_proxy.transparent.session_affinity import KIND
from mcp_proxy.wire import headers
from mcp_proxy.wire.urls import Address

_MISSED = 10.0  # seconds for which an id that no backend knows is not asked for again
_MAX_MISSES = 10_000
_TURN = 60.0  # seconds that a request waits for another one with the same id
_LOOK = 1.0  # seconds between looks at whether its client has left
_BELIEVED = 300.0  # seconds for which it is believed whether a backend looks at session ids


class UnknownSessions:
    """The questions of one transport. Thread-safe; one at a time for each id.

    `limit` bounds them for the worker.
    """

    def __init__(
        self, balancer: Balancer, calls: OwnCalls, manager: SessionManager, limit: RateLimit
    ) -> None:
        self._balancer = balancer
        self._calls = calls
        self._manager = manager
        self._limit = limit
        self._changed = threading.Condition()  # guards and announces what follows
        self._asked: set[str] = set()
        self._missed: OrderedDict[str, float] = OrderedDict()  # until when, the oldest first
        # Whether a backend takes every session id, and until when that is believed.
        self._takes_all: dict[Address, tuple[bool, float]] = {}

    def find(
        self,
        session_id: str,
        request_headers: Mapping[str, str],
        has_left: Callable[[], bool] | None = None,
        watch: Watch | None = None,
    ) -> Session | Address:
        """The session, now with a record, or the backend that the request may go to without one.

        The latter takes every id, or answers neither with a result nor that the session is lost.
        Raises SessionEnded where no backend knows the session, Overloaded at the limit,
        BackendError where one could not be asked, StorageError, and ClientLeft where `has_left`, or
        `watch` while one is asked, says so.
        """
        with self._turn(session_id, has_left) as is_first:
            if not is_first:
                try:
                    return self._manager.load(session_id)
                except SessionNotFound:
                    pass
            with self._changed:
                if self._missed.get(session_id, 0.0) > time.monotonic():
                    raise SessionEnded
            if not any(map(self._is_believed_to_take_all, self._takes_all)):
                self._limit.acquire()
            return self._found(session_id, request_headers, self._calls.waited_for(watch))

    @contextmanager
    def _turn(self, session_id: str, has_left: Callable[[], bool] | None) -> Iterator[bool]:
        """Waits until nobody else asks for this id; yields whether nobody did."""
        until = time.monotonic() + _TURN
        is_first = self._has_turn(session_id, 0.0)
        while not is_first and not self._has_turn(session_id, _LOOK):
            if has_left is not None and has_left():
                raise ClientLeft
            if time.monotonic() >= until:
                break  # whoever asks is too slow
        try:
            yield is_first
        finally:
            with self._changed:
                self._asked.discard(session_id)
                self._changed.notify_all()

    def _has_turn(self, session_id: str, seconds: float) -> bool:
        """Whether nobody else asks for this id, which is waited for; then this request does."""
        with self._changed:
            is_free = self._changed.wait_for(lambda: session_id not in self._asked, seconds)
            if is_free:
                self._asked.add(session_id)
            return is_free

    def _found(
        self, session_id: str, request_headers: Mapping[str, str], calls: OwnCalls
    ) -> Session | Address:
        given = taken_along(request_headers)
        version = request_headers.get(headers.PROTOCOL_VERSION.title())
        if version is not None:
            given[headers.PROTOCOL_VERSION] = version
        failure: BackendError | None = None
        other: Address | None = None
        for address in self._balancer.one_by_one():
            if self._is_believed_to_take_all(address):
                return address
            try:
                answer = calls.ping(address, given, session_id)
                if answer.has_result and not self._takes_every_id(address, given, calls):
                    return self._recorded(session_id, answer.address, version)
            except BackendError as error:
                failure = error
                if isinstance(error, BackendUnreached):
                    self._balancer.note_failure(address, error)
                continue
            if answer.has_result:
                return address
            if not answer.is_lost:
                other = other or address  # such as 401: the client must hear it
        if failure is not None:
            raise failure
        if other is not None:
            return other
        self._remember_miss(session_id)
        raise SessionEnded

    def _is_believed_to_take_all(self, address: Address) -> bool:
        takes_all, until = self._takes_all.get(address, (False, 0.0))
        return takes_all and until > time.monotonic()

    def _takes_every_id(self, address: Address, given: Mapping[str, str], calls: OwnCalls) -> bool:
        """Whether a backend takes an id that nobody has issued; asked once in five minutes."""
        now = time.monotonic()
        takes_all, until = self._takes_all.get(address, (False, 0.0))
        if until > now:
            return takes_all
        takes_all = calls.ping(address, given, uuid.uuid4().hex).has_result
        with self._changed:
            kept = {a: known for a, known in self._takes_all.items() if known[1] > now}
            self._takes_all = {**kept, address: (takes_all, now + _BELIEVED)}
        return takes_all

    def _recorded(self, session_id: str, address: Address, version: str | None) -> Session:
        metadata = {
            BACKEND_URL: address.backend_url,
            BACKEND_HOST: address.name,
            PROTOCOL_VERSION: version,
        }
        known = {key: value for key, value in metadata.items() if value is not None}
        session = new_session(session_id, KIND, **known)
        try:
            self._manager.create(session)
        except SessionExists:  # another replica was faster
            return self._manager.load(session_id)
        self._balancer.add(session_id, address)
        return session

    def _remember_miss(self, session_id: str) -> None:
        with self._changed:
            self._missed[session_id] = time.monotonic() + _MISSED
            self._missed.move_to_end(session_id)
            if len(self._missed) > _MAX_MISSES:
                self._missed.popitem(last=False)
