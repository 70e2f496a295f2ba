"""The courier: the one thread of a replica that sends letters, many in one round trip.

What cannot be sent now waits here, in order: while the store is away, and while it is not certain
whether a replica without a mailbox is gone or about to come back. After a lease it is given up.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay import protocol as frames
from mcp_proxy.relay.protocol import Channel, Frame, Reach
from mcp_proxy.storage.mailboxes import Letter, Mailboxes

log = logging.getLogger(__name__)

# Letters of one round trip, and seconds between two attempts.
_BATCH = 128
_PAUSE = 0.25


class Conversation(ABC):
    """One end of a channel with what it is about.

    `step` is called by the courier, `take` by the listener, `lose` by either; none may wait, but
    for the store.
    """

    channel: Channel

    @abstractmethod
    def step(self) -> list[Frame]:
        """What is to be sent now."""

    @abstractmethod
    def take(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        """A message of the other side, to be acted upon as long as it `is_fresh`."""

    @abstractmethod
    def lose(self, sentence: str, is_gone: bool = False) -> None:
        """The other side cannot be reached any more; `channel` says whether it ever was.

        `is_gone`: nor can anybody else, so that its sessions may be taken over.
        """

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits for an answer that this conversation brings."""
        return False

    def tick(self) -> None:  # noqa: B027  (most have no deadlines to look at)
        """Called now and then."""


class _Item(NamedTuple):
    conversation: Conversation
    frame: Frame
    since: float


class Courier:
    """Sends what conversations have to say, when they are woken."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        is_gone: Callable[[str], bool],
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self._mailboxes = mailboxes
        self._is_gone = is_gone
        self._may_send = may_send
        self._woken: queue.SimpleQueue[Conversation | None] = queue.SimpleQueue()
        self._outbox: dict[str, deque[_Item]] = {}  # by replica; touched by the thread only
        self._paused: dict[str, float] = {}  # replicas that are not tried before a time
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="mcp-relay-courier", daemon=True)

    def __repr__(self) -> str:
        return f"<Courier waiting={sum(map(len, self._outbox.values()))}>"

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Sends what can be sent at once, and ends the thread within `timeout` seconds."""
        self._is_stopping = True
        self._woken.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def wake(self, conversation: Conversation) -> None:
        """A conversation may have something to send. Never waits."""
        self._woken.put(conversation)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self.run_once(_PAUSE if self._outbox else None)
            except Exception:
                log.exception("sending letters failed")
        self.run_once(0)

    def run_once(self, timeout: float | None) -> None:
        """Waits until a conversation is woken or the time is over, then sends what can be sent."""
        for conversation in self._take_woken(timeout):
            for frame in _step(conversation):
                items = self._outbox.setdefault(conversation.channel.peer, deque())
                items.append(_Item(conversation, frame, time.monotonic()))
        if not self._may_send():  # what the others answer would find no mailbox here
            self._hold_all("This replica cannot reach the others")
            return
        while batch := self._next_batch():
            if not self._send(batch):
                break

    def _hold_all(self, sentence: str) -> None:
        for peer in list(self._outbox):
            self._pause_or_give_up(peer, sentence)

    def _take_woken(self, timeout: float | None) -> dict[Conversation, None]:
        """Everybody who was woken, once, in order."""
        woken: dict[Conversation, None] = {}
        try:
            first = self._woken.get(timeout=timeout)
            while True:
                if first is not None:
                    woken[first] = None
                first = self._woken.get_nowait()
        except queue.Empty:
            return woken

    def _next_batch(self) -> list[_Item]:
        now = time.monotonic()
        batch: list[_Item] = []
        for peer, items in self._outbox.items():
            if self._paused.get(peer, 0.0) <= now:
                batch.extend(list(items)[: _BATCH - len(batch)])
        return batch

    def _send(self, batch: Sequence[_Item]) -> bool:
        """Whether the store took the batch; what a mailbox refused waits, or is given up."""
        letters = [Letter(i.conversation.channel.peer, frames.encode(i.frame)) for i in batch]
        channels = {item.conversation.channel for item in batch}
        new = {channel for channel in channels if channel.reach is Reach.NOT}
        for channel in new:
            channel.reach = Reach.PERHAPS
        try:
            accepted = self._mailboxes.post(letters)
        except StorageUnavailable as error:
            log.warning("letters to other replicas wait: %s", error)
            for peer in {letter.to for letter in letters}:
                self._pause_or_give_up(peer, str(error))
            return False
        refused: dict[str, None] = {}
        for item, is_accepted in zip(batch, accepted, strict=True):
            channel = item.conversation.channel
            if not is_accepted:
                refused[channel.peer] = None
                if channel in new and channel.reach is Reach.PERHAPS:
                    channel.reach = Reach.NOT
            elif channel.peer not in refused:
                channel.reach = Reach.CERTAIN
                self._drop_first(channel.peer)
        for peer in refused:
            self._consider(peer)
        return True

    def _drop_first(self, peer: str) -> None:
        items = self._outbox[peer]
        items.popleft()
        if not items:
            del self._outbox[peer]
            self._paused.pop(peer, None)

    def _consider(self, peer: str) -> None:
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
        """Tells everybody who waits for this replica."""
        self._paused.pop(peer, None)
        lost = dict.fromkeys(item.conversation for item in self._outbox.pop(peer))
        for conversation in lost:
            conversation.lose(sentence, is_gone)


def _step(conversation: Conversation) -> list[Frame]:
    """What a conversation has to send; one that fails does not keep the others from it."""
    try:
        return conversation.step()
    except Exception:
        log.exception("a conversation with another replica failed")
        return []
