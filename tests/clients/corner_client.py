"""A client of the official Python SDK, 1.x or 2.x, that takes every step of the corners.

    python corner_client.py TARGET legacy|auto|modern TRACE [MEMBER]

TARGET is a URL, or the command of a stdio server as a JSON list. The server is one of those of
tests/servers/two_eras.py; TRACE is where it says what happens in it. Prints one JSON document: what
came of each step. A step that fails does not hold up the others. corner_client.mjs is the twin.

Where TARGET is a group, MEMBER is a JSON object: what the `names` and the `uris` of the server
begin with there, who the `caller` is, and the `calls` of tools of other servers, a list of names
and arguments; `is_sse` where the group has the transport of 2024-11-05.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
from mcp import StdioServerParameters, stdio_client, types
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from pydantic import AnyUrl
from sdk_session import IS_SDK_1, Json, connected, httpx, plain, say

STEP_TIME = 6.0
START_TIME = 25.0  # of what may have to wait for servers that start
ALL_TIME = 45.0
LOG_LEVEL = "io.modelcontextprotocol/logLevel"
MODES = {"modern": "2026-07-28"}
UPDATED = "notifications/resources/updated"

STEPS: dict[str, Callable[[Corner], Awaitable[Any]]] = {}


def step(function: Callable[[Corner], Awaitable[Any]]) -> Callable[[Corner], Awaitable[Any]]:
    """What is done in each session, in this order."""
    STEPS[function.__name__] = function
    return function


class Corner:
    """One session, and what came to it unasked."""

    def __init__(self, trace: Path, names: str = "", uris: str = "") -> None:
        self.trace = trace
        self.names = names
        self.uris = uris
        self.label = secrets.token_hex(8)
        self.client: Any = None
        self.is_modern = False
        self.asked: list[list[str]] = []
        self.heard: list[Json] = []

    # --- what the SDK calls ---

    async def elicited(self, context: Any, params: Any) -> types.ElicitResult:
        """A person who says yes to everything."""
        given = plain(params)
        self.asked.append([f"elicitation {given.get('mode', 'form')}", given["message"]])
        if given.get("mode") == "url":
            return types.ElicitResult(action="accept")
        return types.ElicitResult(
            action="accept", content={"answer": f"answer to {given['message']}"}
        )

    async def sampled(self, context: Any, params: Any) -> types.CreateMessageResult:
        """A model."""
        text = plain(params)["messages"][0]["content"]["text"]
        self.asked.append(["sampling", text])
        said = types.TextContent(type="text", text=f"thought on {text}")
        return types.CreateMessageResult(role="assistant", content=said, model="none")

    async def rooted(self, context: Any) -> types.ListRootsResult:
        """One directory."""
        self.asked.append(["roots", ""])
        root = {"uri": "file:///corner", "name": "corner"}
        return types.ListRootsResult.model_validate({"roots": [root]})

    async def hear(self, message: Any) -> None:
        """Any notification."""
        if not hasattr(message, "model_dump"):
            return  # requests of SDK 1.x, which its callbacks answer
        self.heard.append(plain(message))

    def callbacks(self) -> Json:
        """All of the above."""
        return {
            "elicitation_callback": self.elicited,
            "sampling_callback": self.sampled,
            "list_roots_callback": self.rooted,
            "message_handler": self.hear,
        }

    # --- what the steps share ---

    async def call(self, name: str, _meta: Json | None = None, **arguments: Any) -> Json:
        """The result of a tool."""
        meta = {"meta": _meta} if _meta else {}
        return plain(await self.client.call_tool(self.names + name, arguments, **meta))

    def own(self, listed: list[Json], key: str = "name") -> list[str]:
        """The names, or URIs, of the server in a list, as it has them itself."""
        start = self.names if key == "name" else self.uris
        return [it[key].removeprefix(start) for it in listed if it[key].startswith(start)]

    def address(self, uri: str) -> Any:
        """A URI of the server as the SDK wants it."""
        return AnyUrl(self.uris + uri) if IS_SDK_1 else self.uris + uri

    async def be_asked(self, awaitable: Awaitable[Json]) -> Json:
        """What was asked while something ran, and what came of it."""
        self.asked.clear()
        result = await awaitable
        return {"asked": sorted(self.asked), "answer": result}

    async def ask(self, tool: str, **arguments: Any) -> Json:
        """The same of a tool that asks."""

        async def answer() -> Json:
            structured: Json = (await self.call(tool, **arguments))["structuredContent"]
            return structured

        return await self.be_asked(answer())

    def heard_of(self, method: str) -> list[Json]:
        """The params of the notifications of a method."""
        return [it.get("params") or {} for it in self.heard if it["method"] == method]

    async def until(self, condition: Callable[[], bool], seconds: float = 3) -> bool:
        """Whether it came true in time."""
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            await anyio.sleep(0.02)
        return condition()

    @asynccontextmanager
    async def events(
        self, methods: set[str], uri: str = "", **changes: bool
    ) -> AsyncIterator[list[Any]]:
        """A subscription, and after its block what came on it, once each method has come."""
        got: list[Any] = []
        if not self.is_modern:
            yield got
            await self.until(lambda: methods <= {it["method"] for it in self.heard})
            got += [(it["method"], (it.get("params") or {}).get("uri")) for it in self.heard]
            return
        wanted: Json = {**changes, **({"resource_subscriptions": [uri]} if uri else {})}
        async with self.client.listen(**wanted) as subscription:
            yield got
            with anyio.move_on_after(3):
                async for event in subscription:
                    got.append((type(event).__name__, getattr(event, "uri", None)))
                    if len({name for name, _ in got}) == len(methods):
                        break


# --- calls ---------------------------------------------------------------------------------------


@step
async def tools(corner: Corner) -> Any:
    return corner.own(plain(await corner.client.list_tools())["tools"])


@step
async def echo(corner: Corner) -> Any:
    result = await corner.call("echo", text="Grüße, 世界 \N{WAVING HAND SIGN}")
    return [result["content"][0]["text"], result["structuredContent"]]


@step
async def count(corner: Corner) -> Any:
    progress: list[Any] = []

    async def told(done: float, total: float | None, message: str | None) -> None:
        progress.append([done, total, message])

    name, arguments = f"{corner.names}count", {"to": 3, "pause": 0.1}
    result = await corner.client.call_tool(name, arguments, progress_callback=told)
    return [progress, plain(result)["structuredContent"]]


@step
async def header(corner: Corner) -> Any:
    return (await corner.call("header", region="Zürich 1", query="all"))["structuredContent"]


@step
async def unknown_tool(corner: Corner) -> Any:
    return await corner.call("no such tool")


@step
async def failing(corner: Corner) -> Any:
    result = await corner.call("fail")
    return [result["isError"], result["content"][0]["text"]]


@step
async def refused(corner: Corner) -> Any:
    return await corner.call("fail", error={"code": -31999, "message": "no"})


# --- questions -----------------------------------------------------------------------------------


@step
async def ask_form(corner: Corner) -> Any:
    return await corner.ask("ask", kind="form")


@step
async def ask_url(corner: Corner) -> Any:
    return await corner.ask("ask", kind="url")


@step
async def ask_sampling(corner: Corner) -> Any:
    return await corner.ask("ask", kind="sampling")


@step
async def ask_roots(corner: Corner) -> Any:
    return await corner.ask("ask", kind="roots")


@step
async def ask_both(corner: Corner) -> Any:
    return await corner.ask("ask", kind="both")


@step
async def chain(corner: Corner) -> Any:
    return await corner.ask("chain", rounds=3)


@step
async def ask_in_prompt(corner: Corner) -> Any:
    async def answer() -> Any:
        prompt = plain(await corner.client.get_prompt(f"{corner.names}asking"))
        return json.loads(prompt["messages"][0]["content"]["text"])

    return await corner.be_asked(answer())


@step
async def ask_in_resource(corner: Corner) -> Any:
    async def answer() -> Any:
        resource = plain(await corner.client.read_resource(corner.address("demo://asking")))
        return json.loads(resource["contents"][0]["text"])

    return await corner.be_asked(answer())


@step
async def url_required(corner: Corner) -> Any:
    return await corner.ask("url_required", key=corner.label)


# --- resources and prompts -----------------------------------------------------------------------


@step
async def resources(corner: Corner) -> Any:
    listed = plain(await corner.client.list_resources())["resources"]
    read = plain(await corner.client.read_resource(corner.address("demo://item/7")))
    return [corner.own(listed, "uri"), read["contents"][0]["text"]]


@step
async def templates(corner: Corner) -> Any:
    listed = plain(await corner.client.list_resource_templates())["resourceTemplates"]
    return corner.own(listed, "uriTemplate")


@step
async def unknown_resource(corner: Corner) -> Any:
    return plain(await corner.client.read_resource(corner.address("demo://none")))


@step
async def prompts(corner: Corner) -> Any:
    listed = plain(await corner.client.list_prompts())["prompts"]
    got = plain(await corner.client.get_prompt(f"{corner.names}greet", {"name": "Eve"}))
    return [corner.own(listed), got["messages"][0]["content"]["text"]]


@step
async def completion(corner: Corner) -> Any:
    ref = types.PromptReference(type="ref/prompt", name=f"{corner.names}greet")
    given = {"name": "name", "value": "par"}
    return plain(await corner.client.complete(ref, given))["completion"]["values"]


# --- what is told unasked ------------------------------------------------------------------------


async def logged(corner: Corner, expected: int, meta: Json | None = None) -> Any:
    """The log messages of a call."""
    corner.heard.clear()
    await corner.call("log", meta, label=corner.label)
    await corner.until(lambda: len(corner.heard_of("notifications/message")) >= expected, 1)
    heard = corner.heard_of("notifications/message")
    return [[it["level"], it["logger"], it["data"].replace(corner.label, "my")] for it in heard]


@step
async def log_before_a_level(corner: Corner) -> Any:
    return await logged(corner, 1)


@step
async def log_at_a_level(corner: Corner) -> Any:
    if corner.is_modern:
        return await logged(corner, 2, {LOG_LEVEL: "warning"})
    await corner.client.set_logging_level("warning")
    return await logged(corner, 2)


@step
async def updates(corner: Corner) -> Any:
    corner.heard.clear()
    watched = "demo://watched"
    if not corner.is_modern:
        await corner.client.subscribe_resource(corner.address(watched))
    async with corner.events({UPDATED}, uri=corner.uris + watched) as got:
        await corner.call("notify", kinds=["updated"], uri="demo://static")
        await corner.call("notify", kinds=["updated"], uri=watched)
    if not corner.is_modern:
        await corner.client.unsubscribe_resource(corner.address(watched))
    return [uri.removeprefix(corner.uris) for _, uri in got if uri]


@step
async def changes(corner: Corner) -> Any:
    corner.heard.clear()
    all_changes = {f"{it}_list_changed": True for it in ("tools", "prompts", "resources")}
    kinds = ["tools", "prompts", "resources"]
    methods = {f"notifications/{it}/list_changed" for it in kinds}
    async with corner.events(methods, **all_changes) as got:
        await corner.call("notify", kinds=kinds)
    names = ("tool", "prompt", "resource")
    return sorted({kind for name, _ in got for kind in names if kind in name.lower()})


# --- cancellation --------------------------------------------------------------------------------


@step
async def cancelled(corner: Corner) -> Any:
    begun = anyio.Event()
    ended = "not at all"

    async def told(done: float, total: float | None, message: str | None) -> None:
        begun.set()

    async def run() -> None:
        nonlocal ended
        arguments = {"seconds": 60, "label": corner.label}
        try:
            await corner.client.call_tool(f"{corner.names}slow", arguments, progress_callback=told)
        except Exception as error:
            ended = type(error).__name__

    key = corner.client._request_id if IS_SDK_1 else None
    async with anyio.create_task_group() as group:
        group.start_soon(run)
        await begun.wait()
        if IS_SDK_1:  # which tells the server nothing by itself
            params = types.CancelledNotificationParams(requestId=key, reason="enough")
            notification: Any = types.CancelledNotification(params=params)
            await corner.client.send_notification(types.ClientNotification(notification))
            await anyio.sleep(0.1)
        group.cancel_scope.cancel()

    def is_cancelled() -> bool:
        lines = corner.trace.read_text().splitlines()
        return any(it.startswith("cancelled") and it.endswith(corner.label) for it in lines)

    return [await corner.until(is_cancelled), await echo(corner)]


# --- all of them ---------------------------------------------------------------------------------


async def outcome(
    corner: Corner, taken: Callable[[Corner], Awaitable[Any]], limit: float = STEP_TIME
) -> Any:
    """What a step gives, or how it failed."""
    try:
        with anyio.fail_after(limit):
            return await taken(corner)
    except Exception as error:
        found: BaseException = error
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if (refusal := getattr(found, "error", None)) is not None:
            return {"error": refusal.code, "message": refusal.message}
        return {"failed": repr(found)}


def calling(name: str, arguments: Json) -> Callable[[Corner], Awaitable[Any]]:
    """A step that calls a tool of another server."""

    async def call(corner: Corner) -> Any:
        result = plain(await corner.client.call_tool(name, arguments))
        return [result.get("isError", False), [it["text"] for it in result["content"]]]

    return call


async def main(target: str, mode: str, trace: Path, member: Json) -> None:
    """Prints everything as one document."""
    warnings.simplefilter("ignore")
    server: Any = target
    if not target.startswith("http"):
        command, *arguments = json.loads(target)
        parameters = StdioServerParameters(command=command, args=arguments)
        server = stdio_client(parameters, errlog=open(os.devnull, "w"))  # noqa: SIM115
    corner = Corner(trace, member.get("names", ""), member.get("uris", ""))
    if target.startswith("http"):  # as somebody of whom the proxy knows no roots yet
        named = {"Authorization": f"Bearer {member.get('caller', corner.label)}"}
        http = httpx.AsyncClient(headers=named, timeout=httpx.Timeout(30, read=300))
        is_sse = member.get("is_sse", False)
        server = sse_client(target) if is_sse else streamable_http_client(target, http_client=http)
    record: Json = {"sdk": version("mcp")}
    end = time.monotonic() + ALL_TIME
    async with connected(server, MODES.get(mode, mode), **corner.callbacks()) as (client, revision):
        corner.client = client
        corner.is_modern = revision >= "2026"
        record["revision"] = revision
        for name, taken in STEPS.items():
            is_late = time.monotonic() > end
            limit = START_TIME if name == "tools" else STEP_TIME
            record[name] = (
                {"failed": "not tried"} if is_late else await outcome(corner, taken, limit)
            )
        calls = member.get("calls", [])
        record["calls"] = [await outcome(corner, calling(*it), START_TIME) for it in calls]
    say(**record)


if __name__ == "__main__":
    given = json.loads(sys.argv[4]) if sys.argv[4:] else {}
    anyio.run(main, sys.argv[1], sys.argv[2], Path(sys.argv[3]), given)
