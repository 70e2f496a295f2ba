"""The settings: one table, one frozen object, set in code, in the environment or as options.

Each field of `ProxyConfig` is an environment variable `MCP_PROXY_<NAME>` and a command line option
`--<name>`; its annotation has its type, its bounds and its description, from which the parser, the
help, the checks and the table in the README are made. Unknown names, invalid values and
contradictions raise ConfigError.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta
from msgspec.inspect import (
    BoolType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    UnionType,
    VarTupleType,
)

from mcp_proxy.entry_values import named_files
from mcp_proxy.errors import ConfigError
from mcp_proxy.rate_buckets import LIMIT
from mcp_proxy.server_groups import ALL, SIGN, group_of_all
from mcp_proxy.servers import (
    MAX_SECONDS,
    SCOPE,
    HttpServer,
    Seconds,
    Served,
    Server,
    StdioServer,
    UnservedServer,
    as_command,
    demo_server,
)
from mcp_proxy.servers_file import ignored_keys, read_servers
from mcp_proxy.shown_commands import shown_arguments, shown_command
from mcp_proxy.wire.headers import FIELD_NAME, FIELD_VALUE, FRAMING
from mcp_proxy.wire.urls import ascii_host, parse_target

PREFIX = "MCP_PROXY_"

#: Connections that a gevent worker may have.
GEVENT_CONNECTIONS = 10_000

_LAST_PORT = 65_535

# Settings that have names of others in the environment: gunicorn's, requests' and OpenSSL's.
_OTHER_NAMES = (
    ("WEB_CONCURRENCY", "workers"),
    ("REQUESTS_CA_BUNDLE", "ca_file"),
    ("SSL_CERT_FILE", "ca_file"),
)

#: Field metadata: the value must not be printed.
SECRET = {"secret": True}

Count = Annotated[int, Meta(ge=1)]


# --- entries of lists ----------------------------------------------------------------------------


def _only(what: str, pattern: str = ".*") -> Meta:
    """Entries that match the pattern as a whole; `what` follows "a list of" in errors."""
    return Meta(pattern=rf"\A(?s:{pattern})\Z", description=what)


_NAME = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?"
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%\w+)?"
_PORT = r":[0-9]+"
_ORIGIN = rf"[A-Za-z][A-Za-z0-9+.-]*://({_NAME}|\[{_IPV6}\])({_PORT})?"

Word = Annotated[str, _only("words")]
Url = Annotated[str, _only("absolute http:// or https:// URLs without a password")]
Pair = Annotated[str, _only("NAME=VALUE pairs", r"[^=\0]+=[^\0]*")]
Source = Annotated[
    str,
    _only(
        "NAME=header:NAME or NAME=claim:NAME, with a ? at the end where it is optional",
        r"[^=\0]+=(header|claim):[^=\0]+",
    ),
]
Change = Annotated[
    str,
    _only(
        "changes (Name: value sets, Name: removes)",
        rf"\s*{FIELD_NAME.pattern}\s*:{FIELD_VALUE.pattern}",
    ),
]
Peer = Annotated[
    str,
    _only(
        "addresses and networks (10.0.0.1, 10.0.0.0/8, ::1) or * for all",
        rf"\*|[0-9]+(\.[0-9]+){{3}}(/[0-9]+)?|{_IPV6}(/[0-9]+)?",
    ),
]
Origin = Annotated[
    str, _only("exact origins (https://a.example:8443, null) or * for all", rf"\*|null|{_ORIGIN}")
]
Host = Annotated[  # with a port too: the guard also compares the Host header as a whole
    str,
    _only(
        "exact names (www.example.com, ::1) or * for all",
        rf"\*|{_IPV6}|{_NAME}({_PORT})?|\[{_IPV6}\]{_PORT}",
    ),
]


Limit = Annotated[str, _only("limits such as 20/second, 600/minute:50 or off", LIMIT)]
Scope = Annotated[str, _only("scopes without blanks and quotes", SCOPE)]
Cookie = Annotated[
    str, _only("names of cookies, a * at the end stands for any more", r"[!#$%&'+.^`|~\w-]+\*?")
]


def _most_streams(threads: int) -> int:
    """The standing streams that leave a quarter of the threads free for calls, and at least two."""
    return max(1, threads - max(2, threads // 4))


class ProxyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one transport, wherever it is mounted. Times in seconds, sizes in bytes.

    The constructor raises ConfigError for an invalid value. Lists become tuples.
    """

    session_ttl: Annotated[
        Seconds, Meta(description="how long an unused session and its server live")
    ] = 7200
    unknown_session_status: Annotated[
        Literal[400, 404, "ask"],
        Meta(
            description="HTTP status for a session id that was never issued here; ask: an HTTP "
            "server that knows the id goes on with its session"
        ),
    ] = 400
    failure_status: Annotated[
        Literal["json-rpc", "http"],
        Meta(
            description="what a failure that is not the client's fault makes of a call: 200 with a "
            "JSON-RPC error, or 502, 503 and 504"
        ),
    ] = "json-rpc"
    request_timeout: Annotated[
        Seconds, Meta(description="how long a call may take before it fails")
    ] = 600
    connect_timeout: Annotated[
        Seconds,
        Meta(description="how long to wait for a connection to a backend, or an answer from Redis"),
    ] = 5
    keepalive_interval: Annotated[
        Seconds, Meta(description="how often a silent stream gets a keepalive")
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
    evict_after: Annotated[
        Seconds,
        Meta(
            description="how long a stdio session must have been idle before its server may stop "
            "to make room for another one, where there are `max_sessions`; a request starts it anew"
        ),
    ] = 60
    idle_timeout: Annotated[
        Seconds | None,
        Meta(
            description="how long a stdio session may be idle before its server stops in any case; "
            "a request starts it anew; none: it does not"
        ),
    ] = None
    spare_children: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(
            description="processes of each stdio server that a worker starts ahead, so that a "
            "session need not wait for one to start; they count for `max_sessions`, and end first "
            "where a session needs the place"
        ),
    ] = 0
    stateless_children: Annotated[
        Literal["shared", "one", "per-replica"] | None,
        Meta(
            description="calls of 2026-07-28 to a legacy stdio server. shared: a server process of "
            "each caller, more where calls overlap that the server may ask about; one: a single "
            "process, such calls take turns; per-replica: as shared, but each worker has its own; "
            "none: shared, but not with anonymous strangers"
        ),
    ] = None
    bridge: Annotated[
        bool,
        Meta(
            description="on: where an HTTP server has refused a request of the other era, client "
            "and server are served all the same"
        ),
    ] = True
    input_timeout: Annotated[
        Seconds,
        Meta(
            description="how long a call of 2026-07-28 waits for its client's answer to a question"
        ),
    ] = 300
    keep_detached: Annotated[
        bool,
        Meta(
            description="on: processes of a stdio server that left its process group, such as a "
            "browser, outlive the session; they end with the worker"
        ),
    ] = False
    max_streams: Annotated[
        Count | None,
        Meta(
            description="standing streams of one worker; none, and at most: three quarters of "
            "`threads`; with gevent none: 7500"
        ),
    ] = None
    threads: Annotated[
        Annotated[int, Meta(ge=4)],
        Meta(description="threads of a worker: streams and calls that it serves at once"),
    ] = 64
    allowed_origins: Annotated[
        tuple[Origin, ...] | None,
        Meta(description="Origin headers that browsers may send, * for all; none: loopback only"),
    ] = None
    allowed_hosts: Annotated[
        tuple[Host, ...] | None,
        Meta(
            description="Host names that are served, * for all; none: loopback on a loopback bind"
        ),
    ] = None
    trusted_proxies: Annotated[
        tuple[Peer, ...],
        Meta(
            description="addresses and networks whose X-Forwarded-* headers are believed, * for all"
        ),
    ] = ()
    forward_headers: Annotated[
        tuple[Change, ...],
        Meta(
            description="changes to headers for an HTTP server: Name: value sets, Name: removes, "
            "Name: * passes a caller's credential on",
            extra=SECRET,
        ),
    ] = ()
    preserve_host: Annotated[
        bool,
        Meta(
            description="on: an HTTP server gets the Host header that the client sent, not its own"
        ),
    ] = False
    public_url: Annotated[
        str | None,
        Meta(
            description="the URL at which clients see the root of the proxy: what an HTTP server "
            "says of itself for OAuth, in challenges and metadata, names this; none: it passes as "
            "it is"
        ),
    ] = None
    api_keys: Annotated[
        str | None,
        Meta(
            description="a file of API keys, kept with `mcp-wsgi-proxy key`: who shows none of "
            "them is refused; none: everybody is served"
        ),
    ] = None
    rate_limit: Annotated[
        Limit | None,
        Meta(
            description="requests that each caller may have of a server: N/second or N/minute, "
            "with :BURST for how many may come at once (else N); none: off"
        ),
    ] = None
    rate_limit_scope: Annotated[
        Literal["host", "deployment"],
        Meta(
            description="who counts for `rate_limit`. host: the workers of a gunicorn together; "
            "deployment: all that share the Redis, too (the extra `limits`)"
        ),
    ] = "host"
    backend_proxy: Annotated[
        str | None,
        Meta(
            description="the http:// URL of a proxy through which HTTP servers are reached, or "
            "off; none: as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say, but never for loopback",
            extra=SECRET,
        ),
    ] = None
    sticky_cookies: Annotated[
        tuple[Cookie, ...],
        Meta(description="cookies of a balancer that keep a session at one HTTP server"),
    ] = (*("AWSALB*", "AWSALBTG*", "GCLB", "ARRAffinity*", "INGRESSCOOKIE", "SERVERID", "route"),)
    jwt_issuer: Annotated[
        str | None,
        Meta(
            description="the issuer whose JWTs callers have to show; needs `public_url` and "
            "the extra `auth`; none: no JWT is taken"
        ),
    ] = None
    jwt_audience: Annotated[
        tuple[Word, ...],
        Meta(
            description="what a JWT may be issued for, one of these; none: for the URL of its "
            "endpoint below `public_url`"
        ),
    ] = ()
    jwt_jwks_url: Annotated[
        str | None,
        Meta(description="where the keys of `jwt_issuer` are; none: its metadata say that"),
    ] = None
    jwt_scopes: Annotated[
        tuple[Scope, ...], Meta(description="scopes that each JWT must have, all of them")
    ] = ()

    def __post_init__(self) -> None:
        for setting in settings(type(self)):
            value = getattr(self, setting.name)
            if value is not setting.default:
                msgspec.structs.force_setattr(self, setting.name, _checked(setting, value))
        for peer in self.trusted_proxies:
            _require_network(peer)
        for change in self.forward_headers:
            _require_no_framing(change)
        if self.public_url is not None:
            msgspec.structs.force_setattr(self, "public_url", _as_public_url(self.public_url))
        if self.backend_proxy is not None:
            msgspec.structs.force_setattr(
                self, "backend_proxy", _as_outbound_proxy(self.backend_proxy)
            )

    def __repr__(self) -> str:
        changed = (s for s in settings(type(self)) if getattr(self, s.name) != s.default)
        shown = (f"{s.name}={_shown(s, getattr(self, s.name))}" for s in changed)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def asks(self) -> bool:
        """Whether HTTP servers are asked about session ids that are not known."""
        return self.unknown_session_status == "ask"

    @property
    def unknown_status(self) -> int:
        """The HTTP status for such an id where no server is asked."""
        status = self.unknown_session_status
        return 400 if status == "ask" else status

    @property
    def stream_limit(self) -> int:
        """Standing streams of one worker; the rest of the threads stays free for calls."""
        return self.max_streams or _most_streams(self.threads)

    def require_issuer(self) -> None:
        """Raises ConfigError where the settings for JWTs do not go together."""
        if self.jwt_issuer is None:
            if self.jwt_audience or self.jwt_scopes or self.jwt_jwks_url is not None:
                raise ConfigError("jwt_audience, jwt_jwks_url and jwt_scopes belong to jwt_issuer")
            return
        if self.public_url is None:
            raise ConfigError(
                "jwt_issuer needs public_url: a token is issued for the URL that clients use, "
                "and what a request says of its host proves nothing"
            )
        if self.asks:
            raise ConfigError(
                "unknown_session_status=ask does not go with jwt_issuer: whose session it is that "
                "a server still knows, nobody can say; take 400 or 404"
            )
        _require_https("jwt_issuer", self.jwt_issuer, or_anywhere=self.jwt_jwks_url is not None)
        if self.jwt_jwks_url is not None:
            _require_https("jwt_jwks_url", self.jwt_jwks_url, or_anywhere=True)

    def reason_against(self, server: Served) -> str | None:
        """Why a server would let in callers that it is not for; None where it would not."""
        if server.jwt_scopes and self.jwt_issuer is None:
            return "jwt_scopes needs jwt_issuer: without it nobody has to show a token"
        return None


