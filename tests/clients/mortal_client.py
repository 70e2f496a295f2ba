"""A client of the official Python SDK, 1.x or 2.x, whose server is killed by one of its tools.

    python mortal_client.py URL auto|legacy ARGUMENTS

Calls `ok`, `die` with the arguments, a JSON object, and `ok` in one session with the server of
`tests/servers/mortal.py`, and prints what came of each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anyio
from sdk_session import Json, connected, plain, say


async def outcome(client: Any, tool: str, arguments: Json) -> str:
    """The text of a call's result, or its error in words."""
    try:
        result = plain(await client.call_tool(tool, arguments))
    except Exception as error:
        return f"failed: {error}"
    return str(result["content"][0]["text"])


async def main(url: str, mode: str, arguments: Json) -> None:
    """Prints the outcomes as one document."""
    async with connected(url, mode) as (client, _):
        say(
            outcomes=[
                await outcome(client, "ok", {}),
                await outcome(client, "die", arguments),
                await outcome(client, "ok", {}),
            ]
        )


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
