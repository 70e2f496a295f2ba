"""The relay of a replica: its mailbox, its lease, and every conversation with other replicas.

Threads: the listener reads letters and hands them to conversations, the courier sends, the lease's
thread renews it and looks after conversations, lanes do what may take time. They begin when the
relay is first used, in the process that uses it; a fork begins anew.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from mcp_proxy.backends.base import Backend
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay import protocol as frames
from mcp_proxy.relay import protocol as messages
from mcp_proxy.relay.calls import Hosted, RemoteBackend
from mcp_proxy.relay.lanes import Lanes
from mcp_proxy.relay.lease import Lease
from mcp_proxy.relay.protocol import Channel, Frame, Kind, Reach
from mcp_proxy.relay.sender import Conversation, Courier
from mcp_proxy.replica import Replica
from mcp_proxy.storage.mailboxes import Letter, Mailboxes

log = logging.getLogger(__name__)

Finder = Callable[[str], Backend | None]

# Children of this replica that are served to others at the same time.
_LANES = 64

# Channels of others that are over, and remembered: a letter may come twice.
_REMEMBERED = 65_536

# A letter that only wakes the listener.
_NOTHING = b""

# Seconds that the listener waits at a time, at the most, and between attempts to reach the store.
_WAIT = 2.0
_PAUSE = 0.25


class Relay:
    """One for each replica. `find` functions are asked for children of this replica by their id."""

    def __init__(self, mailboxes: Mailboxes, replica: Replica) -> None:
        self._mailboxes = mailboxes
        self._replica = replica
        self._finders: list[Finder] = []
        self._lapse_listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()  # guards _running and _failures
        self._failures = 0  # to open the mailbox
        self._running: _Running | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Relay {self._running!r}>"

    def serve(self, find: Finder, on_lapse: Callable[[], None]) -> None:
        """Has children that `find` knows served to other replicas.

        `on_lapse` is called when this replica may have been declared dead.
        """
        self._finders.append(find)
        self._lapse_listeners.append(on_lapse)

    def start(self) -> None:
        """Opens this replica's mailbox; raises StorageUnavailable. Harmless when repeated."""
        self._begun()

    def backend(self, replica: str, child: str) -> Backend:
        """A child of another replica; raises StorageUnavailable."""
        return RemoteBackend(self._begun(), replica, child)

    def is_gone(self, replica: str) -> bool:
        """Whether another replica is gone for good; StorageUnavailable while nobody can know."""
        return self._begun().lease.is_gone(replica)

    @property
    def is_held(self) -> bool:
        """Whether nobody can have declared this replica dead."""
        running = self._running
        return running is None or running.pid != os.getpid() or running.lease.is_held

    @property
    def is_busy(self) -> bool:
        """Whether a client, here or at another replica, waits for an answer that is relayed."""
        running = self._running
        return running is not None and running.pid == os.getpid() and running.is_busy

    def close(self) -> None:
        """Ends every conversation and the mailbox; harmless when repeated."""
        with self._lock:
            self._is_closed = True
            running, self._running = self._running, None
        if running is not None and running.pid == os.getpid():
            running.stop()

    def _begun(self) -> _Running:
        failures = self._failures
        with self._lock:
            if self._is_closed:
                raise StorageUnavailable("This replica is shutting down")
            if self._running is None or self._running.pid != os.getpid():
                if self._failures != failures:
                    raise StorageUnavailable  # as somebody found out while we waited for our turn
                self._running = self._started()
            return self._running

    def _started(self) -> _Running:
        running = _Running(self._mailboxes, self._replica.id, self._find, self._on_lapse)
        try:
            running.start()
        except StorageUnavailable:
            self._failures += 1
            raise
        return running

    def _find(self, child: str) -> Backend | None:
        return next((found for find in self._finders if (found := find(child))), None)

    def _on_lapse(self) -> None:
        for listener in self._lapse_listeners:
            listener()


