"""A client of the Python SDK 2.x that the conformance suite's client mode tests.

    python conformance_client.py [--proxy {in-place,beside}] --revision REVISION URL

The suite names its scenario in MCP_CONFORMANCE_SCENARIO and appends the URL of its test server.
With `--proxy` the client reaches that server through a transparent proxy, which it starts and ends;
all else is the same, so whatever scores differently is the proxy's doing. `in-place`: the server's
URL leads to the proxy, as where a server is told its public name. `beside`: the proxy has a URL of
its own, which it knows as `public_url`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx2
import mcp
from conformance_authorization import authorization
from mcp import types
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from sdk_session import Json, plain

MODERN = "2026-07-28"
STEP_TIME = 20.0
START_TIME = 20.0

#: Arguments of a tool by the type that its schema gives them.
SAMPLES: Json = {
    "string": "text",
    "integer": 2,
    "number": 2,
    "boolean": True,
    "array": [],
    "object": {},
}


async def elicited(context: Any, params: Any) -> types.ElicitResult:
    """A person who changes nothing: what the form has as defaults is the answer."""
    schema = plain(params).get("requestedSchema", {})
    content = {
        name: field.get("default", SAMPLES.get(field.get("type"), "text"))
        for name, field in schema.get("properties", {}).items()
    }
    return types.ElicitResult(action="accept", content=content)


async def sampled(context: Any, params: Any) -> types.CreateMessageResult:
    """A model."""
    said = types.TextContent(type="text", text="a thought")
    return types.CreateMessageResult(role="assistant", content=said, model="none")


async def rooted(context: Any) -> types.ListRootsResult:
    """One directory."""
    root = {"uri": "file:///conformance", "name": "conformance"}
    return types.ListRootsResult.model_validate({"roots": [root]})


async def attempt(step: Callable[[], Awaitable[Any]]) -> Any:
    """What came of a step; a scenario may refuse it."""
    try:
        with anyio.fail_after(STEP_TIME):
            return await step()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return None


async def use(client: Any, scenario: str, context: Json) -> None:
    """Calls every tool that is listed, reads every resource, gets every prompt."""
    listed = await attempt(client.list_tools)
    tools = [] if listed is None else [plain(tool) for tool in listed.tools]
    wanted = [(each["name"], each["arguments"]) for each in context.get("toolCalls", ())]
    for name, arguments in wanted or [(tool["name"], arguments_of(tool, tools)) for tool in tools]:
        await attempt(lambda name=name, given=arguments: client.call_tool(name, given))  # type: ignore[misc]
    if scenario != "http-standard-headers":
        return
    resources = await attempt(client.list_resources)
    for resource in resources.resources if resources else ():
        await attempt(lambda uri=resource.uri: client.read_resource(uri))  # type: ignore[misc]
    prompts = await attempt(client.list_prompts)
    for prompt in prompts.prompts if prompts else ():
        given = {each.name: "text" for each in prompt.arguments or ()}
        await attempt(lambda name=prompt.name, given=given: client.get_prompt(name, given))  # type: ignore[misc]


def arguments_of(tool: Json, tools: list[Json]) -> Json:
    """Something for each argument; a tool that wants a schema gets that of the first tool."""
    properties = tool.get("inputSchema", {}).get("properties", {})
    given = {name: SAMPLES.get(field.get("type"), "text") for name, field in properties.items()}
    if "schema" in properties:
        given["schema"] = tools[0]["inputSchema"]
    return given


async def run(url: str, revision: str, connect_to: int | None = None) -> None:
    """The whole life of the client; `connect_to` is the port that the URL leads to, if another."""
    scenario = os.environ.get("MCP_CONFORMANCE_SCENARIO", "")
    context = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT") or "{}")
    sdk: Any = mcp

    async def lead(request: httpx2.Request) -> None:
        if request.url.netloc == httpx2.URL(url).netloc:  # what it is called in Host stays
            request.url = request.url.copy_with(port=connect_to)

    async with create_mcp_http_client(auth=authorization(url, scenario, context)) as http:
        if connect_to is not None:
            http.event_hooks = {"request": [lead]}
        async with sdk.Client(
            streamable_http_client(url, http_client=http),
            mode="auto" if revision == MODERN else "legacy",
            elicitation_callback=elicited,
            sampling_callback=sampled,
            list_roots_callback=rooted,
        ) as client:
            await use(client, scenario, context)


@contextmanager
def proxied(url: str, is_named: bool) -> Iterator[int]:
    """The port of a transparent proxy in front of a URL; whether it is told its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    bind = ["--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
    named = ["--public-url", f"http://127.0.0.1:{port}"] if is_named else []
    command = [sys.executable, "-m", "mcp_proxy", *bind, *named, "--target-url", url]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        until = time.monotonic() + START_TIME
        while not accepts(port):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("the proxy did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Runs the client, through the proxy or not."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--proxy", choices=("in-place", "beside"))
    parser.add_argument("--revision", required=True)
    parser.add_argument("url")
    given = parser.parse_args()
    if given.proxy is None:
        anyio.run(run, given.url, given.revision)
        return
    is_beside = given.proxy == "beside"
    with proxied(given.url, is_beside) as port:
        if is_beside:
            anyio.run(run, f"http://127.0.0.1:{port}/mcp", given.revision)
        else:
            anyio.run(run, given.url, given.revision, port)


if __name__ == "__main__":
    main()
