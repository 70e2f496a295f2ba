"""The lists of several servers as the clients of a group see them, and the way back from there.

A name or a URI that a client sends leads to the server that it belongs to, and to what that calls
it. Built from what is known, anew whenever that changes, and shared by all sessions that see the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from msgspec import UNSET, Raw

from mcp_proxy.backends.catalogue import Listed
from mcp_proxy.errors import BadAnswer
from mcp_proxy.wire import jsonrpc, merging, naming
from mcp_proxy.wire.aliases import ResourceOwners, Resources
from mcp_proxy.wire.tools import ToolFilter

#: The most entries of one kind, and the most bytes of them, that a group lists; servers from the
#: end of the order are left out beyond that.
MAX_ENTRIES = 5000
MAX_BYTES = 8 * 1024 * 1024

_TOOLS, _PROMPTS = "tools/list", "prompts/list"
_RESOURCES, _TEMPLATES = "resources/list", "resources/templates/list"

# Which list the names of a method stand in.
_NAMED = {"tools/call": _TOOLS, "prompts/get": _PROMPTS}

_TOO_LONG = "its lists would make those of the group too long"


class Part(NamedTuple):
    """One server of a group, and what is known of it; `listed` of None: nothing."""

    name: str
    prefix: str
    tools: ToolFilter | None
    schemes: frozenset[str]
    listed: Listed | None


class GroupLists:
    """The lists of these servers, in their order. Immutable, so thread-safe."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._numbers = {part.prefix: number for number, part in enumerate(parts)}
        #: Whose a URI is.
        self.owners = ResourceOwners([_resources_of(part) for part in parts])

    def entries(self, method: str) -> list[Raw]:
        """The entries of a list."""
        return self._entries[method][0]

    def left_out(self) -> dict[str, str]:
        """The names of servers whose entries are left out, with the reason."""
        return {name: _TOO_LONG for _, names in self._entries.values() for name in names}

    def may_complete(self, number: int) -> bool:
        """Whether a server completes arguments, as far as is known."""
        listed = self._parts[number].listed
        return listed is None or "completions" in jsonrpc.fields_of(listed.capabilities)

    def named(self, method: str, public: str) -> tuple[int, str] | None:
        """The number of the server whose tool or prompt has this name, and its own name for it.

        None where there is no such server, or where the tool is hidden.
        """
        prefix, rest = naming.split_name(public)
        number = self._numbers.get(prefix)
        if number is None or not prefix:
            number, rest = self._numbers.get(""), public
        if number is None:
            return None
        kind = _NAMED[method]
        if not self._parts[number].prefix or naming.may_be_cut(public):
            rest = self._names[number][kind].get(public, rest)
        return None if is_hidden(method, rest, self._parts[number].tools) else (number, rest)

    @cached_property
    def _names(self) -> list[Mapping[str, Mapping[str, str]]]:
        """For each server and list its own names by those that clients see."""
        prefixes = [part.prefix for part in self._parts if part.prefix]
        found: list[Mapping[str, Mapping[str, str]]] = []
        for part in self._parts:
            of_part: dict[str, Mapping[str, str]] = {}
            for method in (_TOOLS, _PROMPTS):
                names = [merging.name_in(entry) for entry in _listed(part, method)]
                of_part[method] = naming.own_names(part.prefix, filter(None, names), prefixes)
            found.append(of_part)
        return found

    @cached_property
    def _entries(self) -> dict[str, tuple[list[Raw], list[str]]]:
        """The entries of each list, and the names of servers that have no place in it."""
        return {method: self._merged(method) for method in merging.KINDS}

    def _merged(self, method: str) -> tuple[list[Raw], list[str]]:
        entries: list[Raw] = []
        left_out: list[str] = []
        size = 0
        for number, part in enumerate(self._parts):
            shown = self._shown(number, part, method)
            more = sum(len(memoryview(entry)) for entry in shown)
            if len(entries) + len(shown) > MAX_ENTRIES or size + more > MAX_BYTES:
                left_out.append(part.name)
                continue
            entries += shown
            size += more
        return entries, left_out

    def _shown(self, number: int, part: Part, method: str) -> list[Raw]:
        """The entries of one server as clients see them."""
        entries = list(_listed(part, method))
        if method == _TOOLS and part.tools is not None:
            shows = part.tools.shows
            entries = [entry for entry in entries if shows(merging.name_in(entry))]
        if method in (_TOOLS, _PROMPTS):
            entries = merging.named(entries, self._names[number][method])
        if not self.owners.is_needed:
            return entries
        return [Raw(self.owners.shown_in(number, bytes(entry))) for entry in entries]


@lru_cache(maxsize=16)
def lists_of(parts: tuple[Part, ...]) -> GroupLists:
    """The lists of these servers; the same object for the same servers."""
    return GroupLists(parts)


def is_hidden(method: str, own: str, tools: ToolFilter | None) -> bool:
    """Whether a call names a tool that these hide, by its server's own name."""
    return method == "tools/call" and tools is not None and not tools.shows(own)


def require_bounded(method: str, entries: Sequence[Raw]) -> None:
    """Raises BadAnswer for a list of one server that is too long for any group."""
    if len(entries) > MAX_ENTRIES or sum(len(memoryview(one)) for one in entries) > MAX_BYTES:
        raise BadAnswer(f"Its answers to {method} are too long for a group")


def _listed(part: Part, method: str) -> Sequence[Raw]:
    return () if part.listed is None else part.listed.lists.get(method, ())


def _resources_of(part: Part) -> Resources:
    if part.listed is None:
        return Resources(part.prefix, schemes=part.schemes, is_known=False)
    capabilities = jsonrpc.fields_of(part.listed.capabilities)
    uris = (merging.text_in(entry, "uri") for entry in _listed(part, _RESOURCES))
    templates = (merging.text_in(entry, "uriTemplate") for entry in _listed(part, _TEMPLATES))
    return Resources(
        part.prefix,
        frozenset(filter(None, uris)),
        tuple(filter(None, templates)),
        part.schemes,
        has_any=jsonrpc.member(capabilities, "resources") is not UNSET,
    )
