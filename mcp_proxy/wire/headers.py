"""HTTP header names and the rules that go with them."""

from __future__ import annotations

import re
from functools import lru_cache

SESSION_ID = "Mcp-Session-Id"
PROTOCOL_VERSION = "MCP-Protocol-Version"
LAST_EVENT_ID = "Last-Event-ID"

#: Ours: names the kind of a failure that is not the client's fault.
FAILURE = "X-MCP-Proxy-Error"

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

#: The form of a session id (MCP 2025-11-25, transports, "Session Management"); the length is ours.
MAX_SESSION_ID = 1024
SESSION_ID_FORM = re.compile(rf"[\x21-\x7e]{{1,{MAX_SESSION_ID}}}")

#: The form of a header's value that can be sent (RFC 9110 section 5.5): no control characters.
FIELD_VALUE = re.compile(r"[ \t\x21-\x7e\x80-\xff]*")

#: Connection-level fields (RFC 9110 section 7.6.1, with the older names that still turn up).
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "trailers",  # RFC 2616 called it so, and WSGI servers still refuse it
        "transfer-encoding",
        "upgrade",
    }
)

Headers = list[tuple[str, str]]


def is_printable(value: str) -> bool:
    """Whether a value is ASCII without control characters."""
    return value.isascii() and value.isprintable()


def is_session_id(value: str) -> bool:
    """Whether `value` has the form of a session id: visible ASCII, at most 1,024 characters."""
    return SESSION_ID_FORM.fullmatch(value) is not None


@lru_cache(maxsize=256)
def accepts(accept: str, media_type: str) -> bool:
    """Whether an Accept header names `media_type`, itself or by a range (RFC 9110 section 12.5.1).

    `*/*` counts for JSON only: a client that does not name event streams may not read them.
    """
    ranges = [media_type, media_type.partition("/")[0] + "/*"]
    if media_type == JSON:
        ranges.append("*/*")
    wanted = dict(_weighed(part) for part in accept.split(","))
    return next((wanted[name] for name in ranges if name in wanted), False)  # the most specific


def _weighed(part: str) -> tuple[str, bool]:
    """A media range, and whether its weight is more than zero."""
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    return media_range, not any(re.fullmatch(r"q=0(\.0*)?", p) for p in parameters)


@lru_cache(maxsize=256)
def media_type(content_type: str) -> str:
    """The media type of a Content-Type in lower case, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def is_json(content_type: str) -> bool:
    """Whether a Content-Type is JSON, whatever its parameters."""
    return media_type(content_type) == JSON
