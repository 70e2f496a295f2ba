"""What every event log promises, tried on memory and on Redis alike."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.redis import event_log as redis_events
from mcp_proxy.storage import event_log as local_events
from mcp_proxy.storage.event_log import KEPT, MAX_EVENTS, EventLog, LocalEventLog, LoggedEvent
from mcp_proxy.storage.records import LocalStorage
from tests.storage.stores import CLIENTS, TTL, House, LocalHouse, RedisHouse
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together


@pytest.fixture(params=["local", *CLIENTS])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Each kind of store in turn."""
    if request.param == "local":
        yield LocalHouse()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with ExitStack() as stack:
        admin = stack.enter_context(server.client())
        client = stack.enter_context(server.client(**CLIENTS[request.param]))
        yield RedisHouse(client, admin, request.getfixturevalue("redis_prefix"))


@pytest.fixture
def log(house: House) -> EventLog:
    """The event log of the house's store."""
    return house.storage.event_log()


@pytest.fixture
def max_bytes(monkeypatch: pytest.MonkeyPatch) -> int:
    """A bound in bytes that is quickly reached."""
    for module in (local_events, redis_events):
        monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    return 10_000


def append(log: EventLog, *texts: bytes, session: str = "s", stream: str = "a") -> list[str]:
    """Logs events that are not the last, and returns their ids."""
    return [log.append(session, stream, text, False) for text in texts]


def everything(log: EventLog, session: str = "s", after: str | None = None) -> list[LoggedEvent]:
    """All that can be read, however many looks that takes."""
    found: list[LoggedEvent] = []
    while events := log.read(session, after, 0):
        found += events
        after = events[-1].id
    return found


class TestAppending:
    """Events are kept in order, under ids that grow."""

    def test_an_event_is_read_as_it_was_logged(self, log: EventLog) -> None:
        first = log.append("s", "a", b'{"x":1}', False)
        last = log.append("s", "b", b"end", True)
        assert everything(log) == [
            LoggedEvent(first, "a", b'{"x":1}', False),
            LoggedEvent(last, "b", b"end", True),
        ]

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", "é 😀 \u2028 \ufeff".encode(), b'{"a":"\\u0000\\"\r\n\t"}', b"x" * 1_000_000],
        ids=["nothing", "a zero", "text", "escapes", "large"],
    )
    def test_any_text_is_kept_byte_by_byte(self, log: EventLog, data: bytes) -> None:
        event_id = log.append("s", "é/😀 stream", data, False)
        event = LoggedEvent(event_id, "é/😀 stream", data, False)
        assert log.find("s", event_id) == event
        assert log.read("s", None, 0) == [event]

    def test_several_events_are_logged_as_one_after_the_other(self, log: EventLog) -> None:
        before = append(log, b"before")
        texts = [b"%d" % number for number in range(64)]
        ids = log.append_all("s", "b", texts, True)
        events = everything(log)
        assert [event.id for event in events] == before + ids
        assert events[1:] == [
            LoggedEvent(event_id, "b", text, text == b"63")
            for event_id, text in zip(ids, texts, strict=True)
        ]
        assert log.append_all("s", "c", [b"1", b"2"], False) == [e.id for e in everything(log)[-2:]]
        assert not any(event.is_last for event in everything(log)[-2:])

    def test_ids_are_strings_that_a_client_can_send_back(self, log: EventLog) -> None:
        for event_id in append(log, b"1", b"2"):
            assert event_id.isascii()
            assert event_id.isprintable()
            assert 0 < len(event_id) < 100

    def test_the_order_is_that_of_appending_over_all_streams(self, log: EventLog) -> None:
        streams = ["a", "b", "a", "c", "b"] * 20
        ids = [log.append("s", name, b"%d" % n, False) for n, name in enumerate(streams)]
        read = everything(log)
        assert [event.id for event in read] == ids
        assert [event.stream for event in read] == streams
        assert len(set(ids)) == len(ids)

    def test_ids_are_unique_and_in_order_among_many_threads(self, log: EventLog) -> None:
        def appending(name: str) -> Callable[[], list[str]]:
            return lambda: append(log, *[b"%d" % n for n in range(50)], stream=name)

        ids = run_together([appending(str(number)) for number in range(6)])
        read = everything(log)
        assert len({event.id for event in read}) == 300
        for number, own in enumerate(ids):
            mine = [event for event in read if event.stream == str(number)]
            assert [event.id for event in mine] == own
            assert [event.data for event in mine] == [b"%d" % n for n in range(50)]

    def test_sessions_never_see_each_other(self, log: EventLog) -> None:
        for session in ("one", "one:", "*", "o"):
            append(log, session.encode(), session=session)
        for session in ("one", "one:", "*", "o"):
            assert [event.data for event in everything(log, session)] == [session.encode()]
        assert everything(log, "absent") == []

    def test_two_logs_of_a_store_are_the_same_log(self, house: House) -> None:
        (event_id,) = append(house.storage.event_log(), b"1")
        assert house.storage.event_log().find("s", event_id) is not None


