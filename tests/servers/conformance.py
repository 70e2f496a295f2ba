"""An MCP server that offers everything the official conformance suite asks a server for.

    python tests/servers/conformance.py               stdio
    python tests/servers/conformance.py --http PORT   streamable HTTP on 127.0.0.1, PORT 0: any
    ... --modern-only                                 the same without sessions, over HTTP

Both ways serve the same handlers in both protocol eras, so that a run of the suite through a
proxy (stdio behind it) can be compared, check by check, with a run against this server itself.
"""

import argparse
import json
import re
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import anyio
import mcp_types as types
import uvicorn
from conformance_questions import answered, ask, question
from conformance_tools import (
    BUS,
    IMAGE,
    TOOLS,
    WATCHED,
    Context,
    Json,
    embedded,
    result,
    session_of,
    text,
)
from mcp.server.caching import CacheableMethod, CacheHint
from mcp.server.lowlevel import NotificationOptions, Server
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp.server.subscriptions import ListenHandler
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from starlette.responses import JSONResponse

NAME = "conformance-server"
Handler = Callable[[Context, Any], Awaitable[Json]]


# --- tools -----------------------------------------------------------------------------------


async def call_tool(ctx: Context, params: types.CallToolRequestParams) -> Json:
    """Run a tool; one that asks in the modern way cannot do so on a legacy connection."""
    if params.name not in TOOLS:
        raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name}")
    _, handler = TOOLS[params.name]
    outcome = await handler(ctx, params)
    if "inputRequests" in outcome and ctx.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return result(text(f"Needs a client of {MODERN_PROTOCOL_VERSIONS[0]}"), is_error=True)
    return outcome


# --- resources -------------------------------------------------------------------------------

STATIC_TEXT = "This is the content of the static text resource."
PICTURE = {"mimeType": IMAGE["mimeType"], "blob": IMAGE["data"]}
RESOURCES: dict[str, Json] = {
    "test://static-text": {"mimeType": "text/plain", "text": STATIC_TEXT},
    "test://static-binary": PICTURE,
    WATCHED: {"mimeType": "text/plain", "text": "This resource can be subscribed to."},
}
TEMPLATE = {"uriTemplate": "test://template/{id}/data", "name": "template"}
TEMPLATE_URI = re.compile(r"test://template/([^/]+)/data")


def listed(uri: str, content: Json) -> Json:
    """A resource as `resources/list` shows it."""
    name = uri.removeprefix("test://")
    return {"uri": uri, "name": name, "description": name, "mimeType": content["mimeType"]}


def content_of(uri: str) -> Json | None:
    """What is at `uri`, or None."""
    if match := TEMPLATE_URI.fullmatch(uri):
        key = match[1]
        data = {"id": key, "templateTest": True, "data": f"Data for ID: {key}"}
        return {"mimeType": "application/json", "text": json.dumps(data)}
    return RESOURCES.get(uri)


async def read_resource(ctx: Context, params: types.ReadResourceRequestParams) -> Json:
    """Give the content of one resource."""
    content = content_of(params.uri)
    if content is None:
        raise MCPError(types.INVALID_PARAMS, "Resource not found", {"uri": params.uri})
    return {"contents": [{"uri": params.uri, **content}]}


async def subscribe(ctx: Context, params: types.SubscribeRequestParams) -> types.EmptyResult:
    """Remember what a legacy client watches."""
    session_of(ctx).watched.add(params.uri)
    return types.EmptyResult()


async def unsubscribe(ctx: Context, params: types.UnsubscribeRequestParams) -> types.EmptyResult:
    """Forget it again."""
    session_of(ctx).watched.discard(params.uri)
    return types.EmptyResult()


# --- prompts ---------------------------------------------------------------------------------

PROMPTS: dict[str, tuple[str, ...]] = {
    "test_simple_prompt": (),
    "test_prompt_with_arguments": ("arg1", "arg2"),
    "test_prompt_with_embedded_resource": ("resourceUri",),
    "test_prompt_with_image": (),
    "test_input_required_result_prompt": (),
}
"""Each prompt and its arguments."""

CONTEXT = {"user_context": question("What context should the prompt use?", "context")}


def prompt_of(name: str, arguments: tuple[str, ...]) -> Json:
    """A prompt as `prompts/list` shows it."""
    described = [{"name": it, "description": it, "required": True} for it in arguments]
    return {"name": name, "description": name, "arguments": described}


def prompt_content(name: str, given: dict[str, str]) -> list[Json]:
    """The blocks of a prompt whose arguments are all there."""
    match name:
        case "test_prompt_with_arguments":
            return [text("Prompt with arguments: arg1='{arg1}', arg2='{arg2}'".format(**given))]
        case "test_prompt_with_embedded_resource":
            resource = embedded(given["resourceUri"], "Embedded resource content for testing.")
            return [resource, text("Please process the embedded resource above.")]
        case "test_prompt_with_image":
            return [IMAGE, text("Please analyze the image above.")]
        case _:
            return [text("This is a simple prompt for testing.")]


async def get_prompt(ctx: Context, params: types.GetPromptRequestParams) -> Json:
    """Give one prompt; the last of them asks the client first."""
    given = params.arguments or {}
    if not given.keys() >= set(PROMPTS.get(params.name, ("name",))):
        raise MCPError(types.INVALID_PARAMS, f"Unknown prompt or missing argument: {params.name}")
    content = prompt_content(params.name, given)
    if params.name == "test_input_required_result_prompt":
        answers = answered(params, CONTEXT)
        if answers is None:
            return ask(CONTEXT)
        content = [text(answers)]
    return {"messages": [{"role": "user", "content": block} for block in content]}


