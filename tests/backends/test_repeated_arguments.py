"""The list of tools that says which arguments are repeated: what is read of it, and when."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from mcp_proxy.backends import repeated_arguments
from mcp_proxy.backends.repeated_arguments import Page, RepeatedArguments
from mcp_proxy.errors import BackendUnreached, BadAnswer
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request
from tests.support.threads import run_together
from tests.support.waiting import eventually

CALL = Request(1, "tools/call", jsonrpc.as_payload({"name": "go"}))


def page(name: str, following: str | None = None) -> Raw:
    """A page with one tool, one of whose arguments is repeated."""
    city = {"type": "string", "x-mcp-header": "City"}
    tool = {"name": name, "inputSchema": {"type": "object", "properties": {"city": city}}}
    more = {} if following is None else {"nextCursor": following}
    return jsonrpc.as_payload({"tools": [tool], **more})


class Server:
    """Gives pages, or fails, in order; `asked` are the cursors that it was asked with."""

    def __init__(self, pages: Sequence[Raw | Exception] | Callable[[int], Raw]) -> None:
        self.pages = pages
        self.asked: list[Any] = []
        self.sizes: list[int] = []

    def ask(self, page: Page) -> Raw | None:
        cursor = jsonrpc.member(jsonrpc.fields_of(page.request.params), "cursor")
        number = len(self.asked)
        self.asked.append(jsonrpc.text_of(cursor))
        self.sizes.append(page.size)
        assert page.is_first == (number == 0)
        given = self.pages(number) if callable(self.pages) else self.pages[number]
        if isinstance(given, Exception):
            raise given
        return given


def test_all_pages_are_read() -> None:
    server = Server([page("one", "a"), page("two", "b"), page("three")])
    assert set(RepeatedArguments("x").of(CALL, server.ask)) == {"one", "two", "three"}
    assert server.asked == [None, "a", "b"]


def test_a_list_that_comes_back_to_where_it_was_is_over(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(lambda number: page(f"tool {number}", "ab"[number % 2]))
    assert len(RepeatedArguments("x").of(CALL, server.ask)) == 3
    assert server.asked == [None, "a", "b"]
    assert "comes back" in caplog.text


def test_a_list_without_an_end_is_read_for_so_many_pages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server(lambda number: page(f"tool {number}", f"{number}"))
    assert len(RepeatedArguments("x").of(CALL, server.ask)) == 100
    assert "not read to its end" in caplog.text


def test_the_pages_have_one_size_together(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([page("one", "a"), BadAnswer("too long")])
    monkeypatch.setattr(repeated_arguments, "MAX_SIZE", 1000)
    assert set(RepeatedArguments("x").of(CALL, server.ask)) == {"one"}
    assert server.sizes == [1000, 1000 - len(page("one", "a"))]


def test_no_page_is_asked_for_in_next_to_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.chain([0.0, 0.0], itertools.repeat(9.95))
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(repeated_arguments, "time", clock)
    server = Server([page("one", "a")])
    assert set(RepeatedArguments("x").of(CALL, server.ask)) == {"one"}


def test_a_server_that_is_not_reached_for_a_further_page_is_not_lost() -> None:
    server = Server([page("one", "a"), BackendUnreached()])
    assert set(RepeatedArguments("x").of(CALL, server.ask)) == {"one"}
    with pytest.raises(BackendUnreached):
        RepeatedArguments("x").of(CALL, Server([BackendUnreached()]).ask)


def test_one_of_several_callers_asks() -> None:
    server, repeated = Server([page("one")]), RepeatedArguments("x")
    callers: list[int] = []

    def ask(page: Page) -> Raw | None:
        eventually(lambda: len(callers) == 4)
        return server.ask(page)

    def call() -> set[str]:
        callers.append(threading.get_ident())
        return set(repeated.of(CALL, ask))

    assert run_together([call] * 4) == [{"one"}] * 4
    assert server.asked == [None]


def test_while_one_asks_again_others_take_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_arguments, "BELIEVED", 0.0)
    server, repeated = Server([page("one"), page("two")]), RepeatedArguments("x")
    assert set(repeated.of(CALL, server.ask)) == {"one"}
    is_asked, may_answer = threading.Event(), threading.Event()

    def ask(page: Page) -> Raw | None:
        is_asked.set()
        assert may_answer.wait(10)
        return jsonrpc.as_payload({"tools": []})

    found: list[set[str]] = []
    asking = threading.Thread(target=lambda: found.append(set(repeated.of(CALL, ask))))
    asking.start()
    assert is_asked.wait(10)
    assert set(repeated.of(CALL, server.ask)) == {"one"}
    may_answer.set()
    eventually(lambda: found == [set()])
    asking.join()
