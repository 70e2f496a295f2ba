"""The body of an event stream."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.edge.disconnects import ClientConnection, DisconnectWatcher
from mcp_proxy.errors import BackendError, ProxyError, StorageUnavailable
from mcp_proxy.transports.event_stream import EventStream


class Script:
    """An exchange that delivers what it is given: messages, silences (None) and errors."""

    def __init__(self, *items: ServerMessage | ProxyError | None, replaced: bool = False) -> None:
        self.items = list(items)
        self.was_replaced = replaced
        self.closed = 0

    @property
    def is_over(self) -> bool:
        return not self.items

    def receive(self, timeout: float) -> ServerMessage | None:
        item = self.items.pop(0)
        if isinstance(item, ProxyError):
            raise item
        return item

    def close(self) -> None:
        self.closed += 1


def stream_of(exchange: Any, **options: Any) -> EventStream:
    return EventStream(exchange, ClientConnection({}), 1, **options)


def test_a_stream_begins_at_once_and_fills_silences() -> None:
    stream = stream_of(Script(None, ServerMessage(b"{}", True)))
    assert list(stream) == [
        b": keepalive\n\n",
        b": keepalive\n\n",
        b"event: message\ndata: {}\n\n",
    ]


def test_what_came_early_comes_first() -> None:
    stream = stream_of(Script(ServerMessage(b"2", True)), early=[ServerMessage(b"1", False)])
    assert b"".join(stream) == b"event: message\ndata: 1\n\nevent: message\ndata: 2\n\n"


def test_a_large_message_is_not_copied() -> None:
    data = b"x" * 100_000
    pieces = list(stream_of(Script(ServerMessage(data, True))))
    assert any(piece is data for piece in pieces)


def test_an_error_on_a_stream_is_an_event_with_the_request_id() -> None:
    body = b"".join(stream_of(Script(StorageUnavailable()), request_id=9))
    assert b'"id":9' in body
    assert b"-32000" in body


def test_a_replaced_stream_says_when_to_come_back() -> None:
    body = b"".join(stream_of(Script(None, replaced=True)))
    assert body.endswith(b"retry: 86400000\n\n")


def test_a_stream_ends_when_its_client_has_left() -> None:
    connection = ClientConnection({"waitress.client_disconnected": lambda: True})
    assert list(EventStream(Exchange(), connection, 0.01)) == [b": keepalive\n\n"]


def test_a_silent_stream_s_client_is_watched_until_the_stream_is_closed() -> None:
    has_left: list[bool] = []
    connection = ClientConnection({"waitress.client_disconnected": lambda: bool(has_left)})
    watcher = DisconnectWatcher(interval=0.01)
    kept, left = (EventStream(Exchange(), connection, 60, watcher=watcher) for _ in range(2))
    pieces = iter(left)
    next(pieces)
    next(iter(kept))
    assert "watched=2" in repr(watcher)
    kept.close()
    assert "watched=1" in repr(watcher)
    threading.Timer(0.2, has_left.append, (True,)).start()
    since = time.monotonic()
    assert list(pieces) == []
    assert time.monotonic() - since < 10
    left.close()
    assert "watched=0" in repr(watcher)
    watcher.stop(5)


class Source:
    """The source of an exchange, which cannot be left."""

    def stream_begun(self, exchange: Exchange) -> None: ...

    def expire(self, exchange: Exchange, failure: BackendError) -> None: ...

    def leave(self, exchange: Exchange) -> None:
        raise RuntimeError


def test_closing_frees_everything_once_even_if_never_started() -> None:
    released: list[int] = []
    exchange = Exchange()
    exchange.on_close = lambda: released.append(1)
    stream = stream_of(exchange)
    stream.close()
    stream.close()
    assert (exchange.is_closed, released) == (True, [1])


def test_the_place_is_given_back_even_if_closing_fails() -> None:
    released: list[int] = []
    exchange = Exchange()
    exchange.attach(Source())
    exchange.on_close = lambda: released.append(1)
    with pytest.raises(RuntimeError):
        stream_of(exchange).close()
    assert released == [1]
