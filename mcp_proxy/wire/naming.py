"""The names of tools and prompts at an endpoint that carries several servers. Pure.

There a tool of a server is `<prefix>__<name>`, also where the server is the only one: a name never
depends on which others there are. Names have the characters and the length that clients take
(Claude Desktop refuses `:` and `.`, and many put a prefix of their own before a name). What does
not fit is cut and ends in a digest, which is the same on every worker.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence

#: Between a prefix and a name.
SEPARATOR = "__"

#: The longest prefix, and the longest name of a tool with it: 64 characters, which clients allow,
#: without `mcp__`, a name of five letters and `__`, which they put before it.
MAX_PREFIX = 24
MAX_NAME = 52

_UNFIT = re.compile(r"[^A-Za-z0-9_-]")
_DIGEST_LENGTH = 6
_NUL = "\0"
_DIGEST = re.compile(r"_[a-z2-7]{6}\Z")
_PREFIX = re.compile(r"[A-Za-z](?!.*__)[A-Za-z0-9_-]{0,23}(?<!_)\Z")


def is_prefix(text: str) -> bool:
    """Whether a text can be a prefix: a letter first, then at most 23 of A-Z, a-z, 0-9, `_`, `-`.

    It has no `__` and no `_` at its end, so that the first `__` of a name ends its prefix.
    """
    return _PREFIX.match(text) is not None


def prefix_of(server: str) -> str:
    """The prefix of a server without one of its own, from its name."""
    text = re.sub("_+", "_", _UNFIT.sub("-", server)).strip("_")
    if not text[:1].isalpha():
        text = f"m{text}"
    if len(text) <= MAX_PREFIX:
        return text
    kept = text[: MAX_PREFIX - 1 - _DIGEST_LENGTH].rstrip("_")
    return f"{kept}_{_digest(server)}"


def same_prefix(prefix: str) -> str:
    """What two prefixes have in common that people, or URIs, would take for one."""
    return prefix.lower().replace("_", "-")


def public_name(prefix: str, name: str) -> str:
    """A tool's or a prompt's name at the endpoint; without a prefix its own name, if that fits."""
    whole = f"{prefix}{SEPARATOR}{name}" if prefix else name
    fit = _UNFIT.sub("_", whole)
    if fit == whole and len(whole) <= MAX_NAME:
        return whole
    return f"{fit[: MAX_NAME - 1 - _DIGEST_LENGTH]}_{_digest(f'{prefix}{_NUL}{name}')}"


def split_name(public: str) -> tuple[str, str]:
    """The prefix of a name, empty without one, and the rest."""
    prefix, separator, rest = public.partition(SEPARATOR)
    return (prefix, rest) if separator and is_prefix(prefix) else ("", public)


def may_be_cut(public: str) -> bool:
    """Whether a name ends as those do that are not their server's own."""
    return _DIGEST.search(public) is not None


def own_names(prefix: str, names: Iterable[str], others: Sequence[str] = ()) -> dict[str, str]:
    """The names of a server by those that they have at the endpoint.

    Two that meet are both left out, and so is one that would be taken for a name of another server:
    `others` are the prefixes of those.
    """
    found: dict[str, str] = {}
    twice: set[str] = set()
    for name in names:
        public = public_name(prefix, name)
        if public in found and found[public] != name:
            twice.add(public)
        if not prefix and split_name(public)[0] in others:
            twice.add(public)
        found[public] = name
    return {public: name for public, name in found.items() if public not in twice}


def _digest(text: str) -> str:
    """The first characters of a SHA-256, in lower-case base32."""
    whole = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return base64.b32encode(whole)[:_DIGEST_LENGTH].decode().lower()
