"""HTTP header names and the rules that go with them."""

from __future__ import annotations

import base64
import binascii
import re
from functools import lru_cache

from mcp_proxy.errors import HeaderMismatch

SESSION_ID = "Mcp-Session-Id"
PROTOCOL_VERSION = "MCP-Protocol-Version"
LAST_EVENT_ID = "Last-Event-ID"

#: What mirrors the body of a modern request (MCP 2026-07-28, transports, "Request Metadata").
METHOD = "Mcp-Method"
NAME = "Mcp-Name"
PARAM_PREFIX = "Mcp-Param-"

#: Ours: names the kind of a failure that is not the client's fault.
FAILURE = "X-MCP-Proxy-Error"

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

#: The form of a session id (MCP 2025-11-25, transports, "Session Management"); the length is ours.
MAX_SESSION_ID = 1024
SESSION_ID_FORM = re.compile(rf"[\x21-\x7e]{{1,{MAX_SESSION_ID}}}")

#: The form of a header's value that can be sent (RFC 9110 section 5.5): no control characters.
FIELD_VALUE = re.compile(r"[ \t\x21-\x7e\x80-\xff]*")

#: The form of a header's name (RFC 9110 section 5.1).
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

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

#: Fields that say where a message ends (RFC 9112 section 6): who sends it writes them itself, and
#: no setting and no entry can set them.
FRAMING = frozenset({"content-length", "transfer-encoding"})

# A value that no header can carry as it is (MCP 2026-07-28, transports, "Value Encoding").
#: How an encoded value begins.
ENCODED_PREFIX = "=?base64?"
_ENCODED = re.compile(r"=\?base64\?(.*)\?=", re.DOTALL)
_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_READABLE = re.compile(r"[\t\x20-\x7e]*")

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


def encode_value(text: str) -> str:
    """The value of a header that mirrors `text`: itself where it can be sent, else in Base64."""
    if _PLAIN.fullmatch(text) and not _ENCODED.fullmatch(text):
        return text
    return f"{ENCODED_PREFIX}{base64.b64encode(text.encode()).decode()}?="


def decode_value(value: str) -> str:
    """The text that a header mirrors; raises HeaderMismatch where it cannot be read."""
    value = value.strip(" \t")
    if not _READABLE.fullmatch(value):
        raise HeaderMismatch(
            "A header that mirrors the body has characters that no header may have"
        )
    match = _ENCODED.fullmatch(value)
    if match is None:
        return value
    try:
        if not _BASE64.fullmatch(match[1]):
            raise binascii.Error("not in its one form")
        return base64.b64decode(match[1]).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise HeaderMismatch(
            "A header that mirrors the body is not the Base64 of a text"
        ) from error
