"""What an HTTP server refuses by a status that a client has to see, on its way over a bridge. Pure.

A bridge takes and gives JSON alone. So such an answer travels as an error that has status and
headers in its data, also from replica to replica, until the transport makes an answer of it again.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from mcp_proxy.errors import PROXY_ERROR, ConnectionBroken, ProxyError, RequestId, ServerRefused
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.headers import FIELD_VALUE, Headers
from mcp_proxy.wire.jsonrpc import Response

#: What authorization needs (RFC 9110 section 15.5), and what says that a client is too fast.
STATUSES = frozenset({401, 403, 429})

_MEMBER = "mcpProxyRefusal"
#: What every such line has in it, and hardly any other.
TOLD_BY = b'"mcpProxyRefusal"'

_HEADERS = frozenset({"www-authenticate", "retry-after"})


class _Refusal(msgspec.Struct):
    status: int
    headers: list[tuple[str, str]]


class _Data(msgspec.Struct):
    refusal: _Refusal = msgspec.field(name=_MEMBER)


class _Error(msgspec.Struct):
    message: str
    data: _Data


_decoder = msgspec.json.Decoder(_Error)


def encode(status: int, headers: Headers, request_id: RequestId) -> bytes:
    """The line that says of a request that it was refused."""
    data = {_MEMBER: {"status": status, "headers": _kept(headers)}}
    return jsonrpc.encode_error(
        PROXY_ERROR, f"The server refused the request with {status}", request_id, data
    )


def _kept(headers: Headers) -> Headers:
    """The headers that go along with a refusal."""
    return [(n, v) for n, v in headers if n.lower() in _HEADERS and FIELD_VALUE.fullmatch(v)]


def failed(sentence: str, request_id: RequestId) -> bytes:
    """The line that says of a request that its server gave no answer."""
    data = {_MEMBER: {"status": 0, "headers": []}}
    return jsonrpc.encode_error(PROXY_ERROR, sentence, request_id, data)


def without(response: Response) -> Response:
    """The answer of a server that has no statuses: one that looks as such a line is none."""
    if response.error is UNSET or TOLD_BY not in bytes(response.error):
        return response

    def change(fields: dict[str, msgspec.Raw]) -> None:
        fields.pop("data", None)

    return Response(response.id, error=jsonrpc.edited(response.error, change))


def as_plain_error(line: bytes) -> bytes:
    """An answer as a client may see it whose stream has begun, so that no status can follow."""
    try:
        require_none(line)
    except ProxyError as error:
        answer = jsonrpc.parse_message(line)
        assert isinstance(answer, Response)
        return jsonrpc.encode_error(PROXY_ERROR, error.message, answer.id)
    return line


def require_none(line: bytes) -> None:
    """Raises ServerRefused, or ConnectionBroken, where an answer is such a line."""
    if TOLD_BY not in line:
        return
    answer = jsonrpc.parse_message(line)
    if not isinstance(answer, Response) or answer.error is UNSET:
        return
    try:
        error = _decoder.decode(answer.error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    found = error.data.refusal
    if found.status == 0:
        raise ConnectionBroken(error.message)
    if found.status in STATUSES:
        raise ServerRefused(error.message, found.status, _kept(found.headers))
