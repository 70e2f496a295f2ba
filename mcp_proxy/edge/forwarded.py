"""Which headers of a client go to an HTTP backend, and which of the backend's come back.

Everything end-to-end passes (RFC 9110 section 7.6), except what says who is asking: that is written
anew, or continued where the peer is one of `trusted_proxies`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

from mcp_proxy.wire.headers import Headers, end_to_end

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_FORWARDING = frozenset(
    {"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-prefix"}
)

# Written by the proxy for the backend: the host, and the length of what is really sent.
_OURS = frozenset({"host", "content-length"})

# gunicorn, like most servers, writes these itself.
_OF_THE_SERVER = frozenset({"date", "server"})


# RFC 3986 section 3.3: what may stand in a path as it is. A prefix of two slashes would be a host.
_PATH_SAFE = "/:@!$&'()*+,;=~-._"
_PREFIX = re.compile(r"(/[A-Za-z0-9:@!$&'()*+,;=~._%-]+)+")


class Forwarding:
    """The policy of one transport. `changes` are `Name: value` to set and `Name:` to remove."""

    def __init__(self, trusted: tuple[str, ...] = (), changes: tuple[str, ...] = ()) -> None:
        self._trusted = trusted
        pairs = [(n.strip(), v.strip()) for n, _, v in (c.partition(":") for c in changes)]
        self._removed = {name.lower() for name, value in pairs if not value}
        self._set = [(name, value) for name, value in pairs if value]

    def outbound(self, environ: WSGIEnvironment) -> Headers:
        """The request's headers for the backend, without Host and Content-Length."""
        is_trusted = is_trusted_peer(environ, self._trusted)
        kept = [
            (name, value)
            for name, value in end_to_end(_headers_of(environ))
            if name.lower() not in _OURS and (is_trusted or name.lower() not in _FORWARDING)
        ]
        said = [
            (n, v) for n, v in _with_forwarding(kept, environ) if n.lower() not in self._removed
        ]
        return _with_changes(said, self._set)

    def inbound(self, headers: Headers) -> Headers:
        """The response's headers for the client."""
        unwanted = _OF_THE_SERVER
        if any(name.lower() == "transfer-encoding" for name, _ in headers):
            unwanted |= {"content-length"}  # RFC 9112 section 6.3: it means nothing
        return [(n, v) for n, v in end_to_end(headers) if n.lower() not in unwanted]


def is_trusted_peer(environ: WSGIEnvironment, trusted: tuple[str, ...]) -> bool:
    """Whether what the peer says of the way of a request is believed."""
    return environ.get("REMOTE_ADDR") in trusted or "*" in trusted


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


def _headers_of(environ: WSGIEnvironment) -> Iterator[tuple[str, str]]:
    for key, value in environ.items():
        if key.startswith("HTTP_"):
            yield key[5:].replace("_", "-").title(), value
    if environ.get("CONTENT_TYPE"):
        yield "Content-Type", environ["CONTENT_TYPE"]


def _with_forwarding(headers: Headers, environ: WSGIEnvironment) -> Headers:
    """`headers` with the X-Forwarded-* of this hop; what a trusted proxy said stays."""
    present = {name.lower(): value for name, value in headers}
    peer = environ.get("REMOTE_ADDR", "")
    chain = f"{present['x-forwarded-for']}, {peer}" if "x-forwarded-for" in present else peer
    said = {
        "X-Forwarded-For": chain,
        "X-Forwarded-Host": present.get("x-forwarded-host", environ.get("HTTP_HOST", "")),
        "X-Forwarded-Proto": present.get("x-forwarded-proto", environ["wsgi.url_scheme"]),
    }
    return _with_changes(headers, [(name, value) for name, value in said.items() if value])


def _with_changes(headers: Headers, changes: Headers) -> Headers:
    changed = {name.lower() for name, _ in changes}
    return [*((n, v) for n, v in headers if n.lower() not in changed), *changes]


def raw_path(environ: WSGIEnvironment) -> str:
    """The path below the mount, percent-encoded as the client sent it where that is known."""
    path: str = environ.get("PATH_INFO", "")
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    if not environ.get("SCRIPT_NAME") and raw.startswith("/"):
        return str(raw).partition("?")[0]
    return quote(path.encode("latin-1"), safe=_PATH_SAFE)
