"""A client of the Python SDK as the tests of kills and stops use it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
from mcp import Client, types
from mcp.client.streamable_http import streamable_http_client

from tests.support.proxy_process import ProxyProcess


class Talk:
    """A client of the SDK, and what a test wants to know of it.

    `elicited` answers when the server asks the person.
    """

    def __init__(self, proxy: ProxyProcess) -> None:
        self.client: Client
        self.proxy = proxy
        self.session_ids: set[str] = set()
        self.elicited: Callable[[Any, Any], Awaitable[types.ElicitResult]] = _decline

    async def note(self, request: httpx2.Request) -> None:
        """Keeps the session id that a request goes under."""
        if "Mcp-Session-Id" in request.headers:
            self.session_ids.add(request.headers["Mcp-Session-Id"])

    async def on_elicitation(self, context: Any, params: Any) -> types.ElicitResult:
        """Answers as it was set to."""
        return await self.elicited(context, params)

    async def ask(self) -> str:
        """What the server makes of the answer to a question that it asks meanwhile."""
        return _text(await self.client.call_tool("ask", {}))

    async def say(self, text: str) -> str:
        """What the server echoes."""
        return _text(await self.client.call_tool("echo", {"text": text}))

    async def count(self, to: int, begun: anyio.Event | None = None) -> str:
        """A call that takes a tenth of a second for each number; says when it has begun."""

        async def progressed(progress: float, total: float | None, message: str | None) -> None:
            if begun is not None:
                begun.set()

        counting = {"to": to, "pause": 0.1}
        return _text(await self.client.call_tool("count", counting, progress_callback=progressed))


def _text(result: types.CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, types.TextContent)
    return content.text


async def _decline(context: Any, params: Any) -> types.ElicitResult:
    return types.ElicitResult(action="decline")


@asynccontextmanager
async def talking(proxy: ProxyProcess) -> AsyncIterator[Talk]:
    """A client in a session of its own with the proxy."""
    talk = Talk(proxy)
    async with httpx2.AsyncClient(timeout=60, event_hooks={"request": [talk.note]}) as http:
        transport = streamable_http_client(proxy.url, http_client=http)
        async with Client(
            transport, mode="legacy", elicitation_callback=talk.on_elicitation
        ) as talk.client:
            yield talk
