"""The conformance server's tools that need nothing from the client, and how tools are declared.

Names, texts and schemas are those the conformance suite asks for. Results are written as the
JSON that goes over the wire; the SDK validates them against the schema of the revision spoken.
"""

import base64
import io
import json
import struct
import wave
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import anyio
import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.subscriptions import (
    PromptsListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)

Json = dict[str, Any]
Context = ServerRequestContext[Any, Any]
Params = types.CallToolRequestParams
Handler = Callable[[Context, Params], Awaitable[Json]]

BUS = InMemorySubscriptionBus()
SEVERITIES: tuple[types.LoggingLevel, ...] = get_args(types.LoggingLevel)
WATCHED = "test://watched-resource"
TOOLS: dict[str, tuple[Json, Handler]] = {}


@dataclass
class Session:
    """What a legacy client told this server: how much to log, which resources to watch."""

    level: types.LoggingLevel = "debug"
    watched: set[str] = field(default_factory=set)


SESSIONS: defaultdict[str, Session] = defaultdict(Session)


def session_of(ctx: Context) -> Session:
    """The caller's session: by its id over HTTP, the only one there is on stdio."""
    headers: Mapping[str, str] = getattr(ctx.request, "headers", {})
    return SESSIONS[headers.get("mcp-session-id", "stdio")]


# --- content ---------------------------------------------------------------------------------


def png() -> str:
    """A one-pixel red picture, base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\x00\xff\x00\x00"))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


def wav() -> str:
    """A hundredth of a second of silence, base64."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 80, "NONE", "not compressed"))
        file.writeframes(bytes(160))
    return base64.b64encode(sound.getvalue()).decode()


def text(words: str) -> Json:
    """A block of text."""
    return {"type": "text", "text": words}


def embedded(uri: str, words: str, mime_type: str = "text/plain") -> Json:
    """A block with a text resource inside."""
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime_type, "text": words}}


def result(*content: Json, is_error: bool = False) -> Json:
    """A complete tool result."""
    return {"content": list(content), "isError": is_error}


IMAGE: Json = {"type": "image", "data": png(), "mimeType": "image/png"}
AUDIO: Json = {"type": "audio", "data": wav(), "mimeType": "audio/wav"}
MIXED_DATA = json.dumps({"test": "data", "value": 123})
SIMPLE_RESULTS = {
    "test_simple_text": result(text("This is a simple text response for testing.")),
    "test_image_content": result(IMAGE),
    "test_audio_content": result(AUDIO),
    "test_embedded_resource": result(
        embedded("test://embedded-resource", "This is an embedded resource content.")
    ),
    "test_multiple_content_types": result(
        text("Multiple content types test:"),
        IMAGE,
        embedded("test://mixed-content-resource", MIXED_DATA, "application/json"),
    ),
    "test_error_handling": result(
        text("This tool intentionally returns an error for testing"), is_error=True
    ),
}


# --- tools, both eras ------------------------------------------------------------------------


def add_tool(name: str, description: str, handler: Handler, **schema: Any) -> None:
    """Offer a tool; `schema` extends its input schema."""
    listed = {"name": name, "description": description, "inputSchema": {"type": "object", **schema}}
    TOOLS[name] = (listed, handler)


def tool(**schema: Any) -> Callable[[Handler], Handler]:
    """Offer the decorated function as a tool, described by its docstring."""

    def register(handler: Handler) -> Handler:
        add_tool(handler.__name__, str(handler.__doc__).splitlines()[0], handler, **schema)
        return handler

    return register


def add_simple_tool(name: str, answer: Json) -> None:
    """Offer a tool that always gives the same answer."""

    async def handler(ctx: Context, params: Params) -> Json:
        return answer

    add_tool(name, f"Returns a fixed result ({name.removeprefix('test_')})", handler)


for simple_name, simple_result in SIMPLE_RESULTS.items():
    add_simple_tool(simple_name, simple_result)


async def log(ctx: Context, message: str) -> None:
    """Log to the client at level info, unless it asked for less.

    Modern clients ask in each request's `_meta` (the SDK sees to that), legacy ones with
    `logging/setLevel`, which the SDK leaves to the server.
    """
    if SEVERITIES.index("info") >= SEVERITIES.index(session_of(ctx).level):
        await ctx.session.send_log_message("info", message, related_request_id=ctx.request_id)


@tool()
async def test_tool_with_logging(ctx: Context, params: Params) -> Json:
    """Logs three times on the way."""
    for message in ("started", "processing data", "completed"):
        await log(ctx, f"Tool execution {message}")
        await anyio.sleep(0.05)
    return result(text("Logged three messages"))


@tool()
async def test_logging_tool(ctx: Context, params: Params) -> Json:
    """Logs once, which a modern client that did not ask for it must not see."""
    await log(ctx, "Only for those who asked")
    return result(text("Logged one message"))


@tool()
async def test_tool_with_progress(ctx: Context, params: Params) -> Json:
    """Reports progress, if the caller wants it."""
    for progress in (0, 50, 100):
        await ctx.session.report_progress(progress, 100)
        await anyio.sleep(0.05)
    return result(text("Done"))


@tool()
async def test_reconnection(ctx: Context, params: Params) -> Json:
    """Closes the response stream under way, so that the client comes back for the result.

    Only HTTP clients that can resume have such a stream; everybody else just waits.
    """
    if ctx.close_sse_stream is not None:
        await ctx.close_sse_stream()
    await anyio.sleep(0.2)
    return result(text("Reconnection test completed"))


async def announce(event: ServerEvent) -> Json:
    """Tell modern subscribers of a change (made up: the suite watches the notice only)."""
    await BUS.publish(event)
    return result(text("Announced"))


@tool()
async def test_trigger_tool_change(ctx: Context, params: Params) -> Json:
    """Announces that the list of tools changed."""
    await ctx.session.send_tool_list_changed()
    return await announce(ToolsListChanged())


@tool()
async def test_trigger_prompt_change(ctx: Context, params: Params) -> Json:
    """Announces that the list of prompts changed."""
    await ctx.session.send_prompt_list_changed()
    return await announce(PromptsListChanged())


@tool()
async def test_trigger_resource_update(ctx: Context, params: Params) -> Json:
    """Announces a change of the watched resource to those who subscribed to it."""
    if WATCHED in session_of(ctx).watched:
        await ctx.session.send_resource_updated(WATCHED)
    return await announce(ResourceUpdated(uri=WATCHED))


async def echo(ctx: Context, params: Params) -> Json:
    """Return the arguments."""
    return result(text(json.dumps(params.arguments)))


ADDRESS = {
    "$anchor": "addressDef",
    "type": "object",
    "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
}
CONTACT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {"address": ADDRESS},
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
REGION = {"region": {"type": "string", "x-mcp-header": "Region"}}
add_tool("json_schema_2020_12_tool", "Tool with JSON Schema 2020-12 features", echo, **CONTACT)
add_tool("test_x_mcp_header", "Wants an argument in a header too", echo, properties=REGION)
