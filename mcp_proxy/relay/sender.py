"""The sender: posts the envelopes of a replica, many in one round trip.

It has a thread. Whoever begins a call while nothing else is to be sent posts it himself: to hand it
to the thread would take as long as the post.

What cannot be sent now waits here, in order: while the store is away, and while it is not certain
whether a replica without a mailbox is gone or about to come back. After a lease it is given up.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from mcp_proxy.background import QueueWorker, Workers
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import Channel, Delivered, Frame
from mcp_proxy.storage.mailboxes import Envelope, Mailboxes

log = logging.getLogger(__name__)

# Envelopes of one round trip, and seconds between two attempts.
_BATCH = 128
_PAUSE = 0.25


class Call(ABC):
    """One side of a relayed call: a channel, and what it is about.

    `outgoing` is called by the sender, `on_message` by the listener, `on_loss` by either; none may
    wait, but for the store.
    """

    channel: Channel

    @abstractmethod
    def outgoing(self) -> list[Frame]:
        """What is to be sent now."""

    @abstractmethod
    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        """A message of the other side, to be acted upon as long as it `is_fresh`."""

    @abstractmethod
    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        """The other side cannot be reached any more; `channel` says whether it ever was.

        `is_gone`: nor can anybody else, so that its sessions may be taken over.
        """

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits for an answer that this call brings."""
        return False

    def expire_if_due(self) -> None:  # noqa: B027  (most have no deadlines to look at)
        """Called now and then."""


_PEER = attrgetter("to")


class _Waiting(NamedTuple):
    call: Call
    frame: Frame
    since: float


class Sender(QueueWorker[Call]):
    """Sends what calls have to say, when they are put into its queue."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        is_gone: Callable[[str], bool],
        may_send: Callable[[], bool] = lambda: True,
        workers: Workers | None = None,
    ) -> None:
        super().__init__("mcp-relay-sender", workers)
        self._mailboxes = mailboxes
        self._is_gone = is_gone
        self._may_send = may_send
        self._sending = threading.Lock()  # held by the thread that sends; guards what follows
        self._outbox: dict[str, deque[_Waiting]] = {}  # by replica
        self._paused: dict[str, float] = {}  # replicas that are not tried before a time

    def __repr__(self) -> str:
        return f"<Sender waiting={sum(map(len, self._outbox.values()))}>"

    def send(self, call: Call) -> None:
        """Sends what a call has to say: at once, where nobody sends and nothing waits to be sent.

        For threads that may wait for the store, and hold no lock. Else it is as `put`, so that what
        comes from many threads at the same time shares a round trip.
        """
        is_idle = self.is_running and self._queue.empty() and not self._outbox
        if not is_idle or not self._sending.acquire(blocking=False):
            self.put(call)
            return
        try:
            self._send([call])
            must_wake = bool(self._outbox)
        finally:
            self._sending.release()
        if must_wake:
            self.wake()

    def run_once(self) -> None:
        self.send_once(_PAUSE if self._outbox else None)

    def finish(self) -> None:
        """Sends what can be sent at once."""
        self.send_once(0)

    def send_once(self, timeout: float | None) -> None:
        """Waits until a call has something to say or the time is over, then sends what it can."""
        calls = self.take(timeout)
        with self._sending:
            self._send(calls)

    def _send(self, calls: Iterable[Call]) -> None:
        """Sends what calls have to say, and what waits. The lock is held."""
        for call in calls:
            for frame in _outgoing(call):
                waiting = self._outbox.setdefault(call.channel.peer, deque())
                waiting.append(_Waiting(call, frame, time.monotonic()))
        if not self._may_send():  # what the others answer would find no mailbox here
            self._hold_all("This replica cannot reach the others")
            return
        while self._outbox and (batch := self._next_batch()):
            if not self._post(batch):
                break

    def _hold_all(self, sentence: str) -> None:
        for peer in list(self._outbox):
            self._pause_or_give_up(peer, sentence)

    def _next_batch(self) -> list[_Waiting]:
        now = time.monotonic()
        batch: list[_Waiting] = []
        for peer, waiting in self._outbox.items():
            if self._paused.get(peer, 0.0) <= now:
                batch.extend(list(waiting)[: _BATCH - len(batch)])
        return batch

    def _post(self, batch: Sequence[_Waiting]) -> bool:
        """Whether the store took the batch; what a mailbox refused waits, or is given up."""
        envelopes, new = [], set()
        for call, frame, _ in batch:
            envelopes.append(Envelope(call.channel.peer, protocol.encode(frame)))
            if call.channel.delivered is Delivered.NO:
                call.channel.delivered = Delivered.MAYBE
                new.add(call.channel)
        try:
            accepted = self._mailboxes.post(envelopes)
        except StorageUnavailable as error:
            log.debug("envelopes for other replicas wait: %s", error)
            for peer in dict.fromkeys(map(_PEER, envelopes)):
                self._pause_or_give_up(peer, str(error))
            return False
        refused: dict[str, None] = {}
        for (call, _, _), is_accepted in zip(batch, accepted, strict=True):
            channel = call.channel
            if not is_accepted:
                refused[channel.peer] = None
                if channel in new and channel.delivered is Delivered.MAYBE:
                    channel.delivered = Delivered.NO
            elif channel.peer not in refused:
                channel.delivered = Delivered.YES
                self._outbox[channel.peer].popleft()
        for peer in dict.fromkeys(map(_PEER, envelopes)):
            if not self._outbox[peer]:
                del self._outbox[peer]
                self._paused.pop(peer, None)
        for peer in refused:
            self._decide_on(peer)
        return True

    def _decide_on(self, peer: str) -> None:
        """A replica has no mailbox: is it gone, or is that not certain yet?"""
        try:
            is_gone = self._is_gone(peer)
        except StorageUnavailable:
            is_gone = False
        if is_gone:
            self._give_up(peer, "The replica that held the session is gone", is_gone=True)
        else:
            self._pause_or_give_up(peer, "The replica that holds the session cannot be reached")

    def _pause_or_give_up(self, peer: str, sentence: str) -> None:
        self._paused[peer] = time.monotonic() + _PAUSE
        if time.monotonic() - self._outbox[peer][0].since > self._mailboxes.lease:
            self._give_up(peer, sentence)

    def _give_up(self, peer: str, sentence: str, is_gone: bool = False) -> None:
        """Tells everybody who waits for this replica.

        Where it is gone it may have refused what had reached it: the lease's thread looks at that.
        """
        self._paused.pop(peer, None)
        for call in dict.fromkeys(waiting.call for waiting in self._outbox.pop(peer)):
            if not (is_gone and call.channel.delivered is Delivered.YES):
                call.on_loss(sentence, is_gone)


def _outgoing(call: Call) -> list[Frame]:
    """What a call has to send; one that fails does not keep the others from it."""
    try:
        return call.outgoing()
    except Exception:
        log.exception("a call to another replica failed")
        return []
