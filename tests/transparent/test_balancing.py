"""Which backend a new session goes to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from mcp_proxy.errors import BackendLost, BackendUnreached
from mcp_proxy.transparent.balancing import LOOK_UP, NAME_WAIT, Balancer, resolve
from mcp_proxy.wire.urls import Address, Target, parse_target
from tests.support.waiting import eventually


class Names:
    """A resolver whose answers the test changes."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known = dict(known)
        self.asked: list[tuple[str, int]] = []
        self.hang = threading.Event()
        self.hang.set()

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        self.hang.wait(10)
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


Make = Callable[..., Balancer]


@pytest.fixture
def balancer(names: Names, clock: Clock) -> Iterator[Make]:
    balancers: list[Balancer] = []

    def make(*urls: str) -> Balancer:
        balancers.append(Balancer([target(url) for url in urls], 100, names, clock))
        return balancers[-1]

    yield make
    names.hang.set()
    for made in balancers:
        made.stop()


def test_the_address_of_a_name_is_a_backend_if_it_is_the_only_one_too(balancer: Make) -> None:
    assert balancer("http://one:5").candidates() == [Address("http", "10.0.0.1", 5, "one")]


def test_an_address_is_itself(balancer: Make, names: Names) -> None:
    names.known["10.0.0.1"] = ["10.0.0.1"]
    assert balancer("http://10.0.0.1:5").candidates() == [Address("http", "10.0.0.1", 5)]


def test_each_address_of_a_name_is_a_backend(balancer: Make) -> None:
    found = balancer("https://many").candidates()
    assert set(found) == {
        Address("https", "10.0.0.1", 443, "many"),
        Address("https", "10.0.0.2", 443, "many"),
        Address("https", "::3", 443, "many"),
    }


def test_a_name_that_is_not_known_is_tried_all_the_same(balancer: Make) -> None:
    assert balancer("http://lost:5").candidates() == [Address("http", "lost", 5)]


def test_a_name_is_resolved_again_but_not_at_once(
    balancer: Make, names: Names, clock: Clock
) -> None:
    made = balancer("http://many:1")
    made.candidates()
    names.known["many"] = ["10.0.0.8", "10.0.0.9"]
    made.candidates()
    assert len(names.asked) == 1
    clock.now += LOOK_UP
    assert {address.host for address in made.candidates()} == {"10.0.0.8", "10.0.0.9"}


def test_old_addresses_serve_while_the_resolver_is_silent_or_fails(
    balancer: Make, names: Names, clock: Clock
) -> None:
    made = balancer("http://many:1")
    before = set(made.candidates())
    names.hang.clear()
    clock.now += LOOK_UP
    begun = time.monotonic()
    assert all(set(made.candidates()) == before for _ in range(20))
    assert time.monotonic() - begun < 20 * NAME_WAIT / 2  # only the first one waits
    del names.known["many"]
    names.hang.set()

    def asks_again() -> bool:
        """As soon as the question that got no answer is over."""
        clock.now += LOOK_UP
        assert set(made.candidates()) == before
        return len(names.asked) == 3

    eventually(asks_again)
    clock.now += 400
    assert made.candidates() == [Address("http", "many", 1)]


def test_readiness_waits_for_no_resolver(balancer: Make, names: Names) -> None:
    names.hang.clear()
    begun = time.monotonic()
    assert balancer("http://many:1").candidates(wait=0) == [Address("http", "many", 1)]
    assert time.monotonic() - begun < 2
    names.hang.set()


def test_ties_in_turn(balancer: Make) -> None:
    made = balancer("http://a:1", "http://b:1", "http://c:1")
    firsts = Counter(made.candidates()[0].host for _ in range(9))
    assert firsts == {"a": 3, "b": 3, "c": 3}
    assert all(len(set(made.candidates())) == 3 for _ in range(3))


def test_the_fewest_sessions_first(balancer: Make) -> None:
    made = balancer("http://a:1", "http://b:1", "http://c:1")
    counts: Counter[str] = Counter()
    for number in range(30):
        address = made.candidates()[0]
        counts[address.host] += 1
        made.add(str(number), address)
    assert set(counts.values()) == {10}
    for number in range(30):
        if number % 2:
            made.remove(str(number))
            made.remove(str(number))
    b = Address("http", "b", 1)
    for number in range(20):
        made.add(f"more-{number}", b)
    assert made.candidates()[-1] == b


