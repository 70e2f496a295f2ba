"""Mailboxes in memory: for several replicas in one process, and the reference for every other."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mcp_proxy.relay.mailbox import LEASE, Letter, Mailboxes

_MAX_LETTERS = 256  # that one look takes out


class _Mailbox:
    def __init__(self, expires: float) -> None:
        self.expires = expires
        self.letters: deque[bytes] = deque()


class LocalMailboxes(Mailboxes):
    """Shared by handing the same object to each replica. `lease` in seconds; `clock` for tests."""

    def __init__(self, lease: float = LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease = lease
        self._clock = clock
        self._started = clock()
        self._arrived = threading.Condition()  # guards and announces _boxes
        self._boxes: dict[str, _Mailbox] = {}

    def __repr__(self) -> str:
        return f"<LocalMailboxes {list(self._boxes)}>"

    def renew(self, replica: str) -> bool:
        with self._arrived:
            box, expires = self._box(replica), self._clock() + self.lease
            if box is None:
                self._boxes[replica] = _Mailbox(expires)
                return False
            box.expires = expires
            return True

    def is_open(self, replica: str) -> bool:
        with self._arrived:
            return self._box(replica) is not None

    def post(self, letters: Sequence[Letter]) -> list[bool]:
        with self._arrived:
            accepted = [self._put(letter) for letter in letters]
            self._arrived.notify_all()
        return accepted

    def _put(self, letter: Letter) -> bool:
        box = self._box(letter.to)
        if box is not None:
            box.letters.append(letter.data)
        return box is not None

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._has_letters(replica), timeout)
            box = self._box(replica)
            count = 0 if box is None else min(_MAX_LETTERS, len(box.letters))
            return [box.letters.popleft() for _ in range(count)] if box is not None else []

    def remove(self, replica: str) -> None:
        with self._arrived:
            self._boxes.pop(replica, None)

    def uptime(self) -> float:
        return self._clock() - self._started

    def close(self) -> None:
        pass

    def _has_letters(self, replica: str) -> bool:
        box = self._box(replica)
        return box is not None and bool(box.letters)

    def _box(self, replica: str) -> _Mailbox | None:
        """The mailbox, None where there is none or its time is over; the lock is held."""
        box = self._boxes.get(replica)
        if box is not None and box.expires <= self._clock():
            del self._boxes[replica]
            return None
        return box
