"""What clients and servers declare, said to a peer of the other era. Pure.

A modern client declares its capabilities with every request, a legacy one once for its session. In
front of a legacy server only the kinds of questions count that a client can answer: servers are
shared by clients of the same kinds, so nothing of a client's own text reaches them.
"""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.wire import jsonrpc

FORM = "elicitation.form"
URL = "elicitation.url"
SAMPLING = "sampling"
SAMPLING_TOOLS = "sampling.tools"
SAMPLING_CONTEXT = "sampling.context"
ROOTS = "roots"
UI = "ui"

#: Every kind of question, and of answer, that a client can declare to a legacy server.
KINDS = frozenset({FORM, URL, SAMPLING, SAMPLING_TOOLS, SAMPLING_CONTEXT, ROOTS, UI})

UI_EXTENSION = "io.modelcontextprotocol/ui"
TASKS_EXTENSION = "io.modelcontextprotocol/tasks"

# SEP-1865: the one type of user interfaces; servers look for it before they send any.
_UI_TYPE = "text/html;profile=mcp-app"

# The longest declaration whose kinds are remembered, in bytes.
_MAX_KNOWN = 4096

_texts = msgspec.json.Decoder(list[str])


def kinds_of(capabilities: Raw | UnsetType) -> frozenset[str]:
    """The kinds that a client declares; what has a wrong type counts as not declared."""
    encoded = b"" if capabilities is UNSET else bytes(capabilities)
    return _kinds_in(encoded) if len(encoded) <= _MAX_KNOWN else _kinds_in.__wrapped__(encoded)


@lru_cache(maxsize=256)
def _kinds_in(encoded: bytes) -> frozenset[str]:
    declared = jsonrpc.fields_of(Raw(encoded) if encoded else UNSET)
    found = _elicitation_of(declared.get("elicitation", UNSET))
    if jsonrpc.is_object(declared.get("roots", UNSET)):
        found.add(ROOTS)
    sampling = declared.get("sampling", UNSET)
    if jsonrpc.is_object(sampling):
        parts = _objects_in(sampling)
        found.add(SAMPLING)
        found |= {f"{SAMPLING}.{part}" for part in parts} & KINDS
    extensions = jsonrpc.fields_of(declared.get("extensions", UNSET))
    if _shows_pages(extensions.get(UI_EXTENSION, UNSET)):
        found.add(UI)
    return frozenset(found)


def _elicitation_of(declared: Raw | UnsetType) -> set[str]:
    modes = jsonrpc.fields_of(declared)
    if jsonrpc.is_object(declared) and not modes.keys() & {"form", "url"}:
        return {FORM}  # MCP 2025-11-25, elicitation: an empty object means forms
    return {f"elicitation.{mode}" for mode in _objects_in(declared)} & KINDS


def _objects_in(declared: Raw | UnsetType) -> set[str]:
    fields = jsonrpc.fields_of(declared)
    return {name for name, value in fields.items() if jsonrpc.is_object(value)}


def _shows_pages(extension: Raw | UnsetType) -> bool:
    types = jsonrpc.fields_of(extension).get("mimeTypes")
    try:
        return types is not None and _UI_TYPE in _texts.decode(types)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def capabilities_of(kinds: Set[str]) -> Raw:
    """The client capabilities of 2025-11-25 that declare these kinds."""
    found: dict[str, object] = {}
    if kinds & {FORM, URL}:
        found["elicitation"] = _parts_of("elicitation", kinds)
    if kinds & {SAMPLING, SAMPLING_TOOLS, SAMPLING_CONTEXT}:
        found["sampling"] = _parts_of("sampling", kinds)
    if ROOTS in kinds:
        found["roots"] = {}
    if UI in kinds:
        found["extensions"] = {UI_EXTENSION: {"mimeTypes": [_UI_TYPE]}}
    return jsonrpc.as_payload(found)


def _parts_of(capability: str, kinds: Set[str]) -> dict[str, dict[str, object]]:
    """The parts of a capability that have a kind of their own."""
    parts = [kind.partition(".") for kind in sorted(kinds)]
    return {part: {} for whole, dot, part in parts if whole == capability and dot}


def modern_capabilities_of(capabilities: Raw | UnsetType) -> Raw:
    """What a legacy client declared, as its requests say it to a modern server.

    Notifications about roots are no more, and tasks have become an extension that works in another
    way. What is no object declares nothing.
    """

    def translate(declared: dict[str, Raw]) -> None:
        for name in [name for name, value in declared.items() if not jsonrpc.is_object(value)]:
            del declared[name]
        if "roots" in declared:
            declared["roots"] = Raw(b"{}")
        drop_tasks(declared)

    return jsonrpc.edited(capabilities, translate)


def without_tasks(capabilities: Raw | UnsetType) -> Raw:
    """Capabilities without tasks: neither era's tasks can be said in the other."""
    return jsonrpc.edited(capabilities, drop_tasks)


def drop_tasks(declared: dict[str, Raw]) -> None:
    """Takes tasks out of the fields of capabilities, the extension, too; the others stay."""
    declared.pop("tasks", None)
    extensions = declared.get("extensions")
    if extensions is None:
        return
    if jsonrpc.is_object(extensions):
        left = jsonrpc.edited(extensions, lambda names: names.pop(TASKS_EXTENSION, None))
        declared["extensions"] = left
    if not jsonrpc.fields_of(declared["extensions"]):
        del declared["extensions"]
