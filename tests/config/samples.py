"""A value for every setting, as text and as what it means."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sample(NamedTuple):
    """A setting's text in the environment, its words on the command line, and its value."""

    text: str
    words: tuple[str, ...]
    value: Any


def _one(text: str, value: Any) -> Sample:
    return Sample(text, (text,), value)


#: Every setting but `command`, which the command line takes after `--`.
SAMPLES: dict[str, Sample] = {
    "target_url": Sample(
        "http://a/mcp https://b", ("http://a/mcp", "https://b"), ("http://a/mcp", "https://b")
    ),
    "allowed_backends": Sample("http://a:1", ("http://a:1",), ("http://a:1",)),
    "ca_file": _one("/etc/ca.pem", "/etc/ca.pem"),
    "config": _one("servers.json", "servers.json"),
    "aggregate": _one("on", True),
    "reload_on_change": _one("on", True),
    "env": Sample("A=1, B=2=3", ("A=1", "B=2=3"), ("A=1", "B=2=3")),
    "env_from": Sample(
        "A=header:X-A, B=claim:sub?",
        ("A=header:X-A", "B=claim:sub?"),
        ("A=header:X-A", "B=claim:sub?"),
    ),
    "cwd": _one("/srv", "/srv"),
    "stdio_mode": _one("per-session", "per-session"),
    "stdio_transports": Sample("sse", ("sse",), ("sse",)),
    "redis_url": _one("redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
    "redis_prefix": _one("mine:", "mine:"),
    "session_ttl": _one("0.5", 0.5),
    "unknown_session_status": _one("404", 404),
    "failure_status": _one("http", "http"),
    "request_timeout": _one("30", 30.0),
    "connect_timeout": _one("1.25", 1.25),
    "keepalive_interval": _one("2", 2.0),
    "sse_after": _one("0.1", 0.1),
    "max_body_bytes": _one("1", 1),
    "max_message_bytes": _one("1000", 1000),
    "max_sessions": _one("3", 3),
    "evict_after": _one("0.5", 0.5),
    "idle_timeout": _one("90", 90.0),
    "spare_children": _one("2", 2),
    "stateless_children": _one("one", "one"),
    "bridge": _one("off", False),
    "input_timeout": _one("30", 30.0),
    "keep_detached": _one("on", True),
    "max_streams": _one("4", 4),
    "threads": _one("4", 4),
    "allowed_origins": Sample("http://a, *", ("http://a", "*"), ("http://a", "*")),
    "allowed_hosts": Sample("a.example", ("a.example",), ("a.example",)),
    "trusted_proxies": Sample("10.0.0.1, *", ("10.0.0.1", "*"), ("10.0.0.1", "*")),
    "forward_headers": Sample("X-A:, X-B: 1", ("X-A:", "X-B: 1"), ("X-A:", "X-B: 1")),
    "preserve_host": _one("on", True),
    "public_url": _one("https://a.example/x/", "https://a.example/x"),
    "api_keys": _one("/etc/mcp/keys", "/etc/mcp/keys"),
    "rate_limit": _one("600/minute:50", "600/minute:50"),
    "rate_limit_scope": _one("deployment", "deployment"),
    "backend_proxy": _one("http://u:p@proxy:3128", "http://u:p@proxy:3128"),
    "sticky_cookies": Sample("route,MINE*", ("route", "MINE*"), ("route", "MINE*")),
    "jwt_issuer": _one("https://id.example/realms/a", "https://id.example/realms/a"),
    "jwt_audience": Sample(
        "mcp, https://a.example/", ("mcp", "https://a.example/"), ("mcp", "https://a.example/")
    ),
    "jwt_jwks_url": _one("http://id/keys", "http://id/keys"),
    "jwt_scopes": Sample("mcp:use, b", ("mcp:use", "b"), ("mcp:use", "b")),
    "log_format": _one("json", "json"),
    "log_level": _one("debug", "debug"),
    "bind": _one("unix:/run/x.sock", "unix:/run/x.sock"),
    "admin_bind": _one("127.0.0.1:9100", "127.0.0.1:9100"),
    "ctl_socket": _one("/run/mcp/ctl.sock", "/run/mcp/ctl.sock"),
    "metrics": _one("on", True),
    "traces": _one("on", True),
    "workers": _one("2", 2),
    "worker_class": _one("gevent", "gevent"),
    "client_timeout": _one("2.5", 2.5),
    "max_header_bytes": _one("1000", 1000),
    "http_keepalive": _one("100", 100.0),
    "passing": _one("on", "on"),
    "session_dir": _one("/var/lib/mcp", "/var/lib/mcp"),
    "cpu_affinity": _one("0,2", "0,2"),
}

#: Settings that go with a command only.
NEED_COMMAND = {"env", "env_from", "cwd"}