class ProxyConfig(ProxyOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings: those of a transport, the MCP servers, the store, the log and gunicorn."""

    command: Annotated[tuple[Word, ...], Meta(description="the stdio server to serve")] = ()
    target_url: Annotated[
        tuple[Url, ...], Meta(description="the HTTP server to serve: the URL of each replica")
    ] = ()
    allowed_backends: Annotated[
        tuple[Url, ...],
        Meta(description="URLs that a session may be routed to besides `target_url`, * for all"),
    ] = ()
    ca_file: Annotated[
        str | None,
        Meta(
            description="a file or directory of the CAs of HTTP servers, instead of the well-known "
            "ones; none: REQUESTS_CA_BUNDLE, SSL_CERT_FILE"
        ),
    ] = None
    config: Annotated[
        str | None, Meta(description='a file with {"mcpServers": {...}}: several servers')
    ] = None
    aggregate: Annotated[
        bool,
        Meta(description="serve all servers of that file together, too: at /mcp, and at /sse"),
    ] = False
    reload_on_change: Annotated[
        bool,
        Meta(
            description="on: a change of that file, or of one that it names, is served within "
            "seconds; off: at SIGHUP alone"
        ),
    ] = False
    env: Annotated[
        tuple[Pair, ...],
        Meta(description="NAME=VALUE pairs for the server of `command`", extra=SECRET),
    ] = ()
    env_from: Annotated[
        tuple[Source, ...],
        Meta(
            description="variables that the server of `command` gets of its caller when a session "
            "begins: NAME=header:X-Name of the request, NAME=claim:NAME of the access token; a ? "
            "at the end makes it optional",
            extra=SECRET,  # where somebody wrote the value itself
        ),
    ] = ()
    cwd: Annotated[str | None, Meta(description="working directory of that server")] = None
    stdio_mode: Annotated[
        Literal["per-session"], Meta(description="one server process for each session")
    ] = "per-session"
    stdio_transports: Annotated[
        tuple[Literal["streamable", "sse"], ...],
        Meta(description="in front of stdio servers: streamable HTTP at /mcp, HTTP+SSE at /sse"),
    ] = ("streamable", "sse")
    redis_url: Annotated[
        str | None,
        Meta(description="the Redis that has the sessions; none: in memory", extra=SECRET),
    ] = None
    redis_prefix: Annotated[str, Meta(description="prefix of every key in Redis")] = "mcp-proxy:"
    log_format: Annotated[Literal["text", "json"], Meta(description="form of the log lines")] = (
        "text"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="lowest level in the log")
    ] = "info"
    bind: Annotated[str, Meta(description="address to listen on, HOST:PORT or unix:PATH")] = (
        "127.0.0.1:8080"
    )
    admin_bind: Annotated[
        str | None,
        Meta(
            description="address of its own for /metrics and the probes, HOST:PORT, which each "
            "worker serves by a thread of its own; for operators alone"
        ),
    ] = None
    ctl_socket: Annotated[
        str | None,
        Meta(
            description="path of a unix socket for `mcp-wsgi-proxy ctl`, which the proxy's user "
            "alone can open"
        ),
    ] = None
    metrics: Annotated[
        bool, Meta(description="on: /metrics is also served at `bind`, to whoever reaches that")
    ] = False
    traces: Annotated[
        bool,
        Meta(
            description="on: spans of each call are sent by OTLP over HTTP, as the variables "
            "OTEL_... say; needs the extra `otel`"
        ),
    ] = False
    workers: Annotated[Count, Meta(description="gunicorn workers")] = 1
    worker_class: Annotated[
        Literal["gthread", "gevent"], Meta(description="gunicorn's kind of worker")
    ] = "gthread"
    client_timeout: Annotated[
        Seconds,
        Meta(description="how long a client may send and read nothing, and take for its headers"),
    ] = 30
    max_header_bytes: Annotated[Count, Meta(description="the largest headers of a request")] = (
        32 * 1024
    )
    http_keepalive: Annotated[
        Seconds,
        Meta(description="how long an idle connection is kept; longer than a balancer does"),
    ] = 75
    passing: Annotated[
        Literal["on", "off"],
        Meta(
            description="on: a worker gives a connection to the worker of the same gunicorn that "
            "has its session; off: requests are relayed through Redis"
        ),
    ] = "on"
    session_dir: Annotated[
        str | None,
        Meta(
            description="a directory in which sessions in memory outlive an orderly restart; for "
            "the proxy's user alone"
        ),
    ] = None
    cpu_affinity: Annotated[
        str, Meta(description="one CPU for each gthread worker: auto, off, or a list such as 0,2")
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.command) + bool(self.config) + bool(self.target_url) > 1:
            raise ConfigError("Give only one of a command, a target_url and a config file")
        if not self.stdio_transports:
            raise ConfigError("stdio_transports must name streamable, sse or both")
        self._require_threads_for_calls()
        if (self.env or self.env_from or self.cwd) and not self.command:
            raise ConfigError(
                "env, env_from and cwd belong to a command; in a config file each server has its "
                "own"
            )
        _require_targets("target_url", self.target_url)
        _require_targets("allowed_backends", (url for url in self.allowed_backends if url != "*"))
        if self.ca_file is not None and (self.target_url or self.config):
            require_certificates("ca_file (or REQUESTS_CA_BUNDLE, SSL_CERT_FILE)", self.ca_file)
        if self.cpu_affinity not in ("auto", "off"):
            self.cpus()
        _require_addresses(self.bind)
        if self.admin_bind is not None:
            _require_admin_address(self.admin_bind)

    def _require_threads_for_calls(self) -> None:
        most = _most_streams(self.threads)
        if self.worker_class != "gevent" and (self.max_streams or 0) > most:
            raise ConfigError(
                f"max_streams: expected at most {most} with {self.threads} threads, of which a "
                f"quarter is for calls, got {self.max_streams}: raise threads, or choose "
                "worker_class gevent, whose streams take none"
            )

    @property
    def authenticates(self) -> bool:
        """Whether the settings say who may call."""
        return self.api_keys is not None or self.jwt_issuer is not None

    @property
    def stream_limit(self) -> int:
        """As of the options; with gevent a stream takes no thread but one of its connections."""
        if self.worker_class == "gevent":
            return self.max_streams or GEVENT_CONNECTIONS * 3 // 4
        return super().stream_limit

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ProxyConfig:
        """The configuration in `MCP_PROXY_*` variables; raises ConfigError for an unknown one."""
        return from_values(environment_values(environ))

    def cpus(self) -> tuple[int, ...]:
        """The CPUs that `cpu_affinity` lists; raises ConfigError where it is no list."""
        if not re.fullmatch(r"\d+(,\d+)*", self.cpu_affinity):
            choice = repr(self.cpu_affinity)
            raise ConfigError(f"cpu_affinity must be auto, off or a list such as 0,2, not {choice}")
        return tuple(int(part) for part in self.cpu_affinity.split(","))

    @property
    def counts(self) -> bool:
        """Whether anybody may ask for metrics, so that they are counted."""
        return self.metrics or self.admin_bind is not None or self.ctl_socket is not None

    @property
    def is_for_one_machine(self) -> bool:
        """Whether nothing says that others come from elsewhere, under a name or through a proxy."""
        names = (self.public_url, self.allowed_hosts, self.allowed_origins)
        return names == (None, None, None) and not self.trusted_proxies

    @property
    def directory(self) -> str | None:
        """The path that `cwd` names."""
        return None if self.cwd is None else os.path.expanduser(self.cwd)

    def servers(self) -> list[Server]:
        """The servers to serve; without any setting the bundled demo.

        Those of a file are all there, also one that is not served. Raises ConfigError, also where
        none can be served.
        """
        servers = self.listed()
        if all(isinstance(server, UnservedServer) for server in servers):
            reasons = "; ".join(map(str, self.broken()))
            sentence = f"no server can be served: {reasons}" if reasons else "no server is enabled"
            raise ConfigError(f"{self.config}: {sentence}")
        return servers

    def listed(self) -> list[Server]:
        """As `servers`, also where none of them can be served. Raises ConfigError."""
        self.require_issuer()
        if self.rate_limit_scope == "deployment" and self.redis_url is None:
            raise ConfigError("rate_limit_scope=deployment needs redis_url, where all hosts count")
        servers = self._listed()
        if self.asks and all(isinstance(server, StdioServer) for server in servers):
            raise ConfigError(
                "unknown_session_status=ask asks HTTP servers, and none is served: take 400 or 404"
            )
        return servers

    def _listed(self) -> list[Server]:
        if self.config:
            servers = [*map(self._if_possible, read_servers(Path(self.config), os.environ))]
            return [*servers, group_of_all(servers)] if self.aggregate else servers
        if self.aggregate:
            raise ConfigError("aggregate serves the servers of a file together: set config, too")
        if self.command:
            env, env_from = (
                dict(pair.split("=", 1) for pair in pairs) for pairs in (self.env, self.env_from)
            )
            directory = self.directory
            return [StdioServer("default", self.command, env, directory, env_from=env_from)]
        if self.target_url:
            return [HttpServer("default", self.target_url)]
        return [demo_server()]

    def _if_possible(self, server: Server) -> Server:
        """A server of the file, unless it needs a setting that is not there."""
        reason = None
        if isinstance(server, HttpServer) and self.workers > 1 and self.redis_url is None:
            reason = f"an HTTP server needs redis_url where there are {self.workers} workers"
        elif not isinstance(server, UnservedServer):
            reason = self.reason_against(server)
        return server if reason is None else UnservedServer(server.name, reason)

    def path_of(self, name: str) -> str:
        """The path of the mount of a server, or of a group; "" for what is served at the root."""
        if not self.config or name == ALL:
            return ""
        is_group = name.startswith(SIGN)
        return f"/groups/{name.removeprefix(SIGN)}" if is_group else f"/servers/{name}"

    def broken(self) -> list[UnservedServer]:
        """The servers in whose entries of the file something is wrong. Raises ConfigError."""
        unserved = [each for each in self.listed() if isinstance(each, UnservedServer)]
        return [each for each in unserved if not each.is_disabled]

    def ignored(self) -> list[str]:
        """What nobody reads in the file of `config`, each as a sentence. Raises ConfigError."""
        return ignored_keys(Path(self.config)) if self.config else []


# --- the table -----------------------------------------------------------------------------------

#: The first rows of the table: the MCP servers and the session store.
_FIRST = (
    *("command", "target_url", "allowed_backends", "ca_file", "config", "aggregate"),
    "reload_on_change",
    *("env", "env_from", "cwd", "stdio_mode", "stdio_transports", "redis_url", "redis_prefix"),
)


# The settings whose values are URLs of HTTP servers, which may carry a key in the query.
_TARGETS = ("target_url", "allowed_backends")


class Setting(NamedTuple):
    """One row of the table. `annotation` is the field's own, `takes` the type in it."""

    name: str
    default: Any
    reason: str
    is_list: bool
    secret: bool
    annotation: Any
    takes: msgspec.inspect.Type

    @property
    def default_text(self) -> str:
        """The default as it would be written; empty where there is none."""
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        return "" if self.default is None else str(self.default)

    @property
    def is_switch(self) -> bool:
        """Whether the value is on or off; the option alone means on."""
        return isinstance(self.takes, BoolType)

    @property
    def placeholder(self) -> str:
        """What stands for a value, or for an entry of a list: the choices or the unit."""
        takes = self.takes.item_type if isinstance(self.takes, VarTupleType) else self.takes
        match takes:
            case BoolType():
                return "on|off"
            case LiteralType():
                return "|".join(map(str, takes.values))
            case FloatType():
                return "SECONDS"
            case IntType():
                return "BYTES" if self.name.endswith("_bytes") else "NUMBER"
        return self.name.split("_")[-1].upper()


@cache
def settings(kind: type[ProxyOptions] = ProxyConfig) -> tuple[Setting, ...]:
    """Every setting of a class, in the order of the table."""
    rows = (_setting(field) for field in msgspec.structs.fields(kind))
    return tuple(sorted(rows, key=lambda row: row.name not in _FIRST))


def _setting(field: msgspec.structs.FieldInfo) -> Setting:
    info = msgspec.inspect.type_info(field.type)
    assert isinstance(info, Metadata)
    takes = info.type.types[0] if isinstance(info.type, UnionType) else info.type  # or None
    return Setting(
        field.name,
        field.default,
        str((info.extra_json_schema or {})["description"]),
        is_list=isinstance(takes, VarTupleType),
        secret=bool((info.extra or {}).get("secret")),
        annotation=field.type,
        takes=takes,
    )


# --- values from texts ---------------------------------------------------------------------------


def script_name() -> str:
    """The path at which gunicorn is told, in the environment, that the application stands."""
    return os.environ.get("SCRIPT_NAME", "")


def has_gunicorn_arguments() -> bool:
    """Whether the environment has settings for a gunicorn of the user's own."""
    return bool(os.environ.get("GUNICORN_CMD_ARGS"))


def has_given_sockets() -> bool:
    """Whether systemd hands this process the sockets at which it listens (sd_listen_fds(3))."""
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def given_sockets() -> list[str]:
    """The names of those sockets, in the order of their descriptors; empty where there are none."""
    count = int(os.environ.get("LISTEN_FDS", "0")) if has_given_sockets() else 0
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    return [*names, *[""] * count][:count]


def set_given_sockets(names: Sequence[str]) -> None:
    """Has others find these sockets from now on."""
    told = {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
    os.environ.update(told)
    if not names:
        for name in ("LISTEN_PID", *told):
            os.environ.pop(name, None)


def is_malloc_told() -> bool:
    """Whether glibc has been told in the environment how to allocate memory."""
    names = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    return any(name in os.environ for name in names)


def files_named_in(text: str) -> list[str]:
    """The files whose content comes into the entries of the file of servers with this text."""
    return named_files(text, os.environ)


def environment_values(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The values of `MCP_PROXY_*` variables; raises ConfigError for an unknown name.

    An empty variable counts as not set.
    """
    for name, value in environ.items():
        if not isinstance(value, str):
            raise ConfigError(f"{name}: a variable has a text, not {type(value).__name__}")
    given = {name: value for name, value in environ.items() if value.strip()}
    named = {name: value for name, value in given.items() if name.startswith(PREFIX)}
    texts = {name.removeprefix(PREFIX).lower(): value for name, value in named.items()}
    for ours in ("replica", "child"):  # on a process that another proxy started
        texts.pop(ours, None)
    for other, name in _OTHER_NAMES:
        if other in given:
            texts.setdefault(name, given[other])
    return values_of(texts, spell=lambda name: PREFIX + name.upper())


def value_in_environment(name: str) -> Any:
    """One setting of this process's environment, or its default; raises ConfigError."""
    setting = _known((name,))[name]
    text = os.environ.get(PREFIX + name.upper(), "")
    if not text.strip():
        return setting.default
    return _checked(setting, _value(setting, text), strict=False)


def take_from_environment(name: str) -> str:
    """What a process that was replaced by this one has left in a variable, which is removed."""
    return os.environ.pop(name, "")


def set_in_environment(name: str, value: str) -> None:
    """Sets a setting for what reads the environment of this process from now on."""
    os.environ[PREFIX + name.upper()] = value


def values_of(texts: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
    """Values for `from_values` from texts by name, as in environment variables.

    Raises ConfigError for an unknown name, which it shows as `spell` returns it.
    """
    known = _known(texts, spell)
    return {name: _value(known[name], text) for name, text in texts.items()}


def from_values(values: Mapping[str, Any]) -> ProxyConfig:
    """A configuration from values or texts by name; raises ConfigError for an invalid one."""
    known = _known(values)
    return ProxyConfig(**{n: _checked(known[n], v, strict=False) for n, v in values.items()})


def _known(names: Iterable[str], spell: Callable[[str], str] = str) -> dict[str, Setting]:
    """The settings by name; raises ConfigError if one of `names` is unknown."""
    known = {setting.name: setting for setting in settings()}
    unknown = sorted(set(names) - set(known))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known, 1, 0.8)
        meant = f"; {spell(nearest[0])} is meant, it seems" if nearest else ""
        raise ConfigError(f"Unknown setting {spell(unknown[0])}{meant}")
    return known


def _value(setting: Setting, text: str) -> Any:
    if setting.name == "command":
        return as_command(text)
    return entries_of(setting.name, text) if setting.is_list else text


# What is between two entries of a list in a text. Where entries may have commas one separates only
# if another entry begins behind it; `OPTIONS=a=1,b=2` is one pair.
_BETWEEN_WORDS = re.compile(r"[\s,]+")
_BETWEEN_URLS = re.compile(r"(?:\s|,(?=\s|https?://|\*|\Z))+", re.IGNORECASE)
_BETWEEN_LINES = re.compile(r"\s*\n\s*")
_BETWEEN = {
    "target_url": _BETWEEN_URLS,
    "allowed_backends": _BETWEEN_URLS,
    "env": re.compile(r"\s*,\s*(?=[A-Z_][A-Z0-9_]*=)"),
    "forward_headers": re.compile(r"\s*,\s*(?=[A-Za-z][\w-]*\s*:)"),
}


def entries_of(name: str, text: str) -> list[str]:
    """The entries of the list `name` in a variable of the environment, or in an option.

    Commas, blanks and line breaks separate; pairs and headers, which may have blanks, are separated
    by line breaks alone if there is one, else by commas.
    """
    between = _BETWEEN.get(name, _BETWEEN_WORDS)
    if name in ("env", "forward_headers") and "\n" in text:
        between = _BETWEEN_LINES
    return [entry for entry in between.split(text.lstrip()) if entry]


_QUERY = re.compile(r"\?[^'\"#\s]+")


def _shown(setting: Setting, value: Any) -> str:
    """A value as text, without what may be a secret: the query of a target's URL, too."""
    if setting.secret and value:
        return repr("***")
    if setting.name == "command" and isinstance(value, str):
        return repr(shown_command(as_command(value)))
    if setting.name == "command" and isinstance(value, tuple):
        return repr(shown_arguments(value))
    return _QUERY.sub("?***", repr(value)) if setting.name in _TARGETS else repr(value)


# --- the checks ----------------------------------------------------------------------------------


def _checked(setting: Setting, value: Any, strict: bool = True) -> Any:
    """A value, converted to the type of its setting; raises ConfigError for an invalid one.

    Unless `strict`, a number may be a text, and choices may be written in any case.
    """
    meant = value if strict else _folded(setting.takes, value)
    try:
        return msgspec.convert(meant, setting.annotation, strict=strict)
    except msgspec.ValidationError:
        pass
    if setting.is_list and isinstance(value, list | tuple) and len(value) > 1:
        for entry in value:
            _checked(setting, (entry,), strict)  # raises for the first invalid entry
    raise ConfigError(f"{setting.name}: {_complaint(setting, setting.takes, value)}")


def _folded(takes: msgspec.inspect.Type, value: Any) -> Any:
    """A value with its choices in lower case, and `on` and `off` as what they mean."""
    if isinstance(takes, VarTupleType) and isinstance(value, list | tuple):
        return [_folded(takes.item_type, entry) for entry in value]
    if isinstance(takes, BoolType) and isinstance(value, str):
        return {"on": True, "off": False}.get(value.lower(), value)
    return value.lower() if isinstance(takes, LiteralType) and isinstance(value, str) else value


def _complaint(setting: Setting, takes: msgspec.inspect.Type, value: Any) -> str:
    """The allowed values and the given one, which is hidden if it may be a secret."""
    is_hidden = setting.secret or "@" in repr(value)
    shown = "***" if is_hidden else _shown(setting, value)
    match takes:
        case VarTupleType() if isinstance(value, list | tuple):
            return _complaint(setting, takes.item_type, value[0])
        case VarTupleType() if isinstance(value, str):
            instead = _shown(setting, tuple(_value(setting, value)))
            advice = "" if is_hidden else f"; write {instead}"
            return f"expected {_wanted(takes)}, got the text {shown}{advice}"
        case LiteralType():
            return f"{shown} is not one of {_wanted(takes)}"
        case Metadata():
            return f"only {_wanted(takes)} are taken, not {shown}"
    return f"expected {_wanted(takes)}, got {shown}"


def _wanted(takes: msgspec.inspect.Type) -> str:
    """The values that a type allows, in words."""
    match takes:
        case VarTupleType():
            return f"a list of {_wanted(takes.item_type)}"
        case Metadata():
            return str((takes.extra_json_schema or {})["description"])
        case BoolType():
            return "on or off"
        case LiteralType():
            return ", ".join(str(choice) for choice in takes.values)
        case IntType():
            return f"a whole number of at least {takes.ge}"
        case FloatType():
            return f"a number above {takes.gt} and at most {takes.le}"
    return "a text"


def require_seconds(name: str, value: object, or_zero: bool = False) -> None:
    """Raises ConfigError unless this is a time as settings have it; or 0, where that is one."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if 0 < number <= MAX_SECONDS or (or_zero and number == 0):
        return
    bound = "from 0" if or_zero else "above 0"
    raise ConfigError(
        f"{name} must be a number of seconds {bound} and at most {MAX_SECONDS}, not {value!r}"
    )


def _require_no_framing(change: str) -> None:
    """Raises ConfigError for a change that sets where each message ends."""
    name, _, value = (part.strip() for part in change.partition(":"))
    if value and name.lower() in FRAMING:
        raise ConfigError(f"forward_headers: {name} says where a message ends and cannot be set")


def _require_network(peer: str) -> None:
    """Raises ConfigError unless this is an address, a network or `*`."""
    try:
        if peer != "*":
            ipaddress.ip_network(peer, strict=False)
    except ValueError as error:
        raise ConfigError(f"trusted_proxies: {error}") from None


def _as_public_url(value: str) -> str:
    """The URL without a slash at its end; raises ConfigError for what paths cannot follow."""
    if parse_target(value) is None or "?" in value or "#" in value:
        raise ConfigError(
            "public_url must be an absolute http:// or https:// URL, without a query or a password"
        )
    return value.rstrip("/")


def _require_https(name: str, url: str, or_anywhere: bool) -> None:
    """Raises ConfigError for what is no https:// URL; http:// is for loopback, or anywhere."""
    found = parse_target(url)
    if found is None or "#" in url:
        raise ConfigError(f"{name} must be an absolute https:// URL, without a password")
    host = urlsplit(url).hostname or ""
    if url.lower().startswith("http://") and not (or_anywhere or _is_loopback(host)):
        raise ConfigError(
            f"{name} must be https: who changes what comes over http can sign every token. "
            "For an issuer in your own network set jwt_jwks_url, which may be http"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _as_outbound_proxy(value: str) -> str:
    """`off`, or the URL of a proxy; raises ConfigError for anything else, and does not show it."""
    if value.lower() == "off":
        return "off"
    try:
        parts = urlsplit(value)
        is_proxy = parts.scheme == "http" and bool(ascii_host(parts.hostname or ""))
        if is_proxy and parts.port != 0 and parts.path in ("", "/") and not parts.query:
            return value
    except ValueError:
        pass
    raise ConfigError("backend_proxy must be off or http://HOST:PORT, also with USER:PASSWORD@")


def require_certificates(name: str, path: str) -> None:
    """Raises ConfigError, which names the setting, unless certificates of CAs can be read there."""
    import ssl

    where = "capath" if os.path.isdir(path) else "cafile"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(**{where: path})
    except OSError as error:
        reason = "no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"{name}: {path!r} cannot be used: {reason}") from None


_ADDRESS = re.compile(
    rf"unix:.+|fd://[0-9]+|(tcp://)?({_NAME}|\[{_IPV6}\])?:(?P<port>[0-9]{{1,5}})", re.DOTALL
)


def _require_addresses(bind: str) -> None:
    """Raises ConfigError unless gunicorn can be told to listen there; several have commas."""
    for address in bind.split(","):
        found = _ADDRESS.fullmatch(address.strip())
        if found is None or int(found["port"] or 0) > _LAST_PORT:
            wanted = f"HOST:PORT, with a port up to {_LAST_PORT}, or unix:PATH"
            advice = ""
            if re.fullmatch("[0-9]{1,5}", address) and int(address) <= _LAST_PORT:
                advice = f"; 127.0.0.1:{address} is meant, it seems"
            raise ConfigError(f"bind: expected {wanted}, got {address!r}{advice}")


def _require_admin_address(address: str) -> None:
    """Raises ConfigError unless this is a host and a port."""
    found = _ADDRESS.fullmatch(address)
    if found is None or found["port"] is None or int(found["port"]) > _LAST_PORT:
        raise ConfigError(
            f"admin_bind: expected HOST:PORT, with a port up to {_LAST_PORT}, got {address!r}"
        )


def _require_targets(name: str, urls: Iterable[str]) -> None:
    """Raises ConfigError for a URL that is not a valid target."""
    setting = _known((name,))[name]
    for url in urls:
        if parse_target(url) is None:
            raise ConfigError(f"{name}: {_complaint(setting, setting.takes, (url,))}")
