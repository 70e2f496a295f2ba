"""Whose a resource is, at an endpoint that carries several servers. Pure.

A URI finds its server: by the alias that it is, or by who lists it, has a template for it, or alone
has its scheme. What would find its way back stays byte for byte, since hosts compare URIs and
follow links; anything else is an alias, `<prefix>+<uri>`, which is a valid URI. The order of the
servers is trust: an earlier one's URIs are never taken for a later one's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from mcp_proxy.wire.naming import same_prefix

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)\Z", re.DOTALL)
_AUTHORITY = re.compile(r"//([^/?#]*)(.*)\Z", re.DOTALL)
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_EXPRESSION = re.compile(r"\{[^{}]*\}")

# What a URI may have as it is (RFC 3986 section 2); the rest is escaped.
_KEPT = "!#$%&'()*+,/:;=?@[]~"

# URIs of which is remembered how they are shown.
_MAX_KNOWN = 10_000

# The scheme of the pages that tools show (SEP-1865): hosts look for just that one.
_UI = "ui"

# In an answer: a key that says where a resource is, and the text behind it.
_KEYED = re.compile(rb'("(?:uri|uriTemplate|resourceUri)"\s*:\s*)("(?:[^"\\]|\\.)*")')


class Resources(NamedTuple):
    """What is known of the resources of one server.

    `uris` and `templates` are those that it lists; `is_known` says whether its lists have been
    asked for, `has_any` whether it may have some. `schemes` are those of its URIs by its entry.
    """

    prefix: str
    uris: frozenset[str] = frozenset()
    templates: tuple[str, ...] = ()
    schemes: frozenset[str] = frozenset()
    has_any: bool = True
    is_known: bool = True


class Found(NamedTuple):
    """The server, by its number in the order, that a URI belongs to, and its URI for it."""

    number: int
    uri: str


class ResourceOwners:
    """The resources of several servers, in the order of trust. Immutable, so thread-safe."""

    def __init__(self, servers: Sequence[Resources]) -> None:
        self._servers = servers
        self._listed = [{normalised(uri): uri for uri in each.uris} for each in servers]
        self._schemes = [_schemes_of(each) for each in servers]
        # By the scheme of what stands before the first expression; "" fits any.
        self._by_scheme = [_by_scheme(each.templates) for each in servers]
        self._known: dict[tuple[int, str], str] = {}  # what is shown; each operation is atomic
        self._by_alias = {same_prefix(each.prefix): i for i, each in enumerate(servers)}
        self._having = [i for i, each in enumerate(servers) if each.has_any]

    @property
    def is_needed(self) -> bool:
        """Whether two servers may have resources, so that one can be taken for another's."""
        return len(self._having) > 1

    def find(self, uri: str) -> Found | None:
        """The server that a client's URI belongs to; None where it is nobody's."""
        found = self._of_alias(uri)
        if found is not None:
            return found
        plain = normalised(uri)
        for number in self._having:
            own = self._own(number, uri, plain)
            if own is not None:
                return Found(number, own)
            if self._has_template_for(number, uri):
                return Found(number, uri)
        scheme = _scheme_of(uri)
        owners = [number for number in self._having if scheme in self._schemes[number]]
        if len(owners) == 1:
            return Found(owners[0], uri)
        return Found(self._having[0], uri) if len(self._having) == 1 else None

    def find_template(self, template: str) -> Found | None:
        """The server that a client's template belongs to; None where it is nobody's."""
        found = self._of_alias(template)
        if found is not None:
            return found
        for number in self._having:
            if template in self._servers[number].templates:
                return Found(number, template)
        return self.find(template)

    def shown(self, number: int, uri: str) -> str:
        """A URI of a server as clients get it: the same where it finds its way back."""
        known = self._known.get((number, uri))
        if known is not None:
            return known
        is_found = self.find(uri) == Found(number, uri) and not self._is_doubtful(number)
        shown = uri if is_found else alias_of(self._servers[number].prefix, uri)
        if len(self._known) < _MAX_KNOWN:
            self._known[number, uri] = shown
        return shown

    def _has_template_for(self, number: int, uri: str) -> bool:
        by_scheme = self._by_scheme[number]
        candidates = (*by_scheme.get(_scheme_of(uri), ()), *by_scheme.get("", ()))
        return any(_fits(uri, parts) for parts in candidates)

    def shown_template(self, number: int, template: str) -> str:
        """A template of a server as clients get it.

        It stays unless an earlier server has what may begin as its URIs do.
        """
        start = _literal(template)
        earlier = [i for i in self._having if i < number]
        for i in earlier:
            others = [*self._servers[i].uris, *map(_literal, self._servers[i].templates)]
            if any(one.startswith(start) or start.startswith(one) for one in others):
                return alias_of(self._servers[number].prefix, template)
        if self._is_doubtful(number) or self._of_alias(template) is not None:
            return alias_of(self._servers[number].prefix, template)
        return template

    def shown_in(self, number: int, encoded: bytes) -> bytes:
        """A message of a server with its URIs as clients get them; all else keeps its bytes."""
        return _KEYED.sub(lambda found: found[1] + self._shown_text(number, found), encoded)

    def _shown_text(self, number: int, found: re.Match[bytes]) -> bytes:
        try:
            text = msgspec.json.decode(found[2], type=str)
        except msgspec.DecodeError:  # it has half of a character
            return found[2]
        is_template = b"uriTemplate" in found[1]
        shown = self.shown_template(number, text) if is_template else self.shown(number, text)
        return found[2] if shown == text else msgspec.json.encode(shown)

    def _own(self, number: int, uri: str, plain: str) -> str | None:
        """The URI that a server lists and a client means, None where it lists none."""
        return uri if uri in self._servers[number].uris else self._listed[number].get(plain)

    def _is_doubtful(self, number: int) -> bool:
        """Whether an earlier server may have the same URIs, as far as anybody knows."""
        return any(i < number and not self._servers[i].is_known for i in self._having)

    def _of_alias(self, uri: str) -> Found | None:
        found = _SCHEME.match(uri)
        if found is None:
            return None
        scheme, rest = found.groups()
        if scheme.lower() == _UI and rest.startswith("//"):
            prefix, separator, path = rest[2:].partition("/")
            own = f"{scheme}://{path}"
        else:
            prefix, separator, scheme = scheme.partition("+")
            own = f"{scheme}:{rest}" if scheme else rest
        number = self._by_alias.get(same_prefix(prefix)) if separator else None
        if number is None:
            return None
        return Found(number, self._own(number, own, normalised(own)) or own)


