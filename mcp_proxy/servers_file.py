"""The file that lists MCP servers, in the shapes that clients of MCP write."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mcp_proxy.entry_values import EntryValues, read_env_file
from mcp_proxy.errors import ConfigError
from mcp_proxy.rate_buckets import rate_of
from mcp_proxy.server_groups import read_groups, tools_of
from mcp_proxy.servers import (
    HttpServer,
    Seconds,
    Server,
    StdioServer,
    UnservedServer,
    WrongValue,
    kind_of,
    path_name,
    require_types,
)
from mcp_proxy.wire.headers import FIELD_NAME, FIELD_VALUE, FRAMING
from mcp_proxy.wire.urls import parse_target

_BOM = b"\xef\xbb\xbf"

# Where the servers stand in a file; the second is the name in VS Code's mcp.json.
_SERVERS = ("mcpServers", "servers")

# A string, and the colon behind it where it is a key; the beginning and the end of what is nested.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?=\s*(:))?|[{}\[\]]')

# A string, or a number as Python's reader takes it.
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|-?(?:[0-9][0-9.eE+-]*|Infinity)|NaN')

# A string; a comment; a comma before the end of a list or an object.
_COMMENTED = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)

# Where an entry says how its server is spoken to, in the words of several clients; and whether a
# word, without its dashes, means HTTP.
_TYPES = ("type", "transport", "transportType")
_WIRES = {"stdio": False, "http": True, "streamablehttp": True, "sse": True}

# Other keys of an entry that other programs have and that mean nothing here.
_FOREIGN = frozenset(
    {
        *(*_TYPES, "alwaysAllow", "autoApprove", "dev", "gallery"),
        *("description", "icon", "note", "version"),
    }
)

# Keys by which other programs hide tools, and what does that here.
_HIDING = {
    "includeTools": '"tools": {"allow": [...]}',
    "excludeTools": '"tools": {"deny": [...]}',
    "disabledTools": '"tools": {"deny": [...]}',
}

# How much like a key of ours an unknown one is that must be meant for it.
_ALIKE = 0.8


class _Switch(msgspec.Struct):
    """Whether a server of the file is to be served."""

    disabled: bool = False
    enabled: bool = True


class _Entry(msgspec.Struct):
    """A server in the file; what other keys there are `ignored_keys` tells."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    env_file: str | None = msgspec.field(default=None, name="envFile")
    env_from: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    server_url: str | None = msgspec.field(default=None, name="serverUrl")
    http_url: str | None = msgspec.field(default=None, name="httpUrl")
    headers: dict[str, str] = {}
    timeout: Seconds | None = None
    rate_limit: str | None = None
    jwt_scopes: list[str] = []


class _Key(NamedTuple):
    """A key in the file: the keys that lead to it, itself included, and its line.

    `first` is the line where the same object has it already.
    """

    way: tuple[str, ...]
    line: int
    first: int | None


def read_servers(path: Path, environ: Mapping[str, str]) -> list[Server]:
    """The servers of a `{"mcpServers": {...}}` file, or one with `servers` in its place.

    `${NAME}`, `${env:NAME}` and `${NAME:-default}` are replaced from `environ`, `${file:PATH}` by
    what is in that file; comments and commas at the end of a list are skipped, null counts as
    absent. Each is named by its `path_name`. One that is disabled, or in whose entry something is
    wrong, is an UnservedServer. Raises ConfigError with a sentence that names the file where that
    cannot be read, names no server, or names two that would be served at one place. The groups of
    the file come last.
    """
    text, entries, groups = _read(path)
    if not entries:
        raise ConfigError(f"{path}: there is no server in it")
    found: dict[str, tuple[str, Server]] = {}
    for name, entry in entries.items():
        if name in ("", ".", ".."):
            raise ConfigError(f"{path}: {name!r} is no name for a server: it has to be in its URL")
        server = _read_entry(name, entry, environ, text)
        other, _ = found.setdefault(server.name, (name, server))
        if other != name:
            raise ConfigError(
                f"{path}: {other!r} and {name!r} would both be served at /servers/{server.name}: "
                "rename one of them"
            )
    servers = [server for _, server in found.values()]
    try:
        return [*servers, *read_groups(groups, [server.name for server in servers])]
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def ignored_keys(path: Path) -> list[str]:
    """What nobody reads in the entries of a file, each as a sentence with its line."""
    known = {*_known_keys(), *_FOREIGN}
    return [
        f"{path}, line {key.line}: {key.way[1]}: {_ignored(key.way[2])}"
        for key in _keys(_read(path)[0])
        if len(key.way) == 3 and key.way[0] in _SERVERS and key.way[2] not in known
    ]


