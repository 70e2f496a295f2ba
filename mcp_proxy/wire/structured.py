"""What tools return in a structured form, for clients to whom that is always an object. Pure.

Since MCP 2026-07-28 (tools, "Structured Content"; SEP-2106) it is any JSON value, of any schema.
Before, both were objects: some clients refuse a whole list of tools for one `outputSchema` of
another type. So a value that is no object becomes the `result` of one, which is what servers of
both eras make of it themselves.
"""

from __future__ import annotations

import re

from msgspec import UNSET, Raw

from mcp_proxy.wire import jsonrpc

#: What the value is called in the object that stands for it.
RESULT = "result"

_CONTENT = "structuredContent"
_SCHEMA = "outputSchema"
_DIALECT = "$schema"
_OBJECT = "object"

_ANY_OBJECT = Raw(b'{"type":"object"}')

# What leads elsewhere in a schema, and may not once that is a part of another one.
_REFERENCE = re.compile(rb'"\$(?:ref|dynamicRef|recursiveRef)"|\\u')


def require_object(fields: dict[str, Raw]) -> None:
    """Makes the structured content of a tool's result an object, where there is some."""
    value = fields.get(_CONTENT, UNSET)
    if value is not UNSET and not jsonrpc.is_object(value):
        fields[_CONTENT] = jsonrpc.as_payload({RESULT: value})


def require_object_schemas(fields: dict[str, Raw]) -> None:
    """Makes the output schemas in a list of tools those of what `require_object` returns.

    The other tools keep their bytes. A schema that tells neither an object nor something else, or
    that refers to parts of itself, promises less than it did.
    """
    tools = jsonrpc.elements_of(fields.get("tools", UNSET))
    if tools is None:
        return
    changed = [_with_object_schema(tool) for tool in tools]
    if changed != tools:
        fields["tools"] = jsonrpc.as_payload(changed)


def _with_object_schema(tool: Raw) -> Raw:
    schema = jsonrpc.fields_of(tool).get(_SCHEMA, UNSET)
    if schema is UNSET:
        return tool
    changed = _object_schema(schema)
    if changed is schema:
        return tool
    return jsonrpc.edited(tool, lambda fields: fields.update({_SCHEMA: changed}))


def _object_schema(schema: Raw) -> Raw:
    """The schema of an object, the same where it is one already."""
    fields = jsonrpc.fields_of(schema)
    given = fields.get("type", UNSET)
    kind = jsonrpc.text_of(given)
    if kind == _OBJECT:
        return schema
    kinds = [kind] if kind else [jsonrpc.text_of(one) for one in jsonrpc.elements_of(given) or ()]
    if not kinds or None in kinds or _OBJECT in kinds:
        return _ANY_OBJECT
    dialect = {_DIALECT: fields.pop(_DIALECT)} if _DIALECT in fields else {}
    inner = {} if _REFERENCE.search(bytes(schema)) else fields
    wrapped = {"type": _OBJECT, "properties": {RESULT: inner}, "required": [RESULT]}
    return jsonrpc.as_payload({**dialect, **wrapped})