def alias_of(prefix: str, uri: str) -> str:
    """The URI by which a server's resource is known where its own would not find it."""
    own = same_prefix(prefix)
    found = _SCHEME.match(uri)
    if found is None:
        return f"{own}+:{uri}"
    if found[1].lower() == _UI and found[2].startswith("//"):
        return f"{found[1]}://{own}/{found[2][2:]}"
    return f"{own}+{uri}"


def normalised(uri: str) -> str:
    """A URI as clients may send it back: scheme and host in lower case, what is no character of a
    URI escaped (RFC 3986 section 6.2.2).
    """
    escaped = quote(uri, safe=_KEPT, errors="surrogatepass")
    found = _SCHEME.match(escaped)
    if found is not None:
        scheme, rest = found.groups()
        authority = _AUTHORITY.match(rest)
        if authority is not None:
            userinfo, at, host = authority[1].rpartition("@")
            rest = f"//{userinfo}{at}{host.lower()}{authority[2]}"
        escaped = f"{scheme.lower()}:{rest}"
    return _ESCAPE.sub(lambda found: found[0].upper(), escaped)


def _scheme_of(uri: str) -> str:
    found = _SCHEME.match(uri)
    return "" if found is None else found[1].lower()


def _schemes_of(server: Resources) -> Set[str]:
    listed = {_scheme_of(uri) for uri in (*server.uris, *server.templates)}
    return (listed | server.schemes) - {""}


def _literal(template: str) -> str:
    """A template up to its first expression."""
    return template.partition("{")[0]


def _by_scheme(templates: Sequence[str]) -> dict[str, list[list[str]]]:
    """The parts of templates by the schemes of the URIs that they are for."""
    found: dict[str, list[list[str]]] = {}
    for template in templates:
        found.setdefault(_scheme_of(_literal(template)), []).append(_parts_of(template))
    return found


def _parts_of(template: str) -> list[str]:
    """What a template has between its expressions (RFC 6570)."""
    return _EXPRESSION.split(template)


def _fits(uri: str, parts: Sequence[str]) -> bool:
    """Whether a URI has these parts in their order, from its beginning to its end."""
    first, *rest = parts
    if not rest:
        return uri == first
    if not uri.startswith(first):
        return False
    at = len(first)
    for part in rest[:-1]:
        at = uri.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return uri.endswith(rest[-1]) and len(uri) - len(rest[-1]) >= at