def _ignored(key: str) -> str:
    """That a key is ignored, and what is there in place of one that would have hidden tools."""
    instead = f"; no tool is hidden by it: {_HIDING[key]} does that" if key in _HIDING else ""
    return f"{key!r} is not known and is ignored{instead}"


def _read(path: Path) -> tuple[str, dict[str, Any], Any]:
    """The text of a file, its servers by their names, and its groups."""
    text = _text(path)
    try:
        document = msgspec.json.decode(text)
        servers = _servers(document)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{_malformed(text) or f': {plain(str(error))}'}") from error
    for way, line, first in _keys(text):
        if first is not None:
            what = repr(way[-1])
            if way[0] in _SERVERS and len(way) > 1:
                what = f"the server {what}" if len(way) == 2 else f"{way[1]}: {what}"
            raise ConfigError(f"{path}, line {line}: {what} is there twice, first on line {first}")
    return text, servers, document.get("groups")


def _text(path: Path) -> str:
    """What is in the file, with spaces in place of comments and of commas that are too many."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: the file is not UTF-8") from error
    for pattern in (_COMMENTED, _TRAILING):
        text = pattern.sub(lambda m: m[1] or re.sub(r"[^\n]", " ", m[0]), text)
    return text


def _malformed(text: str) -> str | None:
    """Where a text is no JSON, and why; None for one that is.

    Python's reader tells where, and takes numbers without end and half characters.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}, column {error.colno}: {plain(error.msg)}"
    except (ValueError, RecursionError):  # a number of thousands of digits
        pass
    for found in _SCALAR.finditer(text):
        try:
            msgspec.json.decode(found[0])
        except ValueError:
            start = found.start()
            line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
            return f", line {line}, column {column}: {_flaw_of(found[0])}"
    return None


def _flaw_of(scalar: str) -> str:
    if scalar.startswith('"'):
        return "half a character"
    return "a number that is too large" if scalar[-1].isdigit() else "no number of JSON"


def _servers(document: Any) -> dict[str, Any]:
    """The servers of a document by their names; raises ValueError."""
    given = document if isinstance(document, dict) else {}
    named = [name for name in _SERVERS if given.get(name) is not None]
    if len(named) != 1:
        both = "only one of them may name the servers"
        raise ValueError(
            f"{' and '.join(named)}: {both}" if named else 'the form is {"mcpServers": {...}}'
        )
    servers = given[named[0]]
    if not isinstance(servers, dict):
        raise ValueError(f"{named[0]} is to be an object, with a server under each name")
    return servers


def _keys(text: str) -> Iterator[_Key]:
    """Every key of the objects in a text, which is JSON, in their order."""
    way: list[str] = []
    lines: list[dict[str, int]] = []  # of the keys of each object that has begun
    line, at = 1, 0
    for token in _TOKEN.finditer(text):
        line, at = line + text.count("\n", at, token.start()), token.start()
        if token[0] in "{[":
            way.append("")
            lines.append({})
        elif token[0] in "}]":
            way.pop()
            lines.pop()
        elif token[1]:
            way[-1] = json.loads(token[0])
            yield _Key(tuple(way), line, lines[-1].get(way[-1]))
            lines[-1].setdefault(way[-1], line)


def _known_keys() -> list[str]:
    return [*_fields_of(_Entry), *_fields_of(_Switch), "tools"]


