"""Many sessions of the official Python SDK 1.x over its HTTP+SSE transport, all at once.

    python sse_client.py --ports 8001 --clients 0-50 [--at-once 2] [--pause 0.2]

Each talks to a server of `tests/servers/tally.py` behind the proxy and calls until standard input
ends; every POST has a fresh connection, so that any worker gets it. Each call is one line of JSON
on standard output, and so are each session's beginning and end. The TypeScript twin of this program
is sse_client.mjs.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import time
from typing import Any

import anyio
import httpx
from anyio import to_thread
from mcp import ClientSession, types
from mcp.client.sse import sse_client

Json = dict[str, Any]

_STEPS = 3
_KINDS = ("plain", "progress", "sample")
_LABEL = "x-worker"
_CALL_TIME = 60.0


class Post:
    """The POST of a call. It may be acknowledged after the call was answered on the stream."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.worker: int | None = None
        self.done = anyio.Event()


class Noted(httpx.AsyncHTTPTransport):
    """Notes by which JSON-RPC id, and at which worker, each call was posted."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
        self.posts: dict[int, Post] = {}
        self.session = ""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request, noted."""
        if request.method != "POST":
            return await super().handle_async_request(request)
        self.session = str(request.url.query, "ascii")
        message = json.loads(request.content)
        number = _number_of(message)
        post = self.posts[number] = Post(message.get("id"))
        try:
            response = await super().handle_async_request(request)
            post.worker = int(response.headers.get(_LABEL, 0))
        finally:
            post.done.set()
        return response


def _number_of(message: Json) -> int:
    """The number of the call that a message is, 0 where it is none."""
    if message.get("method") != "tools/call":
        return 0
    number: int = message["params"]["arguments"]["number"]
    return number


class Wrong(Exception):
    """An answer that is not the call's own."""


class Client:
    """One session."""

    def __init__(self, number: int, given: argparse.Namespace) -> None:
        self.number = number
        self.given = given
        self.token = f"python-{number}-{secrets.token_hex(8)}"
        self.http = Noted()
        self.calls = 0
        self.strange: list[str] = []  # what came and belonged to none of our calls

    async def answer(self, context: Any, params: Any) -> types.CreateMessageResult:
        """What we say to the server's question, which must be for us."""
        content: Any = params.messages[0].content
        text = (content[0] if isinstance(content, list) else content).text
        if text.split()[0] != self.token:
            self.strange.append(f"question {text}")
        said = types.TextContent(type="text", text=f"yes {text}")
        return types.CreateMessageResult(role="assistant", content=said, model="none")

    async def hear(self, message: Any) -> None:
        """Notes what the SDK could not make sense of, an answer to no call of ours for one."""
        if isinstance(message, Exception):
            self.strange.append(str(message))

    async def run(self, finish: anyio.Event) -> None:
        """The session's whole life."""
        url = f"http://127.0.0.1:{self.given.ports[0]}/sse"
        about = types.Implementation(name=self.token, version="1")

        def client_of(
            headers: dict[str, str] | None = None,
            timeout: httpx.Timeout | None = None,
            auth: httpx.Auth | None = None,
        ) -> httpx.AsyncClient:
            return httpx.AsyncClient(transport=self.http, timeout=timeout)

        async with (
            sse_client(url, timeout=60, httpx_client_factory=client_of) as (reading, writing),
            ClientSession(
                reading,
                writing,
                sampling_callback=self.answer,
                client_info=about,
                message_handler=self.hear,
            ) as session,
        ):
            initialized = await session.initialize()
            say(open=self.number, session=self.http.session, revision=initialized.protocolVersion)
            while not finish.is_set():
                async with anyio.create_task_group() as group:
                    for _ in range(self.given.at_once):
                        group.start_soon(self.call, session)
                await anyio.sleep(random.uniform(0, self.given.pause))
        say(end=self.number, session=self.http.session, strange=self.strange)

    async def call(self, session: ClientSession) -> None:
        """One call and its line."""
        self.calls += 1
        number = self.number * 1_000_000 + self.calls
        kind = _KINDS[self.calls % len(_KINDS)]
        line: Json = {"client": self.number, "call": number, "kind": kind}
        line["started"] = time.monotonic()
        try:
            with anyio.fail_after(_CALL_TIME):
                line["owner"] = await self.answered(session, kind, number)
        except Wrong as error:
            line["wrong"] = str(error)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        line["ended"] = time.monotonic()
        post = self.http.posts.pop(number)
        with anyio.move_on_after(_CALL_TIME):
            await post.done.wait()
        line |= {"id": post.key, "worker": post.worker}
        say(**line)

    async def answered(self, session: ClientSession, kind: str, number: int) -> int:
        """Makes the call; raises Wrong if anything that came was another one's."""
        heard: list[str] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            heard.append(str(message))

        arguments = {"token": self.token, "number": number}
        more: Json = {"progress_callback": hear} if kind == "progress" else {}
        result: Any = await session.call_tool(kind, arguments, **more)
        answer = json.loads(result.content[0].text)
        ours = {"token": self.token, "given": self.token, "number": number, "executions": 1}
        if kind == "sample":
            ours["said"] = f"yes {self.token} {number}"
        if (shown := {key: answer.get(key) for key in ours}) != ours:
            raise Wrong(f"{shown} came for {ours}")
        steps = range(1, _STEPS + 1) if kind == "progress" else ()
        if heard != (own := [f"{self.token} {number} {step}" for step in steps]):
            raise Wrong(f"{heard} came for {own}")
        worker: int = answer["worker"]
        return worker


def say(**line: Any) -> None:
    """Writes a line."""
    print(json.dumps(line), flush=True)


async def until_told(finish: anyio.Event) -> None:
    """Waits for the end of standard input."""
    await to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
    finish.set()


async def main(given: argparse.Namespace) -> None:
    """Runs all sessions at once."""
    finish = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(until_told, finish)
        for number in given.clients:
            group.start_soon(Client(number, given).run, finish)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Many MCP sessions over HTTP+SSE")
    parser.add_argument("--ports", type=lambda text: [int(port) for port in text.split(",")])
    parser.add_argument("--clients", type=lambda text: range(*map(int, text.split("-"))))
    parser.add_argument("--at-once", type=int, default=2, help="calls of a session at a time")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between calls, at most")
    return parser.parse_args()


if __name__ == "__main__":
    anyio.run(main, arguments())
