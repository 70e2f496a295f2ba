"""Requests of the modern era: what each of them says of itself, and how that is checked. Pure.

MCP 2026-07-28, basic, "_meta", and transports, "Request Metadata" and "Server Validation". There is
no handshake and no session: revision, capabilities and log level come with every request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    MISSING_CAPABILITY,
    UNSUPPORTED_REVISION,
    HeaderMismatch,
    InvalidParams,
    RequestId,
    UnsupportedRevision,
)
from mcp_proxy.wire import headers, jsonrpc, revisions
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Request

REVISION = "2026-07-28"

#: The modern revisions that are served.
SUPPORTED = (REVISION,)

#: The keys of `_meta` that the protocol owns begin so; all others are the sender's.
PREFIX = "io.modelcontextprotocol/"
PROTOCOL_VERSION = f"{PREFIX}protocolVersion"
CLIENT_CAPABILITIES = f"{PREFIX}clientCapabilities"
CLIENT_INFO = f"{PREFIX}clientInfo"
LOG_LEVEL = f"{PREFIX}logLevel"
SERVER_INFO = f"{PREFIX}serverInfo"
SUBSCRIPTION_ID = f"{PREFIX}subscriptionId"
PROGRESS_TOKEN = "progressToken"

DISCOVER = "server/discover"

#: What a request of the proxy's own says of itself.
OWN_INFO: Mapping[str, object] = {"name": "mcp_proxy", "version": "1"}
OWN_META: Mapping[str, object] = {
    PROTOCOL_VERSION: REVISION,
    CLIENT_CAPABILITIES: {},
    CLIENT_INFO: OWN_INFO,
}
LISTEN = "subscriptions/listen"

#: The methods whose result may be questions (MCP 2026-07-28, "Multi Round-Trip Requests").
MAY_ASK = frozenset({"tools/call", "prompts/get", "resources/read"})

#: Methods of legacy revisions that are gone: with modern metadata nobody has them any more.
REMOVED = frozenset(
    {
        "initialize",
        "ping",
        "logging/setLevel",
        "resources/subscribe",
        "resources/unsubscribe",
        "tasks/list",  # SEP-2663, which keeps tasks/get and tasks/cancel
        "tasks/result",
    }
)

#: The codes with which a modern server refuses initialize, and whatever says nothing of itself.
NO_HANDSHAKE = frozenset({UNSUPPORTED_REVISION, METHOD_NOT_FOUND, HEADER_MISMATCH, INVALID_PARAMS})

LOG_LEVELS = frozenset(
    {"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"}
)

# The param that Mcp-Name mirrors.
_NAMED_BY = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
}

_STATUS = {
    METHOD_NOT_FOUND: 404,
    HEADER_MISMATCH: 400,
    MISSING_CAPABILITY: 400,
    UNSUPPORTED_REVISION: 400,
}

Header = Callable[[str], str | None]


class ModernMeta(msgspec.Struct, frozen=True):
    """What a modern request says of itself."""

    protocol_version: str
    capabilities: Raw
    client_info: Raw | UnsetType = UNSET
    log_level: str | None = None
    progress_token: RequestId | UnsetType = UNSET


class _Meta(msgspec.Struct):
    version: str = msgspec.field(name=PROTOCOL_VERSION)
    capabilities: Raw = msgspec.field(name=CLIENT_CAPABILITIES)
    info: Raw | UnsetType = msgspec.field(default=UNSET, name=CLIENT_INFO)
    level: str | UnsetType = msgspec.field(default=UNSET, name=LOG_LEVEL)
    token: RequestId | UnsetType = msgspec.field(default=UNSET, name=PROGRESS_TOKEN)


class _Params(msgspec.Struct):
    """What is looked at in the params of a request that is right, which nearly all are."""

    meta: _Meta = msgspec.field(name="_meta")
    name: str | UnsetType = UNSET
    uri: str | UnsetType = UNSET
    task: str | UnsetType = msgspec.field(default=UNSET, name="taskId")


_params = msgspec.json.Decoder(_Params)


def status_of(code: int) -> int:
    """The HTTP status of an answer whose JSON-RPC error has this code."""
    return _STATUS.get(code, 200)


# --- checking -------------------------------------------------------------------------------------


def require_valid(request: Request, header: Header) -> ModernMeta:
    """The metadata of a request whose headers say what its body says.

    `header` returns the value of a request header, None without it. Of several things that are
    wrong the first is named: a missing or unknown revision in the header, another one in the body,
    the rest of `_meta`, the other headers. Raises HeaderMismatch, UnsupportedRevision or
    InvalidParams.
    """
    return _read_at_once(request, header) or _read_in_order(request, header)


def _read_at_once(request: Request, header: Header) -> ModernMeta | None:
    """As `require_valid`, in one go; None where anything is wrong, or unusual."""
    try:
        params = _params.decode(request.params or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    meta = params.meta
    level = None if meta.level is UNSET else meta.level
    is_right = (
        meta.version in SUPPORTED
        and header(headers.PROTOCOL_VERSION) == meta.version
        and header(headers.METHOD) == request.method
        and jsonrpc.is_object(meta.capabilities)
        and (meta.info is UNSET or jsonrpc.is_object(meta.info))
        and (level is None or level in LOG_LEVELS)
    )
    if is_right and request.method in _NAMED_BY:
        by = _NAMED_BY[request.method]
        name = params.task if by == "taskId" else params.uri if by == "uri" else params.name
        is_right = (
            name is not UNSET
            and header(headers.NAME) == name
            and headers.is_printable(name)
            and not name.startswith(headers.ENCODED_PREFIX)
        )
    if not is_right:
        return None
    if level is None:
        request.note_meta(jsonrpc.Meta(meta.token, meta.version))
    return ModernMeta(meta.version, meta.capabilities, meta.info, level, meta.token)


def _read_in_order(request: Request, header: Header) -> ModernMeta:
    params = jsonrpc.fields_of(request.params)
    meta = jsonrpc.fields_of(params.get("_meta", UNSET))
    own = jsonrpc.text_of(meta.get(PROTOCOL_VERSION, UNSET))
    version = _require_revision(header(headers.PROTOCOL_VERSION), own)
    found = _read(version, meta)
    method = header(headers.METHOD)
    if method is None:
        raise HeaderMismatch(f"{headers.METHOD} is missing")
    if method.strip(" \t") != request.method:
        raise HeaderMismatch(f"{headers.METHOD} is not what the body says")
    if request.method in _NAMED_BY:
        _require_name(header(headers.NAME), name_of(request.method, params))
    return found


def _require_revision(given: str | None, own: str | None) -> str:
    """The revision that the header and the body agree on."""
    asked = (given or "").strip(" \t")
    if not asked:
        raise HeaderMismatch(f"{headers.PROTOCOL_VERSION} is missing")
    is_legacy_by_mistake = revisions.is_legacy(asked) and own in SUPPORTED
    if asked not in SUPPORTED and not is_legacy_by_mistake:
        raise UnsupportedRevision(asked, SUPPORTED)
    if own is None:
        raise InvalidParams(f"params._meta must have {PROTOCOL_VERSION}, a string")
    if own != asked:
        raise HeaderMismatch(f"{headers.PROTOCOL_VERSION} is not what params._meta says")
    return asked


def _read(version: str, meta: Mapping[str, Raw]) -> ModernMeta:
    capabilities = meta.get(CLIENT_CAPABILITIES)
    if capabilities is None or not jsonrpc.is_object(capabilities):
        raise InvalidParams(f"params._meta must have {CLIENT_CAPABILITIES}, an object")
    info = jsonrpc.member(meta, CLIENT_INFO)
    if info is not UNSET and not jsonrpc.is_object(info):
        raise InvalidParams(f"{CLIENT_INFO} must be an object")
    level = jsonrpc.member(meta, LOG_LEVEL)
    log_level = None if level is UNSET else jsonrpc.text_of(level)
    if level is not UNSET and log_level not in LOG_LEVELS:
        raise InvalidParams(f"{LOG_LEVEL} must be one of {', '.join(sorted(LOG_LEVELS))}")
    token = jsonrpc.member(meta, PROGRESS_TOKEN)
    progress_token = UNSET if token is UNSET else jsonrpc.id_of(token)
    if progress_token is None:
        raise InvalidParams(f"{PROGRESS_TOKEN} must be a string or an integer")
    return ModernMeta(version, capabilities, info, log_level, progress_token)


def _require_name(given: str | None, expected: str | None) -> None:
    """That params lack their name is the server's to refuse, unless the header claims one."""
    if given is None and expected is not None:
        raise HeaderMismatch(f"{headers.NAME} is missing")
    if given is not None and headers.decode_value(given) != expected:
        raise HeaderMismatch(f"{headers.NAME} is not what the body says")


