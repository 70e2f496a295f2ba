"""Targets, addresses and request URLs of backends. Pure.

A target's path is the path of its MCP endpoint; requests for other paths keep theirs. A session's
`backend_url` replaces scheme, host and port, and the path too if it has one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}

_AUTHORITY = re.compile(r"\A[A-Za-z]+://[^/?#]*")

_HOST = re.compile(r"[A-Za-z0-9_.:%-]+")

#: Before the path of a resource: where its metadata is (RFC 9728 section 3.1).
RESOURCE_METADATA = "/.well-known/oauth-protected-resource"

#: Scheme, host and port.
Origin = tuple[str, str, int]


class Address(NamedTuple):
    """The address of a server. `name` is its host name where `host` is an IP address.

    `path` and `query` are those of its MCP endpoint where they are not the static target's.
    """

    scheme: str
    host: str
    port: int
    name: str | None = None
    path: str = ""
    query: str = ""

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL for the log, with the name where there is one."""
        return f"{self.url} ({self.name})" if self.name else self.url

    @property
    def backend_url(self) -> str:
        """The `backend_url` of a session here; without the query, which may be a secret."""
        return self.url + self.path

    @property
    def host_header(self) -> str:
        """The Host header: the name, and the port unless it is the scheme's default."""
        name = self.name or self.host
        shown = f"[{name}]" if ":" in name else name
        return shown if self.port == _DEFAULT_PORTS[self.scheme] else f"{shown}:{self.port}"


class Target(NamedTuple):
    """The parts of an absolute http(s) URL."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @property
    def url(self) -> str:
        """The URL, always with its port."""
        url = self.address.url + self.path
        return f"{url}?{self.query}" if self.query else url

    @property
    def address(self) -> Address:
        """The address, with the host as given."""
        return Address(self.scheme, self.host, self.port)

    @property
    def origin(self) -> Origin:
        """Scheme, host and port, which identify a server."""
        return self.scheme, self.host, self.port

    @property
    def own_path(self) -> str:
        """The path, empty where the URL has none."""
        return "" if self.path == "/" else self.path


@lru_cache(maxsize=256)
def parse_target(url: str) -> Target | None:
    """The target `url`; None unless it is absolute, http(s), with a host, without credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    host = ascii_host(parts.hostname or "")
    has_credentials = parts.username is not None or parts.password is not None
    if parts.scheme not in _DEFAULT_PORTS or host is None or has_credentials:
        return None
    port = port if port is not None else _DEFAULT_PORTS[parts.scheme]
    return Target(parts.scheme, host, port, parts.path, parts.query)


@lru_cache(maxsize=256)
def ascii_host(name: str) -> str | None:
    """A host name in ASCII (RFC 5891), or an address, as it came; None for anything else."""
    try:
        found = name.encode("idna").decode("ascii")
    except UnicodeError:
        return None
    return found if _HOST.fullmatch(found) else None


def is_endpoint(static: Target, address: Address | None, path: str) -> bool:
    """Whether a request for `path` is for the MCP endpoint; the rest is as in `request_target`."""
    has_path = static.path not in ("", "/") or (address is not None and address.path)
    return path.rstrip("/") == "/mcp" or (bool(has_path) and path in ("", "/"))


def is_host(url: Target, header: str) -> bool:
    """Whether host and port of a URL are those in a Host header."""
    named = parse_target(f"{url.scheme}://{header}")
    return named is not None and named.origin == url.origin


def local_reference(address: Address, host: str, reference: str, mount: str) -> str:
    """A URI that the server at `address` gave, as the clients of the proxy must have it.

    The server was told that it is called `host`; the clients see the proxy under `mount`. Relative
    URIs, and those of other servers, stay as they are.
    """
    if reference.startswith("/") and not reference.startswith("//"):
        return mount + reference
    absolute = f"{address.scheme}:{reference}" if reference.startswith("//") else reference
    path = own_path_in(absolute, address, host)
    if path is None:
        return reference
    if not path.startswith("/"):
        path = f"/{path}"
    if not mount and path.startswith("//"):
        return f"/.{path}"  # RFC 3986 section 3.3: a leading `//` would name a host
    return mount + path


def own_path_in(url: str, address: Address, host: str) -> str | None:
    """What follows the host in an absolute URL that names the server at `address`, as it stands
    there; None where the URL names another one. The server was told that it is called `host`.
    """
    named = parse_target(url)
    if named is None:
        return None
    is_named = named.host in (address.host, address.name) and named.port == address.port
    return _AUTHORITY.sub("", url, count=1) if is_named or is_host(named, host) else None


def request_target(static: Target, address: Address | None, path: str, query: str) -> str:
    """The path and query that the server at `address` gets for a request for `path`.

    `static` is the configured target whose endpoint counts where the address has none of its own.
    The metadata of the endpoint is where that of its own path is.
    """
    own_query, before = "", ""
    if path == f"{RESOURCE_METADATA}/mcp":
        before, path = RESOURCE_METADATA, "/mcp"
    if path.rstrip("/") in ("", "/mcp"):
        own_query = static.query
        if address is not None and (address.path or address.query):
            own_query = address.query
        own_path = static.path if static.path != "/" else ""
        path = (address is not None and address.path) or own_path or path or "/mcp"
    query = f"{own_query}&{query}" if own_query and query else own_query or query
    path = before + path
    return f"{path}?{query}" if query else path


# --- children of replicas ------------------------------------------------------------------------

#: The scheme of the `backend_url` of a child.
WORKER_SCHEME = "worker://"


class WorkerUrl(NamedTuple):
    """The `backend_url` of a child of a replica: `worker://<replica>/<child>`."""

    replica: str
    child: str

    def __str__(self) -> str:
        return f"{WORKER_SCHEME}{self.replica}/{self.child}"


def parse_worker_url(url: str | None) -> WorkerUrl | None:
    """The replica and the child in a `backend_url`, None where it names an HTTP backend or none."""
    if url is None or not url.startswith(WORKER_SCHEME):
        return None
    replica, _, child = url.removeprefix(WORKER_SCHEME).partition("/")
    return WorkerUrl(replica, child) if replica and child else None
