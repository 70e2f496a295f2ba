"""Many clients of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python sticky_client.py --ports 8001,8002 --clients 0-25 --calls 20

Each client opens a legacy session with a server of `tests/servers/sticky.py` behind the proxies at
the ports, holds its standing stream, and calls: every HTTP request goes to one of the ports at
random. They go on until standard input ends, and until each has made its calls. Every call is one
line of JSON on standard output, and so is each client's end.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from sdk_session import Json, call_at_once, command_line, httpx, noted, run_crowd, say, session_at

_CALL_TIME = 30.0
_ANNOUNCEMENT_TIME = 8.0


class Spread(httpx.AsyncHTTPTransport):  # type: ignore[misc]
    """Sends each request to one of several ports, and notes what went where."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__()
        self.ports = ports
        self.used: Counter[str] = Counter()
        self.sessions: set[str] = set()
        self.listening = anyio.Event()
        self.streams = 0

    async def handle_async_request(self, request: Any) -> Any:
        """One request."""
        port = random.choice(self.ports)
        self.used[str(port)] += 1
        request.url = request.url.copy_with(port=port)
        request.headers["Host"] = f"{request.url.host}:{port}"
        if session := request.headers.get("mcp-session-id"):
            self.sessions.add(session)
        response = await super().handle_async_request(request)
        if request.method == "GET" and response.status_code == 200:
            self.streams += 1
            self.listening.set()
        return response


class Client:
    """One client. `marker` is what its session's backend is to remember."""

    def __init__(self, number: int, given: argparse.Namespace) -> None:
        self.number = number
        self.given = given
        self.marker = f"client {number}"
        self.spread = Spread(given.ports)
        self.calls = 0
        self.announced = anyio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Any]:
        """The SDK's session, initialized, its standing stream open."""
        port = self.given.ports[0]
        async with session_at(port, self.spread, message_handler=self.hear) as session:
            with anyio.fail_after(_CALL_TIME):
                await self.spread.listening.wait()
            yield session

    async def hear(self, message: Any) -> None:
        """Whatever the server says of its own accord."""
        if "list_changed" in repr(message):
            self.announced.set()

    async def live(self, finish: anyio.Event) -> None:
        """The client's whole life; its last line says how it was."""
        async with self.listening() as session:
            while self.calls < self.given.calls or not finish.is_set():
                await call_at_once(self.given, lambda: self.call_any(session))
            await self.be_announced(session)
        say(
            end=self.number,
            sessions=sorted(self.spread.sessions),
            requests=dict(self.spread.used),
            streams=self.spread.streams,
            was_announced=self.announced.is_set(),
        )

    async def be_announced(self, session: Any) -> None:
        """Has the server say something on the standing stream; not every stream is open still."""
        deadline = time.monotonic() + _ANNOUNCEMENT_TIME
        while not self.announced.is_set() and time.monotonic() < deadline:
            await self.call(session, "announce", 0)
            with anyio.move_on_after(1):
                await self.announced.wait()

    async def call_any(self, session: Any) -> None:
        """One call more, mostly of the quick tool."""
        self.calls += 1
        is_slow = random.random() < self.given.slow
        await self.call(session, "slow" if is_slow else "whoami", self.calls)

    async def call(self, session: Any, tool: str, number: int) -> None:
        """One call and its line."""
        line: Json = {"client": self.number, "call": number}
        async with noted(line, _CALL_TIME):
            result = await session.call_tool(tool, {"marker": self.marker})
            line |= json.loads(result.content[0].text)
        say(**line, sessions=len(self.spread.sessions))


if __name__ == "__main__":
    given = command_line("Many MCP clients at once", calls=20, at_once=1, pause=0.1, slow=0.1)
    run_crowd(lambda number, given, finish: Client(number, given).live(finish), given)