def test_a_session_that_moves_counts_once(balancer: Make) -> None:
    made = balancer("http://a:1", "http://b:1")
    a, b = Address("http", "a", 1), Address("http", "b", 1)
    made.add("s", a)
    made.add("s", b)
    assert [made.candidates()[0] for _ in range(4)] == [a] * 4
    made.remove("s")
    assert {made.candidates()[0] for _ in range(4)} == {a, b}


def test_sessions_that_nobody_uses_stop_counting(balancer: Make, clock: Clock) -> None:
    made = balancer("http://a:1", "http://b:1")
    a, b = Address("http", "a", 1), Address("http", "b", 1)
    made.add("used", a)
    made.add("unused", b)
    made.add("unused-2", b)
    clock.now = 60
    made.touch("used", a)
    made.touch("never-here", a)
    clock.now = 120
    assert [made.candidates()[0] for _ in range(2)] == [b, b]
    clock.now = 200
    assert {made.candidates()[0] for _ in range(4)} == {a, b}


def test_what_begins_at_once_is_spread(balancer: Make) -> None:
    made = balancer("http://a:1", "http://b:1", "http://c:1")
    begun: list[str] = []

    def act(address: Address) -> None:
        begun.append(address.host)
        if len(begun) < 6:
            made.first_reached(act)

    made.first_reached(act)
    assert Counter(begun) == {"a": 2, "b": 2, "c": 2}
    assert repr(made) == "<Balancer {}>"


def test_a_backend_that_is_not_reached_is_passed_over(balancer: Make) -> None:
    made = balancer("http://a:1", "http://b:1")

    def act(address: Address) -> str:
        if address.host == "a":
            raise BackendUnreached("on purpose")
        return address.host

    assert [made.first_reached(act) for _ in range(4)] == ["b"] * 4


def test_where_no_backend_is_reached_the_last_failure_is_raised(balancer: Make) -> None:
    made, tried = balancer("http://a:1", "http://b:1"), []

    def act(address: Address) -> None:
        tried.append(address.host)
        raise BackendUnreached(f"{address.host} on purpose")

    with pytest.raises(BackendUnreached, match="on purpose") as caught:
        made.first_reached(act)
    assert sorted(tried) == ["a", "b"]
    assert caught.value.message.startswith(tried[-1])


def test_any_other_failure_is_final(balancer: Make) -> None:
    made, tried = balancer("http://a:1", "http://b:1"), []

    def act(address: Address) -> None:
        tried.append(address.host)
        raise BackendLost("on purpose")

    with pytest.raises(BackendLost):
        made.first_reached(act)
    assert len(tried) == 1
    assert repr(made) == "<Balancer {}>"


def test_targets_and_their_addresses_are_known(balancer: Make) -> None:
    made = balancer("http://many:5/mcp", "https://one")
    for url in ("http://many:5", "http://10.0.0.2:5/x", "http://[::3]:5", "https://one:443/"):
        assert made.knows(target(url)), url
    for url in ("http://many:6", "http://one:443", "http://10.0.0.9:5", "https://10.0.0.9"):
        assert not made.knows(target(url)), url


def test_a_target_that_redirects_to_https_is_asked_there(
    balancer: Make, names: Names, clock: Clock
) -> None:
    made = balancer("http://many:5", "https://one:6")
    made.note_tls(Address("http", "10.0.0.1", 5, "many"), 8443)
    found = made.candidates()
    assert {(address.url, address.name) for address in found} == {
        ("https://10.0.0.1:8443", "many"),
        ("https://10.0.0.2:8443", "many"),
        ("https://[::3]:8443", "many"),
        ("https://10.0.0.1:6", "one"),
    }
    for url in ("http://10.0.0.2:5", "https://10.0.0.2:8443", "https://many:8443"):
        assert made.knows(target(url)), url
    made.note_failure(next(a for a in found if a.port == 8443), BackendUnreached())
    assert {address.url for address in made.candidates()} == {
        *(f"http://{host}:5" for host in ("10.0.0.1", "10.0.0.2", "[::3]")),
        "https://10.0.0.1:6",
    }
    names.known["many"] = ["10.0.0.7"]
    clock.now = 301
    assert {address.url for address in made.candidates()} == {
        "http://10.0.0.7:5",
        "https://10.0.0.1:6",
    }
    assert not made.touch("s", Address("https", "10.0.0.2", 8443, "many"))
    assert made.touch("s", Address("https", "10.0.0.7", 8443, "many"))


