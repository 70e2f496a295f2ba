"""A client made with the official Python SDK, 1.x or 2.x, that shows an API key.

    python key_client.py URL auto|legacy KEY

Calls a tool of the demo server at URL, and prints one JSON document of what came back.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import anyio
from sdk_session import connected, httpx, plain, say, streamable_http_client


def reasons(error: BaseException) -> list[str]:
    """What went wrong, in the words of each error in a group."""
    inner: Any = getattr(error, "exceptions", None)
    return [str(error)] if inner is None else [text for each in inner for text in reasons(each)]


async def main(url: str, mode: str, key: str) -> None:
    """Prints the revision and the echo, or why there is none."""
    told: dict[str, Any] = {"sdk": version("mcp")}
    shown = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx.AsyncClient(headers=shown) as http:
            transport = streamable_http_client(url, http_client=http)
            async with connected(transport, mode) as (client, revision):
                echoed = plain(await client.call_tool("echo", {"text": "hello"}))
                told |= {"revision": revision, "echo": echoed["content"][0]["text"]}
    except Exception as error:
        told["failed"] = reasons(error)
    say(**told)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:4])
