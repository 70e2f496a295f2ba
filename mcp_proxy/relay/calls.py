"""The owner's end of a conversation: a child of this replica serves a client of another one.

Nothing that comes late is executed: a replica that was frozen finds its mailbox gone or what it had
taken out of it stale, and says so to whoever asked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from mcp_proxy.backends.base import Backend, Delivery
from mcp_proxy.backends.bridge import WRITE_TIMEOUT
from mcp_proxy.backends.exchange import PushedExchange, QueuedExchange
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnavailable,
    BackendUnreached,
    ProxyError,
    RequestId,
)
from mcp_proxy.relay import protocol as messages
from mcp_proxy.relay.protocol import (
    Begin,
    Call,
    Channel,
    Delivered,
    Done,
    Ended,
    Frame,
    Leave,
    Listen,
    Reach,
    Stop,
    Tell,
)
from mcp_proxy.relay.sender import Conversation
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

log = logging.getLogger(__name__)


class Surroundings(Protocol):
    """What a hosted conversation needs of its relay."""

    def find(self, child: str) -> Backend | None:
        """The child of this replica by its id."""

    def wake(self, conversation: Conversation) -> None:
        """There may be something to send."""

    def forget(self, conversation: Conversation) -> None:
        """The conversation is over."""

    def in_order(self, lane: str, act: Callable[[], None]) -> None:
        """Has `act` called by another thread, after what was given for the same lane before."""


class Hosted(Conversation):
    """One request, notification, response or stream of a client of another replica."""

    def __init__(self, channel: Channel, relay: Surroundings) -> None:
        self.channel = channel
        self._relay = relay
        self._lane = channel.name  # until it is known which child it is about
        self._exchange: PushedExchange | None = None
        self._is_standing = False
        self._is_done = False

    def __repr__(self) -> str:
        return f"<Hosted {self.channel!r} {self._exchange!r}>"

    # --- from the other side: listener's thread, then a lane's -----------------------------------

    def take(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        said = messages.decode_to_owner(message)
        if isinstance(said, (Call, Listen, Tell, Stop)):
            self._lane = said.child
        self.channel.note_read()
        self._relay.in_order(self._lane, lambda: self._act(said, is_fresh))

    def _act(self, said: messages.ToOwner, is_fresh: Callable[[], bool]) -> None:
        if isinstance(said, Leave):
            self.leave()
        elif isinstance(said, Begin):
            if self._exchange is not None:
                self._exchange.begin()
        else:
            self._open(said, is_fresh)
        self._relay.wake(self)

    def _open(self, said: Call | Listen | Tell | Stop, is_fresh: Callable[[], bool]) -> None:
        try:
            if not is_fresh():
                raise BackendUnavailable("The replica that holds the session was away; try again")
            backend = self._relay.find(said.child)
            if backend is None:
                raise BackendUnreached("The server of the session is not here any more")
            self._begin(backend, said)
        except BackendError as error:
            self._finish(messages.Refused(messages.failure_of(error)))
        except ProxyError as error:
            self._finish(messages.Refused(("BackendLost", error.message)))
        except Exception:
            log.exception("serving a client of another replica failed")
            self._finish(messages.Refused(("BackendLost", "The request could not be served")))

    def _begin(self, backend: Backend, said: Call | Listen | Tell | Stop) -> None:
        if isinstance(said, Tell):
            _tell(backend, said)
            self._finish(Done())
        elif isinstance(said, Stop):
            backend.close()
            self._finish(Done())
        elif isinstance(said, Listen):
            self._is_standing = True
            self._serve(backend.listen(said.after))
            self.channel.put(messages.encode(Done()))
        else:
            requests = [_as_request(line) for line in said.lines]
            self._serve(backend.send(requests, said.accepts_stream, said.timeout))

    def _serve(self, exchange: object) -> None:
        assert isinstance(exchange, PushedExchange)
        self._exchange = exchange
        exchange.wake_with(lambda: self._relay.wake(self))

    def _finish(self, last: messages.FromOwner) -> None:
        self._is_done = True
        self.channel.put(messages.encode(last))

    @property
    def is_awaited(self) -> bool:
        return not self._is_standing

    # --- to the other side: courier's thread -----------------------------------------------------

    def step(self) -> list[Frame]:
        outgoing = self.channel.outgoing()
        while not self._is_done and self.channel.has_room and self._can_pass_on():
            outgoing += self.channel.outgoing()
        if self._is_done:
            outgoing += self.channel.outgoing()
            if self.channel.is_drained:
                self._relay.forget(self)
        return outgoing

    def _can_pass_on(self) -> bool:
        """Whether there was another delivery; what the log fails at ends the conversation."""
        try:
            return self._pass_on()
        except ProxyError as error:
            log.warning("a stream for another replica ends: %s", error)
            self._finish(messages.Refused(("BackendLost", error.message)))
            self._relay.in_order(self._lane, self.leave)
            return False

    def _pass_on(self) -> bool:
        """Puts the next delivery, if there is one, and notices that there will be no more."""
        exchange = self._exchange
        if exchange is None:
            return False
        delivery = None if exchange.is_over else exchange.poll()
        if delivery is not None:
            self.channel.put(_encoded(delivery))
        if exchange.is_over:
            if self._is_standing:
                self._finish(Ended(exchange.was_replaced))
            self._is_done = True
            exchange.close()
        return delivery is not None

    # --- the end ---------------------------------------------------------------------------------

    def lose(self, sentence: str, is_gone: bool = False) -> None:
        """The client's replica is gone: nobody listens any more."""
        log.info("a client's replica is gone: %s", sentence)
        self._relay.in_order(self._lane, self.leave)

    def leave(self) -> None:
        """Nobody listens any more."""
        self._is_done = True
        if self._exchange is not None:
            self._exchange.close()
        self._relay.forget(self)

    def tick(self) -> None:
        exchange = self._exchange
        if exchange is not None and exchange.is_due:
            # Not by the thread that asks: telling the child may take time.
            self._relay.in_order(self._lane, exchange.expire_if_due)


