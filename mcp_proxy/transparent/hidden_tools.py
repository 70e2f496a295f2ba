"""Tools of an HTTP server that its clients neither see nor call.

Where tools are hidden a POST no longer passes as it came: what it carries is read, checked, and
written anew, since the server may read the same bytes in another way. What cannot be read, and may
be a message all the same, is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.reply import Reply, empty_reply, event_reply, json_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    INVALID_REQUEST,
    BadAnswer,
    ClientError,
    EncodedBody,
    HeaderMismatch,
    InvalidParams,
    UnknownTool,
)
from mcp_proxy.transparent.sse_sessions import may_name_session
from mcp_proxy.wire import headers, jsonrpc
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request
from mcp_proxy.wire.tool_lists import ToolLists
from mcp_proxy.wire.tools import CALL, LIST, ToolFilter

Transform = Callable[[bytes], bytes]

_NOT_SENT = "Nothing of the batch was sent, since it calls a tool that is not there"


# Headers that repeat what a modern request says, as they stand in the environ.
_MIRRORING = ("HTTP_MCP_METHOD", "HTTP_MCP_NAME", "HTTP_MCP_PARAM_")


class Found(NamedTuple):
    """An answer on its way: its headers, what changes its pieces, and what that has made of the
    first of them.
    """

    headers: Headers
    transform: Transform | None
    first: bytes


class HiddenTools:
    """The filter of one transport, at what passes it. Thread-safe."""

    def __init__(self, tools: ToolFilter) -> None:
        self._tools = tools

    def checked(
        self, request: ClientRequest, body: bytes, is_endpoint: bool
    ) -> tuple[bytes, Message | Batch | None] | Reply:
        """What goes on of a POST, written anew, or the answer where nothing does.

        None is what carries no message, whatever its media type. Raises ClientError for what may be
        one and cannot be read, as anything is that goes to the endpoint.
        """
        message = self._read(request, body, is_endpoint)
        if message is None:
            return body, None
        try:
            admitted = self._admitted(request, message)
        except ClientError as error:
            if not (isinstance(message, Request) and may_name_session(request)):
                return self._refusal(request, message, error)
            _drop_mirrored(request)
            admitted = _called_in_vain(message)
        if admitted is None:
            return empty_reply(202)
        return jsonrpc.encoded(admitted), admitted

    def _read(
        self, request: ClientRequest, body: bytes, is_endpoint: bool
    ) -> Message | Batch | None:
        if request.is_encoded:
            raise EncodedBody
        try:
            return jsonrpc.parse(body)
        except ClientError:
            if is_endpoint or may_name_session(request) or _has_method(body):
                raise
            return None

    def _admitted(self, request: ClientRequest, message: Message | Batch) -> Message | Batch | None:
        """The message as the server may get it, None where nothing of it may go on.

        Raises UnknownTool and InvalidParams; of a batch nothing is sent then.
        """
        if isinstance(message, list):
            admitted = [self._message(part) for part in message]
            return [part for part in admitted if part is not None] or None
        if request.header(headers.METHOD) == CALL or _is_call(message):
            self._require_shown(request.header(headers.NAME))
        return self._message(message)

    def _message(self, message: Message) -> Message | None:
        if isinstance(message, Request):
            return self._tools.admitted(message)
        if isinstance(message, Notification) and not self._tools.admits(message):
            return None
        return message

    def _require_shown(self, mirrored: str | None) -> None:
        """A server may know the tool from the header that repeats its name."""
        if mirrored is None:
            return
        try:
            name = headers.decode_value(mirrored)
        except HeaderMismatch as error:  # whose code is for modern clients alone
            raise InvalidParams(str(error)) from error
        if not self._tools.shows(name):
            raise UnknownTool(name)

    def _refusal(
        self, request: ClientRequest, message: Message | Batch, error: ClientError
    ) -> Reply:
        """The answer to what is refused, as a server gives it."""
        request.reason, request.message = str(error), message
        request.rpc = message.method if isinstance(message, Request) else None
        if not isinstance(message, list):
            key = message.id if isinstance(message, Request) else None
            answer = jsonrpc.encode_error(error.code, error.message, key, error.data)
        else:
            answer = jsonrpc.encode_batch(
                [self._refused(part) for part in message if isinstance(part, Request)]
            )
        return json_reply(answer) if request.accepts_json else event_reply(answer)

    def _refused(self, request: Request) -> bytes:
        try:
            self._tools.admitted(request)
        except ClientError as error:
            return jsonrpc.encode_error(error.code, error.message, request.id, error.data)
        return jsonrpc.encode_error(INVALID_REQUEST, _NOT_SENT, request.id)

    def shown(
        self,
        request: ClientRequest,
        message: Message | Batch | None,
        call: HttpCall,
        found: Found,
    ) -> Found:
        """An answer as clients may see it: the same unless it may have a list of tools.

        A stream that is opened by GET may bring the answer to any request. Raises BadAnswer for one
        that cannot be read.
        """
        is_stream = call.media_type == headers.EVENT_STREAM
        parts = message if isinstance(message, list) else [message]
        is_asked = any(isinstance(part, Request) and part.method == LIST for part in parts)
        if not is_asked and not (is_stream and request.method == "GET"):
            return found
        if (call.header("Content-Encoding") or "identity").lower() != "identity":
            raise BadAnswer("The server's answer is compressed: no tool can be hidden in it")
        lists = ToolLists(self._tools, is_stream)
        kept = [(name, text) for name, text in found.headers if name.lower() != "content-length"]
        first = lists.feed(found.first) if found.first else b""
        return Found(kept, _after(found.transform, lists.feed), first)


def _after(first: Transform | None, second: Transform) -> Transform:
    """Both, one behind the other; each gets b"" once, at the end."""
    if first is None:
        return second

    def both(piece: bytes) -> bytes:
        given = first(piece)
        passed = second(given) if given else b""
        return passed if piece else passed + second(b"")

    return both


def uncompressed(given: Mapping[str, str]) -> dict[str, str]:
    """Headers for the server that ask for no compressed answer."""
    return {name: value for name, value in given.items() if name.title() != "Accept-Encoding"}


def _called_in_vain(request: Request) -> Request:
    """A call of a tool that there is not: the server refuses it on the stream of its session.

    That is the only place where a client of HTTP+SSE reads an answer, and a status that is no
    success ends the whole connection of the official Python SDK.
    """
    params = {"name": f"no-such-tool-{secrets.token_hex(8)}", "arguments": {}}
    return Request(request.id, CALL, jsonrpc.as_payload(params))


def _drop_mirrored(request: ClientRequest) -> None:
    """A server that knows the tool from a header, in place of the body, does not learn it there."""
    for name in [name for name in request.environ if name.startswith(_MIRRORING)]:
        del request.environ[name]


def _is_call(message: Message) -> bool:
    return isinstance(message, Request) and message.method == CALL


def _has_method(body: bytes) -> bool:
    """Whether a body that is no JSON-RPC message is JSON that some reader may take for one."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    parts = document if isinstance(document, list) else [document]
    return any(
        key.casefold() == "method" for part in parts if isinstance(part, dict) for key in part
    )
