"""The one place where errors become HTTP."""

from __future__ import annotations

from mcp_proxy.edge.reply import Reply, json_reply
from mcp_proxy.errors import ProxyError
from mcp_proxy.wire import jsonrpc


def render(error: ProxyError) -> Reply:
    """The answer to an error that was met before the response began: its status, and JSON-RPC."""
    return json_reply(as_message(error), error.status, error.headers)


def as_message(error: ProxyError) -> bytes:
    """The JSON-RPC error that says what `error` says."""
    return jsonrpc.encode_error(error.code, error.message, error.request_id)
