"""The MCP servers that are to be served, and the file that lists them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mcp_proxy.errors import ConfigError
from mcp_proxy.wire.urls import parse_target


class StdioServer(msgspec.Struct, frozen=True):
    """An MCP server that is started as a child process and speaks over its standard streams."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str | None = None

    def __str__(self) -> str:
        return shlex.join(self.argv)

    def __repr__(self) -> str:
        return (
            f"StdioServer({self.name!r}, {self.argv!r}, env={sorted(self.env)}, cwd={self.cwd!r})"
        )


class HttpServer(msgspec.Struct, frozen=True):
    """An MCP server that speaks HTTP: the URLs of its replicas."""

    name: str
    urls: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(url.partition("?")[0] for url in self.urls)

    def __repr__(self) -> str:
        return f"HttpServer({self.name!r}, {str(self)!r})"


Server = StdioServer | HttpServer


def demo_server() -> StdioServer:
    """The demo server of this package."""
    script = Path(__file__).parent / "demo" / "server.py"
    return StdioServer("demo", (sys.executable, "-I", str(script)))


_BOM = b"\xef\xbb\xbf"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Switch(msgspec.Struct):
    """Whether a server of the file is to be served."""

    disabled: bool = False
    enabled: bool = True


class _Entry(msgspec.Struct):
    """A server in the file; keys of other programs are ignored."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None


class _File(msgspec.Struct):
    servers: dict[str, Any] = msgspec.field(name="mcpServers")


def read_servers(path: Path, environ: Mapping[str, str]) -> list[Server]:
    """The enabled servers of a `{"mcpServers": {...}}` file.

    `${NAME}` and `${NAME:-default}` are replaced from `environ`. Raises ConfigError with a sentence
    that names the file and the server.
    """
    try:
        entries = msgspec.json.decode(path.read_bytes().removeprefix(_BOM), type=_File).servers
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {plain(str(error))}") from error
    servers = [_read_server(path, name, entry, environ) for name, entry in entries.items()]
    enabled = [server for server in servers if server is not None]
    if not enabled:
        raise ConfigError(f"{path}: no server is enabled")
    return enabled


def _read_server(path: Path, name: str, entry: Any, environ: Mapping[str, str]) -> Server | None:
    """The server of one entry, None if it is switched off."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{path}: a server's name must fit into a URL path, {name!r} does not")
    try:
        switch = msgspec.convert(entry, _Switch)
        if switch.disabled or not switch.enabled:
            return None
        return _server(name, msgspec.convert(_expanded(entry, environ), _Entry))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {name}: {plain(str(error))}") from error


def _server(name: str, entry: _Entry) -> Server:
    if entry.url is not None and entry.command is not None:
        raise ValueError("a server has either a command or a url, not both")
    if entry.url is not None:
        if parse_target(entry.url) is None:
            raise ValueError("its url is not an absolute http:// or https:// URL")
        return HttpServer(name, (entry.url,))
    if not entry.command:
        raise ValueError("a command is missing")
    return StdioServer(name, (entry.command, *entry.args), entry.env, entry.cwd)


def _expanded(entry: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an entry that we use, with variables replaced."""
    ours = {field.name for field in msgspec.structs.fields(_Entry)}
    return {name: _expand(value, environ) for name, value in entry.items() if name in ours}


def _expand(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, str):
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
    """A command as arguments, a string split as a shell would; ConfigError if it is empty."""
    argv = tuple(split_command(command)) if isinstance(command, str) else tuple(command)
    if not argv:
        raise ConfigError("The command of a stdio server is empty")
    return argv


def plain(complaint: str) -> str:
    """msgspec's error message, in plain words for the author of the text."""
    complaint = complaint.replace(", got `str`", "").replace("`", "")
    return complaint[:1].lower() + complaint[1:] if complaint[1:2].islower() else complaint
