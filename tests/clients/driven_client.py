"""A client in Python that does in one session what its standard input says, a JSON object a line.

    python driven_client.py URL sdk|sdk-auto|fastmcp|langchain

`{"tool": NAME, "arguments": {}}` calls a tool, `{"notify": true}` sends a notification. For each
line it prints what came of it. The clients of the official SDK, 1.x or 2.x, of FastMCP, and of
langchain-mcp-adapters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import anyio
from anyio import to_thread
from sdk_session import connected, plain, say

Json = dict[str, Any]
Call = Callable[[str, Json], Awaitable[str]]
Notify = Callable[[], Awaitable[None]]


def _notifier(session: Any) -> Notify:
    async def notify() -> None:
        await session.send_progress_notification("nobody's", 1.0)

    return notify


def _text(result: Json) -> str:
    text = str(result["content"][0]["text"])
    return f"failed: {text}" if result.get("isError") else text


@asynccontextmanager
async def of_the_sdk(url: str, mode: str) -> AsyncIterator[tuple[Call, Notify]]:
    """A session of the official SDK."""
    async with connected(url, mode) as (client, _):

        async def call(tool: str, arguments: Json) -> str:
            return _text(plain(await client.call_tool(tool, arguments)))

        yield call, _notifier(client)


@asynccontextmanager
async def of_fastmcp(url: str) -> AsyncIterator[tuple[Call, Notify]]:
    """A client of FastMCP."""
    async with import_module("fastmcp").Client(url) as client:

        async def call(tool: str, arguments: Json) -> str:
            result = await client.call_tool(tool, arguments)
            return str(result.content[0].text)

        async def notify() -> None:
            await client.progress("nobody's", 1.0)

        yield call, notify


@asynccontextmanager
async def of_langchain(url: str) -> AsyncIterator[tuple[Call, Notify]]:
    """The tools of a server as LangChain has them."""
    made = import_module("langchain_mcp_adapters.client").MultiServerMCPClient(
        {"proxy": {"transport": "streamable_http", "url": url}}
    )
    load = import_module("langchain_mcp_adapters.tools").load_mcp_tools
    async with made.session("proxy") as session:
        tools = {tool.name: tool for tool in await load(session)}

        async def call(tool: str, arguments: Json) -> str:
            result = await tools[tool].ainvoke(arguments)
            return str(result if isinstance(result, str) else result[0]["text"])

        yield call, _notifier(session)


async def main(url: str, kind: str) -> None:
    """Does what each line says."""
    session = {
        "sdk": lambda: of_the_sdk(url, "legacy"),
        "sdk-auto": lambda: of_the_sdk(url, "auto"),
        "fastmcp": lambda: of_fastmcp(url),
        "langchain": lambda: of_langchain(url),
    }[kind]
    async with session() as (call, notify):
        say(outcome="ready")
        while line := await to_thread.run_sync(sys.stdin.readline):
            command = json.loads(line)
            try:
                if "notify" in command:
                    await notify()
                    say(outcome="sent")
                else:
                    say(outcome=await call(command["tool"], command["arguments"]))
            except Exception as error:
                say(outcome=f"failed: {error}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
