"""The settings: one table, one frozen object, three ways in.

Each field of `ProxyConfig` is an environment variable `MCP_PROXY_<NAME>` and a command line option
`--<name>`; its annotation carries its type, its bounds and its one-line reason, from which the
parser, the help and the table in the README are made. Unknown names and contradictions are errors
with a sentence.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from mcp_proxy.errors import ConfigError

PREFIX = "MCP_PROXY_"

#: Field metadata: the value must not be printed.
SECRET = {"secret": True}

Seconds = Annotated[float, Meta(gt=0, le=10 * 365 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1)]


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


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Times are in seconds, sizes in bytes."""

    command: Annotated[tuple[str, ...], Meta(description="the stdio server to serve")] = ()
    config: Annotated[
        str | None, Meta(description='a file with {"mcpServers": {...}}: several servers')
    ] = None
    env: Annotated[
        tuple[str, ...],
        Meta(description="NAME=VALUE pairs for the server of `command`", extra=SECRET),
    ] = ()
    cwd: Annotated[str | None, Meta(description="working directory of that server")] = None
    redis_url: Annotated[
        str | None,
        Meta(description="where sessions are shared; none: in memory", extra=SECRET),
    ] = None
    redis_prefix: Annotated[str, Meta(description="what every key in Redis begins with")] = (
        "mcp-proxy:"
    )
    session_ttl: Annotated[
        Seconds, Meta(description="how long an unused session and its server live")
    ] = 7200
    unknown_session_status: Annotated[
        Literal[400, 404], Meta(description="HTTP status for an id that was never issued here")
    ] = 400
    stdio_mode: Annotated[
        Literal["per-session"], Meta(description="one server process for each session")
    ] = "per-session"
    request_timeout: Annotated[
        Seconds, Meta(description="how long a call may take before it is given up")
    ] = 600
    connect_timeout: Annotated[
        Seconds, Meta(description="how long to wait for Redis or a backend to answer at all")
    ] = 5
    keepalive_interval: Annotated[
        Seconds, Meta(description="how often a silent stream says that it is there")
    ] = 15
    sse_after: Annotated[
        Seconds,
        Meta(description="how long a call may be silent before its answer becomes a stream"),
    ] = 5
    max_body_bytes: Annotated[Count, Meta(description="the largest request body")] = 8 * 1024 * 1024
    max_message_bytes: Annotated[
        Count, Meta(description="the largest line that a stdio server may write")
    ] = 64 * 1024 * 1024
    max_sessions: Annotated[
        Count, Meta(description="stdio sessions, and so processes, of one worker")
    ] = 256
    max_streams: Annotated[
        Count | None,
        Meta(description="standing streams of one worker; none: three quarters of `threads`"),
    ] = None
    allowed_origins: Annotated[
        tuple[str, ...] | None,
        Meta(description="Origin headers that browsers may send, * for all; none: loopback only"),
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...] | None,
        Meta(
            description="Host names that are served, * for all; none: loopback on a loopback bind"
        ),
    ] = None
    log_format: Annotated[Literal["text", "json"], Meta(description="form of the log lines")] = (
        "text"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what the log leaves out")
    ] = "info"
    bind: Annotated[str, Meta(description="address to listen on, HOST:PORT or unix:PATH")] = (
        "127.0.0.1:8080"
    )
    workers: Annotated[Count, Meta(description="gunicorn workers")] = 1
    threads: Annotated[
        Annotated[int, Meta(ge=4)],
        Meta(description="threads of a worker: streams and calls that it serves at once"),
    ] = 64
    worker_class: Annotated[
        Literal["gthread", "gevent"], Meta(description="gunicorn's kind of worker")
    ] = "gthread"
    cpu_affinity: Annotated[
        str, Meta(description="one CPU for each gthread worker: auto, off, or a list such as 0,2")
    ] = "auto"

    def __post_init__(self) -> None:
        if self.command and self.config:
            raise ConfigError("Give either a command or a config file, not both")
        if (self.env or self.cwd) and not self.command:
            raise ConfigError(
                "env and cwd belong to a command; in a config file each server has its own"
            )
        for pair in self.env:
            if "=" not in pair:
                raise ConfigError("env takes NAME=VALUE pairs, and one of them has no =")
        if self.cpu_affinity not in ("auto", "off"):
            self.cpus()

    def __repr__(self) -> str:
        shown = (
            f"{s.name}={'***' if s.secret and getattr(self, s.name) else getattr(self, s.name)!r}"
            for s in settings()
            if getattr(self, s.name) != s.default
        )
        return f"ProxyConfig({', '.join(shown)})"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ProxyConfig:
        """The configuration in `MCP_PROXY_*` variables; raises ConfigError for an unknown one."""
        return from_values(environment_values(environ))

    @property
    def stream_limit(self) -> int:
        """Standing streams of one worker; the rest of the threads stays free for calls."""
        return self.max_streams or max(1, self.threads - max(2, self.threads // 4))

    def cpus(self) -> tuple[int, ...]:
        """The CPUs that `cpu_affinity` lists; raises ConfigError where it is no such list."""
        if not re.fullmatch(r"\d+(,\d+)*", self.cpu_affinity):
            raise ConfigError("cpu_affinity is auto, off, or a list of CPU numbers such as 0,2")
        return tuple(int(part) for part in self.cpu_affinity.split(","))

    def servers(self) -> list[StdioServer]:
        """The servers to serve; without any setting the bundled demo. Raises ConfigError."""
        if self.config:
            return read_servers(Path(self.config))
        if self.command:
            env = dict(pair.split("=", 1) for pair in self.env)
            return [StdioServer("default", self.command, env, self.cwd)]
        return [demo_server()]


def demo_server() -> StdioServer:
    """The server that comes with the package."""
    script = Path(__file__).parent / "demo" / "server.py"
    return StdioServer("demo", (sys.executable, "-I", str(script)))


# --- the table -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    default: Any
    reason: str
    is_list: bool
    secret: bool


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the table."""
    for field in msgspec.structs.fields(ProxyConfig):
        info = msgspec.inspect.type_info(field.type)
        assert isinstance(info, msgspec.inspect.Metadata)
        reason = (info.extra_json_schema or {})["description"]
        yield Setting(
            field.name,
            field.default,
            str(reason),
            is_list="tuple" in str(field.type),
            secret=bool((info.extra or {}).get("secret")),
        )


def environment_values(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The values that `MCP_PROXY_*` variables give; raises ConfigError for an unknown name."""
    named = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    texts = {name.removeprefix(PREFIX).lower(): value for name, value in named.items()}
    texts.pop("replica", None)  # what marks the children of a proxy that started this one
    return values_of(texts, spell=lambda name: PREFIX + name.upper())


def values_of(texts: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
    """Values for `from_values` from texts by name, as environment variables carry them.

    `spell` says how a name was written, for the ConfigError that an unknown name raises.
    """
    known = {setting.name: setting for setting in settings()}
    unknown = sorted(set(texts) - set(known))
    if unknown:
        raise ConfigError(f"Unknown setting {spell(unknown[0])}")
    return {name: _value(known[name], text) for name, text in texts.items()}


def from_values(values: Mapping[str, Any]) -> ProxyConfig:
    """A configuration from values or texts by name; raises ConfigError where one does not fit."""
    try:
        return msgspec.convert(dict(values), ProxyConfig, strict=False)
    except msgspec.ValidationError as error:
        match = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", str(error), re.DOTALL)
        if match:
            raise ConfigError(f"{match.group(2)}: {_plain(match.group(1))}") from error
        raise ConfigError(str(error)) from error


def _plain(complaint: str) -> str:
    """msgspec's complaint about a text, as the one who wrote the text understands it."""
    complaint = complaint.replace(", got `str`", "").replace("`", "")
    return complaint[:1].lower() + complaint[1:] if complaint[1:2].islower() else complaint


def _value(setting: Setting, text: str) -> Any:
    if setting.name == "command":
        return as_command(text)
    if setting.is_list:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


# --- the config file -----------------------------------------------------------------------------

_BOM = b"\xef\xbb\xbf"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Switch(msgspec.Struct):
    """Whether a server of the file is to be served."""

    disabled: bool = False
    enabled: bool = True


class _Entry(msgspec.Struct):
    """A server in the file; keys that other programs use are left alone."""

    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None


class _File(msgspec.Struct):
    servers: dict[str, Any] = msgspec.field(name="mcpServers")


def read_servers(path: Path, environ: Mapping[str, str] = os.environ) -> list[StdioServer]:
    """The enabled servers of a `{"mcpServers": {...}}` file.

    `${NAME}` and `${NAME:-default}` are replaced from `environ`. Raises ConfigError with a sentence
    that names the file and the server.
    """
    try:
        entries = msgspec.json.decode(path.read_bytes().removeprefix(_BOM), type=_File).servers
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {_plain(str(error))}") from error
    servers = [_read_server(path, name, entry, environ) for name, entry in entries.items()]
    enabled = [server for server in servers if server is not None]
    if not enabled:
        raise ConfigError(f"{path}: no server is enabled")
    return enabled


def _read_server(
    path: Path, name: str, entry: Any, environ: Mapping[str, str]
) -> StdioServer | None:
    """The server of one entry, None if it is switched off."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{path}: a server's name becomes part of a path, {name!r} cannot")
    try:
        switch = msgspec.convert(entry, _Switch)
        if switch.disabled or not switch.enabled:
            return None
        return _server(name, msgspec.convert(_expanded(entry, environ), _Entry))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {name}: {_plain(str(error))}") from error


def _server(name: str, entry: _Entry) -> StdioServer:
    if entry.url is not None:
        raise ValueError("servers with a url are not supported yet")
    if not entry.command:
        raise ValueError("a command is missing")
    return StdioServer(name, (entry.command, *entry.args), entry.env, entry.cwd)


def _expanded(entry: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """An entry with variables replaced, in the fields that are ours."""
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


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"command: {str(error).lower()}") from error


def as_command(command: Sequence[str] | str) -> tuple[str, ...]:
    """A command as arguments, a string split as a shell would; ConfigError if it is empty."""
    argv = tuple(_split(command)) if isinstance(command, str) else tuple(command)
    if not argv:
        raise ConfigError("The command of a stdio server is empty")
    return argv
