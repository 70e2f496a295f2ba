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
from typing import Any

import anyio
import httpx
from mcp import ClientSession
from mcp.client.sse import sse_client
from sdk_session import (
    LABEL,
    Json,
    TallyClient,
    call_at_once,
    command_line,
    noted,
    run_crowd,
    say,
    session_over,
)

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
            post.worker = int(response.headers.get(LABEL, 0))
        finally:
            post.done.set()
        return response


def _number_of(message: Json) -> int:
    """The number of the call that a message is, 0 where it is none."""
    if message.get("method") != "tools/call":
        return 0
    number: int = message["params"]["arguments"]["number"]
    return number


class Client(TallyClient):
    """One session."""

    def __init__(self, number: int, given: argparse.Namespace) -> None:
        super().__init__("python", number, given)
        self.http = Noted()

    async def hear(self, message: Any) -> None:
        """Notes what the SDK could not make sense of, an answer to no call of ours for one."""
        if isinstance(message, Exception):
            self.strange.append(str(message))

    async def live(self, finish: anyio.Event) -> None:
        """The session's whole life."""
        url = f"http://127.0.0.1:{self.given.ports[0]}/sse"

        def client_of(
            headers: dict[str, str] | None = None,
            timeout: httpx.Timeout | None = None,
            auth: httpx.Auth | None = None,
        ) -> httpx.AsyncClient:
            return httpx.AsyncClient(transport=self.http, timeout=timeout)

        async with session_over(
            sse_client(url, timeout=60, httpx_client_factory=client_of),
            sampling_callback=self.answer,
            client_info=self.about,
            message_handler=self.hear,
        ) as (session, revision):
            say(open=self.number, session=self.http.session, revision=revision)
            while not finish.is_set():
                await call_at_once(self.given, lambda: self.call(session))
        say(end=self.number, session=self.http.session, strange=self.strange)

    async def call(self, session: ClientSession) -> None:
        """One call and its line."""
        number = self.next_number()
        kind = self.kinds[self.calls % len(self.kinds)]
        line: Json = {"client": self.number, "call": number, "kind": kind}
        async with noted(line, _CALL_TIME):
            line["owner"] = await self.answered(session, kind, number)
        post = self.http.posts.pop(number)
        with anyio.move_on_after(_CALL_TIME):
            await post.done.wait()
        say(**line, id=post.key, worker=post.worker)

    async def answered(self, session: ClientSession, kind: str, number: int) -> int:
        """Makes the call; raises Wrong if anything that came was another one's."""
        heard: list[str] = []

        async def hear(progress: float, total: float | None, message: str | None) -> None:
            heard.append(str(message))

        arguments = {"token": self.token, "number": number}
        more: Json = {"progress_callback": hear} if kind == "progress" else {}
        result: Any = await session.call_tool(kind, arguments, **more)
        answer = json.loads(result.content[0].text)
        self.require_own_answer(kind, number, answer)
        self.require_own_progress(kind, number, heard)
        worker: int = answer["worker"]
        return worker


if __name__ == "__main__":
    given = command_line("Many MCP sessions over HTTP+SSE", at_once=2, pause=0.2)
    run_crowd(lambda number, given, finish: Client(number, given).live(finish), given)