def name_of(method: str, params: Mapping[str, Raw]) -> str | None:
    """The name, URI or task that the fields of a request's params are about; None without one."""
    return jsonrpc.text_of(params.get(_NAMED_BY.get(method, ""), UNSET))


# --- sending --------------------------------------------------------------------------------------


def headers_of(request: Request) -> Headers:
    """The headers that a client sends with a modern request, those for arguments excepted."""
    found = [
        (headers.PROTOCOL_VERSION, REVISION),
        (headers.METHOD, headers.encode_value(request.method)),
    ]
    name = name_of(request.method, jsonrpc.fields_of(request.params))
    if name is not None:
        found.append((headers.NAME, headers.encode_value(name)))
    return found


def discover_request() -> Request:
    """A `server/discover` of the proxy's own."""
    return Request("mcp-proxy-discover", DISCOVER, jsonrpc.as_payload({"_meta": OWN_META}))


# --- the metadata of any message ------------------------------------------------------------------


def meta_of(payload: Raw | UnsetType) -> dict[str, Raw]:
    """The members of a payload's `_meta`, each as it came; none without it."""
    return jsonrpc.fields_of(jsonrpc.fields_of(payload).get("_meta", UNSET))


def without_meta(params: Raw | UnsetType) -> Raw | UnsetType:
    """Params for a legacy server: of `_meta` the token for progress stays, and what is not MCP's.

    An empty `_meta` goes, too.
    """
    if params is UNSET or not jsonrpc.is_object(params):
        return params
    return edited_meta(params, _drop_own)


def _drop_own(meta: dict[str, Raw]) -> None:
    for key in [key for key in meta if key.startswith(PREFIX)]:
        del meta[key]


def with_meta(params: Raw | UnsetType, fields: Mapping[str, object]) -> Raw:
    """Params with more members of `_meta`, which replace those of the same name.

    Params that are no object give way to one.
    """
    added = {name: jsonrpc.as_payload(value) for name, value in fields.items()}
    return edited_meta(params, lambda meta: meta.update(added))


def edited_meta(payload: Raw | UnsetType, change: Callable[[dict[str, Raw]], object]) -> Raw:
    """A payload with its `_meta` as `change` leaves it; an empty one goes."""
    return jsonrpc.edited(payload, lambda fields: edit_meta(fields, change))


def edit_meta(fields: dict[str, Raw], change: Callable[[dict[str, Raw]], object]) -> None:
    """Changes the `_meta` among the fields of a payload; an empty one goes."""
    meta = jsonrpc.edited(fields.get("_meta", UNSET), change)
    if meta == Raw(b"{}"):
        fields.pop("_meta", None)
    else:
        fields["_meta"] = meta
