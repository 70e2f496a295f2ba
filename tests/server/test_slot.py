"""What the shared page says of workers: where a session or a home is, and who inherits."""

from __future__ import annotations

import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from mcp_proxy.errors import ConfigError
from mcp_proxy.server.passing import Held, Passed
from mcp_proxy.server.shares import Shares
from mcp_proxy.server.slot import STALE, Holder, Slot, SlotTable
from mcp_proxy.shared_page import CANCELLATIONS, HEIRS, HOMES, SharedPage, State


def session(nonce: str) -> str:
    return f"mcp-{nonce}-{'0' * 32}"


def home(caller: str, number: int) -> str:
    return f"home-{caller * 20}0000{number:016x}"


class Workers:
    """Workers of one master, in slots 0, 1 and so on; each has a nonce for its ids."""

    def __init__(self, count: int) -> None:
        self.page = SharedPage(8)
        self.slots = [Slot(number, self.page, None, []) for number in range(count)]  # type: ignore[arg-type]
        self.nonces = [f"{number:08x}" for number in range(0xA0, 0xA0 + count)]
        for slot, nonce in zip(self.slots, self.nonces, strict=True):
            slot.serve(nonce)

    def end(self, number: int) -> None:
        self.page.lines[number].clear()


@pytest.fixture
def workers() -> Workers:
    return Workers(3)


def test_a_session_is_where_its_id_was_minted(workers: Workers) -> None:
    for slot in workers.slots:
        found = [slot.holder_of(session(nonce)) for nonce in workers.nonces]
        assert found == [Holder(0), Holder(1), Holder(2)]
        assert slot.holder_of(session("00000000")) is None
        assert slot.holder_of(session("ffffffff")) is None
        assert slot.holder_of("issued by a server") is None


def test_the_sessions_of_a_worker_that_leaves_may_come_to_its_heir(workers: Workers) -> None:
    first, second, third = workers.slots
    second.line.sessions = 5
    first.leave()
    assert second.holder_of(session(workers.nonces[0])) == Holder(0), "it has no heir yet"
    assert first.choose_heir() == 2
    assert second.holder_of(session(workers.nonces[0])) == Holder(2, may_come=True)
    workers.end(0)
    assert second.holder_of(session(workers.nonces[0])) == Holder(2)
    third.leave()
    assert third.choose_heir() == 1
    workers.end(2)
    assert second.holder_of(session(workers.nonces[0])) == Holder(1)


def test_a_worker_whose_heir_is_gone_has_no_sessions(workers: Workers) -> None:
    first = workers.slots[0]
    first.leave()
    heir = first.choose_heir()
    assert heir is not None
    workers.end(0)
    workers.end(heir)
    assert workers.slots[3 - heir].holder_of(session(workers.nonces[0])) is None


def test_the_last_heirs_of_a_slot_are_remembered(workers: Workers) -> None:
    first, second, _ = workers.slots
    first.inherit([f"{number:08x}" for number in range(1, HEIRS + 3)])
    assert second.holder_of(session("00000002")) is None
    for number in range(3, HEIRS + 3):
        assert second.holder_of(session(f"{number:08x}")) == Holder(0)


def test_nobody_inherits_who_is_stale_or_replaced_or_told_to_stop(workers: Workers) -> None:
    first, second, third = workers.slots
    first.leave()
    second.line.heartbeat -= STALE
    assert first.choose_heir() == 2
    assert first.can_inherit(2)
    workers.page.replace_all()
    assert not first.can_inherit(2)
    assert first.choose_heir() is None
    third.line.is_replaced = 0
    assert first.choose_heir() == 2
    workers.page.stop()
    assert first.choose_heir() is None


def test_a_new_session_goes_to_a_worker_that_has_clearly_fewer(workers: Workers) -> None:
    first, second, third = workers.slots
    for slot in workers.slots:
        slot.line.free_threads = 64
    assert first.least_loaded() is None
    first.line.sessions = 3
    assert first.least_loaded() is None
    first.line.sessions = 4
    assert first.least_loaded() == 1
    second.line.free_threads = 62
    assert first.least_loaded() == 2
    assert second.least_loaded() is third.least_loaded() is None
    third.leave()
    assert first.least_loaded() is None
    first.line.sessions = 6
    assert first.least_loaded() == 1
    second.line.heartbeat -= STALE
    first.line.free_threads = 0
    assert first.least_loaded() is None, "there is nobody else"


def test_a_home_is_where_it_is_said_to_be(workers: Workers) -> None:
    first, second, third = workers.slots
    second.set_homes([home("a", 1), home("b", 2)])
    for slot in workers.slots:
        assert slot.holder_of(home("b", 2)) == Holder(1)
    second.set_homes([home("a", 1)])
    third.set_homes([home("b", 2)])
    assert first.holder_of(home("b", 2)) == Holder(2)
    assert first.holder_of(home("a", 1)) == Holder(1)


