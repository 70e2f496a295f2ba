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
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
import mcp
from anyio import to_thread
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

IS_SDK_1 = version("mcp").startswith("1.")

if IS_SDK_1:
    import httpx
else:
    import httpx2 as httpx

Json = dict[str, Any]

_CALL_TIME = 30.0
_ANNOUNCEMENT_TIME = 8.0


class Spread(httpx.AsyncHTTPTransport):
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
    async def connected(self) -> AsyncIterator[Any]:
        """The SDK's session, initialized, its standing stream open."""
        url = f"http://127.0.0.1:{self.given.ports[0]}/mcp"
        timeout = httpx.Timeout(30, read=300)
        async with httpx.AsyncClient(transport=self.spread, timeout=timeout) as http:
            transport = streamable_http_client(url, http_client=http)
            async with self.initialized(transport) as session:
                with anyio.fail_after(_CALL_TIME):
                    await self.spread.listening.wait()
                yield session

    @asynccontextmanager
    async def initialized(self, transport: Any) -> AsyncIterator[Any]:
        """A session of SDK 1.x, or a client of 2.x in its legacy mode: they call alike."""
        sdk: Any = mcp
        if IS_SDK_1:
            async with (
                transport as (reading, writing, *_),
                ClientSession(reading, writing, message_handler=self.hear) as session,
            ):
                await session.initialize()
                yield session
        else:
            async with sdk.Client(transport, mode="legacy", message_handler=self.hear) as client:
                yield client

    async def hear(self, message: Any) -> None:
        """Whatever the server says of its own accord."""
        if "list_changed" in repr(message):
            self.announced.set()

    async def run(self, finish: anyio.Event) -> None:
        """The client's whole life; its last line says how it was."""
        async with self.connected() as session:
            while self.calls < self.given.calls or not finish.is_set():
                async with anyio.create_task_group() as group:
                    for _ in range(self.given.at_once):
                        self.calls += 1
                        group.start_soon(self.call, session, self.tool(), self.calls)
                await anyio.sleep(random.uniform(0, self.given.pause))
            await self.be_announced(session)
        spread = self.spread
        report = {
            "end": self.number,
            "sessions": sorted(spread.sessions),
            "requests": dict(spread.used),
            "streams": spread.streams,
            "was_announced": self.announced.is_set(),
        }
        print(json.dumps(report), flush=True)

    async def be_announced(self, session: Any) -> None:
        """Has the server say something on the standing stream; not every stream is open still."""
        deadline = time.monotonic() + _ANNOUNCEMENT_TIME
        while not self.announced.is_set() and time.monotonic() < deadline:
            await self.call(session, "announce", 0)
            with anyio.move_on_after(1):
                await self.announced.wait()

    def tool(self) -> str:
        """Mostly the quick one."""
        return "slow" if random.random() < self.given.slow else "whoami"

    async def call(self, session: Any, tool: str, number: int) -> None:
        """One call and its line."""
        line: Json = {"client": self.number, "call": number, "started": time.monotonic()}
        try:
            with anyio.fail_after(_CALL_TIME):
                result = await session.call_tool(tool, {"marker": self.marker})
            line |= json.loads(result.content[0].text)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        line["ended"] = time.monotonic()
        line["sessions"] = len(self.spread.sessions)
        print(json.dumps(line), flush=True)


async def until_told(finish: anyio.Event) -> None:
    """Waits for the end of standard input."""
    await to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
    finish.set()


async def main(given: argparse.Namespace) -> None:
    """Runs all clients at once."""
    warnings.simplefilter("ignore")
    finish = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(until_told, finish)
        for number in given.clients:
            group.start_soon(Client(number, given).run, finish)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Many MCP clients at once")
    parser.add_argument("--ports", type=lambda text: [int(port) for port in text.split(",")])
    parser.add_argument("--clients", type=lambda text: range(*map(int, text.split("-"))))
    parser.add_argument("--calls", type=int, default=20, help="calls that each makes at least")
    parser.add_argument("--at-once", type=int, default=1, help="calls of a session at a time")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between calls, at most")
    parser.add_argument("--slow", type=float, default=0.1, help="part of the calls that take time")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        anyio.run(main, arguments())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads standard input would hold us
