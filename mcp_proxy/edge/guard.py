"""Protection against DNS rebinding, and the CORS headers that go with it.

MCP (2025-11-25, transports, "Security Warning") requires that `Origin` is validated. A page that
was rebound to a loopback address also sends a foreign `Host`, so `Host` is checked where the
listening address is a loopback one; elsewhere `allowed_hosts` decides. A request without `Origin`
does not come from a browser.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mcp_proxy.errors import Forbidden
from mcp_proxy.wire.headers import Headers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_ANY = "*"
_CORS_METHODS = "GET, POST, DELETE, OPTIONS"
_CORS_HEADERS = (
    "Content-Type, Accept, Authorization, Mcp-Session-Id, MCP-Protocol-Version, Last-Event-ID, "
    "Mcp-Method, Mcp-Name, X-Request-ID"
)
_CORS_EXPOSED = "Mcp-Session-Id, X-Request-ID, WWW-Authenticate"


class Guard:
    """Decides whether a request is served. Immutable, so thread-safe."""

    def __init__(
        self, origins: tuple[str, ...] | None = None, hosts: tuple[str, ...] | None = None
    ) -> None:
        self._origins = origins
        self._hosts = hosts

    def check(self, environ: WSGIEnvironment) -> None:
        """Raises Forbidden for a foreign Host or Origin."""
        host = environ.get("HTTP_HOST")
        # waitress's name is `waitress.invalid` wherever it listens: the peer's address decides.
        name: str = environ["SERVER_NAME"]
        listener = environ.get("REMOTE_ADDR", "") if name.endswith(".invalid") else name
        if host is not None and not _allows_host(self._hosts, host, listener):
            raise Forbidden(f"Host {host!r} is not allowed; the setting allowed_hosts can allow it")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and not self._allows_origin(origin):
            raise Forbidden(
                f"Origin {origin!r} is not allowed; the setting allowed_origins can allow it"
            )

    def cors_headers(self, environ: WSGIEnvironment) -> Headers:
        """The headers by which the page at an allowed Origin may read the response."""
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or not self._allows_origin(origin):
            return []
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _CORS_EXPOSED),
            ("Vary", "Origin"),
        ]

    def preflight_headers(self) -> Headers:
        """The headers that name the methods and headers of an allowed Origin's requests."""
        return [
            ("Access-Control-Allow-Methods", _CORS_METHODS),
            ("Access-Control-Allow-Headers", _CORS_HEADERS),
            ("Access-Control-Max-Age", "600"),
        ]

    def _allows_origin(self, origin: str) -> bool:
        if self._origins is not None:
            return _ANY in self._origins or origin in self._origins
        name = url_host(origin)
        return is_loopback(name) or name in (self._hosts or ())


@lru_cache(maxsize=256)
def _allows_host(hosts: tuple[str, ...] | None, host: str, listener: str) -> bool:
    """Whether a Host header is allowed: by `hosts` if given.

    Otherwise it must name the loopback if the listening address is a loopback one.
    """
    if hosts is not None:
        return _ANY in hosts or host in hosts or host_name(host) in hosts
    return not is_loopback(listener) or is_loopback(host_name(host))


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return url_host(f"//{host}")


@lru_cache(maxsize=256)
def url_host(url: str) -> str:
    """The host of a URL or an Origin, empty where there is none or it is invalid."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


@lru_cache(maxsize=256)
def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
