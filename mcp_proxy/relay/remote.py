"""The client's end of a conversation: a child of another replica as a backend of this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from mcp_proxy.backends.base import Backend, Delivery
from mcp_proxy.backends.bridge import WRITE_TIMEOUT
from mcp_proxy.backends.exchange import QueuedExchange
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnavailable,
    BackendUnreached,
    RequestId,
)
from mcp_proxy.relay import messages
from mcp_proxy.relay.courier import Conversation
from mcp_proxy.relay.frames import Channel, Frame, Reach
from mcp_proxy.relay.messages import Begin, Call, Delivered, Done, Ended, Leave, Listen, Stop, Tell
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

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