class TestFinding:
    """`find` gives the event of an id, if the session's log holds it."""

    def test_an_event_is_found_by_its_id(self, log: EventLog) -> None:
        ids = append(log, b"0", b"1", b"2")
        assert [log.find("s", event_id) for event_id in ids] == everything(log)

    def test_an_id_of_another_session_is_not_found(self, log: EventLog) -> None:
        append(log, b"own", session="own")
        for event_id in append(log, *[b"x"] * 5, session="other"):
            found = log.find("own", event_id)
            assert found is None or found.data == b"own"
        assert log.find("absent", event_id) is None

    @pytest.mark.parametrize(
        "event_id",
        [
            *("", "x", "-", "+", "*", "0", "0-0", "-1", "1-", "(1-1", "1-1-1", "$", ">", "é"),
            *("\u0661-\u0662", "9" * 20 + "-0", "0-" + "9" * 20, "9" * 20, "9" * 40, "1e3"),
        ],
    )
    def test_what_is_no_id_of_the_log_is_not_found(self, log: EventLog, event_id: str) -> None:
        assert log.find("s", event_id) is None
        append(log, *[b"%d" % number for number in range(3)], session="t")
        assert log.find("t", event_id) is None


class TestReading:
    """`read` gives what came after an id, and waits for it if need be."""

    def test_it_begins_after_the_id(self, log: EventLog) -> None:
        ids = append(log, *[b"%d" % number for number in range(10)])
        for position, event_id in enumerate(ids):
            assert [event.id for event in everything(log, after=event_id)] == ids[position + 1 :]

    def test_without_an_id_it_begins_with_the_oldest(self, log: EventLog) -> None:
        ids = append(log, b"0", b"1")
        assert [event.id for event in log.read("s", None, 0)] == ids

    def test_all_of_a_full_log_can_be_read_in_some_looks(self, log: EventLog) -> None:
        ids = append(log, *[b"%d" % number for number in range(700)])
        assert [event.id for event in everything(log)] == ids

    def test_without_time_it_returns_at_once(self, log: EventLog) -> None:
        began = time.monotonic()
        assert log.read("s", None, 0) == []
        assert time.monotonic() - began < 5

    def test_it_waits_for_its_time_and_returns_nothing(self, log: EventLog) -> None:
        (event_id,) = append(log, b"0")
        began = time.monotonic()
        assert log.read("s", event_id, 0.15) == []
        assert 0.1 < time.monotonic() - began < 5

    def test_it_returns_as_soon_as_there_is_something(self, log: EventLog) -> None:
        (event_id,) = append(log, b"0")
        found: list[list[LoggedEvent]] = []

        def read() -> None:
            found.append(log.read("s", event_id, 60))

        reader = threading.Thread(target=read)
        reader.start()
        append(log, b"of another session", session="other")
        reader.join(0.1)
        assert reader.is_alive(), "read did not wait"
        (second,) = append(log, b"1")
        reader.join(10)
        (events,) = found
        assert [event.id for event in events] == [second]

    def test_an_id_that_is_no_longer_held_is_a_place_all_the_same(
        self, log: EventLog, max_bytes: int
    ) -> None:
        ids = append(log, *[b"x" * (max_bytes // 4)] * 8)
        assert log.find("s", ids[0]) is None
        assert [event.id for event in everything(log, after=ids[0])] == ids[-4:]


class TestBounds:
    """A log is bounded in number, bytes and time, the oldest given up first."""

    def test_no_more_than_so_many_events_are_kept(self, log: EventLog) -> None:
        ids = append(log, *[b"%d" % number for number in range(MAX_EVENTS + 30)])
        assert [event.id for event in everything(log)] == ids[30:]
        assert log.find("s", ids[29]) is None
        assert log.find("s", ids[30]) is not None

    @pytest.mark.parametrize("size", [100, 3000, 3333, 4000, 5000, 6000, 10_000])
    def test_no_more_than_so_many_bytes_are_kept(
        self, log: EventLog, max_bytes: int, size: int
    ) -> None:
        ids = append(log, *[b"x" * size] * 120)
        fitting = max_bytes // size
        held = [event.id for event in everything(log)]
        assert sum(size for _ in held) <= max_bytes
        assert held == ids[-fitting:]

    def test_an_event_that_is_larger_than_all_may_be_gives_up_the_others(
        self, log: EventLog, max_bytes: int
    ) -> None:
        append(log, b"before")
        large = log.append("s", "a", b"x" * (max_bytes + 1), True)
        assert [event.id for event in everything(log)] == [large]
        (after,) = append(log, b"after")
        assert [event.id for event in everything(log)] == [after]

    def test_the_bounds_are_those_of_one_session(self, log: EventLog, max_bytes: int) -> None:
        append(log, b"x" * max_bytes, session="one")
        append(log, b"x" * max_bytes, session="other")
        assert len(everything(log, "one")) == len(everything(log, "other")) == 1

    def test_a_log_is_kept_for_its_time_after_the_last_event(self, house: House) -> None:
        log = house.storage.event_log()
        (first,) = append(log, b"0")
        house.pass_time(KEPT * 0.8)
        (second,) = append(log, b"1")
        house.pass_time(KEPT * 0.8)
        assert [event.id for event in everything(log)] == [first, second]
        house.pass_time(KEPT * 0.2 + 1)
        assert everything(log) == []
        assert log.find("s", second) is None

    def test_reading_does_not_prolong_it(self, house: House) -> None:
        log = house.storage.event_log()
        (first,) = append(log, b"0")
        house.pass_time(KEPT * 0.8)
        assert log.find("s", first) is not None
        assert everything(log) != []
        house.pass_time(KEPT * 0.2 + 1)
        assert everything(log) == []

    def test_it_has_less_time_than_a_session(self, house: House) -> None:
        assert KEPT < TTL


class TestForgetting:
    """`forget` drops everything of one session."""

    def test_what_was_forgotten_is_gone_and_others_stay(self, log: EventLog) -> None:
        (event_id,) = append(log, b"0")
        append(log, b"1", session="t")
        log.forget("s")
        assert everything(log) == []
        assert log.find("s", event_id) is None
        assert len(everything(log, "t")) == 1

    def test_it_may_be_repeated(self, log: EventLog) -> None:
        log.forget("s")
        append(log, b"0")
        log.forget("s")
        log.forget("s")
        (event_id,) = append(log, b"1")
        assert [event.id for event in everything(log)] == [event_id]

    def test_it_says_what_it_is(self, log: EventLog) -> None:
        assert type(log).__name__ in repr(log)


# --- the twins -----------------------------------------------------------------------------------

_steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "find", "read", "forget", "wait"]),
        st.sampled_from(["s", "t"]),
        st.integers(0, 30),
    ),
    max_size=25,
)
_numbers = itertools.count()