def _tell(backend: Backend, said: Tell) -> None:
    message = jsonrpc.parse_message(said.line)
    if isinstance(message, Notification):
        backend.notify(message)
    elif isinstance(message, Response):
        backend.respond(message)
    else:
        backend.submit(message, said.timeout)


def _as_request(line: bytes) -> Request:
    message = jsonrpc.parse_message(line)
    assert isinstance(message, Request)
    return message


def _encoded(delivery: Delivery) -> bytes:
    failure = None if delivery.failure is None else messages.failure_of(delivery.failure)
    return messages.encode(
        Delivered(delivery.data, delivery.is_response, delivery.event_id, failure)
    )


# --- remote: The client's end of a conversation: a child of another replica as a backend of this one.

# Seconds beyond its own deadline in which the owner is expected to say that it has passed.
_GRACE = 5.0


class Surroundings(Protocol):
    """What a remote backend needs of its relay."""

    def converse(self, conversation: Conversation, first: messages.ToOwner) -> None:
        """Begins a conversation."""

    def channel_to(self, replica: str) -> Channel:
        """A new channel to another replica."""

    def wake(self, conversation: Conversation) -> None:
        """There may be something to send."""

    def forget(self, conversation: Conversation) -> None:
        """The conversation is over."""


class RemoteExchange(QueuedExchange, Conversation):
    """What belongs to requests that another replica's child answers, or to its standing stream.

    `ids` are the requests', None for a standing stream.
    """

    def __init__(
        self, relay: Surroundings, replica: str, ids: Sequence[RequestId] | None, streams: bool
    ) -> None:
        super().__init__(self, None if ids is None else len(ids), streams)
        self.channel = relay.channel_to(replica)
        self._relay = relay
        self._lock = threading.Lock()  # guards _unanswered
        self._unanswered = None if ids is None else list(ids)
        self._has_begun = False
        self._accepted = threading.Event()  # or refused, of a standing stream
        self._refusal: BackendError | None = None

    def __repr__(self) -> str:
        return f"<RemoteExchange {self.channel!r} over={self.is_over}>"

    # --- the receiving side ----------------------------------------------------------------------

    def begin(self) -> None:
        if not self._has_begun and not self.is_over:
            self._has_begun = True
            self._say(Begin())

    def _account(self, item: Delivery) -> Delivery:
        if isinstance(item.failure, BackendUnreached):
            raise item.failure
        if self.channel.note_read():
            self._relay.wake(self)
        return super()._account(item)

    def close(self) -> None:
        super().close()
        if self.is_over:
            self._relay.forget(self)

    def detach(self, exchange: QueuedExchange) -> None:
        if not self._is_answered():
            self._say(Leave())

    def expire(self, exchange: QueuedExchange, failure: BackendError) -> None:
        self._fail(failure)
        self._say(Leave())

    def _say(self, message: messages.ToOwner) -> None:
        self.channel.put(messages.encode(message))
        self._relay.wake(self)

    # --- the other side --------------------------------------------------------------------------

    @property
    def is_awaited(self) -> bool:
        with self._lock:
            return bool(self._unanswered)

    def step(self) -> list[Frame]:
        outgoing = self.channel.outgoing()
        if self.is_closed and self.channel.is_drained:
            self._relay.forget(self)
        return outgoing

    def take(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        said = messages.decode_from_owner(message)
        if isinstance(said, Delivered):
            failure = None if said.failure is None else messages.error_of(said.failure)
            if said.is_response:
                self._note_answered(said.data)
            self.offer(Delivery(said.data, said.is_response, failure, said.event_id))
            if self._is_answered():
                self._relay.forget(self)
        elif isinstance(said, Done):
            self.channel.note_read()
            self._accepted.set()
        elif isinstance(said, Ended):
            self.end(said.replaced)
        elif isinstance(said, messages.Refused):
            self._fail(messages.error_of(said.failure))
            self._relay.forget(self)

    def lose(self, sentence: str, is_gone: bool = False) -> None:
        self._fail(_loss(self.channel, sentence, is_gone))
        self._relay.forget(self)

    def _is_answered(self) -> bool:
        with self._lock:
            return self._unanswered == []

    def _note_answered(self, data: bytes) -> None:
        with self._lock:
            if self._unanswered is None:
                return
            if len(self._unanswered) == 1:
                self._unanswered.clear()
                return
        answer = jsonrpc.parse_message(data)
        with self._lock:
            if isinstance(answer, Response) and answer.id in self._unanswered:
                self._unanswered.remove(answer.id)

    def _fail(self, failure: BackendError) -> None:
        """Answers what is unanswered; a standing stream ends, unless it never began."""
        with self._lock:
            unanswered = self._unanswered
            self._unanswered = None if unanswered is None else []
        if unanswered is None:
            self._end_stream(failure)
            return
        for request_id in unanswered:
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request_id)
            self.offer(Delivery(data, is_response=True, failure=failure))

    def _end_stream(self, failure: BackendError) -> None:
        if not self._accepted.is_set():
            self._refusal = failure
            self._accepted.set()
        self.end()

    def require_accepted(self, timeout: float) -> None:
        """Returns when the owner has made this the standing stream; raises why it has not.

        Without this an older stream could arrive there after a newer one.
        """
        if not self._accepted.wait(timeout):
            self._refusal = _silent()
        if self._refusal is not None:
            self.close()
            raise self._refusal


