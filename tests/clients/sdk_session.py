"""What the client programs beside this share: sessions of the official Python SDK, and crowds.

The SDK is 1.x or 2.x, whichever the interpreter has. The programs run in environments that do not
know the package `tests`: they find this module because it stands in their own directory.
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
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import anyio
import mcp
from anyio import to_thread
from mcp import ClientSession, types
from mcp.client.streamable_http import streamable_http_client

IS_SDK_1 = version("mcp").startswith("1.")

#: The HTTP client that the SDK is made with.
httpx: Any = import_module("httpx" if IS_SDK_1 else "httpx2")

#: The header in which each response of a labelled proxy names its worker.
LABEL = "x-worker"

#: The header that is "passed" where another worker has passed the request to that one.
WAY = "x-way"

Json = dict[str, Any]
Life = Callable[[int, argparse.Namespace, anyio.Event], Coroutine[Any, Any, None]]


def plain(result: Any) -> Json:
    """A result of the SDK as the JSON it was."""
    dumped: Json = result.model_dump(by_alias=True, mode="json", exclude_unset=True)
    return dumped


def say(**line: Any) -> None:
    """Writes a line of JSON."""
    print(json.dumps(line), flush=True)


# --- sessions ------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(
    server: Any, mode: str = "legacy", **callbacks: Any
) -> AsyncIterator[tuple[Any, str]]:
    """A session or, of SDK 2.x, a client, which has the same methods; and its revision.

    `server` is a URL or a transport. The mode is how a client of SDK 2.x finds out what the server
    speaks; SDK 1.x knows only legacy.
    """
    sdk: Any = mcp
    if IS_SDK_1:
        transport = streamable_http_client(server) if isinstance(server, str) else server
        async with session_over(transport, **callbacks) as found:
            yield found
    else:
        async with sdk.Client(server, mode=mode, **callbacks) as client:
            yield client, client.protocol_version


@asynccontextmanager
async def session_over(transport: Any, **callbacks: Any) -> AsyncIterator[tuple[Any, str]]:
    """A session of either SDK, initialized; and its revision."""
    async with (
        transport as (reading, writing, *_),
        ClientSession(reading, writing, **callbacks) as session,
    ):
        initialized = plain(await session.initialize())
        yield session, initialized["protocolVersion"]


@asynccontextmanager
async def session_at(port: int, through: Any, **callbacks: Any) -> AsyncIterator[Any]:
    """A legacy session with the proxy at a port; its requests go through a transport of httpx's."""
    timeout = httpx.Timeout(30, read=300)  # a stream may be silent for long
    async with httpx.AsyncClient(transport=through, timeout=timeout) as http:
        transport = streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)
        async with connected(transport, **callbacks) as (session, _):
            yield session


# --- calls ---------------------------------------------------------------------------------------


class Wrong(Exception):
    """An answer that is not the call's own."""


@asynccontextmanager
async def noted(line: Json, patience: float) -> AsyncIterator[None]:
    """Notes in a call's line when it began and ended, and how it failed, if it did."""
    line["started"] = time.monotonic()
    try:
        with anyio.fail_after(patience) as limit:
            yield
    except Wrong as error:
        line["wrong"] = str(error)
    except Exception as error:
        is_late = isinstance(error, TimeoutError) and limit.cancelled_caught
        late = f"no answer within {patience:g} seconds"
        line["error"] = late if is_late else f"{type(error).__name__}: {error}"
    line.setdefault("ended", time.monotonic())


async def call_at_once(
    given: argparse.Namespace, call: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Calls as many times at once as the command line says, and pauses."""
    async with anyio.create_task_group() as group:
        for _ in range(given.at_once):
            group.start_soon(call)
    await anyio.sleep(random.uniform(0, given.pause))


class TallyClient:
    """A client of `tests/servers/tally.py`, where each answer and question says whose it is."""

    kinds = ("plain", "progress", "sample")
    steps = 3

    def __init__(self, name: str, number: int, given: argparse.Namespace) -> None:
        self.number = number
        self.given = given
        self.token = f"{name}-{number}-{secrets.token_hex(8)}"
        self.calls = 0
        self.strange: list[str] = []  # what came and belonged to none of our calls

    @property
    def about(self) -> types.Implementation:
        """How it names itself to the server."""
        return types.Implementation(name=self.token, version="1")

    def next_number(self) -> int:
        """The number of a new call, which no other client's call has."""
        self.calls += 1
        return self.number * 1_000_000 + self.calls

    async def answer(self, context: Any, params: Any) -> types.CreateMessageResult:
        """What we say to the server's question, which must be for us."""
        content: Any = params.messages[0].content
        text = (content[0] if isinstance(content, list) else content).text
        if text.split()[0] != self.token:
            self.strange.append(f"question {text}")
        said = types.TextContent(type="text", text=f"yes {text}")
        return types.CreateMessageResult(role="assistant", content=said, model="none")

    def require_own_answer(self, kind: str, number: int, answer: Json) -> None:
        """Raises Wrong if an answer is another call's or another session's."""
        own = {"token": self.token, "given": self.token, "number": number, "executions": 1}
        if kind == "sample":
            own["said"] = f"yes {self.token} {number}"
        if (shown := {key: answer.get(key) for key in own}) != own:
            raise Wrong(f"{shown} came for {own}")

    def require_own_progress(self, kind: str, number: int, heard: list[str]) -> None:
        """Raises Wrong if the progress that was told is not all of the call's own."""
        steps = range(1, self.steps + 1) if kind == "progress" else ()
        if heard != (own := [f"{self.token} {number} {step}" for step in steps]):
            raise Wrong(f"{heard} came for {own}")


# --- crowds --------------------------------------------------------------------------------------


_OPTIONS = {
    "calls": "calls that each client makes at least",
    "at_once": "calls of a session at a time",
    "pause": "seconds between calls, at most",
    "slow": "part of the calls that take time",
    "call_time": "patience, in seconds",
    "path": "where the stream is",
    "tool": "what is called: prove or echo",
}


def command_line(description: str, **defaults: float | str) -> argparse.Namespace:
    """What a crowd's command line says: where to, which clients, and the options it has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--ports", type=lambda text: [int(port) for port in text.split(",")])
    parser.add_argument("--clients", type=lambda text: range(*map(int, text.split("-"))))
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=_OPTIONS[name])
    return parser.parse_args()


def run_crowd(life: Life, given: argparse.Namespace) -> None:
    """Runs the lives of all clients at once, which are told when standard input has ended."""
    try:
        anyio.run(_live, life, given)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads standard input would hold us


async def _live(life: Life, given: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    finish = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(_until_told, finish)
        for number in given.clients:
            group.start_soon(life, number, given, finish)


async def _until_told(finish: anyio.Event) -> None:
    await to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
    finish.set()
