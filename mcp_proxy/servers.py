"""The MCP servers that are to be served, and the file that lists them."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from mcp_proxy.errors import ConfigError
from mcp_proxy.wire.urls import parse_target


class StdioServer(msgspec.Struct, frozen=True):
    """An MCP server that is started as a child process and speaks over its standard streams.

    `argv` may be given as a text, which is split as a shell would. `timeout` is how long a call may
    take, in seconds; None: as the settings say. The constructor raises ConfigError.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        force_setattr(self, "argv", as_command(self.argv))
        if self.cwd is not None:
            force_setattr(self, "cwd", os.fspath(self.cwd))
        _require_types(self)

    def __str__(self) -> str:
        return shlex.join(self.argv)

    def __repr__(self) -> str:
        return (
            f"StdioServer({self.name!r}, {self.argv!r}, env={sorted(self.env)}, cwd={self.cwd!r})"
        )


class HttpServer(msgspec.Struct, frozen=True):
    """An MCP server that speaks HTTP: the URLs of its replicas.

    `headers`, each as `Name: value`, are set on every request to it. `timeout` is as for a
    StdioServer. The constructor raises ConfigError.
    """

    name: str
    urls: tuple[str, ...]
    headers: tuple[str, ...] = ()
    timeout: float | None = None

    def __post_init__(self) -> None:
        urls = (self.urls,) if isinstance(self.urls, str) else tuple(self.urls)
        force_setattr(self, "urls", urls)
        _require_types(self)
        if not urls or not all(map(parse_target, urls)):
            raise ConfigError(f"{self.name}: its URLs must be absolute http:// or https:// URLs")

    def __str__(self) -> str:
        return " ".join(url.partition("?")[0] for url in self.urls)

    def __repr__(self) -> str:
        return f"HttpServer({self.name!r}, {str(self)!r})"


Server = StdioServer | HttpServer


def _require_types(server: Server) -> None:
    """Raises ConfigError where a field has a value of another type."""
    for field in msgspec.structs.fields(server):
        try:
            msgspec.convert(getattr(server, field.name), field.type)
        except msgspec.ValidationError as error:
            kind = type(server).__name__
            raise ConfigError(f"{kind}: {field.name}: {plain(str(error))}") from None


def demo_server() -> StdioServer:
    """The demo server of this package."""
    script = Path(__file__).parent / "demo" / "server.py"
    return StdioServer("demo", (python(), "-I", str(script)))


def python() -> str:
    """The interpreter of this process; uWSGI, for one, names itself as `sys.executable`."""
    if re.match(r"python|pypy", os.path.basename(sys.executable)):
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (version, "python3", "python"):
            found = os.path.join(prefix, "bin", name)
            if os.access(found, os.X_OK):
                return found
    return shutil.which(version) or sys.executable


_BOM = b"\xef\xbb\xbf"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")
_INPUT = re.compile(r"\$\{input:[^}]*\}")
_HEADER = re.compile(r"[^\s:]+: [^\r\n\0]+")

# A string; a comment; a comma before the end of a list or an object.
_COMMENTED = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_TRAILING = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)

# Keys of an entry that other programs have and that mean nothing here.
_FOREIGN = frozenset(
    {
        *("type", "transport", "transportType", "alwaysAllow", "autoApprove"),
        *("description", "icon", "note", "version"),
    }
)

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
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    timeout: Annotated[float, Meta(gt=0)] | None = None


class _File(msgspec.Struct):
    servers: dict[str, Any] = msgspec.field(name="mcpServers")


def read_servers(path: Path, environ: Mapping[str, str]) -> list[Server]:
    """The enabled servers of a `{"mcpServers": {...}}` file.

    `${NAME}`, `${env:NAME}` and `${NAME:-default}` are replaced from `environ`; comments and commas
    at the end of a list are skipped. Raises ConfigError with a sentence that names the file and the
    server.
    """
    entries = _entries(path)
    servers = [_read_server(path, name, entry, environ) for name, entry in entries.items()]
    enabled = [server for server in servers if server is not None]
    if not enabled:
        raise ConfigError(f"{path}: no server is enabled")
    return enabled


