"""A stdio server answers a client through the proxy exactly as it answers one that started it.

Two sessions of the same SDK client take the same steps side by side, one over the SDK's stdio
transport, one over streamable HTTP through the real command; what came of each step is compared.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from tests.clients import everything_steps, time_steps
from tests.clients.programs import everything_server
from tests.clients.recording import FAILURE, Json, Outcomes, Step, walk
from tests.support.proxy_process import MARK, ProxyProcess

_TIME_SERVER = [sys.executable, "-m", "mcp_server_time"]


class Pair(NamedTuple):
    """What came of the steps of both sessions."""

    direct: Outcomes
    proxied: Outcomes


@pytest.fixture(scope="module")
def everything() -> Iterator[Pair]:
    """@modelcontextprotocol/server-everything, both ways."""
    yield from _both_ways(everything_server(), everything_steps.STEPS)


@pytest.fixture(scope="module")
def time_server() -> Iterator[Pair]:
    """mcp-server-time, both ways."""
    yield from _both_ways(_TIME_SERVER, time_steps.STEPS)


def _both_ways(command: Sequence[str], steps: Sequence[Step]) -> Iterator[Pair]:
    pair = Pair({}, {})
    with ProxyProcess(command) as proxy:
        anyio.run(_walk_both, command, steps, proxy.url, pair)
        yield pair
    assert "Traceback" not in proxy.log(), proxy.log()


async def _walk_both(command: Sequence[str], steps: Sequence[Step], url: str, pair: Pair) -> None:
    program, *arguments = command
    started = StdioServerParameters(command=program, args=arguments, env=dict(os.environ))
    with open(os.devnull, "w") as nowhere:
        direct, proxied = stdio_client(started, nowhere), streamable_http_client(url)
        async with anyio.create_task_group() as sessions:
            sessions.start_soon(walk, direct, steps, pair.direct)
            sessions.start_soon(walk, proxied, steps, pair.proxied)


@pytest.mark.parametrize("step", [step.__name__ for step in everything_steps.STEPS])
def test_the_everything_server_answers_alike(everything: Pair, step: str) -> None:
    _compare(everything, step)


@pytest.mark.parametrize("step", [step.__name__ for step in time_steps.STEPS])
def test_the_time_server_answers_alike(time_server: Pair, step: str) -> None:
    _compare(time_server, step)


def test_every_tool_of_the_everything_server_is_called(everything: Pair) -> None:
    _require_every_tool_called(everything.proxied)


def test_every_tool_of_the_time_server_is_called(time_server: Pair) -> None:
    _require_every_tool_called(time_server.proxied)


def test_nothing_comes_twice_or_without_a_step_that_waits_for_it(everything: Pair) -> None:
    last = everything.proxied["hear_nothing_else"]
    assert (last["heard"], last["asked"]) == ([], [])


def test_a_probing_client_finds_a_server_of_both_eras_as_if_it_had_started_it() -> None:
    direct, proxied = anyio.run(_probe_both)
    assert direct["revision"] == "2026-07-28"
    assert _normal(proxied) == _normal(direct)


async def _probe_both() -> tuple[Json, Json]:
    program, *arguments = _TIME_SERVER
    with ProxyProcess(_TIME_SERVER) as proxy:
        direct = await _probe(StdioServerParameters(command=program, args=arguments))
        return direct, await _probe(proxy.url)


async def _probe(server: StdioServerParameters | str) -> Json:
    times = {"source_timezone": "UTC", "time": "12:34", "target_timezone": "Asia/Kathmandu"}
    async with Client(server, mode="auto") as client:
        listed = await client.list_tools()
        called = await client.call_tool("convert_time", times)
        return {
            "revision": client.protocol_version,
            "tools": [tool.model_dump(mode="json") for tool in listed.tools],
            "content": [content.model_dump(mode="json") for content in called.content],
            "structured": called.structured_content,
        }


def _compare(pair: Pair, step: str) -> None:
    assert step in pair.direct, "an earlier step failed without the proxy"
    assert FAILURE not in pair.direct[step], pair.direct[step]
    assert step in pair.proxied, "an earlier step failed through the proxy"
    assert _shown(step, pair.proxied) == _shown(step, pair.direct)


def _shown(step: str, outcomes: Outcomes) -> str:
    """As text: equal only if numbers are written alike and members stand in the same order."""
    return json.dumps(normalized(step, outcomes[step]), indent=1, ensure_ascii=False)


def _require_every_tool_called(outcomes: Outcomes) -> None:
    listed = {tool["name"] for tool in outcomes["list_tools"]["tools"]}
    assert listed <= set(outcomes["hear_nothing_else"]["called"])


# --- what two runs of a server never have in common ----------------------------------------------

# Clocks: both servers say when something was made, asked or is. The weekday turns at midnight.
_CLOCKS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"), "<a moment>"),
    (re.compile(r"(created at )[^\"\n]+"), r"\1<a time of day>"),
    (re.compile(r"\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"), "<a weekday>"),
)

# Ids that the everything server draws by lot: of tasks and of elicitations.
_LOTS = (
    (re.compile(r"\b[0-9a-f]{32}\b"), "<an id>"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<an id>"),
)

# Simulated logging draws the level of each line by lot.
_SIMULATED = re.compile(r"(\w+)[- ]level[- ]message")

# What a server behind the proxy finds in its environment besides ours: the marks by which it and
# what it started are found, gunicorn's name, and the mark of this test's process.
_OF_THE_PROXY = frozenset(
    {"MCP_PROXY_REPLICA", "MCP_PROXY_CHILD", "PYTHONUNBUFFERED", "SERVER_SOFTWARE", MARK}
)


def normalized(step: str, outcome: Any) -> Any:
    """What came of a step without what is random or a matter of time."""
    if step == "get_the_environment":
        return _environment(outcome)
    return _normal(outcome)


@functools.singledispatch
def _normal(value: Any) -> Any:
    return value


@_normal.register
def _(value: str) -> str:
    for pattern, replacement in (*_CLOCKS, *_LOTS):
        value = pattern.sub(replacement, value)
    return value


@_normal.register
def _(value: list) -> list[Any]:  # type: ignore[type-arg]
    return [_normal(item) for item in value]


@_normal.register
def _(value: dict) -> dict[str, Any]:  # type: ignore[type-arg]
    simulated = _SIMULATED.fullmatch(str(value.get("data")))
    if simulated is not None:
        assert simulated[1].lower() == value["level"]
        return {**value, "level": "<a level>", "data": "<a line of that level>"}
    special: dict[str, Callable[[Any], Any]] = {"blob": _blob}
    return {name: special.get(name, _normal)(item) for name, item in value.items()}


def _blob(data: str) -> str:
    """Base64 whose content says when it was made; compressed data stays as it is."""
    try:
        return str(_normal(base64.b64decode(data).decode()))
    except UnicodeDecodeError:
        return data


def _environment(outcome: Any) -> dict[str, str]:
    (content,) = outcome["content"]
    variables: dict[str, str] = json.loads(content["text"])
    return {n: value for n, value in sorted(variables.items()) if n not in _OF_THE_PROXY}
