"""Cookies of clients, and those by which a balancer keeps a session at one server (RFC 6265). Pure.

SDK clients keep none, so the proxy keeps those of the names that are given to it, and no other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_tz
from fnmatch import fnmatchcase

from mcp_proxy.wire.headers import Headers

#: The longest text of `kept`, in bytes; a cookie that does not fit is left out.
MAX_COOKIES = 4096

_SECONDS = re.compile(r"-?[0-9]+")

# A comma before what begins a cookie, and what is in quotes, where none does.
_JOINT = re.compile(r"""("[^"]*")|,[ \t]*(?=[!#$%&'*+.^_`|~0-9A-Za-z-]+=)""")


def kept(before: str, received: Headers, names: Sequence[str], now: float) -> str:
    """The cookies `before`, as a Cookie header has them, after the Set-Cookie in an answer.

    `names` are those that are kept; a `*` in them stands for any characters. `now` is the time as
    `time.time` has it: one that is over is taken out.
    """
    cookies = _parsed(before)
    for name, value in received:
        if name.lower() != "set-cookie":
            continue
        pair, *attributes = (part.strip() for part in value.split(";"))
        cookie = pair.partition("=")[0].strip()
        if any(fnmatchcase(cookie, wanted) for wanted in names):
            cookies.pop(cookie, None)
            if not _is_over(attributes, now):
                cookies[cookie] = pair
    text = ""
    for pair in cookies.values():
        joined = f"{text}; {pair}" if text else pair
        if len(joined.encode()) <= MAX_COOKIES:
            text = joined
    return text


def rejoined(cookie: str) -> str:
    """A Cookie header of which a server may have made several, joined by the comma of lists.

    RFC 9113 section 8.2.3 wants `; `. No cookie's value has a comma (RFC 6265 section 4.1.1), but
    some have: one that no name follows stays.
    """
    return _JOINT.sub(lambda found: found[1] or "; ", cookie)


def sent_with(given: str | None, cookies: str) -> str:
    """A Cookie header: the client's, and of `cookies` those of other names."""
    named = _parsed(given or "")
    added = [pair for name, pair in _parsed(cookies).items() if name not in named]
    return "; ".join([given, *added] if given else added)


def _parsed(cookies: str) -> dict[str, str]:
    """The pairs of a Cookie header by their names."""
    pairs = [pair.strip() for pair in cookies.split(";") if pair.strip()]
    return {pair.partition("=")[0].strip(): pair for pair in pairs}


def _is_over(attributes: Sequence[str], now: float) -> bool:
    """Whether a cookie with these attributes is over; Max-Age counts more than Expires."""
    age, expiry = "", float("inf")
    for attribute in attributes:
        name, _, value = attribute.partition("=")
        match name.strip().lower():
            case "max-age" if _SECONDS.fullmatch(value.strip()):
                age = value.strip()
            case "expires" if (date := _time_in(value)) is not None:
                expiry = date
    return (age.startswith("-") or not age.strip("0")) if age else expiry <= now


def _time_in(date: str) -> float | None:
    """The time that a date means, None for what is none."""
    try:
        parsed = parsedate_tz(date)
        return None if parsed is None else datetime(*parsed[:6], tzinfo=UTC).timestamp()
    except (ValueError, OverflowError, IndexError):
        return None
