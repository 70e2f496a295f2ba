"""Arguments of tools that are mirrored in headers: `x-mcp-header` and `Mcp-Param-*`. Pure.

MCP 2026-07-28, tools, "x-mcp-header", and transports, "Custom Headers from Tool Parameters". A tool
names the arguments in its input schema, so that balancers can route by them without reading bodies;
whoever reads both must refuse a call in which they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import HeaderMismatch
from mcp_proxy.wire import headers, jsonrpc, mending
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.modern import Header

#: The way to an argument through nested objects.
Path = tuple[str, ...]

_ANNOTATION = "x-mcp-header"

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_TYPES = ("string", "integer", "boolean")

# JSON Schema keywords that hold data, in which nothing is an annotation.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})

# Keywords that hold schemas by names that are not keywords.
_NAMED = frozenset(
    {"$defs", "definitions", "patternProperties", "dependentSchemas", "dependencies"}
)

# Names of headers that arrive through everything: gunicorn and nginx drop those with underscores,
# and nginx any with other characters.
_SURE_TO_ARRIVE = re.compile(r"[A-Za-z0-9-]+")

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?")
_LONGEST_NUMBER = 400

_anything = msgspec.json.Decoder()


class _Invalid(Exception):
    """The annotations of a tool break the rules."""


class _Tool(msgspec.Struct):
    name: str
    schema: Raw = msgspec.field(default=Raw(b"{}"), name="inputSchema")


class _Tools(msgspec.Struct):
    tools: list[Raw]


_tools = msgspec.json.Decoder(_Tools)
_tool = msgspec.json.Decoder(_Tool)


# --- what tools ask for ---------------------------------------------------------------------------


def annotated(tools_list_results: Iterable[Raw]) -> dict[str, dict[str, Path]]:
    """The mirrored arguments of each tool: the header's name without its prefix, and the way there.

    The names are in lower case. A tool that has none is there all the same; one whose annotations
    break the rules is not, as no client may send headers for it.
    """
    found: dict[str, dict[str, Path]] = {}
    for result in tools_list_results:
        for tool in _tools_in(result):
            try:
                found[tool.name] = _annotations_of(tool.schema)
            except _Invalid:
                found.pop(tool.name, None)
    return found


def _tools_in(result: Raw) -> Iterator[_Tool]:
    try:
        encoded = _tools.decode(mending.repair(bytes(result))).tools
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for each in encoded:
        try:
            yield _tool.decode(each)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue


def _annotations_of(schema: Raw) -> dict[str, Path]:
    if _ANNOTATION.encode() not in bytes(schema):
        return {}
    try:
        decoded = _anything.decode(schema)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Invalid from error
    found: dict[str, Path] = {}
    for path, node in _schemas_in(decoded):
        if _ANNOTATION not in node:
            continue
        name = node[_ANNOTATION]
        is_name = isinstance(name, str) and _TOKEN.fullmatch(name)
        if not is_name or not path or node.get("type") not in _TYPES or name.lower() in found:
            raise _Invalid
        found[name.lower()] = path
    return found


def _schemas_in(root: object) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The schemas in a schema, each with its way there; empty where that is not by properties."""
    waiting: list[tuple[Path | None, object]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, list):
            waiting += [(None, each) for each in node]
        if not isinstance(node, dict):
            continue
        yield path or (), node
        for keyword, value in node.items():
            if keyword == "properties" and isinstance(value, dict):
                for name, each in value.items():
                    waiting.append((None if path is None else (*path, name), each))
            elif keyword in _NAMED and isinstance(value, dict):
                waiting += [(None, each) for each in value.values()]
            elif keyword not in _DATA:
                waiting.append((None, value))


# --- what calls say -------------------------------------------------------------------------------


def require_matching(
    annotations: Mapping[str, Path], arguments: Raw | UnsetType, header: Header
) -> None:
    """Raises HeaderMismatch unless the headers of a call say what its arguments say.

    An argument that is absent or null, or has no form in a header, has no header. Nor need one
    arrive whose name has characters that proxies drop it for.
    """
    for name, path in annotations.items():
        field = f"{headers.PARAM_PREFIX}{name}"
        given, value = header(field), _value_at(arguments, path)
        if given is None and (value is None or not _SURE_TO_ARRIVE.fullmatch(name)):
            continue
        if given is None:
            raise HeaderMismatch(f"{field} is missing")
        if value is None or not _says(headers.decode_value(given), value):
            raise HeaderMismatch(f"{field} is not what the argument {'.'.join(path)!r} says")


def headers_for(annotations: Mapping[str, Path], arguments: Raw | UnsetType) -> Headers:
    """The headers that a client sends with a call."""
    found = []
    for name, path in annotations.items():
        value = _value_at(arguments, path)
        if value is not None:
            text = value if isinstance(value, str) else _decimal(value)
            found.append((f"{headers.PARAM_PREFIX}{name}", headers.encode_value(text)))
    return found


def _value_at(arguments: Raw | UnsetType, path: Path) -> str | Decimal | None:
    """What a header says of an argument, None where no header can."""
    value = arguments
    for name in path:
        value = jsonrpc.member(jsonrpc.fields_of(value), name)
    if value is UNSET or jsonrpc.is_object(value):
        return None
    encoded = bytes(value)
    if encoded.startswith(b'"'):
        return jsonrpc.text_of(value)
    if encoded.startswith(b"["):
        return None
    text = encoded.decode()
    number = _number_in(text)
    return text if number is None else number


def _number_in(text: str) -> Decimal | None:
    """The number that a text is, None where it is none or one that nobody computes with."""
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text)


def _says(given: str, value: str | Decimal) -> bool:
    return given == value if isinstance(value, str) else _number_in(given) == value


def _decimal(number: Decimal) -> str:
    is_whole = number == number.to_integral_value()
    return str(int(number)) if is_whole else str(number)