class _Walk:
    """Takes the same steps in any house; events are known by when they were logged."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.log = house.storage.event_log()
        self.ids: dict[str, list[str]] = {"s": [], "t": []}

    def take(self, action: str, session: str, number: int) -> object:
        """What came of a step."""
        ids = self.ids[session]
        if action == "append":
            data = b"%d" % number * 100
            ids.append(self.log.append(session, f"stream{number % 3}", data, number > 25))
        elif action == "find" and ids:
            found = self.log.find(session, ids[number % len(ids)])
            return found and self._known(session, found)
        elif action == "read":
            after = ids[number % len(ids)] if ids and number else None
            return [self._known(session, event) for event in self.log.read(session, after, 0)]
        elif action == "forget":
            self.log.forget(session)
            ids.clear()
        elif action == "wait":
            self.house.pass_time(number * KEPT / 40)
            for name, known in self.ids.items():
                if not self.log.read(name, None, 0):
                    known.clear()
        return None

    def _known(self, session: str, event: LoggedEvent) -> LoggedEvent:
        return event._replace(id=str(self.ids[session].index(event.id)))


@given(_steps)
def test_redis_does_whatever_memory_does(
    redis_server: RedisServer, steps: list[tuple[str, str, int]]
) -> None:
    with redis_server.client() as admin, redis_server.client() as client:
        prefix = f"events-twin-{next(_numbers)}:"
        walks = [_Walk(LocalHouse()), _Walk(RedisHouse(client, admin, prefix))]
        for action, session, number in steps:
            local, remote = (walk.take(action, session, number) for walk in walks)
            assert local == remote, (action, session, number)
        for key in admin.scan_iter(f"{prefix}*"):
            admin.delete(key)


def test_without_a_clock_of_its_own_time_passes_by_itself() -> None:
    log = LocalEventLog(kept=0.05)
    append(log, b"0")
    until = time.monotonic() + 5
    while everything(log) and time.monotonic() < until:
        pass
    assert everything(log) == []
    assert "sessions=0" in repr(log)


def test_the_memory_of_the_logs_of_all_servers_is_bounded_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_events, "MAX_LOCAL_BYTES", 20_000)
    storage = LocalStorage()
    one, other = (storage.scoped(name).event_log() for name in ("one", "other"))
    first = one.append("a", "s", b"x" * 10_000, False)
    assert other.find("a", first) is None
    assert other.read("a", None, 0) == []
    last = other.append("a", "s", b"x" * 15_000, False)
    assert one.find("a", first) is None
    assert other.find("a", last) is not None
    other.forget("a")
    assert other.read("a", None, 0) == []


def test_the_memory_of_all_logs_is_bounded_and_silent_sessions_lose_their_events_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_events, "MAX_LOCAL_BYTES", 20_000)
    log = LocalEventLog()
    first = [log.append("a", "s", b"x" * 1000, False) for _ in range(10)]
    for _ in range(20):
        last = log.append("b", "s", b"x" * 700, False)
    assert log.find("a", first[-1]) is None
    assert log.find("b", last) is not None
    assert int(repr(log).partition("bytes=")[2].rstrip(">")) <= 20_000
    huge = log.append("c", "s", b"x" * 50_000, False)
    assert log.find("c", huge) is not None
    assert log.find("b", last) is None
    log.forget("c")
    assert "bytes=0" in repr(log)
