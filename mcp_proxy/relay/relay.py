"""The relay of a replica: its mailbox, its lease, and every call to and from other replicas.

Threads: the listener reads envelopes and hands them to calls, the sender posts, the lease's thread
renews it and looks after calls, an executor does what may take time. They begin when the relay is
first used, in the process that uses it; a fork begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

import msgspec

from mcp_proxy.backends.exchange import Backend
from mcp_proxy.background import Worker, Workers
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay import protocol
from mcp_proxy.relay.calls import Calls, Find, InboundCall, RemoteBackend
from mcp_proxy.relay.lease import Lease
from mcp_proxy.relay.protocol import Channel, Delivered, Frame, Kind
from mcp_proxy.relay.sender import Call, Sender
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.storage.mailboxes import Envelope, Mailboxes

log = logging.getLogger(__name__)

# An envelope that only wakes the listener.
_NOTHING = b""

# Other replicas that are looked at in one look.
_PEERS = 64

# Seconds that the listener waits at most, and between attempts to reach the store.
_WAIT = 2.0
_PAUSE = 0.25


def _never() -> bool:
    return False


class Relay:
    """One for each replica. Thread-safe."""

    def __init__(
        self, mailboxes: Mailboxes, replica: Replica, workers: Workers | None = None
    ) -> None:
        self._mailboxes = mailboxes
        self._replica = replica
        self._workers = workers
        # What is served: how its children are found, and who wants to know of a lapse. Replaced as
        # a whole, so no lock guards those who read.
        self._served: tuple[tuple[Find, Callable[[], None]], ...] = ()
        self._lock = threading.Lock()  # guards changes of _served, _running and _failures
        self._failures = 0  # to open the mailbox
        self._running: _Running | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Relay {self._running!r}>"

    def serve(self, find: Find, on_lapse: Callable[[], None]) -> None:
        """Has children that `find` knows by their ids served to other replicas.

        `on_lapse` is called when this replica may have been declared dead.
        """
        with self._lock:
            self._served = (*self._served, (find, on_lapse))

    def serve_no_more(self, find: Find) -> None:
        """Has nothing that `find` knows served any more; harmless when repeated."""
        with self._lock:
            self._served = tuple(each for each in self._served if each[0] != find)

    def start(self) -> None:
        """Opens this replica's mailbox; raises StorageUnavailable. Harmless when repeated."""
        self._begun()

    def backend(self, replica: str, child: str) -> Backend:
        """A child of another replica; raises StorageUnavailable."""
        return RemoteBackend(self._begun().calls, replica, child)

    def is_gone(self, replica: str) -> bool:
        """Whether another replica is gone for good; StorageUnavailable while nobody can know."""
        return self._begun().lease.is_gone(replica)

    @property
    def is_held(self) -> bool:
        """Whether nobody can have declared this replica dead."""
        running = self._running
        return running is None or running.pid != os.getpid() or running.lease.is_held

    @property
    def calls(self) -> int:
        """How many calls to and from other replicas are under way."""
        running = self._running
        return 0 if running is None else len(running.calls)

    @property
    def is_busy(self) -> bool:
        """Whether a client, here or at another replica, waits for an answer that is relayed."""
        running = self._running
        return running is not None and running.pid == os.getpid() and running.is_busy

    def has_call_since(self, before: float) -> bool:
        """Whether a client at another replica waits for an answer since before that time."""
        running = self._running
        calls = [] if running is None else running.calls.all()
        return any(
            isinstance(call, InboundCall) and call.is_awaited_since(before) for call in calls
        )

    def close(self) -> None:
        """Ends every call and the mailbox; harmless when repeated."""
        with self._lock:
            self._is_closed = True
            running, self._running = self._running, None
        if running is not None and running.pid == os.getpid():
            running.end()

    def _begun(self) -> _Running:
        failures = self._failures
        with self._lock:
            if self._is_closed:
                raise StorageUnavailable("This replica is shutting down")
            if self._running is None or self._running.pid != os.getpid():
                if self._failures != failures:
                    raise StorageUnavailable  # another caller failed while we waited for the lock
                self._running = self._started()
            return self._running

    def _started(self) -> _Running:
        running = _Running(
            self._mailboxes, self._replica.id, self._find, self._on_lapse, self._workers
        )
        try:
            running.begin_all()
        except BaseException:
            self._failures += 1
            running.end()
            raise
        return running

    def _find(self, child: str, begins: bool) -> Backend | None:
        for find, _ in self._served:
            found = find(child, begins)
            if found is not None:
                return found
        return None

    def _on_lapse(self) -> None:
        for _, on_lapse in self._served:
            on_lapse()


