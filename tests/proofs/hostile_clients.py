"""Clients that mean no good, a few hundred of them in one process, until standard input ends.

    python -m tests.proofs.hostile_clients PORT SHARE

`SHARE` is the part of each kind in `CROWD` that there is to be. Says `ready` when all have begun,
and at the end what each kind has seen, as one JSON document. No client library: every byte is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable

STDIO = "/servers/stdio/mcp"
HTTP = "/servers/http/mcp"

#: How many there are of each kind.
CROWD = {
    "half a head": 200,
    "half a body": 200,
    "leaves its call": 200,
    "idle": 200,
    "closes late": 32,
    "GET stream": 32,
    "listen": 32,
}

#: Seconds that a call takes whose client leaves.
SLOW = 8.0

# Seconds between two calls of a client that leaves them, and after which it leaves one.
_PAUSE = (10.0, 30.0)
_PATIENCE = (0.0, 0.5)

# Seconds for which a client that closes late leaves the connection open.
_LATE = (0.05, 2.0)

_SESSIONS_TO_LEAVE = 8
_MODERN = "2026-07-28"

Head = tuple[int, dict[str, str]]
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hostile:
    """The crowd against one port."""

    def __init__(self, port: int, share: float) -> None:
        self.port = port
        self.counts = {kind: max(1, round(count * share)) for kind, count in CROWD.items()}
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)
        self.begun: Counter[str] = Counter()
        self._sessions: list[tuple[str, str]] = []

    async def run(self) -> None:
        """All of them, until standard input ends."""
        left = [await self._session(STDIO) for _ in range(_SESSIONS_TO_LEAVE)]
        streams = [await self._session(STDIO) for _ in range(self.counts["GET stream"])]
        acts: dict[str, Callable[[int], Awaitable[None]]] = {
            "half a head": self._half_head,
            "half a body": self._half_body,
            "leaves its call": lambda number: self._leave_a_call(left[number % len(left)]),
            "idle": self._idle,
            "closes late": self._close_late,
            "GET stream": lambda number: self._get_stream(streams[number]),
            "listen": self._listen,
        }
        tasks = [
            asyncio.create_task(self._repeat(kind, act, number))
            for kind, act in acts.items()
            for number in range(self.counts[kind])
        ]
        while any(self.begun[kind] < count for kind, count in self.counts.items()):
            await asyncio.sleep(0.1)
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for path, session in self._sessions:
            await self._ask(f"DELETE {path}", b"", {"Mcp-Session-Id": session})
        print(json.dumps(self.seen), flush=True)

    async def _repeat(self, kind: str, act: Callable[[int], Awaitable[None]], number: int) -> None:
        """One client: again and again, as long as the crowd is there."""
        if kind == "leaves its call":
            self.begun[kind] += 1  # they come one after the other
            await asyncio.sleep(random.uniform(0, _PAUSE[1]))
        await asyncio.sleep(random.uniform(0, 2))
        while True:
            try:
                await act(number)
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                self.seen[kind][type(error).__name__] += 1
                await asyncio.sleep(1)

    # --- the kinds -------------------------------------------------------------------------------

    async def _half_head(self, _: int) -> None:
        half = b"POST /servers/stdio/mcp HTTP/1.1\r\nHost: localhost\r\nContent-Ty"
        await self._send_and_wait("half a head", half)

    async def _half_body(self, _: int) -> None:
        half = _request(f"POST {STDIO}", b'{"jsonrpc"', {}, length=1000)
        await self._send_and_wait("half a body", half)

    async def _idle(self, number: int) -> None:
        """Every other one has asked something before."""
        await self._send_and_wait("idle", _request("GET /healthz", b"", {}) if number % 2 else b"")

    async def _send_and_wait(self, kind: str, data: bytes) -> None:
        """Sends a part of a request and waits for what the server makes of that."""
        async with self._connection() as (reader, writer):
            writer.write(data)
            self.begun[kind] += 1
            began = time.monotonic()
            answer = await reader.read()
            waited = round((time.monotonic() - began) / 5) * 5
            self.seen[kind][f"{_status(answer)} after about {waited} s"] += 1

    async def _leave_a_call(self, session: str) -> None:
        call = {"jsonrpc": "2.0", "id": 1, "method": "sleep", "params": {"seconds": SLOW}}
        async with self._connection() as (_, writer):
            given = {"Mcp-Session-Id": session, "Accept": "application/json"}
            writer.write(_request(f"POST {STDIO}", json.dumps(call).encode(), given))
            await writer.drain()
            await asyncio.sleep(random.uniform(*_PATIENCE))
            self.seen["leaves its call"]["left"] += 1
        await asyncio.sleep(random.uniform(*_PAUSE))

    async def _close_late(self, _: int) -> None:
        async with self._connection() as (reader, writer):
            writer.write(_request("GET /healthz", b"", {"Connection": "close"}))
            self.begun["closes late"] += 1
            answer = await reader.read()
            self.seen["closes late"][_status(answer)] += 1
            await asyncio.sleep(random.uniform(*_LATE))

    async def _get_stream(self, session: str) -> None:
        given = {"Mcp-Session-Id": session, "Accept": "text/event-stream"}
        await self._stand("GET stream", _request(f"GET {STDIO}", b"", given))

    async def _listen(self, number: int) -> None:
        about = {
            "io.modelcontextprotocol/protocolVersion": _MODERN,
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params = {"notifications": {"toolsListChanged": True}, "_meta": about}
        call = {"jsonrpc": "2.0", "id": number, "method": "subscriptions/listen", "params": params}
        given = {"MCP-Protocol-Version": _MODERN, "Mcp-Method": "subscriptions/listen"}
        await self._stand("listen", _request(f"POST {HTTP}", json.dumps(call).encode(), given))

    async def _stand(self, kind: str, request: bytes) -> None:
        """A standing stream, read to its end; who is refused one comes again."""
        async with self._connection() as (reader, writer):
            self.begun[kind] += 1
            writer.write(request)
            status, headers = await _head(reader)
            is_stream = headers.get("content-type", "").startswith("text/event-stream")
            failure = headers.get("x-mcp-proxy-error", "")
            self.seen[kind][f"{status} {'stream' if is_stream else failure}"] += 1
            await reader.read()
        await asyncio.sleep(1 + random.random())

    # --- how they speak --------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Stream]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _session(self, path: str) -> str:
        about = {"name": "hostile", "version": "1"}
        params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
        status, headers = await self._ask(f"POST {path}", json.dumps(message).encode(), {})
        assert status == 200, status
        session = headers["mcp-session-id"]
        self._sessions.append((path, session))
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        await self._ask(f"POST {path}", json.dumps(ready).encode(), {"Mcp-Session-Id": session})
        return session

    async def _ask(self, line: str, body: bytes, headers: dict[str, str]) -> Head:
        async with self._connection() as (reader, writer):
            writer.write(_request(line, body, {**headers, "Connection": "close"}))
            found = await _head(reader)
            await reader.read()
            return found


def _request(line: str, body: bytes, headers: dict[str, str], length: int | None = None) -> bytes:
    given = {
        "Host": "localhost",
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "Content-Length": str(len(body) if length is None else length),
        **headers,
    }
    if line.startswith(("GET", "DELETE")):
        del given["Content-Length"], given["Content-Type"]
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _head(reader: asyncio.StreamReader) -> Head:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = [line.partition(":") for line in lines[1:] if line]
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}


def _status(answer: bytes) -> str:
    """The last status in what was answered."""
    statuses = [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return statuses[-1].decode() if statuses else "closed"


if __name__ == "__main__":
    asyncio.run(Hostile(int(sys.argv[1]), float(sys.argv[2])).run())
