"""What is asked a client once for all servers of a group, and what is not."""

from __future__ import annotations

from typing import Any, cast

import pytest
from msgspec import Raw

from mcp_proxy.backends import group_roots
from mcp_proxy.backends.group_roots import MAX_WAITING, ROOTS_TIME, Asker, SharedRoots
from mcp_proxy.backends.group_server import RunningServer
from mcp_proxy.wire.jsonrpc import Response

ROOTS = Raw(b'{"roots":[]}')


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the roots go by."""
    made = Clock()
    monkeypatch.setattr(group_roots, "time", made)
    return made


def asker(server: str, number: int = 1) -> Asker:
    """A question of a server, which is nothing but a name here."""
    return Asker(cast(RunningServer, server), number)


def asks(roots: SharedRoots, one: Asker) -> bool:
    """Whether the client is asked."""
    return roots.ask(one).goes_to_client


def answer(result: Any = ROOTS) -> Response:
    """What the client says."""
    return Response(1, result)


def test_one_question_goes_to_the_client_and_the_others_get_its_answer(clock: Clock) -> None:
    roots = SharedRoots()
    assert asks(roots, asker("a"))
    assert not asks(roots, asker("b"))
    assert asks(roots, asker("a")), "who looks at the same question twice asks it still"
    assert roots.answered(asker("a"), answer()) == [asker("b")]
    assert roots.ask(asker("c")) == (ROOTS, False)


def test_an_answer_holds_for_a_while_or_until_the_client_says_so(clock: Clock) -> None:
    for capabilities, holds in ((b"{}", False), (b'{"roots":{"listChanged":true}}', True)):
        roots = SharedRoots()
        roots.begin(Raw(capabilities))
        roots.ask(asker("a"))
        roots.answered(asker("a"), answer())
        clock.now += ROOTS_TIME + 1
        assert (roots.ask(asker("b")).answer == ROOTS) is holds
        roots.forget()
        assert roots.ask(asker("c", 2)).answer is None


def test_a_server_that_asks_again_and_again_keeps_no_more_than_so_many(clock: Clock) -> None:
    roots = SharedRoots()
    assert asks(roots, asker("a"))
    told = [asks(roots, asker("b", number)) for number in range(MAX_WAITING + 2)]
    assert told == [False] * MAX_WAITING + [True, True]
    assert len(roots.answered(asker("a"), answer())) == MAX_WAITING


def test_a_question_without_an_answer_stops_nobody_for_ever(clock: Clock) -> None:
    roots = SharedRoots()
    assert asks(roots, asker("a"))
    clock.now += ROOTS_TIME + 1
    assert asks(roots, asker("b"))


def test_where_the_server_is_lost_that_has_asked_the_next_one_asks(clock: Clock) -> None:
    roots = SharedRoots()
    for name in ("a", "b", "c"):
        roots.ask(asker(name))
    assert roots.lost(asker("b").running) is None
    assert roots.lost(asker("a").running) == asker("c")
    assert roots.answered(asker("c"), answer()) == []
