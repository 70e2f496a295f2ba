"""What `check` says to a server: initialize, and the end of the session that it makes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from urllib.parse import urljoin

from mcp_proxy import __version__
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.errors import BackendError, BackendTimeout, BadAnswer, ClientError
from mcp_proxy.wire import jsonrpc, revisions, sse
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.headers import EVENT_STREAM, JSON, PROTOCOL_VERSION, SESSION_ID
from mcp_proxy.wire.jsonrpc import Request, Response
from mcp_proxy.wire.urls import Target, parse_target, request_target

# Seconds for a server to answer initialize; `npx` and `uvx` may have to fetch it first.
_ANSWER_TIME = 60.0

_PULSE = 1.0
_MAX_ANSWER = 1024 * 1024

# What a server answers to a POST whose wire is the older one (MCP 2025-11-25, transports,
# "Backwards Compatibility").
_NOT_THIS_WIRE = (400, 404, 405)


def greet_child(bridge: Bridge) -> str:
    """The name, version and revision of a stdio server; raises ProxyError."""
    return handshake.describe(handshake.ask(bridge, _initialize(), _ANSWER_TIME))


def greet(client: HttpClient, target: Target, headers: Mapping[str, str]) -> str:
    """The name, version and revision of an HTTP server; raises ProxyError.

    `headers` are sent with each request. A server that wants credentials is in order where they
    have none: its clients have them.
    """
    endpoint = request_target(target, None, "/mcp", "")
    try:
        return _greet_streamable(client, target, endpoint, headers)
    except _Refused as refusal:
        if refusal.status == 401 and "authorization" not in map(str.lower, headers):
            return "wants credentials of each client (401), so it was not initialized"
        if refusal.status not in _NOT_THIS_WIRE:
            raise
        older = request_target(target, None, "/sse", "")
        for path in dict.fromkeys((endpoint, older)):
            found = _greet_older(client, target, path, headers)
            if found is not None:
                return found
        raise


class _Refused(BackendError):
    """The server has answered a POST with a status that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"The server answers initialize with HTTP status {status}")
        self.status = status


def _initialize() -> Request:
    params = {
        "protocolVersion": revisions.LEGACY[-1],
        "capabilities": {},
        "clientInfo": {"name": "mcp-wsgi-proxy check", "version": __version__},
    }
    return Request("check", INITIALIZE, jsonrpc.as_payload(params))


def _greet_streamable(
    client: HttpClient, target: Target, endpoint: str, headers: Mapping[str, str]
) -> str:
    accepted = {"Accept": f"{JSON}, {EVENT_STREAM}", "Content-Type": JSON}
    body = jsonrpc.encode(_initialize())
    call = HttpCall(client, target.address, "POST", endpoint, {**accepted, **headers}, body)
    call = _sent(call)
    try:
        if not 200 <= call.status < 300:
            raise _Refused(call.status)
        if call.media_type == EVENT_STREAM:
            answer = _response_among(_events(call))
        else:
            answer = _response_in(call.read(_MAX_ANSWER))
        found = handshake.describe(answer)
        session = call.header(SESSION_ID)
    finally:
        call.close()
    if session is not None:
        version = jsonrpc.protocol_version_of(answer.result) or revisions.ASSUMED
        named = {SESSION_ID: session, PROTOCOL_VERSION: version, **headers}
        end = HttpCall(client, call.address, "DELETE", call.target, named, b"")
        end.send(_ANSWER_TIME)
        end.close()
    return found


def _greet_older(
    client: HttpClient, target: Target, path: str, headers: Mapping[str, str]
) -> str | None:
    """As `greet` over HTTP+SSE (2024-11-05); None where there is no such stream."""
    accepted = {"Accept": EVENT_STREAM, **headers}
    stream = _sent(HttpCall(client, target.address, "GET", path, accepted, b""))
    try:
        if stream.status != 200 or stream.media_type != EVENT_STREAM:
            return None
        events = _events(stream)
        first = next(events, None)
        if first is None or first.event != b"endpoint":
            return None
        uri = (first.data or b"").decode("utf-8", "replace")
        there = parse_target(urljoin(stream.address.url + stream.target, uri))
        if there is None or there.origin != target.origin:
            raise BadAnswer("The server's endpoint event names another server, or none")
        endpoint = f"{there.path or '/'}?{there.query}" if there.query else there.path or "/"
        typed = {"Content-Type": JSON, "Accept": JSON, **headers}
        body = jsonrpc.encode(_initialize())
        post = HttpCall(client, stream.address, "POST", endpoint, typed, body)
        post.send(_ANSWER_TIME)
        post.close()
        if not 200 <= post.status < 300:
            raise _Refused(post.status)
        return handshake.describe(_response_among(events))
    finally:
        stream.close()


def _sent(call: HttpCall) -> HttpCall:
    """The call, its answer begun, with redirects followed as the proxy follows them."""
    while True:
        call.send(_ANSWER_TIME)
        successor = call.redirected()
        if successor is None:
            return call
        call.close()
        call = successor


def _events(call: HttpCall) -> Iterator[sse.Event]:
    """The events of an answer, for as long as an answer may take."""
    deadline = time.monotonic() + _ANSWER_TIME
    decoder = sse.Decoder(_MAX_ANSWER)
    for piece in call.pieces(pulse=_PULSE):
        yield from decoder.feed(piece)
        if time.monotonic() > deadline:
            raise BackendTimeout(f"The server did not answer within {_ANSWER_TIME:g} seconds")


def _response_among(events: Iterator[sse.Event]) -> Response:
    """The first response in a stream; what the server says before that is not for us."""
    for event in events:
        if event.data:
            message = _parsed(event.data)
            if isinstance(message, Response):
                return message
    raise BadAnswer("The server's event stream ended without an answer to initialize")


def _response_in(body: bytes) -> Response:
    message = _parsed(body)
    if not isinstance(message, Response):
        raise BadAnswer("The server's answer to initialize is no JSON-RPC response")
    return message


def _parsed(data: bytes) -> jsonrpc.Message:
    try:
        return jsonrpc.parse_message(data)
    except ClientError as error:
        raise BadAnswer(f"The server's answer to initialize is not understood: {error}") from error
