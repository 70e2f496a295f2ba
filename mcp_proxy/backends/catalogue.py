"""What servers list, as far as this worker knows: so that a list starts nothing.

Clients keep their first list, some of them for ever. So the first one waits for servers whose lists
are unknown, which start together, and every later one is answered from here. A server that does not
answer in time is waited for once: from then on it is missing until it comes.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.background import KeyedExecutor, TimerWorker
from mcp_proxy.errors import BackendDraining, BackendExited, ProxyError
from mcp_proxy.wire import jsonrpc

log = logging.getLogger(__name__)

#: Seconds that a first list waits for servers whose lists are unknown.
GATHER_TIMEOUT = 20.0

#: Seconds after which a server that could not be asked is asked again, when a list is wanted.
ASK_AGAIN = 10.0

# Keys whose failures are remembered.
_MAX_FAILED = 1000

#: The lists that are kept, in bytes; those that were not used for the longest time go first.
MAX_KEPT = 64 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Listed:
    """What a server says of itself: its InitializeResult, and its lists by their methods."""

    result: Raw
    lists: Mapping[str, Sequence[Raw]]

    @property
    def capabilities(self) -> Raw | UnsetType:
        """What the server can do."""
        return jsonrpc.fields_of(self.result).get("capabilities", UNSET)

    def is_same(self, other: Listed | None) -> bool:
        """Whether the other has the same lists."""
        return other is not None and other.lists == self.lists

    @property
    def size(self) -> int:
        """In bytes."""
        entries = (entry for entries in self.lists.values() for entry in entries)
        return sum(len(memoryview(each)) for each in (self.result, *entries))


class Listener(Protocol):
    """Who is told when the lists of a server have become known."""

    def note_listed(self, key: str) -> None:
        """The lists under a key are known, or others than they were. Quick."""


class _Asking(NamedTuple):
    """Somebody asks a server for its lists."""

    since: float  # monotonic
    waiters: list[Callable[[], object]]


class _Failed(NamedTuple):
    reason: str
    at: float


class Catalogue:
    """The lists of servers by keys, which say which server it is and for whom. Thread-safe.

    At most `width` servers are asked at the same time.
    """

    def __init__(self, timer: TimerWorker, width: int) -> None:
        self.timer = timer
        self._executor = KeyedExecutor("mcp-gatherer", width)
        self._lock = threading.Lock()  # guards what follows
        self._listed: OrderedDict[str, Listed] = OrderedDict()
        self._size = 0
        self._asking: dict[str, _Asking] = {}
        self._failed: dict[str, _Failed] = {}
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Catalogue listed={len(self._listed)} asking={len(self._asking)}>"

    def listed(self, key: str) -> Listed | None:
        """What is known under a key."""
        with self._lock:
            found = self._listed.get(key)
            if found is not None:
                self._listed.move_to_end(key)
            return found

    def reason(self, key: str) -> str | None:
        """Why nothing is known under a key; None where that is not known either."""
        with self._lock:
            failed = self._failed.get(key)
            return None if failed is None else failed.reason

    def is_awaited(self, key: str) -> bool:
        """Whether it is worth waiting for what is listed under a key: once, and not for ever."""
        return self.awaited_for(key) > 0

    def awaited_for(self, key: str) -> float:
        """How many seconds it is worth waiting for that: until `GATHER_TIMEOUT` after it was first
        asked for.
        """
        with self._lock:
            if key in self._listed or key in self._failed:
                return 0.0
            asking = self._asking.get(key)
            waited = 0.0 if asking is None else time.monotonic() - asking.since
            return max(0.0, GATHER_TIMEOUT - waited)

    def is_to_be_asked_again(self, key: str) -> bool:
        """Whether a server that could not be asked may be another by now."""
        with self._lock:
            failed = self._failed.get(key)
            is_due = failed is not None and time.monotonic() - failed.at > ASK_AGAIN
            return is_due and key not in self._asking

    def ask(
        self, key: str, look: Callable[[], Listed], waiter: Callable[[], object] | None = None
    ) -> None:
        """Has a thread of ours `look` up the lists, unless one is at it; then `waiter` is called.

        Never waits.
        """
        self._begin(key, lambda: self.note(key, look()), waiter)

    def look(
        self, key: str, act: Callable[[], object], waiter: Callable[[], object] | None = None
    ) -> None:
        """As `ask`, of what nobody but the caller of `act` is to know. Never waits."""
        self._begin(key, act, waiter)

    def _begin(
        self, key: str, act: Callable[[], object], waiter: Callable[[], object] | None
    ) -> None:
        with self._lock:
            asking = self._asking.get(key)
            is_first = asking is None
            if asking is None:
                asking = self._asking[key] = _Asking(time.monotonic(), [])
            if waiter is not None:
                asking.waiters.append(waiter)
        if not is_first:
            return
        try:
            self._executor.submit(key, lambda: self._ask(key, act))
        except RuntimeError as error:
            self.note_failure(key, f"It cannot be asked: {error}")
            self._note_asked(key)

    def note(self, key: str, listed: Listed) -> None:
        """What a server has said; whoever listens is told if it is something else than before."""
        with self._lock:
            before = self._listed.pop(key, None)
            self._failed.pop(key, None)
            self._listed[key] = listed
            self._size += listed.size - (0 if before is None else before.size)
            while self._size > MAX_KEPT and len(self._listed) > 1:
                _, oldest = self._listed.popitem(last=False)
                self._size -= oldest.size
            listeners = [] if listed.is_same(before) else list(self._listeners)
        for listener in listeners:
            listener.note_listed(key)

    def listen(self, listener: Listener) -> None:
        """Has a listener told of changes for as long as it lives."""
        with self._lock:
            self._listeners.add(listener)

    def close(self) -> None:
        """Asks nobody any more."""
        self._executor.close()

    def _ask(self, key: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (BackendDraining, BackendExited):
            pass  # who asked has left; somebody else asks again
        except ProxyError as error:
            self.note_failure(key, error.message)
        except Exception:
            log.exception("the lists of a server could not be read")
            self.note_failure(key, "Its lists could not be read")
        finally:
            self._note_asked(key)

    def _note_asked(self, key: str) -> None:
        with self._lock:
            asking = self._asking.pop(key)
        for waiter in asking.waiters:
            waiter()

    def note_failure(self, key: str, reason: str) -> None:
        """Why a server has not said what it lists."""
        with self._lock:
            self._failed[key] = _Failed(reason, time.monotonic())
            if len(self._failed) > _MAX_FAILED:
                del self._failed[next(iter(self._failed))]


class Gathering:
    """Waits, without a thread of its own, until the lists under some keys are known, and calls
    `done` once; at the latest after `timeout` seconds.

    `looks` has for each key what looks its lists up. Once nobody wants them (`is_wanted`) nothing
    is waited for any more.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        looks: Mapping[str, Callable[[], Listed]],
        timeout: float,
        done: Callable[[], object],
        is_wanted: Callable[[], bool],
    ) -> None:
        self._catalogue = catalogue
        self._looks = looks
        self._until = time.monotonic() + timeout
        self._done = done
        self._is_wanted = is_wanted
        self._lock = threading.Lock()  # guards that `done` is called once
        self._is_over = False

    def begin(self) -> None:
        """Begins to wait; `done` may have been called when this returns."""
        if self._awaited():
            self._wait()
        self._look()

    def _wait(self) -> None:
        """Looks again when the first of them is no longer worth waiting for."""
        if self._is_over:
            return
        left = self._until - time.monotonic()
        waits = [s for s in map(self._catalogue.awaited_for, self._looks) if s > 0]
        if left > 0 and waits:
            self._catalogue.timer.call_later(min(left, *waits), self._wait)
        else:
            self._finish()

    def _awaited(self) -> list[str]:
        return [key for key in self._looks if self._catalogue.is_awaited(key)]

    def _look(self) -> None:
        """Asks for what is awaited, also where somebody else who has asked has left meanwhile."""
        if self._is_over:
            return
        may_wait = self._is_wanted() and time.monotonic() < self._until
        awaited = self._awaited() if may_wait else []
        for key in awaited:
            self._catalogue.ask(key, self._looks[key], self._look)
        if not awaited:
            self._finish()

    def _finish(self) -> None:
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if not was_over:
            self._done()
