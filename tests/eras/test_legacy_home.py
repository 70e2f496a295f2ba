"""A home in front of a legacy server: its children, its waiting calls and its listeners."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.backends.owned import OwnedBackend
from mcp_proxy.background import TimerWorker
from mcp_proxy.eras import legacy_home, probing
from mcp_proxy.eras.legacy_home import LegacyHome, Started
from mcp_proxy.errors import BackendError, BackendExited, BackendNotStarted, Overloaded
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.capabilities import KINDS, capabilities_of
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from tests.support.modern_client import SUBSCRIPTION, Trace, answering, called, server_of
from tests.support.waiting import eventually

Json = dict[str, Any]

HOME = "home-" + "b" * 40


class House:
    """A home with real children, whose starts can be held up or fail."""

    def __init__(self, trace: Trace, kinds: frozenset[str], has_one_child: bool = False) -> None:
        self.trace = trace
        self.supervisor = Supervisor(Replica())
        self.server = StdioServer("test", server_of("legacy", "--trace", str(trace.path)))
        self.lost: list[OwnedBackend] = []
        self.failure: BackendError | Overloaded | None = None
        self.may_start = threading.Event()
        self.may_start.set()
        self.may_tell_of_end = threading.Event()
        self.may_tell_of_end.set()
        self.asked_to_start = 0
        self.bridges: list[Bridge] = []
        self.timer = TimerWorker("test-timer")
        self.home = LegacyHome(HOME, kinds, self.start, self.lost.append, self.timer, has_one_child)
        self.home.add(self.start(self.home))

    def start(self, home: LegacyHome) -> Started:
        self.asked_to_start += 1
        assert self.may_start.wait(20)
        if self.failure is not None:
            raise self.failure
        board = home.new_switchboard()

        def note_lost(bridge: OwnedBackend) -> None:
            assert self.may_tell_of_end.wait(20)
            home.note_lost(bridge)

        bridge = Bridge(self.supervisor, self.server, 1 << 26, note_lost, board)
        self.bridges.append(bridge)
        result = probing.initialized(bridge, capabilities_of(home.kinds), 20)
        return Started(bridge, board, result)

    def send(self, method: str, params: Json | None = None, key: Any = 1, **of: Any) -> Exchange:
        request = Request(key, method, jsonrpc.as_payload(params or {}))
        exchange = Exchange([request], timeout=of.pop("timeout", 20.0), cancels=True, **of)
        self.home.send(exchange)
        return exchange

    def tool(self, name: str, /, **arguments: Any) -> Exchange:
        return self.send("tools/call", called(name, **arguments))

    def pid(self) -> int:
        pid: int = answer(self.tool("pid"))["result"]["structuredContent"]["pid"]
        return pid

    def listen(self, key: Any = "l", **wanted: Any) -> Exchange:
        return self.send("subscriptions/listen", {"notifications": wanted}, key, timeout=None)


def answer(exchange: Exchange) -> Json:
    """The next message."""
    message = exchange.receive(20)
    assert message is not None
    found: Json = json.loads(message.data)
    return found


Make = Callable[..., House]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[House] = []

    def build(kinds: frozenset[str] = KINDS, **options: Any) -> House:
        made.append(House(Trace(tmp_path / f"trace{len(made)}"), kinds, **options))
        return made[-1]

    yield build
    for house in made:
        house.may_start.set()
        house.may_tell_of_end.set()
        house.home.close()
        house.supervisor.close()
        house.timer.stop(10)


# --- children ------------------------------------------------------------------------------------


def test_discover_is_answered_here(make: Make) -> None:
    house = make()
    result = answer(house.send("server/discover"))["result"]
    assert result["supportedVersions"] == ["2026-07-28"]
    house.may_start.set()
    assert house.home.size == 1


def test_a_call_that_may_ask_has_a_child_to_itself(make: Make) -> None:
    house = make()
    slow = house.tool("slow", label="a")
    house.trace.wait("started", end=" a")
    assert house.pid()
    assert house.home.size == 2
    slow.close()
    house.trace.wait("cancelled", end=" a")


def test_calls_that_cannot_ask_go_to_the_first_child(make: Make) -> None:
    house = make()
    slow = house.tool("slow", label="a")
    house.trace.wait("started", end=" a")
    for method in ("tools/list", "prompts/list", "resources/list"):
        assert "result" in answer(house.send(method))
    assert house.home.size == 1
    slow.close()


def test_the_free_child_with_the_lowest_number_comes_first(make: Make) -> None:
    house = make()
    first = house.pid()
    asked = [answer(house.tool("ask", message=str(number)))["result"] for number in range(3)]
    assert house.home.size == 3
    for number in (2, 0):  # the third and the first become free, in this order
        retry = answering(asked[number])
        params = {**called("ask", message=str(number)), **retry}
        assert answer(house.send("tools/call", params))["result"]["resultType"] == "complete"
    assert [house.pid() for _ in range(3)] == [first] * 3


def test_a_call_that_waits_for_a_child_is_expired_in_its_time(make: Make) -> None:
    house = make(has_one_child=True)
    asked = house.tool("ask")
    assert answer(asked)["result"]["resultType"] == "input_required"
    waiting = house.send("tools/call", called("pid"), timeout=0.3)
    message = answer(waiting)
    assert message["error"]["code"] == -32000
    assert "did not answer within" in message["error"]["message"]
    assert not house.home.is_busy


def test_a_call_that_waits_for_a_child_may_be_left(make: Make) -> None:
    house = make(has_one_child=True)
    answer(house.tool("ask"))
    waiting = house.tool("pid")
    assert house.home.is_busy
    waiting.close()
    assert not house.home.is_busy
    assert house.asked_to_start == 1


@pytest.mark.parametrize("failure", [BackendNotStarted("it does not start"), Overloaded("full")])
def test_where_no_further_child_starts_a_call_waits_for_one_that_is_free(
    make: Make, failure: BackendError | Overloaded
) -> None:
    house = make()
    house.failure = failure
    slow = house.tool("slow", seconds=0.5)
    assert house.pid()
    assert "result" in answer(slow)
    assert house.home.size == 1
    assert house.lost == []


def test_a_home_is_lost_with_its_last_child(make: Make) -> None:
    house = make()
    listening = house.listen(toolsListChanged=True)
    assert answer(listening)["method"] == "notifications/subscriptions/acknowledged"
    slow = house.tool("slow")
    os.kill(house_pid(house), signal.SIGKILL)
    assert answer(slow)["error"]["code"] == -32000
    eventually(lambda: house.lost)
    assert house.lost == [house.home]
    assert not house.home.is_alive
    assert answer(listening)["result"]["_meta"][SUBSCRIPTION] == "l"
    for method in ("tools/list", "tools/call", "server/discover", "subscriptions/listen"):
        with pytest.raises(BackendExited):  # so that it is sent to the next home
            house.send(method, {**called("pid"), "notifications": {"toolsListChanged": True}})


def house_pid(house: House) -> int:
    """The process of the first child, as it says when it starts."""
    (line, *_) = house.trace.wait("pid ")
    return int(line.split()[1])


def test_a_home_whose_last_child_has_failed_its_calls_is_lost_before_that_is_told(
    make: Make,
) -> None:
    house = make()
    house.may_tell_of_end.clear()
    slow = house.tool("slow")
    os.kill(house_pid(house), signal.SIGKILL)
    assert answer(slow)["error"]["code"] == -32000
    with pytest.raises(BackendExited):
        house.send("server/discover")
    assert not house.home.is_alive  # so that it is sent to the next home
    house.may_tell_of_end.set()
    eventually(lambda: house.lost)
    assert house.lost == [house.home]


def test_a_call_is_sent_to_a_child_that_is_left_before_the_end_of_another_is_told(
    make: Make,
) -> None:
    house = make()
    answer(house.tool("ask"))
    other = house.pid()
    house.may_tell_of_end.clear()
    os.kill(house_pid(house), signal.SIGKILL)
    eventually(lambda: not house.bridges[0].is_alive)
    with pytest.raises(BackendExited):
        house.send("tools/list")
    answer(house.send("tools/list"))  # as the owner does
    assert house.pid() == other


def test_a_home_outlives_a_child_that_is_not_its_last(make: Make) -> None:
    house = make()
    answer(house.tool("ask"))
    other = house.pid()
    os.kill(house_pid(house), signal.SIGKILL)
    eventually(lambda: house.home.size == 1)
    assert house.pid() == other
    assert house.home.is_alive
    assert house.lost == []


def test_a_home_whose_last_child_goes_while_another_starts_waits_for_that(make: Make) -> None:
    house = make()
    answer(house.tool("ask"))
    house.may_start.clear()
    waiting = house.tool("pid")
    eventually(lambda: house.asked_to_start == 2)
    os.kill(house_pid(house), signal.SIGKILL)
    eventually(lambda: house.supervisor.children == 0)
    house.may_start.set()
    assert "result" in answer(waiting)
    assert house.home.is_alive
    assert house.lost == []


def test_a_home_whose_last_child_goes_while_another_fails_to_start_is_lost(make: Make) -> None:
    house = make()
    answer(house.tool("ask"))
    house.may_start.clear()
    house.failure = BackendNotStarted("it does not start")
    waiting = house.tool("pid")
    eventually(lambda: house.asked_to_start == 2)
    os.kill(house_pid(house), signal.SIGKILL)
    eventually(lambda: house.supervisor.children == 0)
    house.may_start.set()
    assert answer(waiting)["error"]["code"] == -32000
    eventually(lambda: house.lost)
    assert not house.home.is_alive


def test_no_server_is_started_for_calls_that_were_left(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_home, "STARTS_AT_ONCE", 1)
    house = make()
    house.tool("slow")
    house.may_start.clear()
    waiting = [house.tool("pid") for _ in range(6)]
    eventually(lambda: house.asked_to_start == 2)
    for exchange in waiting:
        exchange.close()
    house.may_start.set()
    eventually(lambda: house.home.size == 2)
    house.tool("slow")
    assert house.pid()  # of a third one, which starts after those that nobody wants
    assert house.asked_to_start == 3


def test_a_home_whose_last_child_goes_is_lost_where_the_calls_that_waited_were_left(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_home, "STARTS_AT_ONCE", 1)
    house = make()
    house.tool("slow")
    house.may_start.clear()
    house.failure = BackendNotStarted("it does not start")
    waiting = [house.tool("pid") for _ in range(2)]
    eventually(lambda: house.asked_to_start == 2)
    for exchange in waiting:
        exchange.close()
    os.kill(house_pid(house), signal.SIGKILL)
    eventually(lambda: house.supervisor.children == 0)
    house.may_start.set()
    eventually(lambda: house.lost)
    assert house.asked_to_start == 2


def test_a_call_waits_for_a_child_that_is_free_where_no_thread_can_start_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*of: object) -> None:
        raise RuntimeError("can't start new thread")

    house = make()
    slow = house.tool("slow", label="a")
    monkeypatch.setattr(legacy_home.KeyedExecutor, "submit", no_thread)
    waiting = house.tool("pid")
    house.trace.wait("started", end=" a")
    os.kill(house_pid(house), signal.SIGKILL)
    assert answer(slow)["error"]["code"] == -32000
    assert answer(waiting)["error"]["code"] == -32000
    eventually(lambda: house.lost)


def test_a_child_of_somebody_else_is_none_of_the_home_s(make: Make) -> None:
    house, other = make(), make()
    assert house.home.note_lost(other.home) is False
    assert house.home.is_alive


def test_a_closed_home_refuses_what_waits(make: Make) -> None:
    house = make(has_one_child=True)
    answer(house.tool("ask"))
    waiting = house.tool("pid")
    house.home.close()
    assert answer(waiting)["error"]["code"] == -32000
    eventually(lambda: house.supervisor.children == 0)


def test_a_home_is_handed_over_when_nobody_waits(make: Make) -> None:
    house = make()
    slow = house.tool("slow")
    assert not house.home.hand_over()
    slow.close()
    eventually(house.home.hand_over)
    assert not house.home.is_alive


def test_idleness_counts_from_the_last_use(make: Make) -> None:
    house = make()
    assert house.pid()
    assert not house.home.is_idle(60)
    assert house.home.is_idle(0)
    listening = house.listen(toolsListChanged=True)
    assert not house.home.is_idle(0)
    assert not house.home.stop_if_idle(0)
    listening.close()
    assert house.home.stop_if_idle(0)
    assert not house.home.stop_if_idle(0)


# --- listening -----------------------------------------------------------------------------------


def test_a_resource_is_watched_while_anybody_listens(make: Make) -> None:
    house = make()
    one = house.listen("one", resourceSubscriptions=["demo://watched"])
    two = house.listen("two", resourceSubscriptions=["demo://watched", "demo://static"])
    house.trace.wait("subscribed", 2)
    assert sorted(house.trace.lines("subscribed")) == [
        "subscribed demo://static",
        "subscribed demo://watched",
    ]
    one.close()
    two.close()
    house.trace.wait("unsubscribed", 2)
    assert len(house.trace.lines("unsubscribed")) == 2


def test_a_server_that_answers_no_subscription_is_idle_after_a_while(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_home, "WATCH_TIME", 0.1)
    house = make()
    pid = house.pid()
    os.kill(pid, signal.SIGSTOP)
    house.listen(resourceSubscriptions=["demo://watched"]).close()
    eventually(lambda: (house.home.expire_left_calls(), house.home.is_idle(0))[1])
    os.kill(pid, signal.SIGCONT)


def test_another_child_tells_of_changes_where_the_first_one_has_exited(make: Make) -> None:
    house = make()
    listening = house.listen(resourceSubscriptions=["demo://watched"], toolsListChanged=True)
    answer(listening)
    answer(house.tool("ask"))
    house.pid()
    os.kill(house_pid(house), signal.SIGKILL)
    house.trace.wait("subscribed", 2)
    missed = [answer(listening)["method"] for _ in range(2)]
    assert sorted(missed) == [
        "notifications/resources/updated",
        "notifications/tools/list_changed",
    ]
    assert "result" in answer(house.tool("notify", kinds=["updated"]))
    assert answer(listening)["params"]["uri"] == "demo://watched"


def test_what_a_further_child_tells_reaches_nobody(make: Make) -> None:
    """Each child would tell of the same change."""
    house = make()
    listening = house.listen(toolsListChanged=True)
    answer(listening)
    answer(house.tool("ask"))
    assert "result" in answer(house.tool("notify", kinds=["tools"]))  # at the second child
    assert listening.poll() is None


def test_a_listener_that_reads_nothing_costs_no_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy_home, "MAX_UNREAD", 5)
    house = make()
    listening = house.listen(toolsListChanged=True)
    assert "result" in answer(house.tool("notify", kinds=["tools"], times=50))
    assert listening.waiting == 5


@pytest.mark.parametrize(
    ("capabilities", "honoured"),
    [
        ({}, {}),
        ({"tools": {}}, {}),
        ({"tools": {"listChanged": True}}, {"toolsListChanged": True}),
        ({"resources": {"subscribe": True}}, {"resourceSubscriptions": ["demo://a"]}),
    ],
)
def test_only_what_the_server_tells_of_is_honoured(
    make: Make, capabilities: Json, honoured: Json
) -> None:
    """T71."""
    house = make()
    board = house.home.new_switchboard()
    bridge = Bridge(house.supervisor, house.server, 1 << 26, house.home.note_lost, board)
    home = LegacyHome(HOME, KINDS, house.start, house.lost.append, house.timer)
    home.add(Started(bridge, board, jsonrpc.as_payload({"capabilities": capabilities})))
    wanted = {"toolsListChanged": True, "resourceSubscriptions": ["demo://a"]}
    request = Request("l", "subscriptions/listen", jsonrpc.as_payload({"notifications": wanted}))
    exchange = Exchange([request], timeout=None)
    home.send(exchange)
    assert answer(exchange)["params"]["notifications"] == honoured
    home.close()


# --- what modern clients never send --------------------------------------------------------------


def test_a_home_takes_nothing_but_requests(make: Make) -> None:
    home = make().home
    for act in (
        lambda: home.submit(Request(1, "tools/list"), 1),
        lambda: home.notify(Notification("notifications/x")),
        lambda: home.respond(Response(1, Raw(b"{}"))),
        lambda: home.listen(Exchange()),
    ):
        with pytest.raises(BackendError):
            act()
