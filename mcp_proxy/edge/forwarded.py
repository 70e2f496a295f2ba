"""The headers that pass from a client to an HTTP backend, and from the backend to the client.

End-to-end headers pass (RFC 9110 section 7.6), except those that describe the client: they are
written anew, or continued where the peer is one of `trusted_proxies`.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from mcp_proxy.edge.request import path_as_sent
from mcp_proxy.wire import cookies
from mcp_proxy.wire.headers import FIELD_VALUE, HOP_BY_HOP, Headers

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

# Our workers', in the environ: the commas in the Cookie header are the client's own.
_COOKIES_KNOWN = "mcp_proxy.cookies_known"

# As WSGI names them. Host and Content-Length are written for the backend: its own name, and the
# length of the body that is sent.
_NOT_SENT = frozenset(
    f"HTTP_{name.upper().replace('-', '_')}" for name in (*HOP_BY_HOP, "host", "content-length")
)

# Headers about the request's way here are believed of a trusted proxy only.
_NOT_SENT_FOR_STRANGERS = _NOT_SENT | {
    "HTTP_FORWARDED",
    "HTTP_X_FORWARDED_FOR",
    "HTTP_X_FORWARDED_HOST",
    "HTTP_X_FORWARDED_PROTO",
    "HTTP_X_FORWARDED_PREFIX",
}

# In lower case. gunicorn, like most servers, writes the last two itself.
_NOT_RETURNED = HOP_BY_HOP | {"date", "server"}

# The value of a change that has a header passed on as the caller sent it.
_AS_IT_IS = "*"

# RFC 9110 section 5.1: the name is a token.
_FIELD = re.compile(rf"[!#$%&'*+.^_`|~0-9A-Za-z-]+:{FIELD_VALUE.pattern}")

# RFC 9112 section 5.2: a line break and blanks in a value mean one blank.
_FOLD = re.compile(r"(\r?\n[ \t]+)+")

# RFC 3986 section 3.3: the characters of a path. A prefix that begins with `//` would name a host.
_PATH_SAFE = "/:@!$&'()*+,;=~-._"
_PREFIX = re.compile(r"(/[A-Za-z0-9:@!$&'()*+,;=~._%-]+)+")


def join_cookies(headers: Iterable[tuple[str, str]], environ: WSGIEnvironment) -> None:
    """Makes one header of several Cookie headers; gunicorn joins them by the comma of lists.

    `headers` are those of the request as gunicorn names them.
    """
    if "," in environ.get("HTTP_COOKIE", ""):
        values = [value for name, value in headers if name == "COOKIE"]
        environ["HTTP_COOKIE"] = "; ".join(values)  # RFC 9113 section 8.2.3
        environ[_COOKIES_KNOWN] = True


class HeaderPolicy:
    """The policy of one transport. `changes` are `Name: value` to set and `Name:` to remove.

    `keeps_host` says whether the backend gets the client's Host header. `withheld` are headers, in
    title case, by which callers have said who they are: a backend gets one of them only where a
    change says `Name: *`.
    """

    def __init__(
        self,
        trusted: tuple[str, ...] = (),
        changes: tuple[str, ...] = (),
        keeps_host: bool = False,
        withheld: frozenset[str] = frozenset(),
    ) -> None:
        self._trusted = trusted
        self._keeps_host = keeps_host
        pairs = [(n.strip(), v.strip()) for n, _, v in (c.partition(":") for c in changes)]
        passed_on = {name.title() for name, value in pairs if value == _AS_IT_IS}
        self._removed = {name.title() for name, _ in pairs} - passed_on | (withheld - passed_on)
        self._set = {_named(name): value for name, value in pairs if value not in ("", _AS_IT_IS)}

    def outbound(self, environ: WSGIEnvironment) -> dict[str, str]:
        """The request's headers for the backend, without Content-Length.

        Names are in title case (`Mcp-Session-Id`), except those of `changes`. Host is among them
        only where it is not the backend's own.
        """
        is_trusted = is_trusted_peer(environ, self._trusted)
        not_sent = _NOT_SENT if is_trusted else _NOT_SENT_FOR_STRANGERS
        headers: dict[str, str] = {}
        for key, value in environ.items():
            if key.startswith("HTTP_") and key not in not_sent:
                headers[key[5:].replace("_", "-").title()] = value
        if environ.get("CONTENT_TYPE"):
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        if "," in headers.get("Cookie", "") and not environ.get(_COOKIES_KNOWN):
            headers["Cookie"] = cookies.rejoined(headers["Cookie"])
        for option in environ.get("HTTP_CONNECTION", "").split(","):
            headers.pop(option.strip().title(), None)
        if peer := environ.get("REMOTE_ADDR"):
            chain = headers.get("X-Forwarded-For", "").strip(", ")
            headers["X-Forwarded-For"] = f"{chain}, {peer}" if chain else peer
        if host := environ.get("HTTP_HOST"):
            headers.setdefault("X-Forwarded-Host", host)
            if self._keeps_host:
                headers["Host"] = host
        headers.setdefault("X-Forwarded-Proto", environ["wsgi.url_scheme"])
        return self.changed(headers)

    def of_client(self, environ: WSGIEnvironment) -> dict[str, str]:
        """As `outbound`, without the headers that `changes` set."""
        return {n: v for n, v in self.outbound(environ).items() if n not in self._set}

    def changed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers as `changes` say: without those that are removed, and with those that are set."""
        kept = {name: value for name, value in headers.items() if name not in self._removed}
        return {**kept, **self._set}

    def inbound(self, headers: Headers, session_id: str | None = None) -> Headers:
        """The response's headers for the client, which knows its session as `session_id`.

        They are such that every WSGI server sends them: folded lines are joined, and what is
        malformed all the same is left out.
        """
        returned: Headers = []
        named: set[str] = set()
        for name, value in headers:
            key = name.lower()
            if _FIELD.fullmatch(f"{name}:{value}") is None:
                value = _FOLD.sub(" ", value)
                if _FIELD.fullmatch(f"{name}:{value}") is None:
                    log.info("left out a malformed header of a server's answer: %r", name)
                    continue
            if key == "connection":
                named.update(option.strip().lower() for option in value.split(","))
            elif key == "transfer-encoding":
                named.add("content-length")  # RFC 9112 section 6.3: it is overridden
            elif key == "mcp-session-id" and session_id is not None:
                returned.append((name, session_id))
            elif key not in _NOT_RETURNED:
                returned.append((name, value))
        if named:
            returned = [(name, value) for name, value in returned if name.lower() not in named]
        return returned


