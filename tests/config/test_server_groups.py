"""The groups of a file of servers: what they may say, and what is said of those that may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import ProxyConfig
from mcp_proxy.errors import ConfigError
from mcp_proxy.server_groups import ALL
from mcp_proxy.servers import GroupMember, ServerGroup, UnservedServer
from mcp_proxy.servers_file import read_servers
from mcp_proxy.wire.tools import ToolFilter

SERVERS = {"time": {"command": "t"}, "my.git": {"command": "g"}, "off": {"disabled": True}}


def written(directory: Path, groups: Any) -> Path:
    """A file with these groups."""
    file = directory / "servers.json"
    file.write_text(json.dumps({"mcpServers": SERVERS, "groups": groups}), encoding="utf-8")
    return file


def test_members_are_names_or_say_more(tmp_path: Path) -> None:
    members = ["time", {"server": "my.git", "prefix": "g", "tools": ["a*"], "schemes": ["Git"]}]
    group = read_servers(written(tmp_path, {"dev": {"members": members}}), {})[-1]
    assert group == ServerGroup(
        "@dev",
        (GroupMember("time", "time"), GroupMember("my.git", "g", ToolFilter(("a*",)), ("git",))),
    )


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ([], "a group is to be"),
        ({"members": []}, "has no servers"),
        ({"members": ["nobody"]}, "there is no server 'nobody'"),
        ({"members": [7]}, "a member is the name of a server"),
        ({"members": ["time"], "path": "/x"}, "'path' is not known"),
        ({"members": [{"server": "time", "Prefix": "x"}]}, "'Prefix' is not known"),
        ({"members": [{"server": "time", "prefix": "a__b"}]}, "is no prefix"),
        ({"members": [{"server": "time", "prefix": 7}]}, "expected a text"),
        ({"members": [{"server": "time", "schemes": "x"}]}, "expected a list of texts"),
        ({"members": [{"server": "time", "tools": {"only": []}}]}, "the form is"),
        ({"members": ["time", {"server": "my.git", "prefix": "TIME"}]}, "the same prefix"),
    ],
)
def test_a_mistake_is_that_groups(tmp_path: Path, group: Any, complaint: str) -> None:
    good = {"members": ["time"]}
    bad, other = read_servers(written(tmp_path, {"bad": group, "good": good}), {})[-2:]
    assert isinstance(bad, UnservedServer)
    assert bad.name == "@bad"
    assert complaint in bad.reason
    assert isinstance(other, ServerGroup)


@pytest.mark.parametrize("name", ["", "..", "a b", "all"])
def test_a_group_has_a_name_that_fits_into_a_url(tmp_path: Path, name: str) -> None:
    group = read_servers(written(tmp_path, {name: {"members": ["time"]}}), {})[-1]
    assert isinstance(group, UnservedServer)
    assert "is no name for a group" in group.reason


def test_groups_that_are_no_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="groups is to be an object"):
        read_servers(written(tmp_path, ["dev"]), {})


def test_a_group_has_at_most_32_members() -> None:
    members = tuple(GroupMember(f"s{n}", f"s{n}") for n in range(33))
    assert len(ServerGroup("@g", members[:32]).members) == 32
    with pytest.raises(ConfigError, match="more than 32"):
        ServerGroup("@g", members)


def test_all_enabled_servers_together_are_a_group_of_their_own(tmp_path: Path) -> None:
    file = written(tmp_path, {"dev": {"members": ["time"]}})
    config = ProxyConfig(config=str(file), aggregate=True)
    group = config.servers()[-1]
    assert isinstance(group, ServerGroup)
    assert group.name == ALL
    assert [(each.server, each.prefix) for each in group.members] == [
        ("time", "time"),
        ("my.git", "my-git"),
    ]
    assert config.path_of(ALL) == ""
    assert config.path_of("@dev") == "/groups/dev"
    assert config.path_of("time") == "/servers/time"


def test_what_is_to_be_served_together_stands_in_a_file() -> None:
    with pytest.raises(ConfigError, match="aggregate"):
        ProxyConfig(command=("server",), aggregate=True).servers()
