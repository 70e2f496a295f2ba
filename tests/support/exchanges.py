"""Exchanges as tests make them: sent to a backend, or listening to it."""

from __future__ import annotations

from collections.abc import Sequence

from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.wire.jsonrpc import Request


def sent(
    backend: Backend, requests: Sequence[Request], accepts_stream: bool, timeout: float
) -> Exchange:
    """An exchange whose requests were sent."""
    exchange = Exchange(requests, accepts_stream, timeout)
    backend.send(exchange)
    return exchange


def listening(backend: Backend, after: str | None = None) -> Exchange:
    """An exchange that is the standing stream."""
    exchange = Exchange()
    backend.listen(exchange, after)
    return exchange


def received(exchange: Exchange, count: int) -> list[ServerMessage]:
    """The next messages; a silence fails the test."""
    found: list[ServerMessage] = []
    for _ in range(count):
        message = exchange.receive(10)
        assert message is not None, f"{len(found)} of {count} came"
        found.append(message)
    return found
