"""A client made with the official Python SDK, 1.x or 2.x, that calls faster than it may.

    python limited_client.py URL auto|legacy

Calls a tool of the demo server until a call is refused, waits, and calls again. Prints one JSON
document of what came back.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from typing import Any

import anyio
from sdk_session import connected, plain, say

_MOST = 50


async def main(url: str, mode: str) -> None:
    """Prints how many calls were served, what the refused one was told, and the next one's echo."""
    told: dict[str, Any] = {"sdk": version("mcp"), "served": 0}
    async with connected(url, mode) as (client, revision):
        for _ in range(_MOST):
            try:
                await client.call_tool("echo", {"text": "hello"})
            except Exception as error:
                told["refused"] = str(error)
                break
            told["served"] += 1
        until, told["echo"] = time.monotonic() + 20, None
        while told["echo"] is None and time.monotonic() < until:
            try:
                echoed = plain(await client.call_tool("echo", {"text": "again"}))
                told["echo"] = echoed["content"][0]["text"]
            except Exception as error:
                told["last"] = str(error)
                await anyio.sleep(0.2)
        told["revision"] = revision
    say(**told)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:3])