class _Errand(Conversation):
    """Something that is told to a child, and waited for."""

    def __init__(self, relay: Surroundings, replica: str) -> None:
        self.channel = relay.channel_to(replica)
        self._relay = relay
        self._done = threading.Event()
        self._failure: BackendError | None = None

    @property
    def is_awaited(self) -> bool:
        return not self._done.is_set()

    def step(self) -> list[Frame]:
        return self.channel.outgoing()

    def take(self, message: bytes, is_fresh: Callable[[], bool]) -> None:
        said = messages.decode_from_owner(message)
        if isinstance(said, messages.Refused):
            self._failure = messages.error_of(said.failure)
        if isinstance(said, (messages.Refused, Done)):
            self._finish()

    def lose(self, sentence: str, is_gone: bool = False) -> None:
        self._failure = _loss(self.channel, sentence, is_gone)
        self._finish()

    def _finish(self) -> None:
        self._done.set()
        self._relay.forget(self)

    def run(self, message: messages.ToOwner, timeout: float) -> None:
        """Returns when it is done; raises why it is not."""
        self._relay.converse(self, message)
        is_done = self._done.wait(timeout)
        self._relay.forget(self)
        if not is_done:
            raise _silent()
        if self._failure is not None:
            raise self._failure


class RemoteBackend(Backend):
    """A child of another replica."""

    def __init__(self, relay: Surroundings, replica: str, child: str) -> None:
        self._relay = relay
        self._replica = replica
        self._child = child

    def __repr__(self) -> str:
        return f"<RemoteBackend {self._replica}/{self._child}>"

    def send(
        self, requests: Sequence[Request], accepts_stream: bool, timeout: float
    ) -> RemoteExchange:
        ids = [request.id for request in requests]
        exchange = RemoteExchange(self._relay, self._replica, ids, accepts_stream)
        lines = [jsonrpc.encode(request) for request in requests]
        exchange.set_deadline(timeout + _GRACE, lambda: _no_answer(timeout))
        self._relay.converse(exchange, Call(self._child, lines, accepts_stream, timeout))
        return exchange

    def submit(self, request: Request, timeout: float) -> None:
        self._tell(jsonrpc.encode(request), timeout)

    def notify(self, notification: Notification) -> None:
        self._tell(jsonrpc.encode(notification))

    def respond(self, response: Response) -> None:
        self._tell(jsonrpc.encode(response))

    def _tell(self, line: bytes, timeout: float = 0.0) -> None:
        errand = _Errand(self._relay, self._replica)
        errand.run(Tell(self._child, line, timeout), WRITE_TIMEOUT + _GRACE)

    def listen(self, after: str | None = None) -> RemoteExchange:
        exchange = RemoteExchange(self._relay, self._replica, None, streams=True)
        self._relay.converse(exchange, Listen(self._child, after))
        exchange.require_accepted(WRITE_TIMEOUT + _GRACE)
        return exchange

    def close(self) -> None:
        self._relay.converse(_Errand(self._relay, self._replica), Stop(self._child))


def _loss(channel: Channel, sentence: str, is_gone: bool) -> BackendError:
    """The loss of the other side, by whether it may have got something and may be alive."""
    if channel.reach is not Reach.NOT:
        return BackendLost(sentence)
    return BackendUnreached(sentence) if is_gone else BackendUnavailable(sentence)


def _silent() -> BackendTimeout:
    return BackendTimeout("The replica that holds the session does not answer")


def _no_answer(timeout: float) -> BackendTimeout:
    return BackendTimeout(f"The server did not answer within {timeout:g} seconds")
