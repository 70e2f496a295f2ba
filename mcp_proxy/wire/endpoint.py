"""The `endpoint` event with which a stream of MCP 2024-11-05 begins, found and rewritten.

Pure. Everything else of the stream keeps its bytes, whatever its line endings and however it is
cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from urllib.parse import SplitResult, parse_qsl, urlencode, urljoin, urlsplit

#: Parameters that name the session in the URI for messages; all are in use.
SESSION_PARAMETERS = ("session_id", "sessionId")

#: The one that is added where a server's URI has none of them.
OUR_PARAMETER = "mcp_proxy_session"

#: Bytes within which the event has to come.
MAX_HEAD = 64 * 1024

# WHATWG HTML section 9.2.5: CRLF, LF and CR end a line, so two of them end a block.
_BLOCK_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"[^\r\n]+")
_ENDPOINT = re.compile(rb"event: ?endpoint")
_DATA = re.compile(rb"data: ?")
_BOM = b"\xef\xbb\xbf"


class EndpointRewriter:
    """Passes a stream on and replaces the URI of its `endpoint` event by what `rewrite` returns.

    Only an event that is the stream's first is looked at. Not thread-safe.
    """

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        self._rewrite = rewrite
        self._held = b""
        self._is_done = False

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now; after an empty piece, the stream's end, everything."""
        if self._is_done:
            return piece
        self._held += piece
        passed = b""
        while not self._is_done and (end := _BLOCK_END.search(self._held)) is not None:
            block, self._held = self._held[: end.end()], self._held[end.end() :]
            passed += self._with_uri(block)
        if self._is_done or not piece or len(self._held) > MAX_HEAD:
            self._is_done = True
            passed, self._held = passed + self._held, b""
        return passed

    def _with_uri(self, block: bytes) -> bytes:
        lines = _LINE.findall(block.removeprefix(_BOM))
        fields = [line for line in lines if not line.startswith(b":")]
        if not fields:
            return block  # a comment
        self._is_done = True
        if not any(_ENDPOINT.fullmatch(line) for line in fields):
            return block
        return _LINE.sub(self._data_line, block)

    def _data_line(self, line: re.Match[bytes]) -> bytes:
        head = _DATA.match(line[0])
        if head is None:
            return line[0]
        uri = line[0][head.end() :].decode("utf-8", "replace")
        return head[0] + self._rewrite(uri).encode()


def named_session(query: str) -> tuple[str, str] | None:
    """The parameter of a query that names a session, and its value; None where there is none."""
    pairs = dict(parse_qsl(query, keep_blank_values=True))
    return next(
        ((name, pairs[name]) for name in (*SESSION_PARAMETERS, OUR_PARAMETER) if name in pairs),
        None,
    )


def with_session(query: str, parameter: str, value: str | None) -> str:
    """`query` with the session named by `value`; None removes the parameter.

    Everything else keeps its bytes.
    """
    parts = [part for part in query.split("&") if part]
    kept = [part for part in parts if part.partition("=")[0] != parameter]
    if len(kept) == len(parts) or value is None:
        return "&".join(kept if value is None else [*kept, urlencode({parameter: value})])
    ours = urlencode({parameter: value})
    return "&".join(ours if part.partition("=")[0] == parameter else part for part in parts)


def local_uri(base: str, uri: str, hosts: Collection[str]) -> tuple[str, str] | None:
    """Path and query of `uri`, as found in a stream from `base`.

    None where it leads elsewhere than to `base` and to `hosts`, which are HOST:PORT without the
    ports that go without saying.
    """
    try:
        found = urlsplit(urljoin(base, uri.strip()))
    except ValueError:
        return None
    if _host_of(found) not in {_host_of(urlsplit(base)), *hosts}:
        return None
    return found.path or "/", found.query


def _host_of(parts: SplitResult) -> str:
    ordinary = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return parts.netloc.rpartition("@")[2].lower().removesuffix(ordinary or ":")
