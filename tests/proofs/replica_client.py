"""Many clients of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python replica_client.py --ports 8001 --clients 0-50

Each client opens a legacy session with a server of `tests/servers/tally.py` behind the proxy and
calls; every HTTP request has a fresh connection, so that any worker gets it. They go on until
standard input ends. Every call is one line of JSON on standard output, with what has shown that an
answer was not its own and with the HTTP requests it took; and so is each client's end.

The SDK's transport does not survive a connection that breaks. Here such a request is answered by an
error of ours, as a client that is meant to live does, and an answer to the server's question is
sent again, which can do no harm.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import time
import traceback
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import anyio
import mcp
from anyio import to_thread
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

IS_SDK_1 = version("mcp").startswith("1.")

httpx: Any = import_module("httpx" if IS_SDK_1 else "httpx2")
types: Any = import_module("mcp.types" if IS_SDK_1 else "mcp_types")

Json = dict[str, Any]

_STEPS = 3
_PROGRESS_TIME = 2.0
_KINDS = {"plain": 0.6, "progress": 0.2, "sample": 0.2}
_LABEL = "x-worker"
_BROKEN = -32098


class Noted(httpx.AsyncHTTPTransport):  # type: ignore[misc]
    """Notes for each call which connections its requests took, and who answered.

    A note is a list: the HTTP method, the port on our side, the worker's process id, the status or
    the error.
    """

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
        self.notes: dict[int, list[list[Any]]] = {}
        self.sessions: set[str] = set()
        self.streams = 0
        self.sent_again = 0

    async def handle_async_request(self, request: Any) -> Any:
        """One request; a broken connection becomes an answer."""
        message = _message_in(request)
        try:
            return await self.noted(request, message)
        except httpx.TransportError as error:
            if "method" in message or not message:
                return _broken(request, message, error)
            self.sent_again += 1
        try:
            return await self.noted(request, message)
        except httpx.TransportError as error:
            return _broken(request, message, error)

    async def noted(self, request: Any, message: Json) -> Any:
        """One request, noted."""
        note: list[Any] = [request.method, None, None, None]
        self.notes.setdefault(_number_of(message), []).append(note)

        async def trace(event: str, info: Json) -> None:
            if event == "connection.connect_tcp.complete":
                note[1] = info["return_value"].get_extra_info("client_addr")[1]

        request.extensions = {**request.extensions, "trace": trace}
        if session := request.headers.get("mcp-session-id"):
            self.sessions.add(session)
        try:
            response = await super().handle_async_request(request)
            note[2:] = [int(response.headers.get(_LABEL, 0)), response.status_code]
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                await response.aread()
        except httpx.TransportError as error:
            note[3] = type(error).__name__
            raise
        if request.method == "GET" and response.status_code == 200:
            self.streams += 1
        return response


def _message_in(request: Any) -> Json:
    message = json.loads(request.content) if request.method == "POST" else {}
    return message if isinstance(message, dict) else {}


def _number_of(message: Json) -> int:
    """The number of the call that a message is about, 0 where it is about none."""
    if message.get("method") == "tools/call":
        return int(message["params"]["arguments"]["number"])
    if "result" in message and "content" in message["result"]:
        return int(message["result"]["content"]["text"].split()[-1])
    return 0


def _broken(request: Any, message: Json, error: Exception) -> Any:
    """What the SDK is given in place of a connection's failure."""
    text = f"the connection to the proxy broke ({type(error).__name__})"
    body = {"jsonrpc": "2.0", "error": {"code": _BROKEN, "message": text}}
    return httpx.Response(502, json={**body, "id": message.get("id")}, request=request)


#: What the server says that got no answer to its question.
UNHEARD = "no answer"


class Wrong(Exception):
    """An answer that is not the call's own."""


