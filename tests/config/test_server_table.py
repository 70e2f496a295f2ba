"""The table of servers: what a reload makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import ConfigError, HttpServer, StdioServer, UnservedServer
from mcp_proxy.server_table import MAX_REMOVED, ServerTable, decode, encode, is_other_process

NAMES = st.sampled_from("abcdef")
SERVERS = st.one_of(
    st.builds(
        StdioServer,
        NAMES,
        st.just(("run",)),
        st.dictionaries(
            st.sampled_from(["A", "B"]),
            st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        ),
        timeout=st.sampled_from([None, 1.5]),
    ),
    st.builds(
        HttpServer, NAMES, st.just(("http://a.example/mcp",)), st.sampled_from([(), ("X: y",)])
    ),
)
LISTS = st.lists(SERVERS, min_size=1, unique_by=lambda server: server.name)


@given(LISTS, st.lists(NAMES), st.sampled_from([None, "why"]))
def test_a_table_is_read_as_it_was_written(
    servers: list[StdioServer | HttpServer], removed: list[str], failure: str | None
) -> None:
    table = ServerTable("file", list(servers), removed, failure)
    assert decode(encode(table)) == table


def test_what_is_no_table_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        decode(b"\x93")


@given(st.lists(LISTS, min_size=2, max_size=5))
def test_what_was_there_and_is_not_is_removed(
    lists: list[list[StdioServer | HttpServer]],
) -> None:
    table = ServerTable("file", list(lists[0]))
    was_there: set[str] = set()
    for servers in lists[1:]:
        was_there |= set(table.names())
        table = table.renewed(list(servers))
        assert table.servers == servers
        assert set(table.removed) == was_there - set(table.names())
        assert table.failure is None


def test_a_mistake_in_an_entry_is_that_entrys() -> None:
    one, two = StdioServer("one", "run"), StdioServer("two", "run")
    table = ServerTable("file", [one, two])
    broken = [UnservedServer("one", "no command"), UnservedServer("three", "no url")]
    after = table.renewed([StdioServer("two", "walk"), *broken])
    assert after.servers == [StdioServer("two", "walk"), one, broken[1]]
    assert after.removed == []
    assert after.failure == (
        "one: no command, and it is served as it was before; three: no url, and it is not served"
    )
    mended = after.renewed([one, StdioServer("three", "run")])
    assert (mended.failure, mended.removed) == (None, ["two"])


def test_what_is_disabled_is_served_no_more() -> None:
    one, two = StdioServer("one", "run"), StdioServer("two", "run")
    disabled = UnservedServer("one", "it is disabled", is_disabled=True)
    table = ServerTable("file", [one, two]).renewed([disabled, two])
    assert table.servers == [disabled, two]
    assert table.failure is None
    still_broken = UnservedServer("one", "no command")
    assert table.renewed([still_broken, two]).servers == [still_broken, two]


def test_a_table_without_any_server_is_a_mistake() -> None:
    table = ServerTable("file", [StdioServer("one", "run")])
    with pytest.raises(ConfigError, match="no server would be served; two: no url"):
        table.renewed([UnservedServer("two", "no url")])
    with pytest.raises(ConfigError, match="no server would be served"):
        table.renewed([UnservedServer("one", "it is disabled", is_disabled=True)])


def test_names_of_the_past_are_forgotten_the_oldest_first() -> None:
    table = ServerTable("file", [StdioServer("0", "run")])
    for number in range(1, MAX_REMOVED + 3):
        table = table.renewed([StdioServer(str(number), "run")])
    assert len(table.removed) == MAX_REMOVED
    assert table.removed[0] == str(MAX_REMOVED + 1)
    assert "0" not in table.removed


def test_changes_are_named() -> None:
    one, two = StdioServer("one", "run"), StdioServer("two", "run")
    table = ServerTable("file", [one, two])
    assert table.changes_to(table) == "nothing is different"
    after = table.renewed([StdioServer("two", "walk"), StdioServer("three", "run")])
    assert table.changes_to(after) == "changed: two; new: three; removed: one"


def test_another_process_is_one_that_is_started_in_another_way() -> None:
    server = StdioServer("a", "run", {"A": "1"}, "/")
    assert not is_other_process(server, StdioServer("a", "run", {"A": "1"}, "/", 3.0))
    assert is_other_process(server, StdioServer("a", "run x", {"A": "1"}, "/"))
    assert is_other_process(server, StdioServer("a", "run", {"A": "2"}, "/"))
    assert is_other_process(server, StdioServer("a", "run", {"A": "1"}))
