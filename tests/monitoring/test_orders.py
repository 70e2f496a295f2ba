"""What workers are told to do: each does it once, and whoever asks learns what came of it."""

from __future__ import annotations

from mcp_proxy.metrics import MetricsPage
from mcp_proxy.monitoring.orders import Orders, Outcome


class Worker:
    """A worker with sessions in its memory; `ended` are those that it was told to end."""

    def __init__(self, page: MetricsPage, slot: int, *sessions: str) -> None:
        self.page, self.slot = page, slot
        self.sessions = set(sessions)
        self.asked: list[tuple[str, bool]] = []
        self.orders = Orders(self.end)
        page.take(slot)

    def end(self, session_id: str, is_told: bool) -> Outcome:
        self.asked.append((session_id, is_told))
        if session_id == "stuck":
            return Outcome.FAILED
        if session_id not in self.sessions:
            return Outcome.UNKNOWN
        self.sessions.discard(session_id)
        return Outcome.ENDED

    def tell(self, session_id: str) -> str:
        return self.orders.end(self.page, self.slot, session_id)

    def look(self) -> None:
        self.orders.look(self.page, self.slot)


def test_the_worker_that_has_a_session_ends_it_whoever_was_told() -> None:
    page = MetricsPage(4)
    told, other, owner = Worker(page, 0), Worker(page, 1), Worker(page, 3, "a")
    order = told.tell("a")
    for worker in (told, other):
        worker.look()
        assert Orders.outcome(page, order) is Outcome.PENDING
    owner.look()
    assert Orders.outcome(page, order) is Outcome.ENDED
    assert owner.sessions == set()
    assert [worker.asked for worker in (told, other, owner)] == [
        [("a", True)],
        [("a", False)],
        [("a", False)],
    ]


def test_each_worker_does_what_it_is_told_once() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0, "a"), Worker(page, 1, "b")
    orders = [one.tell("a"), two.tell("b"), one.tell("c"), one.tell("stuck")]
    for _ in range(3):
        one.look()
        two.look()
    outcomes = [Orders.outcome(page, order) for order in orders]
    assert outcomes == [Outcome.ENDED, Outcome.ENDED, Outcome.UNKNOWN, Outcome.FAILED]
    assert len(one.asked) == len(two.asked) == 4


def test_a_worker_that_ends_is_not_waited_for() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0), Worker(page, 1)
    order = one.tell("a")
    one.look()
    assert Orders.outcome(page, order) is Outcome.PENDING
    page.free(two.slot)
    assert Orders.outcome(page, order) is Outcome.UNKNOWN


def test_a_successor_knows_nothing_of_the_orders_of_the_one_before_it() -> None:
    page = MetricsPage(1)
    first = Worker(page, 0, "a")
    first.tell("a")
    second = Worker(page, 0, "a")
    second.look()
    assert second.asked == []


def test_of_many_orders_the_oldest_are_forgotten() -> None:
    page = MetricsPage(1)
    worker = Worker(page, 0)
    orders = [worker.tell(f"{number}" * 100) for number in range(100)]
    worker.look()
    assert Orders.outcome(page, orders[-1]) is Outcome.UNKNOWN
    assert Orders.outcome(page, orders[0]) is Outcome.PENDING