class Client:
    """One client."""

    def __init__(self, number: int, given: argparse.Namespace) -> None:
        self.number = number
        self.given = given
        self.token = f"session-{number}-{secrets.token_hex(8)}"
        self.http = Noted()
        self.calls = 0
        self.strange: list[str] = []  # what came and belonged to none of our calls

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Any]:
        """The SDK's session, initialized."""
        url = f"http://127.0.0.1:{self.given.ports[0]}/mcp"
        timeout = httpx.Timeout(30, read=300)
        about = types.Implementation(name=self.token, version="1")
        sdk: Any = mcp
        async with httpx.AsyncClient(transport=self.http, timeout=timeout) as http:
            transport: Any = streamable_http_client(url, http_client=http)
            if IS_SDK_1:
                async with (
                    transport as (reading, writing, *_),
                    ClientSession(
                        reading, writing, sampling_callback=self.answer, client_info=about
                    ) as session,
                ):
                    await session.initialize()
                    yield session
            else:
                async with sdk.Client(
                    transport, mode="legacy", sampling_callback=self.answer, client_info=about
                ) as client:
                    yield client

    async def answer(self, context: Any, params: Any) -> Any:
        """What we say to the server's question, which must be for us."""
        content = params.messages[0].content
        text = (content[0] if isinstance(content, list) else content).text
        if text.split()[0] != self.token:
            self.strange.append(f"question {text}")
        said = types.TextContent(type="text", text=f"yes {text}")
        return types.CreateMessageResult(role="assistant", content=said, model="none")

    async def run(self, finish: anyio.Event) -> None:
        """The client's whole life; its last line says how it was."""
        async with self.connected() as session:
            while not finish.is_set():
                async with anyio.create_task_group() as group:
                    for _ in range(self.given.at_once):
                        group.start_soon(self.call, session)
                await anyio.sleep(random.uniform(0, self.given.pause))
        report = {
            "end": self.number,
            "sessions": sorted(self.http.sessions),
            "streams": self.http.streams,
            "sent_again": self.http.sent_again,
            "strange": self.strange,
        }
        print(json.dumps(report), flush=True)

    async def call(self, session: Any) -> None:
        """One call and its line."""
        self.calls += 1
        number = self.number * 1_000_000 + self.calls
        kind = random.choices(list(_KINDS), list(_KINDS.values()))[0]
        line: Json = {"client": self.number, "call": number, "kind": kind, "token": self.token}
        line["started"] = time.monotonic()
        try:
            with anyio.fail_after(self.given.call_time):
                line |= await self.answered(session, kind, number)
        except Wrong as error:
            line["wrong"] = str(error)
        except TimeoutError:
            line["error"] = f"no answer within {self.given.call_time:g} seconds"
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        line.setdefault("ended", time.monotonic())
        line["requests"] = self.http.notes.pop(number, [])
        print(json.dumps(line), flush=True)

    async def answered(self, session: Any, kind: str, number: int) -> Json:
        """Makes the call; raises Wrong if anything that came was another one's."""
        heard: list[str] = []
        complete = anyio.Event()

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            heard.append(str(message))
            if len(heard) >= _STEPS:
                complete.set()

        slow = random.random() < self.given.slow
        seconds = random.uniform(0.2, 1.0) if slow else 0.0
        arguments = {"token": self.token, "number": number, "seconds": seconds}
        more = {"progress_callback": hear} if kind == "progress" else {}
        result = await session.call_tool(kind, arguments, **more)
        ended = time.monotonic()
        answer = json.loads(result.content[0].text)
        ours = {"token": self.token, "given": self.token, "number": number, "executions": 1}
        if kind == "sample":
            if answer.get("said") == UNHEARD:
                raise RuntimeError("the answer to the server's question did not reach it")
            ours["said"] = f"yes {self.token} {number}"
        if (shown := {key: answer.get(key) for key in ours}) != ours:
            raise Wrong(f"{shown} came for {ours}")
        if kind == "progress":
            with anyio.move_on_after(_PROGRESS_TIME):
                await complete.wait()
            if heard != (own := [f"{self.token} {number} {n + 1}" for n in range(_STEPS)]):
                raise Wrong(f"{heard} came for {own}")
        return {
            "pid": answer["pid"],
            "owner": answer["worker"],
            "ended": ended,
            "seconds": seconds,
        }


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
    parser.add_argument("--at-once", type=int, default=1, help="calls of a session at a time")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between calls, at most")
    parser.add_argument("--slow", type=float, default=0.0, help="part of the calls that take time")
    parser.add_argument("--call-time", type=float, default=60.0, help="patience, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        anyio.run(main, arguments())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads standard input would hold us
