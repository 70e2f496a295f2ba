"""A client made with the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python python_client.py URL auto|legacy

Talks to the demo server at URL and prints one JSON document of what came back. The mode is how an
SDK 2.x client finds out what the server speaks: auto probes first. SDK 1.x knows only legacy.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import anyio
from mcp import types
from sdk_session import Json, connected, plain, say

Seen = list[Json]

#: What the person, or the model, at this end says when it is asked.
ANSWER = "forty-two"


async def with_elicitation(url: str, mode: str) -> Json:
    """Lists the tools and calls them; a question is answered by elicitation."""
    asked: Seen = []
    progress: list[list[float | None]] = []

    async def elicited(_: Any, params: Any) -> types.ElicitResult:
        asked.append(plain(params))
        return types.ElicitResult(action="accept", content={"answer": ANSWER})

    async def counted(done: float, total: float | None, _: str | None) -> None:
        progress.append([done, total])

    async with connected(url, mode, elicitation_callback=elicited) as (client, revision):
        listed = plain(await client.list_tools())
        echoed = plain(await client.call_tool("echo", {"text": "Grüße, 世界 \N{WAVING HAND SIGN}"}))
        count = await client.call_tool("count", {"to": 3, "pause": 0.1}, progress_callback=counted)
        answered = plain(await client.call_tool("ask", {"question": "How much?"}))
        return {
            "revision": revision,
            "tools": [tool["name"] for tool in listed["tools"]],
            "echo": echoed["content"],
            "count": plain(count)["content"],
            "progress": progress,
            "elicited": asked,
            "elicitation": answered["content"],
        }


async def with_sampling(url: str, mode: str) -> Json:
    """A client without elicitation: the question comes as a request for a model's answer."""
    asked: Seen = []

    async def sampled(_: Any, params: Any) -> types.CreateMessageResult:
        asked.append(plain(params))
        said = types.TextContent(type="text", text=ANSWER)
        return types.CreateMessageResult(role="assistant", content=said, model="none")

    async with connected(url, mode, sampling_callback=sampled) as (client, _):
        answered = plain(await client.call_tool("ask", {"question": "How much?"}))
        return {"sampled": asked, "sampling": answered["content"]}


async def main(url: str, mode: str) -> None:
    """Prints everything as one document."""
    seen = await with_elicitation(url, mode) | await with_sampling(url, mode)
    say(sdk=version("mcp"), **seen)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
