"""Names of tools at an endpoint with several servers: there and back, for any text."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire import naming

PREFIXES = st.from_regex(r"[A-Za-z](_?[A-Za-z0-9-]){0,10}", fullmatch=True)
NAMES = st.text(min_size=1, max_size=80)
CLIENTS_TAKE = re.compile(r"[A-Za-z0-9_-]{1,52}")


@given(NAMES)
def test_every_server_has_a_prefix(server: str) -> None:
    assert naming.is_prefix(naming.prefix_of(server))


def test_a_prefix_is_the_servers_name_where_that_fits() -> None:
    assert naming.prefix_of("time") == "time"
    assert naming.prefix_of("my.server") == "my-server"
    assert naming.prefix_of("two__parts_") == "two_parts"
    assert naming.prefix_of("7zip") == "m7zip"
    long = naming.prefix_of("modelcontextprotocol-server-filesystem")
    assert long.startswith("modelcontextproto_")
    assert len(long) <= naming.MAX_PREFIX
    assert long != naming.prefix_of("modelcontextprotocol-server-file")


def test_what_can_be_no_prefix() -> None:
    for text in ("", "7a", "_a", "a__b", "a_", "a.b", "a" * 25, "a\n"):
        assert not naming.is_prefix(text)


@given(PREFIXES, NAMES)
def test_clients_take_every_name(prefix: str, name: str) -> None:
    public = naming.public_name(prefix, name)
    assert CLIENTS_TAKE.fullmatch(public)
    assert naming.split_name(public)[0] == prefix
    assert public == naming.public_name(prefix, name)


@given(PREFIXES, st.lists(NAMES, unique=True, max_size=20))
def test_every_name_finds_its_way_back(prefix: str, names: list[str]) -> None:
    own = naming.own_names(prefix, names)
    for public, name in own.items():
        assert naming.public_name(prefix, name) == public
        if not naming.may_be_cut(public):
            assert naming.split_name(public) == (prefix, name)
    met = [naming.public_name(prefix, name) for name in names]
    assert set(own) == {public for public in met if met.count(public) == 1}


def test_a_name_that_fits_stays_and_another_ends_in_a_digest() -> None:
    assert naming.public_name("git", "push") == "git__push"
    assert naming.public_name("git", "a__b") == "git__a__b"
    assert naming.public_name("git", "a.b") == "git__a_b_pziw4f"
    assert naming.public_name("", "push") == "push"
    assert len(naming.public_name("", "x" * 60)) == naming.MAX_NAME


def test_without_a_prefix_a_name_like_another_servers_is_left_out() -> None:
    assert naming.own_names("", ["git__push", "pull", "x__y"], ["git"]) == {
        "pull": "pull",
        "x__y": "x__y",
    }


def test_two_names_that_meet_are_left_out() -> None:
    cut = naming.public_name("git", "a.b").removeprefix("git__")
    assert naming.own_names("git", ["a.b", cut, "c"]) == {"git__c": "c"}
