"""A streamable HTTP server of the official Python SDK 1.x, which knows sessions alone.

python sdk1_http.py PORT
"""

import sys

from mcp.server.fastmcp import Context, FastMCP
from pydantic import BaseModel

server = FastMCP("sdk1", host="127.0.0.1", port=int(sys.argv[1]), log_level="WARNING")


class Answer(BaseModel):
    """What a form asks for."""

    answer: str


@server.tool()
async def echo(text: str) -> str:
    """Its text."""
    return text


@server.tool()
async def count(to: int, ctx: Context) -> str:
    """Progress from 1 to `to`."""
    for number in range(1, to + 1):
        await ctx.report_progress(number, to)
    return f"counted to {to}"


@server.tool()
async def ask(question: str, ctx: Context) -> str:
    """What the person at the client answers."""
    came = await ctx.elicit(question, Answer)
    return came.data.answer if came.action == "accept" else came.action


server.run("streamable-http")
