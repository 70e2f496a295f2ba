"""Which backend a new session goes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from mcp_proxy.transparent.balancing import BackendChooser, resolve
from mcp_proxy.wire.urls import Address, Target, parse_target


class Names:
    """A resolver whose answers the test changes."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known = dict(known)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if host not in self.known:
            raise OSError("no such name")
        return self.known[host]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def target(url: str) -> Target:
    found = parse_target(url)
    assert found is not None
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def names() -> Names:
    return Names(one=["10.0.0.1"], many=["10.0.0.1", "10.0.0.2", "::3"])


Chooser = Callable[..., BackendChooser]


@pytest.fixture
def chooser(names: Names, clock: Clock) -> Chooser:
    def make(*urls: str) -> BackendChooser:
        return BackendChooser([target(url) for url in urls], 100, names, clock)

    return make


def test_a_name_with_one_address_stays_a_name(chooser: Chooser) -> None:
    assert chooser("http://one:5").candidates() == [Address("http", "one", 5)]


def test_each_address_of_a_name_is_a_backend(chooser: Chooser) -> None:
    found = chooser("https://many").candidates()
    assert set(found) == {
        Address("https", "10.0.0.1", 443, "many"),
        Address("https", "10.0.0.2", 443, "many"),
        Address("https", "::3", 443, "many"),
    }


def test_a_name_that_is_not_known_is_tried_all_the_same(chooser: Chooser) -> None:
    assert chooser("http://lost:5").candidates() == [Address("http", "lost", 5)]


def test_a_name_is_resolved_again(chooser: Chooser, names: Names) -> None:
    made = chooser("http://many:1")
    made.candidates()
    names.known["many"] = ["10.0.0.8", "10.0.0.9"]
    assert {address.host for address in made.candidates()} == {"10.0.0.8", "10.0.0.9"}


def test_ties_in_turn(chooser: Chooser) -> None:
    made = chooser("http://a:1", "http://b:1", "http://c:1")
    firsts = Counter(made.candidates()[0].host for _ in range(9))
    assert firsts == {"a": 3, "b": 3, "c": 3}
    assert all(len(set(made.candidates())) == 3 for _ in range(3))


def test_the_fewest_sessions_first(chooser: Chooser) -> None:
    made = chooser("http://a:1", "http://b:1", "http://c:1")
    counts: Counter[str] = Counter()
    for number in range(30):
        address = made.candidates()[0]
        counts[address.host] += 1
        made.opened(str(number), address)
    assert set(counts.values()) == {10}
    for number in range(30):
        if number % 2:
            made.closed(str(number))
            made.closed(str(number))
    b = Address("http", "b", 1)
    for number in range(20):
        made.opened(f"more-{number}", b)
    assert made.candidates()[-1] == b


def test_a_session_that_moves_counts_once(chooser: Chooser) -> None:
    made = chooser("http://a:1", "http://b:1")
    a, b = Address("http", "a", 1), Address("http", "b", 1)
    made.opened("s", a)
    made.opened("s", b)
    assert [made.candidates()[0] for _ in range(4)] == [a] * 4
    made.closed("s")
    assert {made.candidates()[0] for _ in range(4)} == {a, b}


def test_sessions_that_nobody_uses_stop_counting(chooser: Chooser, clock: Clock) -> None:
    made = chooser("http://a:1", "http://b:1")
    a, b = Address("http", "a", 1), Address("http", "b", 1)
    made.opened("used", a)
    made.opened("unused", b)
    made.opened("unused-2", b)
    clock.now = 60
    made.used("used")
    made.used("never-here")
    clock.now = 120
    assert [made.candidates()[0] for _ in range(2)] == [b, b]
    clock.now = 200
    assert {made.candidates()[0] for _ in range(4)} == {a, b}


def test_targets_and_their_addresses_are_known(chooser: Chooser) -> None:
    made = chooser("http://many:5/mcp", "https://one")
    for url in ("http://many:5", "http://10.0.0.2:5/x", "http://[::3]:5", "https://one:443/"):
        assert made.knows(target(url)), url
    for url in ("http://many:6", "https://many:5", "http://10.0.0.9:5", "https://10.0.0.2"):
        assert not made.knows(target(url)), url


def test_a_new_address_is_looked_up_before_it_is_refused(chooser: Chooser, names: Names) -> None:
    made = chooser("http://many:5")
    made.candidates()
    names.known["many"] = ["10.0.0.7"]
    assert made.knows(target("http://10.0.0.7:5"))


def test_addresses_are_remembered_for_a_while(chooser: Chooser, names: Names, clock: Clock) -> None:
    made = chooser("http://many:5")
    made.candidates()
    names.known["many"] = ["10.0.0.7"]
    clock.now = 99
    assert made.knows(target("http://10.0.0.2:5"))
    clock.now = 101
    assert not made.knows(target("http://10.0.0.2:5"))
    assert made.knows(target("http://many:5"))


def test_what_is_known_is_not_looked_up(chooser: Chooser, names: Names) -> None:
    made = chooser("http://many:5")
    made.knows(target("http://10.0.0.1:5"))
    names.asked.clear()
    assert made.knows(target("http://10.0.0.1:5"))
    assert names.asked == []


def test_the_systems_own_resolver() -> None:
    assert "127.0.0.1" in resolve("localhost", 80)
    assert resolve("127.0.0.1", 80) == ["127.0.0.1"]
    with pytest.raises(OSError, match=r"."):
        resolve("no-such-name.invalid", 80)