def test_a_home_that_nobody_has_is_for_one_worker_whoever_asks(workers: Workers) -> None:
    chosen = set()
    for caller in "0123456789abcdef":
        found = {slot.holder_of(home(caller, 7)) for slot in workers.slots}
        found |= {slot.holder_of(home(caller, 8)) for slot in workers.slots}
        (holder,) = found  # all homes of one caller are together
        assert holder is not None
        chosen.add(holder.number)
    assert chosen == {0, 1, 2}


def test_a_home_of_a_worker_that_leaves_is_for_another_one(workers: Workers) -> None:
    first, second, third = workers.slots
    first.set_homes([home("a", 1)])
    first.leave()
    assert second.holder_of(home("a", 1)) in (Holder(1), Holder(2))
    second.leave()
    assert second.holder_of(home("a", 1)) == Holder(2)
    third.leave()
    assert third.holder_of(home("a", 1)) is None


def test_more_homes_than_the_page_has_room_for_are_not_listed(workers: Workers) -> None:
    first, second, _ = workers.slots
    first.set_homes([home("a", number) for number in range(1, HOMES + 10)])
    assert workers.page.find_home(HOMES) == 0
    assert workers.page.find_home(HOMES + 1) is None
    second.set_homes([home("b", 3 * HOMES)])
    assert workers.page.find_home(3 * HOMES) == 1


def test_a_page_is_searched_for_whole_cells_of_homes_alone(workers: Workers) -> None:
    first = workers.slots[0]
    first.line.connections = 77
    assert workers.page.find_home(77) is None
    first.set_homes([home("a", 0x0102030405060708), home("a", 0x090A0B0C0D0E0F10)])
    assert workers.page.find_home(0x0506070809) is None


def test_a_slot_that_is_freed_keeps_its_heirs_alone() -> None:
    with closing(SlotTable(2)) as table:
        slot = table.take(1)
        slot.serve("000000aa")
        slot.set_homes([home("a", 1)])
        slot.inherit(["000000bb"])
        table.free(1)
        line = table.page.lines[1]
        assert (line.state, line.nonce, line.pid) == (State.FREE, 0, 0)
        assert table.page.find_home(1) is None
        assert line.heir_of(0xBB) == 0xAA


def test_there_is_room_for_twice_the_workers() -> None:
    with closing(SlotTable(20)) as table:
        table.require_room(20)
        with pytest.raises(ConfigError, match="can have 20 workers"):
            table.require_room(21)


def test_a_cancellation_is_heard_of_by_the_calls_that_came_before_it(workers: Workers) -> None:
    first, second, _ = workers.slots
    before = time.monotonic()
    first.note_cancelled("s", 1)
    for slot in workers.slots:
        assert slot.was_cancelled("s", 1, before)
        assert not slot.was_cancelled("s", 1, time.monotonic()), "the id is used once more"
        assert not slot.was_cancelled("s", "1", before)
        assert not slot.was_cancelled("t", 1, before)
    workers.end(0)
    assert second.was_cancelled("s", 1, before)


class Putting:
    """A connection with a call of the session `s`, which has come whole."""

    max_header_bytes = 1000

    def __init__(self, call: int) -> None:
        self.call = call
        self.share: str | None = None
        self.held: Held | None = None

    def to_read_again(self, request: bytes, session: str, is_counted: bool) -> Passed:
        return Passed(request, session, 0, is_counted)

    def admitted(self, shares: Shares) -> frozenset[int | str] | None:
        """What the application learns when the request is read, or read once more."""
        reader = SimpleNamespace(length=0)
        asked = SimpleNamespace(method="POST", uri="/mcp", version=(1, 1), headers=[], trailers=[])
        asked.body, asked.limit_request_fields = SimpleNamespace(reader=reader), 100
        seam = shares.seam(self, asked, SimpleNamespace(headers_sent=False))  # type: ignore[arg-type]
        return seam("s", b"{}", "id", False, [self.call])


def test_a_cancellation_that_comes_while_a_call_is_put_off_once_more_is_heard_of(
    workers: Workers,
) -> None:
    cancels: list[int] = []

    def limit() -> int:
        for call in cancels:  # another worker gets them between a look and the next wait
            workers.slots[1].note_cancelled("s", call)
        return 1

    shares = Shares(limit, lambda conn: None)
    shares.slot = workers.slots[0]
    running, waiting = Putting(1), Putting(2)
    assert running.admitted(shares) == frozenset()
    assert waiting.admitted(shares) is None
    cancels.append(2)
    assert waiting.admitted(shares) is None
    cancels.clear()
    shares.leave(running)  # type: ignore[arg-type]
    assert waiting.admitted(shares) == {2}


def test_the_latest_cancellations_of_a_worker_are_remembered(workers: Workers) -> None:
    slot = workers.slots[0]
    slot.set_homes([home("a", 7)])
    before = time.monotonic()
    for call in range(CANCELLATIONS + 1):
        slot.note_cancelled("s", call)
    heard = [slot.was_cancelled("s", call, before) for call in range(CANCELLATIONS + 1)]
    assert heard == [False] + [True] * CANCELLATIONS
    assert workers.page.find_home(7) == 0
