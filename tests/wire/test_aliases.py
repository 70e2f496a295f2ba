"""Whose a resource is: URIs there and back, for any servers and any text."""

from __future__ import annotations

import re

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire.aliases import Found, ResourceOwners, Resources, alias_of, normalised

SCHEMES = st.sampled_from(["file", "note", "ui", "http", "a+b", "one+note", "UI", "Note"])
URIS = st.builds(
    lambda scheme, rest: f"{scheme}:{rest}",
    SCHEMES,
    st.one_of(
        st.text(max_size=12),
        st.builds(lambda host, path: f"//{host}/{path}", st.text(max_size=6), st.text(max_size=8)),
        st.sampled_from(["//one/x", "//x", "///tmp/a b", "//Host/é", "//two/one/x"]),
    ),
)
TEMPLATES = st.sampled_from(["note://{id}", "file:///{+path}", "note://a/{b}/c", "{any}", "http:x"])


@st.composite
def servers(draw: st.DrawFn) -> list[Resources]:
    prefixes = draw(st.permutations(["one", "two", "a_b", "Note"]))
    return [
        Resources(
            prefix,
            frozenset(draw(st.lists(URIS, max_size=4))),
            tuple(draw(st.lists(TEMPLATES, max_size=2))),
            is_known=draw(st.booleans()),
        )
        for prefix in prefixes[: draw(st.integers(1, 4))]
    ]


@given(servers())
def test_every_listed_uri_finds_its_server(group: list[Resources]) -> None:
    owners = ResourceOwners(group)
    for index, server in enumerate(group):
        for uri in server.uris:
            assert owners.find(owners.shown(index, uri)) == Found(index, uri)


@given(servers(), URIS)
def test_every_uri_that_a_server_writes_finds_it(group: list[Resources], uri: str) -> None:
    owners = ResourceOwners(group)
    for index in range(len(group)):
        found = owners.find(owners.shown(index, uri))
        assert found is not None
        assert found.number == index
        assert normalised(found.uri) == normalised(uri)


@given(servers(), st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True))
def test_what_a_template_becomes_finds_its_server(group: list[Resources], value: str) -> None:
    owners = ResourceOwners(group)
    for index, server in enumerate(group):
        for template in server.templates:
            if template == "{any}":  # it says nothing of where it leads
                continue
            shown = owners.shown_template(index, template)
            expanded = re.sub(r"\{[^{}]*\}", value, shown)
            found = owners.find(expanded)
            assert found is not None
            assert found.number == index or shown == template


@given(servers(), servers())
def test_a_server_that_comes_last_changes_none_before_it(
    group: list[Resources], others: list[Resources]
) -> None:
    before = ResourceOwners(group)
    names = {each.prefix for each in group}
    after = ResourceOwners([*group, *(each for each in others if each.prefix not in names)])
    if len(group) < 2:
        return
    for index, server in enumerate(group):
        for uri in server.uris:
            if after.shown(index, uri) != before.shown(index, uri):
                assert after.find(before.shown(index, uri)) is not None


def test_the_first_in_the_order_is_trusted() -> None:
    owners = ResourceOwners(
        [Resources("one", frozenset({"note://x"})), Resources("two", frozenset({"note://x"}))]
    )
    assert owners.shown(0, "note://x") == "note://x"
    assert owners.shown(1, "note://x") == "two+note://x"
    assert owners.find("two+note://x") == Found(1, "note://x")
    assert owners.find("TWO+note://x") == Found(1, "note://x")


def test_pages_keep_their_scheme() -> None:
    assert alias_of("a_b", "ui://page/1") == "ui://a-b/page/1"
    owners = ResourceOwners([Resources("one"), Resources("a_b")])
    assert owners.find("ui://a-b/page/1") == Found(1, "ui://page/1")


def test_what_a_client_has_normalised_is_found() -> None:
    listed = frozenset({"Note://Host/a b", "note://é"})
    owners = ResourceOwners([Resources("one", listed), Resources("two")])
    assert owners.find("note://host/a%20b") == Found(0, "Note://Host/a b")
    assert owners.find("note://%C3%A9") == Found(0, "note://é")


def test_a_scheme_of_one_server_alone_is_its_own() -> None:
    one = Resources("one", frozenset({"note://1"}))
    owners = ResourceOwners([one, Resources("two", schemes=frozenset({"log"}))])
    assert owners.find("note://2") == Found(0, "note://2")
    assert owners.find("log://2") == Found(1, "log://2")
    assert owners.find("mail://2") is None
    assert ResourceOwners([one, Resources("two", has_any=False)]).find("mail://2") == Found(
        0, "mail://2"
    )


def test_while_an_earlier_server_is_unknown_later_ones_have_aliases() -> None:
    owners = ResourceOwners([Resources("one", is_known=False), Resources("two")])
    assert owners.shown(1, "note://1") == "two+note://1"
    assert owners.shown(0, "file://1") == alias_of("one", "file://1")


def test_a_message_is_rewritten_where_it_names_resources() -> None:
    owners = ResourceOwners([Resources("one", is_known=False), Resources("two")])
    said = {
        "text": '"uri": "note://1"',
        "list": [{"uri": "note://1", "n": 1.0}, {"uriTemplate": "note://{x}"}],
        "_meta": {"ui": {"resourceUri": "ui://page"}},
    }
    shown = owners.shown_in(1, msgspec.json.encode(said))
    assert msgspec.json.decode(shown) == {
        "text": '"uri": "note://1"',
        "list": [{"uri": "two+note://1", "n": 1.0}, {"uriTemplate": "two+note://{x}"}],
        "_meta": {"ui": {"resourceUri": "ui://two/page"}},
    }
    assert owners.shown_in(1, b'{"uri": "\\ud800"}') == b'{"uri": "\\ud800"}'
