"""Cookies by which a balancer keeps a session at one server (RFC 6265). Pure.

SDK clients keep none, so the proxy keeps those of the names that are given to it, and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mcp_proxy.wire.headers import Headers

#: The longest text of `kept`, in bytes; a cookie that does not fit is left out.
MAX_COOKIES = 4096


def kept(before: str, received: Headers, names: Sequence[str]) -> str:
    """The cookies `before`, as a Cookie header has them, after the Set-Cookie in an answer.

    `names` are those that are kept; a `*` in them stands for any characters.
    """
    cookies = _parsed(before)
    for name, value in received:
        if name.lower() != "set-cookie":
            continue
        pair, *attributes = (part.strip() for part in value.split(";"))
        cookie = pair.partition("=")[0].strip()
        if any(fnmatchcase(cookie, wanted) for wanted in names):
            cookies.pop(cookie, None)
            if not any(_ends(attribute) for attribute in attributes):
                cookies[cookie] = pair
    text = ""
    for pair in cookies.values():
        joined = f"{text}; {pair}" if text else pair
        if len(joined.encode()) <= MAX_COOKIES:
            text = joined
    return text


def sent_with(given: str | None, cookies: str) -> str:
    """A Cookie header: the client's, and of `cookies` those of other names."""
    named = _parsed(given or "")
    added = [pair for name, pair in _parsed(cookies).items() if name not in named]
    return "; ".join([given, *added] if given else added)


def _parsed(cookies: str) -> dict[str, str]:
    """The pairs of a Cookie header by their names."""
    pairs = [pair.strip() for pair in cookies.split(";") if pair.strip()]
    return {pair.partition("=")[0].strip(): pair for pair in pairs}


def _ends(attribute: str) -> bool:
    """Whether an attribute says that the cookie is over."""
    name, _, value = attribute.partition("=")
    return name.strip().lower() == "max-age" and (value.strip() or "0").startswith(("-", "0"))
