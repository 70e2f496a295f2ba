"""The owner's end of a conversation: a child of this replica serves a client of another one.

Nothing that comes late is executed: a replica that was frozen finds its mailbox gone or what it had
taken out of it stale, and says so to whoever asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from mcp_proxy.backends.base import Backend, Delivery
from mcp_proxy.backends.exchange import PushedExchange
from mcp_proxy.errors import BackendError, BackendUnavailable, BackendUnreached, ProxyError
from mcp_proxy.relay import messages
from mcp_proxy.relay.courier import Conversation
from mcp_proxy.relay.frames import Channel, Frame
from mcp_proxy.relay.messages import Begin, Call, Delivered, Done, Ended, Leave, Listen, Stop, Tell
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
