"""The groups of a file of servers: which servers one endpoint carries together, and how.

`"groups": {"dev": {"members": ["time", {"server": "git", "prefix": "g"}]}}`, where a member may
also have `tools`, as an entry has, and the `schemes` of its resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import (
    GroupMember,
    Server,
    ServerGroup,
    UnservedServer,
    WrongValue,
    kind_of,
    path_name,
)
from mcp_proxy.wire.naming import prefix_of
from mcp_proxy.wire.tools import ToolFilter

#: What the name of a group begins with where servers and groups stand together: no server's does.
SIGN = "@"

#: The group of all servers of a file (`aggregate`), which is served at the root.
ALL = f"{SIGN}all"

_KEYS = frozenset({"server", "prefix", "tools", "schemes"})


def group_of_all(servers: Sequence[Server]) -> ServerGroup:
    """The group of all servers that are not disabled; raises ConfigError."""
    enabled = [
        server.name
        for server in servers
        if not server.name.startswith(SIGN)
        and not (isinstance(server, UnservedServer) and server.is_disabled)
    ]
    return ServerGroup(ALL, tuple(GroupMember(name, prefix_of(name)) for name in enabled))


def read_groups(given: Any, names: Sequence[str]) -> list[Server]:
    """The groups of a file whose servers have these names; raises ValueError where it has none that
    could be read.

    One in which something is wrong is an UnservedServer.
    """
    if given is None:
        return []
    if not isinstance(given, dict):
        raise ValueError("groups is to be an object, with a group under each name")
    return [_read_group(name, group, names) for name, group in given.items()]


def _read_group(name: str, given: Any, names: Sequence[str]) -> Server:
    own = f"{SIGN}{path_name(name)}"
    try:
        if name in ("", ".", "..") or own == ALL or path_name(name) != name:
            raise ValueError(f"{name!r} is no name for a group: it has to be in its URL")
        if not isinstance(given, dict) or not isinstance(given.get("members"), list):
            raise ValueError('a group is to be {"members": [...]}')
        unknown = sorted(set(given) - {"members"})
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not known")
        return ServerGroup(own, tuple(_member(each, names) for each in given["members"]))
    except (ConfigError, ValueError) as error:
        return UnservedServer(own, f"the group {name}: {error}")


def _member(given: Any, names: Sequence[str]) -> GroupMember:
    """A server of a group; raises ValueError for what is none."""
    entry = {"server": given} if isinstance(given, str) else given
    if not isinstance(entry, dict) or not isinstance(entry.get("server"), str):
        raise ValueError(f"a member is the name of a server, or an object with it, not {given!r}")
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ValueError(f"{entry['server']}: {unknown[0]!r} is not known")
    name = path_name(entry["server"])
    if name not in names:
        raise ValueError(f"there is no server {entry['server']!r} in the file")
    prefix = entry.get("prefix", prefix_of(name))
    schemes = entry.get("schemes", [])
    if not isinstance(prefix, str):
        raise ValueError(f"{name}: prefix: expected a text, got {kind_of(prefix)}")
    if not isinstance(schemes, list) or not all(isinstance(each, str) for each in schemes):
        raise ValueError(f"{name}: schemes: expected a list of texts")
    lowered = tuple(each.lower() for each in schemes)
    return GroupMember(name, prefix, tools_of(entry.get("tools")), lowered)


def tools_of(given: Any) -> ToolFilter | None:
    """Which tools the `tools` of an entry hide: a list alone names those that are allowed."""
    if given is None:
        return None
    lists = {"allow": given} if isinstance(given, list) else given
    is_known = isinstance(lists, dict) and not set(lists) - {"allow", "deny"}
    if not is_known or not all(_is_list_of_texts(names) for names in lists.values()):
        raise WrongValue("tools", 'the form is {"allow": [...], "deny": [...]}, with texts')
    allow = lists.get("allow")
    return ToolFilter(None if allow is None else tuple(allow), tuple(lists.get("deny", ())))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