class _Running:
    """A relay in the process that uses it."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        own: str,
        find: Finder,
        on_lapse: Callable[[], None],
    ) -> None:
        self.pid = os.getpid()
        self.find = find
        self.lease = Lease(mailboxes, own, self._look, self._note_lapse)
        self._mailboxes = mailboxes
        self._own = own
        self._on_lapse = on_lapse
        self._courier = Courier(mailboxes, self.lease.is_gone, lambda: self.lease.is_held)
        self._lanes = Lanes(_LANES)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards _conversations, _over and _over_order
        self._conversations: dict[str, Conversation] = {}
        self._over: set[str] = set()
        self._over_order: deque[str] = deque()
        self._next_probe = time.monotonic() + mailboxes.lease
        self._is_stopping = False
        self._listener = threading.Thread(target=self._listen, name="mcp-relay", daemon=True)

    def __repr__(self) -> str:
        return f"{self._own} conversations={len(self._conversations)} {self.lease!r}"

    def start(self) -> None:
        self.lease.start()
        self._courier.start()
        self._listener.start()

    def stop(self) -> None:
        self._courier.stop(_WAIT)
        self._is_stopping = True
        with contextlib.suppress(StorageUnavailable):
            self._mailboxes.post([Letter(self._own, _NOTHING)])
        self._listener.join(_WAIT)
        self.lease.stop()
        self._lanes.close()
        for conversation in self._all():
            if isinstance(conversation, Hosted):
                conversation.leave()
            else:
                conversation.lose("This replica is shutting down")

    # --- for conversations -----------------------------------------------------------------------

    def channel_to(self, replica: str) -> Channel:
        return Channel(f"{self._own}/{next(self._numbers)}", self._own, replica)

    def converse(self, conversation: Conversation, first: messages.ToOwner) -> None:
        conversation.channel.put(messages.encode(first))
        with self._lock:
            self._conversations[conversation.channel.name] = conversation
        self._courier.wake(conversation)

    def wake(self, conversation: Conversation) -> None:
        self._courier.wake(conversation)

    def forget(self, conversation: Conversation) -> None:
        name = conversation.channel.name
        with self._lock:
            if isinstance(self._conversations.pop(name, None), Hosted):
                self._over.add(name)
                self._over_order.append(name)
                if len(self._over_order) > _REMEMBERED:
                    self._over.discard(self._over_order.popleft())

    def in_order(self, lane: str, act: Callable[[], None]) -> None:
        self._lanes.add(lane, act)

    @property
    def is_busy(self) -> bool:
        return any(conversation.is_awaited for conversation in self._all())

    def _all(self) -> list[Conversation]:
        with self._lock:
            return list(self._conversations.values())

    # --- the listener ----------------------------------------------------------------------------

    def _listen(self) -> None:
        wait = min(_WAIT, self._mailboxes.lease / 3)
        while not self._is_stopping:
            is_fresh = self.lease.witness()
            try:
                letters = self._mailboxes.collect(self._own, wait)
            except StorageUnavailable as error:
                log.warning("letters of other replicas are not read: %s", error)
                time.sleep(_PAUSE)
                continue
            for letter in filter(None, letters):
                self._take(letter, is_fresh)

    def _take(self, letter: bytes, is_fresh: Callable[[], bool]) -> None:
        try:
            frame = frames.decode(letter)
            conversation = self._conversation_of(frame)
            if conversation is not None:
                self._hand_over_or_forget(conversation, frame, is_fresh)
        except msgspec.DecodeError as error:
            log.error("a letter of another replica cannot be read: %s", error)
        except Exception:
            log.exception("a letter of another replica was not understood")

    def _hand_over_or_forget(
        self, conversation: Conversation, frame: Frame, is_fresh: Callable[[], bool]
    ) -> None:
        try:
            self._hand_over(conversation, frame, is_fresh)
        except Exception:
            if isinstance(conversation, Hosted) and frame.is_first:
                self.forget(conversation)
            raise

    def _hand_over(
        self, conversation: Conversation, frame: Frame, is_fresh: Callable[[], bool]
    ) -> None:
        channel = conversation.channel
        channel.reach = Reach.CERTAIN
        if frame.kind == Kind.UNKNOWN:
            conversation.lose("The replica that holds the session has lost the call")
            return
        try:
            message = channel.take(frame)
        except LookupError as error:
            log.warning("something between two replicas was lost: %s", error)
            conversation.lose("Something between two replicas was lost; the call may have been run")
            return
        if frame.kind == Kind.PROBE:
            self._send(frame.sender, channel.count(Kind.COUNT))
        if message is not None:
            conversation.take(message, is_fresh)
        if frame.kind != Kind.PIECE or channel.is_credit_due:
            self._courier.wake(conversation)

    def _conversation_of(self, frame: Frame) -> Conversation | None:
        """Who a frame is for; the first of a channel begins a conversation here."""
        with self._lock:
            known = self._conversations.get(frame.channel)
            if known is not None:
                return known
            is_ours = frame.channel.startswith(f"{self._own}/")
            if frame.is_first and not is_ours and frame.channel not in self._over:
                channel = Channel(frame.channel, self._own, frame.sender)
                hosted = self._conversations[frame.channel] = Hosted(channel, self)
                return hosted
        if frame.kind == Kind.PROBE:
            self._send(frame.sender, Frame(frame.channel, self._own, Kind.UNKNOWN, 0))
        return None

    def _send(self, replica: str, frame: Frame) -> None:
        self._courier.wake(_Remark(Channel(frame.channel, self._own, replica), frame))

    # --- the lease's thread ----------------------------------------------------------------------

    def _look(self) -> None:
        """Ends conversations with replicas that are gone, and probes the others now and then."""
        conversations = self._all()
        for peer in {conversation.channel.peer for conversation in conversations}:
            if self._is_gone(peer):
                for conversation in conversations:
                    # One that has not certainly reached the replica is the courier's to decide.
                    channel = conversation.channel
                    if channel.peer == peer and channel.reach is Reach.CERTAIN:
                        conversation.lose("The replica that held the session is gone")
        for conversation in conversations:
            conversation.tick()
        if time.monotonic() > self._next_probe:
            self._next_probe = time.monotonic() + self._mailboxes.lease
            self._probe(conversations)

    def _is_gone(self, peer: str) -> bool:
        try:
            return self.lease.is_gone(peer)
        except StorageUnavailable:
            return False

    def _probe(self, conversations: list[Conversation]) -> None:
        for conversation in conversations:
            if not isinstance(conversation, Hosted) and conversation.channel.has_sent:
                self._send(conversation.channel.peer, conversation.channel.count(Kind.PROBE))

    def _note_lapse(self) -> None:
        with contextlib.suppress(StorageUnavailable):  # the listener looks at the lease anew
            self._mailboxes.post([Letter(self._own, _NOTHING)])
        self._next_probe = 0.0
        self._on_lapse()


class _Remark(Conversation):
    """One frame that expects nothing."""

    def __init__(self, channel: Channel, frame: Frame) -> None:
        self.channel = channel
        self._frame = frame

    def step(self) -> list[Frame]:
        return [self._frame]

    def take(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        pass

    def lose(self, sentence: str, is_gone: bool = False) -> None:
        pass
