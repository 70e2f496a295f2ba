"""Many HTTP+SSE clients of the official Python SDK, 1.x or 2.x, whichever the interpreter has.

    python sse_crowd.py --ports 8001 --clients 0-25 --calls 20 [--tool echo]

Each opens a session and calls, one call after the other, until it has made its calls and standard
input has ended; sessions stay open as long. Every call is one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from typing import Any

import anyio
from anyio import to_thread
from mcp import ClientSession
from mcp.client.sse import sse_client

Json = dict[str, Any]

_CALL_TIME = 60.0


async def run(number: int, given: argparse.Namespace, finish: anyio.Event) -> None:
    """One client's whole life."""
    marker = f"python {version('mcp')} client {number}"
    url = f"http://127.0.0.1:{given.ports[number % len(given.ports)]}{given.path}"
    async with (
        sse_client(url, timeout=_CALL_TIME) as (reading, writing),
        ClientSession(reading, writing) as session,
    ):
        await session.initialize()
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
    said = f"{line['mine']} call {line['call']}"
    line |= {"expected": said, "started": time.monotonic()}
    arguments = {"message": said} if tool == "echo" else {"marker": line["mine"], "said": said}
    try:
        with anyio.fail_after(_CALL_TIME):
            result = await session.call_tool(tool, arguments)
        text = result.content[0].text
        line |= {"text": text} if tool == "echo" else json.loads(text)
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(line | {"ended": time.monotonic()}), flush=True)


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
            group.start_soon(run, number, given, finish)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Many HTTP+SSE clients at once")
    parser.add_argument("--ports", type=lambda text: [int(port) for port in text.split(",")])
    parser.add_argument("--clients", type=lambda text: range(*map(int, text.split("-"))))
    parser.add_argument("--calls", type=int, default=20, help="calls that each makes at least")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between further calls")
    parser.add_argument("--path", default="/sse", help="where the stream is")
    parser.add_argument("--tool", default="prove", help="what is called: prove or echo")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        anyio.run(main, arguments())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads standard input would hold us