def _named(name: str) -> str:
    """A header as it is set: Host is looked for by who sends the request."""
    return "Host" if name.title() == "Host" else name


def is_trusted_peer(environ: WSGIEnvironment, trusted: tuple[str, ...]) -> bool:
    """Whether the peer's headers about the client and the request's way are believed."""
    return bool(trusted) and _is_among(environ.get("REMOTE_ADDR", ""), trusted)


@lru_cache(maxsize=1024)
def _is_among(peer: str, trusted: tuple[str, ...]) -> bool:
    """Whether an address is one of `trusted`, or in one of its networks.

    A socket for IPv6 that takes IPv4 too shows those peers as `::ffff:10.0.0.1`.
    """
    if "*" in trusted or peer in trusted:
        return True
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    networks = [ipaddress.ip_network(each, strict=False) for each in trusted]
    return any((mapped or address) in network or address in network for network in networks)


def client_address(environ: WSGIEnvironment, trusted: tuple[str, ...]) -> str:
    """The address of the client, as far as peers that are trusted tell it; "" where unknown.

    Each proxy adds to X-Forwarded-For whom it has its request from. So the last address in it that
    is no trusted proxy's is the client's: what stands before that, anybody may have written. Where
    all are trusted (`*`) it is the last one.
    """
    address: str = environ.get("REMOTE_ADDR", "")
    if not is_trusted_peer(environ, trusted):
        return address
    for told in reversed(environ.get("HTTP_X_FORWARDED_FOR", "").split(",")):
        found = _address_in(told)
        if found is None:
            break
        address = found
        if "*" in trusted or not _is_among(address, trusted):
            break
    return address


def _address_in(told: str) -> str | None:
    """The address in an entry of X-Forwarded-For, which may have a port."""
    bare = told.strip()
    candidates = (bare, bare.partition("]")[0].removeprefix("["), bare.rpartition(":")[0])
    for candidate in candidates:
        try:
            return str(ipaddress.ip_address(candidate))
        except ValueError:
            continue
    return None


def mount_of(environ: WSGIEnvironment, trusted: tuple[str, ...]) -> str:
    """The path under which the client sees this application, percent-encoded; "" for the root.

    That is SCRIPT_NAME (PEP 3333), below the X-Forwarded-Prefix of a trusted proxy.
    """
    name: str = environ.get("SCRIPT_NAME", "")
    mount = quote(name.encode("latin-1"), safe=_PATH_SAFE).rstrip("/")
    prefix: str = environ.get("HTTP_X_FORWARDED_PREFIX", "").rstrip("/")
    if is_trusted_peer(environ, trusted) and _PREFIX.fullmatch(prefix):
        return prefix + mount
    return mount


def raw_path(environ: WSGIEnvironment) -> str:
    """The path below the mount, percent-encoded, and as the client sent it where that is known."""
    path: str = environ.get("PATH_INFO", "")
    sent = None if environ.get("SCRIPT_NAME") else path_as_sent(environ)
    return quote(path.encode("latin-1"), safe=_PATH_SAFE) if sent is None else sent
