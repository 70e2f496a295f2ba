"""Many HTTP+SSE clients of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python sse_crowd.py --ports 8001 --clients 0-25 --calls 20 [--tool echo]

Each opens a session and calls, one call after the other, until it has made its calls and standard
input has ended; sessions stay open as long. Every call is one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import Any

import anyio
from mcp.client.sse import sse_client
from sdk_session import Json, command_line, noted, run_crowd, say, session_over

_CALL_TIME = 60.0


async def live(number: int, given: argparse.Namespace, finish: anyio.Event) -> None:
    """One client's whole life."""
    marker = f"python {version('mcp')} client {number}"
    url = f"http://127.0.0.1:{given.ports[number % len(given.ports)]}{given.path}"
    async with session_over(sse_client(url, timeout=_CALL_TIME)) as (session, _):
        await session.list_tools()  # or the SDK asks for them between the first two calls
        call = 0
        while call < given.calls or not finish.is_set():
            call += 1
            await make(session, given.tool, {"client": number, "call": call, "mine": marker})
            if call >= given.calls:
                with anyio.move_on_after(given.pause):
                    await finish.wait()


async def make(session: Any, tool: str, line: Json) -> None:
    """One call and its line."""
    said = line["expected"] = f"{line['mine']} call {line['call']}"
    arguments = {"message": said} if tool == "echo" else {"marker": line["mine"], "said": said}
    async with noted(line, _CALL_TIME):
        result = await session.call_tool(tool, arguments)
        text = result.content[0].text
        line |= {"text": text} if tool == "echo" else json.loads(text)
    say(**line)


if __name__ == "__main__":
    given = command_line(
        "Many HTTP+SSE clients at once", calls=20, pause=0.5, path="/sse", tool="prove"
    )
    run_crowd(live, given)
