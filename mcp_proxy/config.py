"""The settings: one table, one frozen object, three ways in.

Each field of `ProxyConfig` is an environment variable `MCP_PROXY_<NAME>` and a command line option
`--<name>`; its annotation carries its type, its bounds and its one-line reason, from which the
parser, the help and the table in the README are made. Unknown names and contradictions are errors
with a sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import (
    HttpServer,
    Server,
    StdioServer,
    as_command,
    demo_server,
    plain,
    read_servers,
)
from mcp_proxy.wire.urls import parse_target

PREFIX = "MCP_PROXY_"

_WEB_CONCURRENCY = "WEB_CONCURRENCY"

#: Field metadata: the value must not be printed.
SECRET = {"secret": True}

Seconds = Annotated[float, Meta(gt=0, le=10 * 365 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1)]


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Times are in seconds, sizes in bytes."""

    command: Annotated[tuple[str, ...], Meta(description="the stdio server to serve")] = ()
    target_url: Annotated[
        tuple[str, ...], Meta(description="the HTTP server to serve: the URL of each replica")
    ] = ()
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
    stdio_transports: Annotated[
        tuple[Literal["streamable", "sse"], ...],
        Meta(description="in front of stdio servers: streamable HTTP at /mcp, HTTP+SSE at /sse"),
    ] = ("streamable", "sse")
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
    allowed_backends: Annotated[
        tuple[str, ...],
        Meta(description="URLs that a session may be routed to besides `target_url`, * for all"),
    ] = ()
    trusted_proxies: Annotated[
        tuple[str, ...],
        Meta(description="addresses whose X-Forwarded-* headers are believed, * for all"),
    ] = ()
    forward_headers: Annotated[
        tuple[str, ...],
        Meta(description="changes to what an HTTP server gets: Name: value sets, Name: removes"),
    ] = ()
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
        if bool(self.command) + bool(self.config) + bool(self.target_url) > 1:
            raise ConfigError("Give one of a command, a target_url and a config file, not both")
        if not self.stdio_transports:
            raise ConfigError("stdio_transports names at least one of streamable and sse")
        for change in self.forward_headers:
            if ":" not in change:
                raise ConfigError("forward_headers takes Name: value to set and Name: to remove")
        for url in self.target_url:
            if parse_target(url) is None:
                raise ConfigError("target_url takes absolute http:// or https:// URLs")
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

    def servers(self) -> list[Server]:
        """The servers to serve; without any setting the bundled demo. Raises ConfigError."""
        if self.config:
            return read_servers(Path(self.config), os.environ)
        if self.command:
            env = dict(pair.split("=", 1) for pair in self.env)
            return [StdioServer("default", self.command, env, self.cwd)]
        if self.target_url:
            return [HttpServer("default", self.target_url)]
        return [demo_server()]


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
    if _WEB_CONCURRENCY in environ:  # gunicorn's own name for it
        texts.setdefault("workers", environ[_WEB_CONCURRENCY])
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
            raise ConfigError(f"{match.group(2)}: {plain(match.group(1))}") from error
        raise ConfigError(str(error)) from error


def _value(setting: Setting, text: str) -> Any:
    if setting.name == "command":
        return as_command(text)
    if setting.name == "target_url":
        return text.split()
    if setting.is_list:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text