def ignored_keys(path: Path) -> list[str]:
    """What nobody reads in the entries of a file, each as a sentence with its line."""
    found = []
    text = _text(path)
    for name, entry in _entries(path).items():
        after = max(0, text.find(json.dumps(name, ensure_ascii=False)))
        for key in entry if isinstance(entry, dict) else ():
            if key not in _known_keys() and key not in _FOREIGN:
                at = max(0, text.find(json.dumps(key, ensure_ascii=False), after))
                line = text.count("\n", 0, at) + 1
                found.append(f"{path}, line {line}: {name}: {key!r} is not known and is ignored")
    return found


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


def _entries(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(_text(path), type=_File).servers
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {plain(str(error))}") from error


def _known_keys() -> list[str]:
    kinds: tuple[type[msgspec.Struct], ...] = (_Entry, _Switch)
    return [field.name for kind in kinds for field in msgspec.structs.fields(kind)]


def _require_no_slip(entry: dict[str, Any]) -> None:
    """Raises ValueError for a key that is nearly one of ours: its server would not be the same."""
    known = _known_keys()
    for key in entry:
        if key not in known and key not in _FOREIGN:
            nearest = difflib.get_close_matches(key.lower(), known, 1, _ALIKE)
            if nearest:
                raise ValueError(f"{key!r} is not known; {nearest[0]!r} is meant, it seems")


def _read_server(path: Path, name: str, entry: Any, environ: Mapping[str, str]) -> Server | None:
    """The server of one entry, None if it is switched off."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{path}: a server's name must fit into a URL path, {name!r} does not")
    try:
        switch = msgspec.convert(entry, _Switch)
        if switch.disabled or not switch.enabled:
            return None
        _require_no_slip(entry)
        return _server(name, msgspec.convert(_expanded(entry, environ), _Entry))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {name}: {plain(str(error))}") from error


def _server(name: str, entry: _Entry) -> Server:
    if entry.url is not None and entry.command is not None:
        raise ValueError("a server has either a command or a url, not both")
    if entry.url is not None:
        if parse_target(entry.url) is None:
            raise ValueError("its url is not an absolute http:// or https:// URL")
        headers = tuple(f"{key.strip()}: {text.strip()}" for key, text in entry.headers.items())
        for header in headers:
            if not _HEADER.fullmatch(header):
                raise ValueError(f"the header {header.partition(':')[0]!r} has no name or no value")
        return HttpServer(name, (entry.url,), headers, entry.timeout)
    if not entry.command:
        raise ValueError("a command is missing")
    if entry.headers:
        raise ValueError("headers belong to a url")
    argv = (entry.command, *entry.args)
    return StdioServer(name, argv, entry.env, entry.cwd, entry.timeout)


def _expanded(entry: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an entry that we use, with variables replaced."""
    ours = {field.name for field in msgspec.structs.fields(_Entry)}
    return {name: _expand(value, environ) for name, value in entry.items() if name in ours}


def _expand(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        if asked := _INPUT.search(value):
            raise ValueError(
                f"{asked[0]} asks the user of an editor, and there is none: name an environment "
                "variable, ${NAME}"
            )
        return _VARIABLE.sub(lambda match: _lookup(match, environ), value)
    if isinstance(value, list):
        return [_expand(item, environ) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, environ) for key, item in value.items()}
    return value


def _lookup(match: re.Match[str], environ: Mapping[str, str]) -> str:
    name, default = match.groups()
    value = environ.get(name, default)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value


def split_command(command: str) -> list[str]:
    """A command line as a shell would split it; raises ConfigError for an invalid one."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command: {str(error).lower()}") from error


def as_command(command: Sequence[str] | str) -> tuple[str, ...]:
    """A command as arguments, a string split as a shell would; ConfigError for any other type,
    and if it is empty.
    """
    if isinstance(command, str):
        argv = tuple(split_command(command))
    elif isinstance(command, Sequence) and all(isinstance(part, str) for part in command):
        argv = tuple(command)
    else:
        raise ConfigError(f"A command is a text or a list of texts, not {command!r}")
    if not argv:
        raise ConfigError("The command of a stdio server is empty")
    return argv


def plain(complaint: str) -> str:
    """msgspec's error message, in plain words for the author of the text."""
    complaint = complaint.replace(", got `str`", "").replace("`", "")
    return complaint[:1].lower() + complaint[1:] if complaint[1:2].islower() else complaint
