"""Finds and rewrites the `endpoint` event (MCP 2024-11-05, transports, "HTTP with SSE").

Pure. All other bytes of the stream are unchanged, for any line endings and any split into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import quote, unquote_plus, urljoin, urlsplit

from mcp_proxy.wire import sse

#: Query parameters in which servers name the session in the URI for messages.
SESSION_PARAMETERS = ("session_id", "sessionId")

#: The parameter that is added where a server's URI has none of them.
OUR_PARAMETER = "mcp_proxy_session"

#: The largest event that is rewritten, in bytes; a larger one is forwarded unchanged.
MAX_EVENT = 64 * 1024

# Comments and empty lines, which begin no block; a CR at the end may be half a CRLF.
_SKIPPED = re.compile(rb"(?:(?::[^\r\n]{0,%d}+)?(?:\r\n|\n|\r(?!\Z)))*" % (MAX_EVENT - 1))
_SKIPPED_FIRST = re.compile(rb"(?:\xef\xbb\xbf)?" + _SKIPPED.pattern)  # the byte order mark, too


class EndpointRewriter:
    """Replaces the URI in a stream's `endpoint` event by the result of `rewrite`.

    Only the first event of the stream is examined. Not thread-safe.
    """

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        self._rewrite = rewrite
        self._skipped = _SKIPPED_FIRST
        self._held = b""
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether all bytes from now on are passed on as they come."""
        return self._is_done

    def feed(self, piece: bytes) -> bytes:
        """The bytes that may be passed on now; all that are left for b"", the stream's end."""
        if self._is_done:
            return piece
        self._held += piece
        if not piece:
            self._is_done = True
        elif len(self._held) <= MAX_EVENT and b"\n" not in piece and b"\r" not in piece:
            return b""  # no line has ended
        passed = b""
        while not self._is_done:
            passed += self._skip()
            end = sse.BLOCK_END.search(self._held)
            block = self._held[: end.end()] if end is not None else self._held
            if len(block.strip(b"\r\n")) > MAX_EVENT:
                self._is_done = True
            elif end is None:
                return passed
            else:
                self._held = self._held[end.end() :]
                passed += self._judged(block)
        passed, self._held = passed + self._held, b""
        return passed

    def _skip(self) -> bytes:
        """The comments and empty lines before the next block."""
        found = self._skipped.match(self._held)
        assert found is not None  # it matches nothing, too
        self._skipped = _SKIPPED
        self._held = self._held[found.end() :]
        return found[0]

    def _judged(self, block: bytes) -> bytes:
        fields = sse.fields_of(block)
        data = [value for name, value in fields if name == b"data"]
        if not data:
            return block  # a retry time or an id, not an event
        self._is_done = True
        if [value for name, value in fields if name == b"event"][-1:] != [b"endpoint"]:
            return block
        uri = b"\n".join(data).decode("utf-8", "surrogateescape")
        rewritten = self._rewrite(uri)
        if rewritten == uri:
            return block
        return sse.with_data(block, rewritten.encode("utf-8", "surrogateescape"))


class Named(NamedTuple):
    """The session that a query names. `value` is percent-encoded, as in the query."""

    parameter: str
    value: str

    @property
    def id(self) -> str:
        """The decoded value."""
        return unquote_plus(self.value)


def named_session(query: str) -> Named | None:
    """The parameter of a query that names a session; None where there is none."""
    if not query:
        return None
    pairs = dict(_pair(part) for part in query.split("&"))
    names = (*SESSION_PARAMETERS, OUR_PARAMETER)
    return next((Named(name, pairs[name]) for name in names if name in pairs), None)


def with_session(query: str, parameter: str, value: str | None) -> str:
    """`query` with the percent-encoded `value` for the parameter; None removes the parameter.

    All other bytes are unchanged.
    """
    parts = query.split("&") if query else []
    names = [_pair(part)[0] for part in parts]
    ours = [] if value is None else [f"{parameter}={value}"]
    if parameter not in names:
        return "&".join([*parts, *ours])
    kept = [ours if n == parameter else [p] for n, p in zip(names, parts, strict=True)]
    return "&".join(part for some in kept for part in some)


def _pair(part: str) -> tuple[str, str]:
    """A parameter's name, and its value with everything but visible ASCII percent-encoded."""
    name, _, value = part.partition("=")
    return unquote_plus(name), quote(value, safe=_VISIBLE, errors="surrogateescape")


_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


def local_uri(base: str, uri: str, hosts: Iterable[str]) -> tuple[str, str] | None:
    """Path and query of `uri`, which may be relative to `base`.

    None unless it names the server of `base` or one of `hosts`: authorities, which may leave out
    the default port of the scheme.
    """
    try:
        found = urlsplit(urljoin(base, uri.strip()))
        ours = urlsplit(base)
    except ValueError:
        return None
    if found.scheme not in _PORTS:
        return None
    known = {_origin(ours.netloc, ours.scheme), *(_origin(host, found.scheme) for host in hosts)}
    if _origin(found.netloc, found.scheme) not in known:
        return None
    return found.path or "/", found.query


_PORTS = {"http": "80", "https": "443"}
_AUTHORITY = re.compile(r"(?:.*@)?(.*?)(?::([0-9]*))?", re.DOTALL)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def _origin(authority: str, scheme: str) -> tuple[str, str]:
    """Host and port; all loopback names count as one host."""
    parts = _AUTHORITY.fullmatch(authority.lower())
    assert parts is not None  # it matches everything
    host = "localhost" if parts[1] in _LOOPBACK else parts[1]
    return host, parts[2] or _PORTS[scheme]
