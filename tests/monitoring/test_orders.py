"""What workers are told to do: each does it once, and whoever asks learns what came of it."""

from __future__ import annotations

from mcp_proxy.metrics import MetricsPage
from mcp_proxy.monitoring.orders import Order, Orders, Outcome, Result, Task


class Worker:
    """A worker with sessions in its memory; `ended` are those that it was told to end."""

    def __init__(self, page: MetricsPage, slot: int, *sessions: str) -> None:
        self.page, self.slot = page, slot
        self.sessions = set(sessions)
        self.asked: list[tuple[str, bool]] = []
        self.orders = Orders({Task.END: self.end, Task.RELOAD: self.reload, Task.SHOW: self.end})
        #: Whether the file can be served here by now, and why not.
        self.reloaded = Result(Outcome.PENDING)
        page.take(slot)

    def end(self, order: Order, is_told: bool) -> Result:
        self.asked.append((order.about, is_told))
        if order.about == "stuck":
            return Result(Outcome.FAILED, "it is stuck")
        if order.about not in self.sessions:
            return Result(Outcome.UNKNOWN)
        self.sessions.discard(order.about)
        return Result(Outcome.ENDED)

    def reload(self, order: Order, is_told: bool) -> Result:
        return self.reloaded

    def tell(self, session_id: str) -> str:
        return self.orders.give(self.page, self.slot, Task.END, session_id)

    def look(self) -> None:
        self.orders.look(self.page, self.slot)


def test_the_worker_that_has_a_session_ends_it_whoever_was_told() -> None:
    page = MetricsPage(4)
    told, other, owner = Worker(page, 0), Worker(page, 1), Worker(page, 3, "a")
    order = told.tell("a")
    for worker in (told, other):
        worker.look()
        assert Orders.result(page, order).outcome is Outcome.PENDING
    owner.look()
    assert Orders.result(page, order).outcome is Outcome.ENDED
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
    outcomes = [Orders.result(page, order).outcome for order in orders]
    assert outcomes == [Outcome.ENDED, Outcome.ENDED, Outcome.UNKNOWN, Outcome.FAILED]
    assert len(one.asked) == len(two.asked) == 4


def test_a_worker_that_ends_is_not_waited_for() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0), Worker(page, 1)
    order = one.tell("a")
    one.look()
    assert Orders.result(page, order).outcome is Outcome.PENDING
    page.free(two.slot)
    assert Orders.result(page, order).outcome is Outcome.UNKNOWN


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
    assert Orders.result(page, orders[-1]).outcome is Outcome.UNKNOWN
    assert Orders.result(page, orders[0]).outcome is Outcome.PENDING


def test_what_every_worker_has_to_do_is_done_when_each_has_done_it() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0), Worker(page, 1)
    order = one.orders.give(page, 0, Task.RELOAD)
    one.reloaded = Result(Outcome.DONE)
    for _ in range(2):
        one.look()
        two.look()
        assert Orders.result(page, order).outcome is Outcome.PENDING
    two.reloaded = Result(Outcome.DONE)
    two.look()
    assert Orders.result(page, order).outcome is Outcome.DONE


def test_one_worker_that_fails_says_why_once_all_have_tried() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0), Worker(page, 1)
    order = one.orders.give(page, 0, Task.RELOAD)
    two.reloaded = Result(Outcome.FAILED, "a mistake\n" + "in the file " * 100)
    two.look()
    assert Orders.result(page, order).outcome is Outcome.PENDING
    one.reloaded = Result(Outcome.DONE)
    one.look()
    result = Orders.result(page, order)
    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith("a mistake")
    assert len(result.reason) < 400


def test_of_workers_that_are_asked_for_a_session_the_first_one_knows_that_it_was_told() -> None:
    page = MetricsPage(2)
    other, first = Worker(page, 0), Worker(page, 1)
    order = first.orders.show(page, 1, "a")
    other.look()
    assert other.orders.show(page, 0, "a") == first.orders.show(page, 1, "a") == order
    first.look()
    other.look()
    assert (other.asked, first.asked) == ([("a", False)], [("a", True)])


def test_a_session_is_not_called_unknown_where_its_record_cannot_be_read() -> None:
    page = MetricsPage(2)
    one, two = Worker(page, 0), Worker(page, 1)
    order = one.orders.show(page, 0, "stuck")
    one.look()
    assert Orders.shown(page, order).outcome is Outcome.PENDING
    two.look()
    assert Orders.shown(page, order) == Result(Outcome.FAILED, "it is stuck")
