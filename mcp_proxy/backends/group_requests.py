"""Which server of a group a client's request is for, and what it says there.

By the name of a tool or a prompt, by the URI of a resource, by what a completion is for: the server
gets its own name for it, and all else as the client has sent it. Nothing is asked: what is not
known is not found. Whoever needs a list that is unknown learns it first (`needs_lists`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Raw

from mcp_proxy.backends.group_lists import GroupLists, is_hidden
from mcp_proxy.errors import InvalidParams, UnknownTool
from mcp_proxy.wire import jsonrpc, merging, naming
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.tools import ToolFilter

COMPLETE = "completion/complete"
SUBSCRIBE, UNSUBSCRIBE = "resources/subscribe", "resources/unsubscribe"
BY_NAME = frozenset({"tools/call", "prompts/get"})
BY_URI = frozenset({"resources/read", SUBSCRIBE, UNSUBSCRIBE})

#: The result of a completion for which nobody has any values.
NO_VALUES = Raw(b'{"completion":{"values":[]}}')

_EMPTY = Raw(b"{}")

# What of a client's text is in a sentence, in characters.
_SHOWN = 200


class Served(Protocol):
    """One server of a group, as its requests need it."""

    @property
    def tools(self) -> ToolFilter | None:
        """Which of its tools the group hides."""


class Prefixed(Served, Protocol):
    """One that is known by its prefix."""

    prefix: str


class Addressed(NamedTuple):
    """The number of the server that a request is for, in the order of the group, and the request
    as that server gets it.
    """

    number: int
    request: Request


def needs_lists(request: Request) -> bool:
    """Whether whose a request is can be said only once the lists of all servers are known."""
    if request.method in BY_NAME:
        return naming.may_be_cut(name_of(request))
    return request.method in BY_URI


def name_of(request: Request) -> str:
    """The name of the tool or prompt in a request, empty without one."""
    return merging.text_in(request.params or _EMPTY, "name")


def uri_of(request: Request) -> str:
    """The URI of the resource in a request, empty without one."""
    return merging.text_in(request.params or _EMPTY, "uri")


def by_prefix(request: Request, servers: Sequence[Prefixed]) -> Addressed | None:
    """Whose tool or prompt it is where its name says that alone, as most do; else None, and lists
    have to be looked at. Raises what a filter raises.
    """
    public = name_of(request)
    prefix, own = naming.split_name(public)
    if not prefix or naming.may_be_cut(public):
        return None
    for number, server in enumerate(servers):
        if server.prefix == prefix:
            if is_hidden(request.method, own, server.tools):
                raise UnknownTool(public[:_SHOWN])
            return _addressed(number, request, own, server)
    return None


def by_name(request: Request, servers: Sequence[Served], lists: GroupLists) -> Addressed:
    """Whose tool or prompt it is; raises UnknownTool, InvalidParams, and what a filter raises."""
    public = name_of(request)
    found = lists.named(request.method, public)
    if found is None:
        if request.method == "tools/call":
            raise UnknownTool(public[:_SHOWN])
        raise InvalidParams(f"Unknown prompt: {public[:_SHOWN]}")
    number, own = found
    return _addressed(number, request, own, servers[number])


def _addressed(number: int, request: Request, own: str, server: Served) -> Addressed:
    renamed = _with(request, "name", own)
    tools = server.tools
    return Addressed(number, renamed if tools is None else tools.admitted(renamed))


def by_uri(request: Request, lists: GroupLists) -> Addressed | None:
    """Whose resource it is; None where it is nobody's."""
    found = lists.owners.find(uri_of(request))
    return None if found is None else Addressed(found.number, _with(request, "uri", found.uri))


def completion(request: Request, lists: GroupLists) -> Addressed | None:
    """Whose prompt or template an argument is of; None where that is nobody's, or where the server
    is known to complete nothing.
    """
    reference = jsonrpc.fields_of(request.params).get("ref", _EMPTY)
    key = "name" if merging.text_in(reference, "name") else "uri"
    public = merging.text_in(reference, key)
    found: tuple[int, str] | None
    if key == "name":
        found = lists.named("prompts/get", public)
    else:
        found = lists.owners.find_template(public)
    if found is None or not lists.may_complete(found[0]):
        return None
    number, own = found
    return Addressed(number, _with(request, "ref", merging.with_field(reference, key, own)))


def _with(request: Request, key: str, value: object) -> Request:
    return request.with_params(merging.with_field(request.params or _EMPTY, key, value))
