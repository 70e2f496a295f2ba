"""What a Redis server was really asked, as its MONITOR command tells it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from redis.client import Monitor

from tests.support.redis_server import RedisServer


@contextmanager
def recorded_commands(server: RedisServer) -> Iterator[list[list[str]]]:
    """A list that holds, once the block is left, the words of every command sent meanwhile.

    Commands that a script calls are not listed, the script's own command is.
    """
    commands: list[list[str]] = []
    marker = uuid.uuid4().hex
    with server.client() as other, server.client() as client:
        other.ping()  # so that its handshake is over
        with client.monitor() as monitor:
            yield commands
            other.echo(marker)
            commands.extend(_until(marker, monitor))


def _next(monitor: Monitor) -> dict[str, str]:
    seen: dict[str, str] = monitor.next_command()  # type: ignore[no-untyped-call]
    return seen


def _until(marker: str, monitor: Monitor) -> Iterator[list[str]]:
    while marker not in (seen := _next(monitor))["command"]:
        if seen["client_type"] != "lua":
            yield seen["command"].split(" ")
