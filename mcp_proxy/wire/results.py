"""Results and errors of a server of one era, said to a client of the other. Pure.

MCP 2026-07-28, basic, "Result Types" and "Error Codes", and caching. Nothing is ever cached by us:
what a legacy server answers may be used once, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET, Raw

from mcp_proxy.errors import (
    HEADER_MISMATCH,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    UNSUPPORTED_REVISION,
    ParseError,
)
from mcp_proxy.wire import jsonrpc, revisions, structured, tools
from mcp_proxy.wire.capabilities import without_tasks
from mcp_proxy.wire.jsonrpc import Response
from mcp_proxy.wire.modern import DISCOVER, PREFIX, REVISION, SERVER_INFO, SUPPORTED, edit_meta

#: Codes of legacy revisions that a modern server must not send.
RESOURCE_NOT_FOUND = -32002
URL_ELICITATION_REQUIRED = -32042

COMPLETE = Raw(b'"complete"')

# MCP 2026-07-28, caching; and SEP-2640 for skills.
_CACHEABLE = frozenset(
    {
        DISCOVER,
        "tools/list",
        "prompts/list",
        "resources/list",
        "resources/templates/list",
        "resources/read",
        "resources/directory/read",
    }
)
_CACHEABLE_PREFIX = "skills/"

_NOT_CACHED = {"ttlMs": Raw(b"0"), "cacheScope": Raw(b'"private"')}

# The last code that MCP 2026-07-28 reserves; the first is HEADER_MISMATCH.
_LAST_RESERVED = -32099


# --- a legacy server's, for a modern client -------------------------------------------------------


def upgraded_result(method: str, result: Raw, server_info: Raw | None) -> Raw:
    """A legacy server's result with what a modern client needs of it, where that is absent.

    What is no object, or cannot be read, stays as it is.
    """

    def upgrade(fields: dict[str, Raw]) -> None:
        if jsonrpc.text_of(fields.get("resultType", UNSET)) is None:
            fields["resultType"] = COMPLETE
        if fields["resultType"] == COMPLETE and _is_cacheable(method):
            fields.update(
                {name: value for name, value in _NOT_CACHED.items() if name not in fields}
            )
        if server_info is not None:
            edit_meta(fields, lambda meta: meta.setdefault(SERVER_INFO, server_info))

    return _edited(result, upgrade)


def _is_cacheable(method: str) -> bool:
    return method in _CACHEABLE or method.startswith(_CACHEABLE_PREFIX)


def upgraded_error(error: Raw) -> Raw:
    """A legacy server's error with a code that a modern client may see.

    A code that only a modern server can have meant leaves as an internal error, as does
    URL_ELICITATION_REQUIRED, unless the caller has made questions of it.
    """

    def code_of_modern(code: int) -> int:
        return INVALID_PARAMS if code == RESOURCE_NOT_FOUND else _unreserved(code)

    return _recoded(error, code_of_modern)


def discover_result(initialize_result: Raw, versions: Sequence[str] = SUPPORTED) -> Raw:
    """The DiscoverResult of a legacy server, from its InitializeResult."""
    given = jsonrpc.fields_of(initialize_result)
    fields = {
        "resultType": COMPLETE,
        "supportedVersions": jsonrpc.as_payload(list(versions)),
        "capabilities": without_tasks(given.get("capabilities", UNSET)),
        **_NOT_CACHED,
    }
    if jsonrpc.text_of(given.get("instructions", UNSET)):
        fields["instructions"] = given["instructions"]
    info = given.get("serverInfo", UNSET)
    if info is not UNSET and jsonrpc.is_object(info):
        edit_meta(fields, lambda meta: meta.update({SERVER_INFO: info}))
    return jsonrpc.as_payload(fields)


# --- a modern server's, for a legacy client -------------------------------------------------------


def downgraded_result(method: str, result: Raw) -> Raw:
    """A modern server's result without what legacy clients do not know.

    What is no object, or cannot be read, stays as it is.
    """

    def downgrade(fields: dict[str, Raw]) -> None:
        for name in ("resultType", *_NOT_CACHED):
            fields.pop(name, None)
        if "_meta" in fields:
            edit_meta(fields, lambda meta: meta.pop(SERVER_INFO, None))
        if method == tools.CALL:
            structured.require_object(fields)
        elif method == tools.LIST:
            structured.require_object_schemas(fields)

    return _edited(result, downgrade)


def downgraded_error(error: Raw) -> Raw:
    """A modern server's error without a code by which a client would take us for one."""
    return _recoded(error, _unreserved)


def initialize_result(discover_result: Raw, version: str) -> Raw:
    """The InitializeResult at `version` of a modern server, from its DiscoverResult.

    Legacy clients need a name and a version of the server, which modern ones need not tell.
    """
    given = jsonrpc.fields_of(discover_result)
    meta = jsonrpc.fields_of(given.get("_meta", UNSET))
    fields = {
        "protocolVersion": jsonrpc.as_payload(version),
        "capabilities": without_tasks(given.get("capabilities", UNSET)),
        "serverInfo": jsonrpc.edited(meta.get(SERVER_INFO, UNSET), _require_name),
    }
    if jsonrpc.text_of(given.get("instructions", UNSET)):
        fields["instructions"] = given["instructions"]
    others = {name: value for name, value in meta.items() if not name.startswith(PREFIX)}
    if others:
        fields["_meta"] = jsonrpc.as_payload(others)
    return jsonrpc.as_payload(fields)


def _require_name(info: dict[str, Raw]) -> None:
    for name, value in (("name", "unnamed"), ("version", "0")):
        if jsonrpc.text_of(info.get(name, UNSET)) is None:
            info[name] = jsonrpc.as_payload(value)


# --- both -----------------------------------------------------------------------------------------


def code_of(error: Raw) -> int | None:
    """The code of a JSON-RPC error object, None without one."""
    try:
        code = jsonrpc.id_of(jsonrpc.fields_of(error).get("code", UNSET))
    except ParseError:
        return None
    return code if isinstance(code, int) else None


def supported_in(error: Raw) -> list[str]:
    """The revisions that a JSON-RPC error says are supported, none where it names none."""
    data = jsonrpc.fields_of(jsonrpc.fields_of(error).get("data", UNSET))
    return revisions.named_in(data.get("supported", UNSET))


def is_modern(answer: Response) -> bool:
    """Whether a server that answers `server/discover` so speaks a revision that we do.

    A server may name legacy revisions alone, also in an error that only modern ones know.
    """
    if answer.result is not UNSET:
        fields = jsonrpc.fields_of(answer.result)
        named = revisions.named_in(fields.get("supportedVersions", UNSET))
    elif answer.error is not UNSET and code_of(answer.error) == UNSUPPORTED_REVISION:
        named = supported_in(answer.error)
    else:
        named = []
    return REVISION in named


def _unreserved(code: int) -> int:
    return INTERNAL_ERROR if _LAST_RESERVED <= code <= HEADER_MISMATCH else code


def _recoded(error: Raw, change: Callable[[int], int]) -> Raw:
    """An error with another code; its message and data stay."""
    code = code_of(error)
    if code is None or change(code) == code:
        return error
    encoded = jsonrpc.as_payload(change(code))
    return _edited(error, lambda fields: fields.update(code=encoded))


def _edited(payload: Raw, change: Callable[[dict[str, Raw]], object]) -> Raw:
    if not jsonrpc.is_object(payload):
        return payload
    try:
        return jsonrpc.edited(payload, change)
    except ParseError:
        return payload
