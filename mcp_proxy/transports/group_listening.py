"""The stream of a modern client that listens to several servers together.

Each of them has a subscription of its own, which the client's is made of: one acknowledgement, one
id, and URIs as the client knows them. The acknowledgement waits for the servers, since clients rely
on hearing of everything from then on; of one that is slow they hear, when it has come, that all may
have changed. The subscription of a server that ends is begun again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from msgspec import UNSET

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.group_messages import ServerVoice
from mcp_proxy.backends.group_server import CHANGES_APART
from mcp_proxy.errors import BackendError, ProxyError, RequestId
from mcp_proxy.wire import jsonrpc, listening
from mcp_proxy.wire.jsonrpc import Notification, Response
from mcp_proxy.wire.listening import Filter

# Seconds that the acknowledgement waits for the servers.
_ACKNOWLEDGED_AFTER = 3.0

# Seconds before a subscription that has ended is begun again: the first time, and at the most.
_AGAIN_AFTER, _LONGEST = 1.0, 30.0


class Timer(Protocol):
    """Who calls later."""

    def call_later(self, seconds: float, act: Callable[[], object]) -> None:
        """Has `act` called after so many seconds; raises RuntimeError where there is no thread."""


class Heard(NamedTuple):
    """A server to listen to: the `front` that it is reached by, what opens a subscription there,
    what of the client's filter is its, and how it is heard.
    """

    front: object
    open: Callable[[Filter], Exchange]
    wanted: Filter
    voice: ServerVoice


class GroupListening:
    """A client's subscription to several servers. Thread-safe.

    `heard` says which servers there are just now, by their keys.
    """

    def __init__(
        self,
        exchange: Exchange,
        subscription_id: RequestId,
        wanted: Filter,
        heard: Callable[[Filter], Mapping[str, Heard]],
        timer: Timer,
    ) -> None:
        self._exchange = exchange
        self._id = subscription_id
        self._wanted = wanted
        self._heard = heard
        self._timer = timer
        # Guards what follows, and the order of offers; who is offered something may leave at once.
        self._lock = threading.RLock()
        self._changing = threading.Lock()  # guards that one thread at a time looks who is there
        self._open: dict[str, _Subscription] = {}
        self._announced: dict[str, float] = {}  # when (monotonic) of which change
        self._to_announce: set[str] = set()
        self._early: list[Notification] | None = []  # what has come before the acknowledgement
        self._is_over = False

    def begin(self) -> None:
        """Acknowledges the subscription, and has the servers told of it.

        One that wants nothing ends at once (MCP 2026-07-28, subscriptions).
        """
        self._exchange.attach(self)
        if self._wanted.is_empty:
            self.end()
        else:
            with contextlib.suppress(RuntimeError):  # no thread: whoever is slow is waited for
                self._timer.call_later(_ACKNOWLEDGED_AFTER, self._acknowledge)
            self._listen_to_all()
            self._acknowledge_if_all_have()

    def _acknowledge_if_all_have(self) -> None:
        if all(each.is_heard for each in self._all_open()):
            self._acknowledge()

    def _acknowledge(self) -> None:
        """The stream begins, unless it has."""
        with self._lock:
            early, self._early = self._early, None
            if early is not None:
                for notification in (listening.acknowledged(self._wanted, self._id), *early):
                    self._put(notification)

    def end(self) -> None:
        """Ends the stream in good order."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if not was_over:
            self._acknowledge()
            result = listening.listen_result(self._id)
            data = jsonrpc.encode(Response(self._id, result))
            self._exchange.offer(ServerMessage(data, is_response=True))
            self._close_all()

    def note_servers(self) -> None:
        """There may be other servers now: the client asks for their lists again."""
        self._listen_to_all()
        self._announce_lists()

    def note_come(self, key: str) -> None:
        """A server that was missing has come, perhaps one of this client's."""
        if any(each.endswith(key) for each in list(self._open)):
            self._announce_lists()

    def _announce_lists(self) -> None:
        for change in self._wanted.changes():
            if change.method != listening.UPDATED:
                self._announce_once(change)

    # --- the servers -----------------------------------------------------------------------------

    def _listen_to_all(self) -> None:
        with self._changing:
            self._listen_to(self._heard(self._wanted))

    def _listen_to(self, heard: Mapping[str, Heard]) -> None:
        with self._lock:
            if self._is_over:
                return
            gone = [
                self._open.pop(key)
                for key, subscription in list(self._open.items())
                if key not in heard or not subscription.goes_on_at(heard[key])
            ]
            new = {key: each for key, each in heard.items() if key not in self._open}
            made = {
                key: _Subscription(each, self._offer_from, self._note_heard)
                for key, each in new.items()
            }
            self._open.update(made)
        for subscription in gone:
            subscription.close()
        for subscription in made.values():
            self._begin(subscription)

    def _all_open(self) -> list[_Subscription]:
        with self._lock:
            return list(self._open.values())

    def _note_heard(self, missed: Sequence[Notification]) -> None:
        """A server has taken its subscription, or will not soon; until then what may have changed
        was not told of.
        """
        if self._early is not None:
            self._acknowledge_if_all_have()
            return
        for change in missed:
            self._offer_from(change)

    def _begin(self, subscription: _Subscription) -> None:
        if self._is_over:
            return
        try:
            subscription.begin(partial(self._begin_again, subscription))
        except BackendError:
            subscription.note_heard()
            self._begin_again(subscription)
        except ProxyError:  # it will not be taken later either
            subscription.note_heard()

    def _begin_again(self, subscription: _Subscription) -> None:
        """A server has ended its subscription, or could not be asked for it: it is asked later."""
        if not self._is_over:
            with contextlib.suppress(RuntimeError):
                self._timer.call_later(subscription.pause, partial(self._reopen, subscription))

    def _reopen(self, subscription: _Subscription) -> None:
        if subscription in self._all_open():
            self._begin(subscription)

    def _close_all(self) -> None:
        with self._lock:
            ending, self._open = list(self._open.values()), {}
        for subscription in ending:
            subscription.close()

    # --- what the client gets --------------------------------------------------------------------

    def _offer_from(self, notification: Notification) -> None:
        if notification.method in _LISTS:
            self._announce_once(notification)
        else:
            self._offer(listening.tagged(notification, self._id))

    def _announce_once(self, change: Notification) -> None:
        """Tells of a change of lists, once in `CHANGES_APART` seconds."""
        method = change.method
        with self._lock:
            if method in self._to_announce:
                return
            seconds = self._announced.get(method, 0.0) + CHANGES_APART - time.monotonic()
            self._to_announce.add(method)
        if seconds <= 0:
            self._announce(method)
        else:
            with contextlib.suppress(RuntimeError):  # no thread: the next change is told of
                self._timer.call_later(seconds, partial(self._announce, method))

    def _announce(self, method: str) -> None:
        with self._lock:
            self._to_announce.discard(method)
            self._announced[method] = time.monotonic()
        self._offer(listening.tagged(Notification(method), self._id))

    def _offer(self, notification: Notification) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(notification)
            elif not self._is_over:
                self._put(notification)

    def _put(self, notification: Notification) -> None:
        self._exchange.offer(ServerMessage(jsonrpc.encode(notification), is_response=False))

    # --- as the source of the stream -------------------------------------------------------------

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: no server need know."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """Does nothing: a subscription has no time limit."""

    def leave(self, exchange: Exchange) -> None:
        """The client no longer listens."""
        with self._lock:
            self._is_over = True
        self._close_all()


class _Subscription:
    """The subscription at one server, begun again and again.

    `on_heard` is called whenever the server has taken it, with all changes that it tells of, and
    without any if the server does not take it the first time.
    """

    def __init__(
        self,
        heard: Heard,
        offer: Callable[[Notification], object],
        on_heard: Callable[[Sequence[Notification]], object],
    ) -> None:
        #: Whether the server has taken it, or has not when it was asked, or need not.
        self.is_heard = heard.wanted.is_empty
        self._heard = heard
        self._offer = offer
        self._on_heard = on_heard
        self._lock = threading.RLock()  # guards what follows; what is sent may be answered at once
        self._exchange: Exchange | None = None
        self._is_closed = self._is_honoured = False
        #: Seconds before it is begun again.
        self.pause = _AGAIN_AFTER

    def begin(self, on_end: Callable[[], object]) -> None:
        """Subscribes; `on_end` is called if that ends. Raises ProxyError."""
        with self._lock:
            if self._is_closed or self._heard.wanted.is_empty:
                return
            exchange = self._exchange = self._heard.open(self._heard.wanted)
            self._is_honoured = True  # unless the server says otherwise
            exchange.set_on_ready(partial(self._read, exchange, on_end))

    def goes_on_at(self, heard: Heard) -> bool:
        """Whether it goes on at a server as that is now, which is heard so from then on."""
        is_same = (heard.front, heard.wanted) == (self._heard.front, self._heard.wanted)
        if is_same:
            self._heard = heard
        return is_same

    def close(self) -> None:
        """Ends it for good."""
        with self._lock:
            self._is_closed = True
            exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()

    def _read(self, exchange: Exchange, on_end: Callable[[], object]) -> None:
        with self._lock:
            if exchange is not self._exchange:
                return
            has_ended = self._pass_on(exchange)
            if not has_ended:
                return
            self._exchange = None
            is_wanted = self._is_honoured
            self.pause = min(2 * self.pause, _LONGEST)
        self.note_heard()
        if is_wanted:
            on_end()

    def note_heard(self) -> None:
        """The server has not taken it: nobody waits for that."""
        if not self.is_heard:
            self.is_heard = True
            self._on_heard(())

    def _pass_on(self, exchange: Exchange) -> bool:
        """Passes on what has come; whether nothing comes any more."""
        try:
            while (message := exchange.poll()) is not None:
                if message.is_response:
                    self._is_honoured &= message.failure is not None or _is_result(message)
                    return True
                self._take(jsonrpc.parse_message(message.data))
        except ProxyError as error:
            self._is_honoured &= isinstance(error, BackendError)
            return True
        return exchange.is_over

    def _take(self, message: jsonrpc.Message) -> None:
        if not isinstance(message, Notification):
            return
        if message.method == listening.ACKNOWLEDGED:
            honoured = listening.honoured_of(message)
            self._is_honoured = not honoured.is_empty
            self.is_heard, self.pause = True, _AGAIN_AFTER
            self._on_heard([self._heard.voice.notification(each) for each in honoured.changes()])
        elif self._heard.wanted.wants(message):
            self._offer(self._heard.voice.notification(message))


def _is_result(message: ServerMessage) -> bool:
    """Whether a server has ended a subscription in good order."""
    answer = jsonrpc.parse_message(message.data)
    return isinstance(answer, Response) and answer.result is not UNSET


_LISTS: Sequence[str] = (
    listening.TOOLS_CHANGED,
    listening.PROMPTS_CHANGED,
    listening.RESOURCES_CHANGED,
)