def test_a_record_may_name_the_host_of_an_http_target_with_tls(balancer: Make) -> None:
    made = balancer("http://many:5", "https://one:6")
    assert not made.knows(target("https://10.0.0.9:8443"))
    assert made.knows(target("https://10.0.0.2:8443"))
    assert {address.port for address in made.candidates()} == {5, 6}  # new sessions begin as ever
    pinned = Address("https", "10.0.0.2", 8443, "many")
    assert [address.url for address in made.instead_of(pinned)][2:] == ["https://10.0.0.1:6"]
    assert {address.url for address in list(made.instead_of(pinned))[:2]} == {
        "https://10.0.0.1:8443",
        "https://[::3]:8443",
    }


def test_a_new_address_is_looked_up_before_it_is_refused(
    balancer: Make, names: Names, clock: Clock
) -> None:
    made = balancer("http://many:5")
    made.candidates()
    names.known["many"] = ["10.0.0.7"]
    clock.now += LOOK_UP
    assert made.knows(target("http://10.0.0.7:5"))


def test_addresses_are_remembered_for_a_while(balancer: Make, names: Names, clock: Clock) -> None:
    made = balancer("http://many:5")
    made.candidates()
    names.known["many"] = ["10.0.0.7"]
    clock.now = 99
    assert made.knows(target("http://10.0.0.2:5"))
    clock.now = 101
    assert not made.knows(target("http://10.0.0.2:5"))
    assert made.knows(target("http://many:5"))


def test_what_is_known_is_not_looked_up(balancer: Make, names: Names) -> None:
    made = balancer("http://many:5")
    made.knows(target("http://10.0.0.1:5"))
    names.asked.clear()
    assert made.knows(target("http://10.0.0.1:5"))
    assert names.asked == []


def test_the_systems_own_resolver() -> None:
    assert "127.0.0.1" in resolve("localhost", 80)
    assert resolve("127.0.0.1", 80) == ["127.0.0.1"]
    with pytest.raises(OSError, match=r"."):
        resolve("no-such-name.invalid", 80)


def test_an_address_belongs_to_its_name_for_five_minutes(
    balancer: Make, names: Names, clock: Clock
) -> None:
    made = balancer("http://many:1")
    old = Address("http", "10.0.0.2", 1, "many")
    assert made.touch("s", old)  # nothing is known of the name
    made.candidates()
    names.known["many"] = ["10.0.0.7"]
    clock.now = 299
    made.candidates()
    assert made.touch("s", old)
    clock.now = 301
    assert made.touch("s", Address("http", "10.0.0.7", 1, "many"))
    assert not made.touch("s", old)
    del names.known["many"]
    clock.now = 320
    made.candidates()
    assert not made.touch("s", old)


def test_each_target_has_an_endpoint_of_its_own(balancer: Make) -> None:
    made = balancer("http://one:5/v2?t=1", "http://b:1/v2?t=2", "http://b:1/z", "http://c:1")
    first = Address("http", "10.0.0.1", 5, "one")
    second = Address("http", "b", 1, None, "/v2", "t=2")
    third = Address("http", "b", 1, None, "/z")
    fourth = Address("http", "c", 1, None, "/mcp")
    assert set(made.candidates()) == {first, second, third, fourth}
    for address in (first, second, third, fourth):
        recorded = target(address.backend_url)
        assert made.address_of(recorded, address.name) == address
        assert address not in list(made.instead_of(address))
    assert made.address_of(target("http://c:1"), None) == fourth
    led = second._replace(scheme="https", port=443)
    assert made.address_of(target(led.backend_url), None) == led
    assert made.address_of(target("http://b:1/w"), None) == third._replace(path="/w")
    assert made.address_of(target("http://d:1"), None) == Address("http", "d", 1)


def test_a_record_may_repeat_the_path_of_the_only_target(balancer: Make) -> None:
    made = balancer("http://a:1/v2")
    for url in ("http://a:1", "http://a:1/", "http://a:1/v2"):
        assert made.address_of(target(url), None) == Address("http", "a", 1)


def test_who_serves_instead_is_of_the_same_name_first(balancer: Make) -> None:
    made = balancer("http://many:5", "http://one:5", "http://many:6")
    pinned = Address("http", "10.0.0.2", 5, "many")
    for _ in range(5):
        found = list(made.instead_of(pinned))
        assert {address.host for address in found[:2]} == {"10.0.0.1", "::3"}
        assert {address.port for address in found[:2]} == {5}
        assert len(found) == 6
        assert pinned not in found
