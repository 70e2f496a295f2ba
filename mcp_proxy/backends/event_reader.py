"""Event streams of HTTP servers, read as their events come: no thread waits for the next one.

A call that waits for its client's answer, a subscription and a legacy server's GET stream last for
minutes or days. One thread watches all of them; a few read those that have something to read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.background import KeyedExecutor, SelectorWorker, Workers
from mcp_proxy.errors import BackendError, BackendLost
from mcp_proxy.wire import sse

# Seconds that streams have to end when nobody reads any more: they have been aborted.
_CLOSE_TIME = 1.0

#: Streams that are read at the same time. Who takes an event may have to wait for a slow client.
WIDTH = 256


class _Stream:
    """A stream that is read."""

    def __init__(
        self,
        key: str,
        call: HttpCall,
        limit: int,
        take: Callable[[sse.Event], bool],
        on_end: Callable[[bool, BackendError | None], object],
    ) -> None:
        self.key = key
        self.call = call
        self.on_end = on_end
        self._take = take
        self._pieces = call.pieces()
        self._decoder = sse.Decoder(limit)

    def take(self) -> bool | None:
        """Takes what has come; True once no more is wanted, False where the stream has ended, None
        while more may come. Raises BackendError where it breaks.
        """
        while self.call.has_more():
            piece = next(self._pieces, None)
            if piece is None:
                return False
            if any(self._take(event) for event in self._decoder.feed(piece)):
                return True
        return None


class EventReader:
    """Reads any number of event streams. Thread-safe; `close` ends its threads."""

    def __init__(self, name: str, workers: Workers | None = None) -> None:
        self._watcher = _Watcher(name, workers)
        self._readers = KeyedExecutor(f"{name}-reader", WIDTH)
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards and announces _open
        self._open = 0

    def __repr__(self) -> str:
        return f"<EventReader open={self._open} {self._watcher!r} {self._readers!r}>"

    def read(
        self,
        call: HttpCall,
        limit: int,
        take: Callable[[sse.Event], bool],
        on_end: Callable[[bool, BackendError | None], object],
    ) -> None:
        """Has `take` called with each event of a response, in order, until it returns True.

        Then, or when the stream has ended, `on_end` is called once, with whether `take` has
        returned True and with what the stream broke by; it has to close the call. An event has at
        most `limit` bytes. Returns when what has come already is taken; no time limit is left.
        """
        call.wait_for_ever()
        try:
            self._watcher.start()
        except RuntimeError:
            on_end(False, BackendLost("There is no thread to wait for the server's answer"))
            return
        self._count(1)
        self._read_on(_Stream(f"{next(self._numbers)}", call, limit, take, on_end))

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def _read_on(self, stream: _Stream) -> None:
        try:
            is_taken = stream.take()
        except BackendError as error:
            self._end(stream, False, error)
        except BaseException:
            self._end(stream, False, BackendLost("The server's answer could not be read"))
            raise
        else:
            if is_taken is None:
                self._watcher.watch(stream.call, lambda: self._hand_on(stream))
            else:
                self._end(stream, is_taken, None)

    def _end(self, stream: _Stream, is_taken: bool, failure: BackendError | None) -> None:
        try:
            stream.on_end(is_taken, failure)
        finally:
            self._count(-1)

    def _hand_on(self, stream: _Stream) -> None:
        """Has another thread read, so that the one that watches waits for nobody."""
        try:
            self._readers.submit(stream.key, lambda: self._read_on(stream))
        except RuntimeError:  # the system has no thread
            self._read_on(stream)

    def close(self) -> None:
        """Ends the threads; the streams that are read have to have been aborted."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, _CLOSE_TIME)
        self._watcher.stop()
        self._readers.close()


class _Watcher(SelectorWorker):
    """Waits until there is something to read of a response, or until its connection has ended."""

    is_essential = False

    def watch(self, call: HttpCall, act: Callable[[], object]) -> None:
        """Has `act` called once, by this thread, when reading would not wait.

        Nobody may close the call meanwhile; `abort` counts as its end.
        """
        self.call(lambda: self._add(call, act))

    def _add(self, call: HttpCall, act: Callable[[], object]) -> None:
        try:
            self.register(call, lambda: self._note_readable(call, act))
        except (OSError, ValueError, KeyError):  # it is closed: reading says so
            act()

    def _note_readable(self, call: HttpCall, act: Callable[[], object]) -> None:
        self.unregister(call)
        act()
