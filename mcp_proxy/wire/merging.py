"""What several servers say, as one says it: capabilities, instructions, lists. Pure.

Entries of lists keep their bytes but for their names and URIs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.wire import jsonrpc, questions
from mcp_proxy.wire.capabilities import drop_tasks
from mcp_proxy.wire.jsonrpc import Notification, Response

#: The methods that ask for a list: where the entries are in its result.
KINDS: Mapping[str, str] = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}

#: The notifications by which a server says that a list has changed, and which lists these are.
CHANGED: Mapping[str, Sequence[str]] = {
    "notifications/tools/list_changed": ("tools/list",),
    "notifications/prompts/list_changed": ("prompts/list",),
    "notifications/resources/list_changed": ("resources/list", "resources/templates/list"),
}

#: The capability without which a server is not asked for a list.
CAPABILITY: Mapping[str, str] = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resources",
}

#: The lists that say together whose something is.
TOGETHER: Mapping[str, Sequence[str]] = {
    "resources/list": ("resources/list", "resources/templates/list"),
    "resources/templates/list": ("resources/list", "resources/templates/list"),
}

#: The key under which the result of a list names the servers that it lacks.
MISSING = "mcp-wsgi-proxy/missing"

# The longest instructions, in characters.
_MAX_INSTRUCTIONS = 16 * 1024

# The longest reason why a server is missing, in characters.
_MAX_REASON = 200

_STRUCTURED = b'"structuredContent"'
_INPUT_REQUIRED = b'"input_required"'
_ELICIT = "elicitation/create"
_LOG = "notifications/message"
_HEADING = re.compile(r"(?m)^(\s*)#")

_SUBSCRIBE, _LIST_CHANGED = "subscribe", "listChanged"
_TRUE, _EMPTY = Raw(b"true"), Raw(b"{}")
_NO_HINTS: Mapping[str, object] = MappingProxyType({})

# What a server may be able to do of which nothing is known.
_ALL = ("completions", "logging", "prompts", "resources", "tools")


def entries_of(result: Raw, method: str) -> tuple[list[Raw], str | None]:
    """The entries of one page of a list, and the cursor of the next one; None: there is none."""
    fields = jsonrpc.fields_of(result)
    entries = jsonrpc.elements_of(fields.get(KINDS[method], UNSET)) or []
    return entries, jsonrpc.text_of(fields.get("nextCursor", UNSET))


def named(entries: Iterable[Raw], names: Mapping[str, str]) -> list[Raw]:
    """The entries whose names are among the values of `names`, each under its key there."""
    public = {name: key for key, name in names.items()}
    found = []
    for entry in entries:
        name = name_in(entry)
        if name in public:
            found.append(with_field(entry, "name", public[name]))
    return found


def name_in(entry: Raw) -> str:
    """The name of an entry of a list, empty without one."""
    return text_in(entry, "name")


def text_in(payload: Raw, key: str) -> str:
    """The text under a key of an object, empty without one."""
    return jsonrpc.text_of(jsonrpc.fields_of(payload).get(key, UNSET)) or ""


def with_field(payload: Raw, key: str, value: object) -> Raw:
    """An object with another value under a key."""
    encoded = jsonrpc.as_payload(value)
    return jsonrpc.edited(payload, lambda fields: fields.update({key: encoded}))


def ttl_of(result: Raw) -> int:
    """For how many milliseconds a result holds (MCP 2026-07-28, caching); without a word: 0."""
    ttl = jsonrpc.id_of(jsonrpc.fields_of(result).get("ttlMs", UNSET))
    return max(0, ttl) if isinstance(ttl, int) else 0


def is_public(result: Raw) -> bool:
    """Whether a result says that it is the same for everybody."""
    return text_in(result, "cacheScope") == "public"


def list_result(
    method: str,
    entries: Sequence[Raw],
    missing: Mapping[str, str],
    hints: Mapping[str, object] = _NO_HINTS,
) -> Raw:
    """The result of a list; `missing` are reasons by the names of servers that it lacks, `hints`
    what is said of its caching.
    """
    fields: dict[str, object] = {KINDS[method]: entries, **hints}
    if missing:
        fields["_meta"] = {MISSING: missing}
    return jsonrpc.as_payload(fields)


def capabilities(known: Sequence[Raw], is_all: bool) -> Raw:
    """The capabilities of several servers; unless these are all, others may have any."""
    found: dict[str, Raw] = {}
    for each in known:
        for name, value in jsonrpc.fields_of(each).items():
            if name not in found:
                found[name] = value
            elif jsonrpc.is_object(value) and jsonrpc.is_object(found[name]):
                found[name] = _joined(found[name], value)
    if not is_all:
        found = dict.fromkeys(_ALL, _EMPTY) | found
    for name in ("tools", "prompts", "resources"):
        if name in found:
            found[name] = jsonrpc.edited(found[name], _promise_changes)
    if "resources" in found and not is_all:
        found["resources"] = with_field(found["resources"], _SUBSCRIBE, True)
    drop_tasks(found)
    return jsonrpc.as_payload(found)


def _joined(one: Raw, other: Raw) -> Raw:
    added = jsonrpc.fields_of(other)

    def join(fields: dict[str, Raw]) -> None:
        for name, value in added.items():
            if name not in fields or value == _TRUE:
                fields[name] = value

    return jsonrpc.edited(one, join)


def _promise_changes(fields: dict[str, Raw]) -> None:
    fields[_LIST_CHANGED] = _TRUE


def instructions(parts: Sequence[tuple[str, str]], missing: Mapping[str, str]) -> str:
    """The instructions of several servers, each below its prefix, and which of them are missing.

    No server speaks below the heading of another, and none takes the place of the others.
    """
    found = [
        f"# {name}\n\nThis server is missing: {' '.join(reason.split())[:_MAX_REASON]}"
        for name, reason in missing.items()
    ]
    texts = [(prefix, text.strip()) for prefix, text in parts if text.strip()]
    share = _MAX_INSTRUCTIONS // max(1, len(texts))
    for prefix, text in texts:
        found.append(f"# {prefix}\n\n" + _HEADING.sub(r"\1\\#", text)[:share])
    return "\n\n".join(found)


def initialize_result(
    version: str, name: str, server_version: str, capabilities: Raw, instructions: str
) -> Raw:
    """The InitializeResult of an endpoint that carries several servers."""
    fields: dict[str, object] = {
        "protocolVersion": version,
        "capabilities": capabilities,
        "serverInfo": server_info(name, server_version),
    }
    if instructions:
        fields["instructions"] = instructions
    return jsonrpc.as_payload(fields)


def discover_result(revisions: Sequence[str], capabilities: Raw, instructions: str) -> Raw:
    """The DiscoverResult of such an endpoint (MCP 2026-07-28)."""
    fields: dict[str, object] = {"supportedVersions": revisions, "capabilities": capabilities}
    if instructions:
        fields["instructions"] = instructions
    return jsonrpc.as_payload(fields)


def server_info(name: str, version: str) -> Raw:
    """What such an endpoint says of itself."""
    return jsonrpc.as_payload({"name": name, "version": version})


# --- what a server asks and tells -----------------------------------------------------------------


def marked_question(prefix: str, method: str, params: Raw | UnsetType) -> Raw | UnsetType:
    """The params of a server's question, which people read: what they are asked begins with the
    prefix. Those of any other request, or without a prefix, stay as they are.
    """
    if not prefix or method != _ELICIT or not jsonrpc.is_object(params):
        return params
    assert params is not UNSET
    return with_field(params, "message", f"{prefix}: {text_in(params, 'message')}")


def marked_questions(prefix: str, data: bytes) -> bytes:
    """An answer whose questions, if it has any (`input_required`), are marked so."""
    if not prefix or _INPUT_REQUIRED not in data or _ELICIT.encode() not in data:
        return data
    answer = jsonrpc.parse_message(data)
    if not isinstance(answer, Response) or answer.result is UNSET:
        return data
    found = questions.input_required_of(answer.result)
    if found is None:
        return data
    asked = {
        key: {"method": method, "params": marked_question(prefix, method, params)}
        for key, (method, params) in found.requests.items()
    }
    return jsonrpc.encode(Response(answer.id, with_field(answer.result, "inputRequests", asked)))


def marked_log(prefix: str, notification: Notification) -> Notification:
    """A log message whose logger begins with the prefix; anything else stays as it is."""
    params = notification.params
    if not prefix or notification.method != _LOG or not jsonrpc.is_object(params):
        return notification
    assert params is not UNSET
    logger = text_in(params, "logger")
    params = with_field(params, "logger", f"{prefix}/{logger}" if logger else prefix)
    return Notification(notification.method, params)


def without_structured(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A message as `change` makes it, but for a tool's structured content: that is data, whatever
    its keys are called.
    """
    if _STRUCTURED not in data:
        return change(data)
    message = jsonrpc.parse_message(data)
    if not isinstance(message, Response) or message.result is UNSET:
        return change(data)

    def edit(fields: dict[str, Raw]) -> None:
        for name, value in fields.items():
            if name != "structuredContent":
                fields[name] = Raw(change(bytes(value)))

    return jsonrpc.encode(Response(message.id, jsonrpc.edited(message.result, edit)))
