"""Protection against DNS rebinding, and the CORS headers that go with it.

MCP (2025-11-25, transports, "Security Warning") requires that `Origin` is validated. A page that
was rebound to a loopback address also sends a foreign `Host`, so `Host` is checked where the
listening address is a loopback one; elsewhere `allowed_hosts` decides. A request without `Origin`
does not come from a browser.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mcp_proxy.errors import Forbidden
from mcp_proxy.wire.headers import FAILURE, SESSION_ID, Headers, is_printable

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_ANY = "*"
_CORS_METHODS = ("GET", "POST", "DELETE", "OPTIONS")
_CORS_HEADERS = (
    "Content-Type, Accept, Authorization, X-API-Key, Mcp-Session-Id, MCP-Protocol-Version, "
    "Last-Event-ID, Mcp-Method, Mcp-Name, X-Request-ID"
)
_FORWARDED = frozenset(
    {
        *("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_X_FORWARDED_FOR"),
        *("HTTP_X_FORWARDED_HOST", "HTTP_X_FORWARDED_PROTO", "HTTP_X_FORWARDED_PORT"),
    }
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CORS_EXPOSED = f"{SESSION_ID}, X-Request-ID, WWW-Authenticate, Retry-After, {FAILURE}"


class Guard:
    """Decides whether a request is served. Immutable, so thread-safe."""

    def __init__(
        self, origins: tuple[str, ...] | None = None, hosts: tuple[str, ...] | None = None
    ) -> None:
        self._origins = origins
        self._hosts = hosts

    def check(self, environ: WSGIEnvironment) -> None:
        """Raises Forbidden for a foreign Host or Origin."""
        if not self.allows_host(environ):
            host = environ["HTTP_HOST"]
            raise Forbidden(f"Host {host!r} is not allowed; the setting allowed_hosts can allow it")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and not self._allows_origin(origin):
            raise Forbidden(
                f"Origin {origin!r} is not allowed; the setting allowed_origins can allow it"
            )

    def allows_host(self, environ: WSGIEnvironment) -> bool:
        """Whether the Host header, if there is one, is allowed."""
        host = environ.get("HTTP_HOST")
        if host is None:
            return True
        # waitress's name is `waitress.invalid` wherever it listens: the peer's address decides.
        name: str = environ["SERVER_NAME"]
        listener = environ.get("REMOTE_ADDR", "") if name.endswith(".invalid") else name
        return _allows_host(self._hosts, host, listener)

    def cors_headers(self, environ: WSGIEnvironment) -> Headers:
        """The headers by which the page at an allowed Origin may read the response.

        On a preflight also those that grant what it asks for: it is a page that we serve.
        """
        origin = environ.get("HTTP_ORIGIN")
        if origin is None or not self._allows_origin(origin):
            return []
        granted = _granted(environ) if environ.get("REQUEST_METHOD") == "OPTIONS" else []
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", _CORS_EXPOSED),
            ("Vary", "Origin"),
            *granted,
        ]

    def preflight_headers(self) -> Headers:
        """What a preflight's answer has besides `cors_headers`."""
        return [("Access-Control-Max-Age", "600")]

    def _allows_origin(self, origin: str) -> bool:
        if not is_printable(origin):
            return False  # it is echoed in a header
        if self._origins is not None:
            return _ANY in self._origins or origin in self._origins
        name = url_host(origin)
        return is_loopback(name) or name in (self._hosts or ())


def require_own_site(environ: WSGIEnvironment) -> None:
    """Raises Forbidden for what a browser asks for on behalf of another site's page.

    For MCP endpoints: an `<img>` begins a session, too, and sends no Origin (W3C Fetch Metadata).
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site in ("cross-site", "same-site") and "HTTP_ORIGIN" not in environ:
        raise Forbidden("A page of another site may not ask for this without an Origin header")


def is_local(environ: WSGIEnvironment) -> bool:
    """Whether a request comes from this machine, to a loopback address with nothing in front.

    One that came over no network, as from a test client, does.
    """
    if not environ.keys().isdisjoint(_FORWARDED):  # which looks at the few, not at all headers
        return False
    name: str = environ["SERVER_NAME"]
    peer = environ.get("REMOTE_ADDR")
    return (peer is None or is_loopback(peer)) and (name.endswith(".invalid") or is_loopback(name))


def _granted(environ: WSGIEnvironment) -> Headers:
    """The methods and headers that a preflight asks for (WHATWG Fetch, section 4.9).

    What is no token (RFC 9110 section 5.6.2) is left out: it cannot be the name of either.
    """
    method = environ.get("HTTP_ACCESS_CONTROL_REQUEST_METHOD", "")
    methods = [*_CORS_METHODS, *_tokens(method)]
    asked = _tokens(environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", ""))
    return [
        ("Access-Control-Allow-Methods", ", ".join(dict.fromkeys(methods))),
        ("Access-Control-Allow-Headers", ", ".join(asked) or _CORS_HEADERS),
    ]


def _tokens(listed: str) -> list[str]:
    return [name for part in listed.split(",") if _TOKEN.fullmatch(name := part.strip())]


def without_cors(headers: Headers) -> Headers:
    """A server's headers without its own word on CORS: two of them and a browser refuses both."""
    return [(n, value) for n, value in headers if not n.lower().startswith("access-control-")]


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
