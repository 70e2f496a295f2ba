"""Where an HTTP backend is: targets, addresses, and the URL that a request goes to. Pure.

The target's path is where the MCP endpoint lives; other paths keep theirs. A session's
`backend_url` replaces scheme, host and port, and the path too if it has one.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Address(NamedTuple):
    """One place that can be connected to. `name` is the host name where `host` is an address."""

    scheme: str
    host: str
    port: int
    name: str | None = None

    @property
    def url(self) -> str:
        """The `backend_url` of a session that is served here."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def host_header(self) -> str:
        """The Host header: the name, and the port where it is not the scheme's own."""
        name = self.name or self.host
        shown = f"[{name}]" if ":" in name else name
        return shown if self.port == _DEFAULT_PORTS[self.scheme] else f"{shown}:{self.port}"


class Target(NamedTuple):
    """An absolute http(s) URL, taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def address(self) -> Address:
        """Where it is, by its own host name."""
        return Address(self.scheme, self.host, self.port)


def parse_target(url: str) -> Target | None:
    """The target that `url` names, None if it is no absolute http(s) URL with a host."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or _has_credentials(parts):
        return None
    port = port if port is not None else _DEFAULT_PORTS[parts.scheme]
    return Target(parts.scheme, parts.hostname, port, parts.path, parts.query)


def _has_credentials(parts: SplitResult) -> bool:
    return parts.username is not None or parts.password is not None


def request_target(static: Target, backend: Target | None, path: str, query: str) -> str:
    """Path and query of a request for `path`, as the backend is to see them.

    `static` is the configured target, `backend` what the session's `backend_url` names, if any.
    """
    is_endpoint = path.rstrip("/") in ("", "/mcp")
    if not is_endpoint:
        return _joined(path, "", query)
    if backend is not None and backend.path not in ("", "/"):
        return _joined(backend.path, backend.query, query)
    has_path = static.path not in ("", "/")
    return _joined(static.path if has_path else path or "/mcp", static.query, query)


def _joined(path: str, *queries: str) -> str:
    query = "&".join(query for query in queries if query)
    return f"{path}?{query}" if query else path


# --- placement: Where a session's child is, as `backend_url` says it: `worker://<replica>/<child>`.

_SCHEME = "worker://"


class Place(NamedTuple):
    """A replica and a child of it."""

    replica: str
    child: str

    @property
    def url(self) -> str:
        """The place as a `backend_url`."""
        return f"{_SCHEME}{self.replica}/{self.child}"


def parse_place(url: str | None) -> Place | None:
    """The place that a `backend_url` names, None where it names none."""
    if url is None or not url.startswith(_SCHEME):
        return None
    replica, _, child = url.removeprefix(_SCHEME).partition("/")
    return Place(replica, child) if replica and child else None