class _Running(Worker):
    """A relay in the process that uses it; its own thread is the listener."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        own: str,
        find: Find,
        on_lapse: Callable[[], None],
        workers: Workers | None,
    ) -> None:
        super().__init__("mcp-relay", workers)
        self.pid = os.getpid()
        self.lease = Lease(mailboxes, own, self._look, self._note_lapse, workers, self._can_serve)
        self._sender = Sender(mailboxes, self.lease.is_gone, lambda: self.lease.is_held, workers)
        self.calls = Calls(own, self._sender, find)
        self._mailboxes = mailboxes
        self._own = own
        self._on_lapse = on_lapse
        self._next_probe = time.monotonic() + mailboxes.lease
        # Touched by the lease's thread only.
        self._seen_gone: set[str] = set()  # at the last look
        self._next_peer = 0  # where the next look begins

    def __repr__(self) -> str:
        return f"{self._own} calls={len(self.calls)} {self.lease!r}"

    def begin_all(self) -> None:
        """Opens the mailbox and starts the threads; raises StorageUnavailable."""
        self.lease.start()
        self._sender.start()
        self.start()

    def end(self) -> None:
        """Ends the threads, every call and the mailbox.

        What has reached this replica and was not begun is refused as such: others serve it.
        """
        self.stop(_WAIT)
        self.calls.begin_no_more()
        for envelope in self.lease.end():
            if envelope != _NOTHING:
                self._receive(envelope, _never)
        self.calls.refuse_unbegun()
        self._sender.stop(_WAIT)
        self.calls.close()

    @property
    def is_busy(self) -> bool:
        """Whether a client waits for an answer."""
        return any(call.is_awaited for call in self.calls.all())

    # --- the listener ----------------------------------------------------------------------------

    def wake(self) -> None:
        with contextlib.suppress(StorageUnavailable):
            self._mailboxes.post([Envelope(self._own, _NOTHING)])

    def run_once(self) -> None:
        is_fresh = self.lease.freshness()
        try:
            envelopes = self._mailboxes.collect(self._own, min(_WAIT, self._mailboxes.lease / 3))
        except StorageUnavailable as error:
            log.debug("envelopes of other replicas are not read: %s", error)
            time.sleep(_PAUSE)
            return
        for envelope in envelopes:
            if envelope != _NOTHING:
                self._receive(envelope, is_fresh)

    def _receive(self, envelope: bytes, is_fresh: Callable[[], bool]) -> None:
        try:
            frame = protocol.decode_frame(envelope)
        except msgspec.DecodeError as error:
            log.error("an envelope of another replica cannot be read: %s", error)
            return
        call = self.calls.of(frame)
        if call is None:
            if frame.kind == Kind.PROBE:
                self._send_alone(frame.sender, Frame(frame.channel, self._own, Kind.UNKNOWN, 0))
            return
        try:
            self._hand_over(call, frame, is_fresh)
        except Exception as error:
            is_unforeseen = not isinstance(error, (msgspec.DecodeError, UnicodeDecodeError))
            sentence = "an envelope of another replica was not understood: %s"
            log.error(sentence, error, exc_info=is_unforeseen)
            if isinstance(call, InboundCall) and frame.is_first:
                self.calls.forget(call)

    def _hand_over(self, call: Call, frame: Frame, is_fresh: Callable[[], bool]) -> None:
        channel = call.channel
        channel.delivered = Delivered.YES
        if frame.kind == Kind.UNKNOWN:
            call.on_loss("The replica that holds the session has lost the call")
            return
        try:
            message = channel.receive(frame)
        except LookupError as error:
            log.warning("something between two replicas was lost: %s", error)
            call.on_loss(
                "The connection between two workers failed. The call may have been executed"
            )
            return
        if frame.kind == Kind.PROBE:
            self._send_alone(frame.sender, channel.count(Kind.COUNT))
        if message is not None:
            call.on_message(message, is_fresh)
        if frame.kind != Kind.PIECE or channel.is_credit_due:
            self._sender.put(call)

    def _send_alone(self, replica: str, frame: Frame) -> None:
        self._sender.put(_SingleFrame(Channel(frame.channel, self._own, replica), frame))

    # --- the lease's thread ----------------------------------------------------------------------

    def _can_serve(self) -> bool:
        """Whether the threads run that hear the others and answer them."""
        return self.not_ready_reason() is None and self._sender.not_ready_reason() is None

    def _look(self) -> None:
        """Ends calls with replicas that are gone, and probes the others now and then."""
        calls = self.calls.all()
        if not self._can_serve():  # /readyz says so, and no call waits for it
            for call in calls:
                call.on_loss("This replica has lost its way to the others")
            return
        peers = self._next_peers(sorted({call.channel.peer for call in calls}))
        gone = self.lease.gone_among(peers)
        # One that leaves in order removes its mailbox first, then refuses what was left there.
        lost = {peer for peer in gone if peer in self._seen_gone or has_ended(peer)}
        self._seen_gone = gone
        for call in calls:
            # One that has not certainly reached the replica is the sender's to decide.
            if call.channel.peer in lost and call.channel.delivered is Delivered.YES:
                call.on_loss("The replica that held the session is gone")
        for call in calls:
            call.expire_if_due()
        if time.monotonic() > self._next_probe:
            self._next_probe = time.monotonic() + self._mailboxes.lease
            self._probe(calls)

    def _next_peers(self, peers: list[str]) -> list[str]:
        """Those that are looked at now: the next ones in turn, and what was gone a moment ago.

        Streams connect each replica of a large deployment with all others.
        """
        start = self._next_peer if self._next_peer < len(peers) else 0
        self._next_peer = start + _PEERS
        chosen = peers[start : start + _PEERS]
        return [*chosen, *(self._seen_gone.intersection(peers).difference(chosen))]

    def _probe(self, calls: list[Call]) -> None:
        for call in calls:
            if not isinstance(call, InboundCall) and call.channel.has_sent:
                self._send_alone(call.channel.peer, call.channel.count(Kind.PROBE))

    def _note_lapse(self) -> None:
        self.wake()  # the listener looks at the lease anew
        self._next_probe = 0.0
        self._on_lapse()


class _SingleFrame(Call):
    """One frame that expects nothing."""

    def __init__(self, channel: Channel, frame: Frame) -> None:
        self.channel = channel
        self._frame = frame

    def outgoing(self) -> list[Frame]:
        return [self._frame]

    def on_message(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        pass

    def on_loss(self, sentence: str, is_gone: bool = False) -> None:
        pass
