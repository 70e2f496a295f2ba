"""What a request or an answer is, as far as routing has to know."""

from __future__ import annotations

from msgspec import UNSET

from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ClientError
from mcp_proxy.wire import headers, jsonrpc, revisions
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request, Response


def peek(request: ClientRequest, body: bytes) -> Message | Batch | None:
    """What a POST carries, None where it is nothing that this proxy has to understand."""
    if request.method != "POST" or not headers.is_json(request.content_type or ""):
        return None
    try:
        return jsonrpc.parse(body)
    except ClientError:
        return None  # the backend will say what is wrong with it


def is_modern(request: ClientRequest, message: Message | Batch | None) -> bool:
    """Whether a request is of the stateless era: by its body if it has one, else by its header."""
    if request.method != "POST":
        return revisions.is_modern(request.protocol_version or "")
    if not isinstance(message, (Request, Notification)):
        return False
    try:
        version = jsonrpc.meta_of(message).protocol_version
    except ClientError:
        return False
    return isinstance(version, str) and revisions.is_modern(version)


def is_lost_session(status: int, explanation: bytes) -> bool:
    """Whether an answer says that the backend does not know the session.

    404 with a JSON-RPC error that speaks of the session, and the 400 of older SDKs: "No valid
    session ID provided". A 404 of a path that is not there, or of a method, is something else.
    """
    try:
        message = jsonrpc.parse_message(explanation)
    except ClientError:
        return False
    if not isinstance(message, Response) or message.error is UNSET:
        return False
    said = bytes(message.error).lower()
    return b"session" in said if status == 404 else b"no valid session id" in said


def cancellation_of(request: Request) -> bytes:
    """What tells a server that nobody waits for its answer any more."""
    params = {"requestId": request.id, "reason": "The proxy's time limit has passed"}
    return jsonrpc.encode(Notification("notifications/cancelled", jsonrpc.as_payload(params)))
