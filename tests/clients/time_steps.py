"""What is asked of mcp-server-time, call by call."""

from __future__ import annotations

from typing import Any

from tests.clients.opening_steps import initialize, list_tools, ping
from tests.clients.recording import Recording, Step


async def tell_the_time(talk: Recording) -> Any:
    return await talk.call("get_current_time", timezone="Europe/Zurich")


async def convert_a_time(talk: Recording) -> Any:
    return await talk.call(
        "convert_time",
        source_timezone="UTC",
        time="12:34",
        target_timezone="Asia/Kathmandu",
    )


async def call_an_unknown_tool(talk: Recording) -> Any:
    return await talk.call("no_such_tool")


async def name_an_unknown_timezone(talk: Recording) -> Any:
    return await talk.call("get_current_time", timezone="Mars/Olympus_Mons")


async def leave_an_argument_out(talk: Recording) -> Any:
    return await talk.call("convert_time", source_timezone="UTC")


async def send_an_unknown_method(talk: Recording) -> Any:
    return await talk.ask("no/such/method")


async def ask_for_prompts(talk: Recording) -> Any:
    return await talk.ask("prompts/list")


async def hear_nothing_else(talk: Recording) -> Any:
    return {"heard": talk.heard, "asked": talk.asked, "called": sorted(talk.called)}


STEPS: tuple[Step, ...] = (
    initialize,
    ping,
    list_tools,
    tell_the_time,
    convert_a_time,
    call_an_unknown_tool,
    name_an_unknown_timezone,
    leave_an_argument_out,
    send_an_unknown_method,
    ask_for_prompts,
    hear_nothing_else,
)