async def complete(ctx: Context, params: types.CompleteRequestParams) -> types.CompleteResult:
    """Suggest words that begin with what was typed."""
    words = [it for it in ("paris", "park", "party") if it.startswith(params.argument.value)]
    return types.CompleteResult(completion=types.Completion(values=words, total=len(words)))


async def set_level(ctx: Context, params: types.SetLevelRequestParams) -> types.EmptyResult:
    """Remember how much a legacy client wants to hear."""
    session_of(ctx).level = params.level
    return types.EmptyResult()


# --- the server ------------------------------------------------------------------------------


class ConformanceServer(Server[Any]):
    """A server that declares, in both eras, that its lists may change."""

    def get_capabilities(
        self, notification_options: NotificationOptions | None = None, *args: Any, **kwargs: Any
    ) -> types.ServerCapabilities:
        """The HTTP side of the SDK takes no options for this, so they are set here."""
        return super().get_capabilities(NotificationOptions(True, True, True), *args, **kwargs)


def typed(handler: Handler) -> Handler:
    """Name the type of a result that does not; the SDK drops it again for legacy clients."""

    async def wrapped(ctx: Context, params: Any) -> Json:
        return {"resultType": "complete", **await handler(ctx, params)}

    return wrapped


def listing(key: str, items: list[Json]) -> Handler:
    """A handler that answers with a list that never changes."""

    async def handler(ctx: Context, params: types.PaginatedRequestParams) -> Json:
        return {key: items}

    return handler


def build() -> ConformanceServer:
    """Put the handlers together.

    The boundary seals `requestState` on its way out and refuses what it did not seal.
    """
    server = ConformanceServer(
        NAME,
        version="1.0.0",
        cache_hints=dict.fromkeys(get_args(CacheableMethod), CacheHint(60_000, "public")),
        on_subscriptions_listen=ListenHandler(BUS),
        on_subscribe_resource=subscribe,
        on_unsubscribe_resource=unsubscribe,
        on_completion=complete,
        on_set_logging_level=set_level,
    )
    lists = {
        "tools/list": listing("tools", [shown for shown, _ in TOOLS.values()]),
        "prompts/list": listing("prompts", [prompt_of(*it) for it in PROMPTS.items()]),
        "resources/list": listing("resources", [listed(*it) for it in RESOURCES.items()]),
        "resources/templates/list": listing("resourceTemplates", [TEMPLATE]),
    }
    for method, handler in lists.items():
        server.add_request_handler(method, types.PaginatedRequestParams, typed(handler))
    server.add_request_handler("tools/call", types.CallToolRequestParams, typed(call_tool))
    server.add_request_handler(
        "resources/read", types.ReadResourceRequestParams, typed(read_resource)
    )
    server.add_request_handler("prompts/get", types.GetPromptRequestParams, typed(get_prompt))
    security = RequestStateSecurity.ephemeral()
    server.middleware.append(RequestStateBoundary(security, default_audience=NAME))
    return server


class Replay(EventStore):
    """Everything sent so far, for clients that come back with `Last-Event-ID`.

    The SDK names a stream after its request's id alone, so two sessions resuming at the same
    moment could see each other's events. The suite never does that.
    """

    def __init__(self) -> None:
        """Start with nothing sent."""
        self.events: list[tuple[str, types.JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: str, message: types.JSONRPCMessage | None) -> str:
        """Keep an event; its id is its place."""
        self.events.append((stream_id, message))
        return str(len(self.events) - 1)

    async def replay_events_after(
        self, last_event_id: str, send_callback: EventCallback
    ) -> str | None:
        """Send what followed on the same stream."""
        if not last_event_id.isdecimal() or int(last_event_id) >= len(self.events):
            return None
        stream, _ = self.events[int(last_event_id)]
        for number in range(int(last_event_id) + 1, len(self.events)):
            owner, message = self.events[number]
            if owner == stream and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream


async def serve_stdio() -> None:
    """Serve one client on stdin and stdout."""
    server = build()
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


def without_sessions(app: Any) -> Any:
    """The same application for clients of 2026-07-28 alone: the SDK has no switch for that."""

    async def filtered(scope: Any, receive: Any, send: Any) -> None:
        version = dict(scope.get("headers", ())).get(b"mcp-protocol-version", b"").decode()
        if scope["type"] != "http" or version in MODERN_PROTOCOL_VERSIONS:
            await app(scope, receive, send)
            return
        body = json.loads((await receive())["body"] or b"{}")
        data = {"supported": [*MODERN_PROTOCOL_VERSIONS], "requested": version}
        error = {"code": -32022, "message": "Unsupported protocol version", "data": data}
        answer = JSONResponse({"jsonrpc": "2.0", "id": body.get("id"), "error": error}, 400)
        await answer(scope, receive, send)

    return filtered


def serve_http(port: int, is_modern_only: bool = False) -> None:
    """Serve HTTP clients until a signal; says where once connections are accepted."""
    app: Any = build().streamable_http_app(event_store=Replay(), retry_interval=100)
    app = without_sessions(app) if is_modern_only else app
    with socket.create_server(("127.0.0.1", port)) as listener:
        address, port = listener.getsockname()
        print(f"listening on http://{address}:{port}/mcp", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    """Serve as the command line says. What newer revisions deprecate is wanted here."""
    parser = argparse.ArgumentParser(description="MCP server for the conformance suite")
    parser.add_argument("--http", metavar="PORT", type=int, help="HTTP instead of stdio (0: any)")
    parser.add_argument("--modern-only", action="store_true", help="no sessions over HTTP")
    options = parser.parse_args()
    port: int | None = options.http
    warnings.simplefilter("ignore", MCPDeprecationWarning)
    if port is None:
        anyio.run(serve_stdio)
    else:
        serve_http(port, options.modern_only)


if __name__ == "__main__":
    main()
