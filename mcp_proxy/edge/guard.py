"""Protection against DNS rebinding, and the CORS answers that go with it.

MCP (2025-11-25, transports, "Security Warning") wants `Origin` validated. A page that was rebound
to a loopback address also sends a foreign `Host`, so that one is checked wherever the listening
socket is a loopback one; elsewhere `allowed_hosts` decides. A request without `Origin` does not
come from a browser.
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
    """Decides whether a request may come in at all. Immutable, so safe for any thread."""

    def __init__(
        self, origins: tuple[str, ...] | None = None, hosts: tuple[str, ...] | None = None
    ) -> None:
        self._origins = origins
        self._hosts = hosts

    def check(self, environ: WSGIEnvironment) -> None:
        """Raises Forbidden for a foreign Host or Origin."""
        host = environ.get("HTTP_HOST")
        if host is not None and not self._allows_host(host, _listens_on_loopback(environ)):
            raise Forbidden(f"Host {host!r} is not served here; allowed_hosts can name it")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and not self._allows_origin(origin):
            raise Forbidden(f"Origin {origin!r} is not allowed; allowed_origins can name it")

    def cors_headers(self, environ: WSGIEnvironment) -> Headers:
        """What lets the page at an allowed Origin read the response."""
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or not self._allows_origin(origin):
            return []
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _CORS_EXPOSED),
            ("Vary", "Origin"),
        ]

    def preflight_headers(self) -> Headers:
        """What a page at an allowed Origin may send."""
        return [
            ("Access-Control-Allow-Methods", _CORS_METHODS),
            ("Access-Control-Allow-Headers", _CORS_HEADERS),
            ("Access-Control-Max-Age", "600"),
        ]

    def _allows_host(self, host: str, listens_on_loopback: bool) -> bool:
        if self._hosts is not None:
            return _ANY in self._hosts or host in self._hosts or host_name(host) in self._hosts
        return not listens_on_loopback or is_loopback(host_name(host))

    def _allows_origin(self, origin: str) -> bool:
        if self._origins is not None:
            return _ANY in self._origins or origin in self._origins
        name = url_host(origin)
        return is_loopback(name) or name in (self._hosts or ())


def _listens_on_loopback(environ: WSGIEnvironment) -> bool:
    """Whether the request came in by a loopback address, as far as the WSGI server tells.

    waitress calls itself `waitress.invalid` wherever it listens; then the peer's address has to do.
    """
    name: str = environ["SERVER_NAME"]
    return is_loopback(environ.get("REMOTE_ADDR", "") if name.endswith(".invalid") else name)


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return url_host(f"//{host}")


@lru_cache(maxsize=256)
def url_host(url: str) -> str:
    """The host of a URL or an Origin, empty where there is none (`null`, rubbish)."""
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