def _fields_of(kind: type[msgspec.Struct]) -> list[str]:
    """The keys of an entry that are fields of this class."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _require_no_slip(entry: dict[str, Any]) -> None:
    """Raises ValueError for a key that is nearly one of ours: its server would not be the same."""
    known = _known_keys()
    for key in entry:
        if key not in known and key not in _FOREIGN:
            nearest = difflib.get_close_matches(key.lower(), known, 1, _ALIKE)
            nearest += [one for one in known if sorted(one) == sorted(key.lower())]  # agrs, ulr
            if nearest:
                raise ValueError(f"{key!r} is not known; {nearest[0]!r} is meant, it seems")


def _read_entry(name: str, entry: Any, environ: Mapping[str, str], text: str) -> Server:
    """The server of one entry of the file that has this text."""
    at, key = path_name(name), ""
    try:
        return _server(at, entry, environ)
    except WrongValue as error:
        reason, key = str(error), error.key
    except ConfigError as error:  # of a constructor, which names the server
        reason = str(error).removeprefix(f"{at}: ")
    except (ValueError, RecursionError) as error:
        reason = plain(str(error))
    return UnservedServer(at, f"{reason} (line {_line_of(text, name, key)})")


def _line_of(text: str, name: str, key: str) -> int:
    """The line where an entry begins, or a key of it, where that is not empty."""
    rest = (name, key) if key else (name,)
    ways = [(section, *rest) for section in _SERVERS]
    return next(found.line for found in _keys(text) if found.way in ways)


def _server(name: str, entry: Any, environ: Mapping[str, str]) -> Server:
    """What an entry describes; raises ValueError and ConfigError for what cannot be served."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object with a command or a url, got {kind_of(entry)}")
    given = _without_nulls(entry)
    require_types(_Switch, given)
    switch = msgspec.convert(given, _Switch)
    if switch.disabled or not switch.enabled:
        return UnservedServer(name, "it is disabled", is_disabled=True)
    _require_no_slip(given)
    values = EntryValues(environ)
    expanded = values.expanded(given, _fields_of(_Entry))
    require_types(_Entry, expanded)
    made = msgspec.convert(expanded, _Entry)
    url = _url(made)
    _require_wire(given, made.command, url)
    server = _stdio_server(name, made) if url is None else _http_server(name, url, made)
    return msgspec.structs.replace(
        server,
        secrets=tuple(values.secrets),
        tools=tools_of(given.get("tools")),
        rate_limit=_rate_limit(made.rate_limit),
        jwt_scopes=made.jwt_scopes,
    )


def _rate_limit(text: str | None) -> str | None:
    """The `rate_limit` of an entry; raises WrongValue for what is none."""
    if text is not None:
        try:
            rate_of(text)
        except ValueError as error:
            raise WrongValue("rate_limit", f"{error}, got {text!r}") from None
    return text


def _require_wire(entry: dict[str, Any], command: str | None, url: str | None) -> None:
    """Raises ValueError unless there is a command or a url, as the type of the entry says."""
    if url is not None and command is not None:
        raise ValueError("a server has either a command or a url, not both")
    for key in _TYPES:
        value = entry.get(key)
        if not isinstance(value, str):
            continue
        is_http = _WIRES.get(re.sub("[-_]", "", value.lower()))
        if is_http is None:
            raise ValueError(f"{key}: {value!r} is not one of stdio, http, streamable-http, sse")
        if is_http is (url is None):
            missing = "url" if is_http else "command"
            raise ValueError(f"{key} is {value!r}, and a {missing} is missing")
    if url is None and not command:
        raise ValueError("a command is missing")


def _stdio_server(name: str, entry: _Entry) -> StdioServer:
    if entry.headers:
        raise ValueError("headers belong to a url")
    argv = (entry.command or "", *entry.args)
    env = {**read_env_file(entry.env_file), **entry.env} if entry.env_file else entry.env
    cwd = None if entry.cwd is None else os.path.expanduser(entry.cwd)
    return StdioServer(name, argv, env, cwd, entry.timeout, env_from=entry.env_from)


def _http_server(name: str, url: str, entry: _Entry) -> HttpServer:
    if entry.env_from:
        raise ValueError("env_from belongs to a command")
    if parse_target(url) is None:
        raise ValueError("its url is not an absolute http:// or https:// URL")
    headers = tuple(_header(key.strip(), text.strip()) for key, text in entry.headers.items())
    return HttpServer(name, (url,), headers, entry.timeout)


def _header(name: str, value: str) -> str:
    """A header of an entry as it is kept; raises ValueError for one that cannot be sent."""
    if not FIELD_NAME.fullmatch(name) or not value or not FIELD_VALUE.fullmatch(value):
        raise ValueError(f"the header {name!r} has no name or no value that can be sent")
    if name.lower() in FRAMING:
        raise ValueError(f"the header {name!r} says where a message ends: leave it out")
    return f"{name}: {value}"


def _url(entry: _Entry) -> str | None:
    """The URL of an entry by whichever name it has."""
    named = {"url": entry.url, "serverUrl": entry.server_url, "httpUrl": entry.http_url}
    given = {name: url for name, url in named.items() if url is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(given)} are different: only one is served")
    return next(iter(given.values()), None)


def _without_nulls(entry: Any) -> Any:
    """An entry without what is null in it, or in an object in it."""
    if not isinstance(entry, dict):
        return entry
    return {key: _without_nulls(value) for key, value in entry.items() if value is not None}


def plain(complaint: str) -> str:
    """An error message about a text, in plain words for its author."""
    complaint = complaint.replace("`", "")
    return complaint[:1].lower() + complaint[1:] if complaint[1:2].islower() else complaint
