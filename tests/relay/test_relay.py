"""Relays end to end: a child of one replica as a backend of another."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

import pytest

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    Cancelled,
    ClientLeft,
    StorageUnavailable,
)
from mcp_proxy.storage.mailboxes import LocalMailboxes
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from tests.relay.scene import PATIENCE, Node, Scene
from tests.relay.scripted import ScriptedCall, call, result_of, silent
from tests.support.exchanges import listening, received, sent
from tests.support.threads import run_together
from tests.support.waiting import eventually

# --- calls ---------------------------------------------------------------------------------------


def test_a_call_is_executed_there_and_answered_here(client: Node, owner: Node) -> None:
    exchange = sent(client.reach(owner), [call("add", "id-1", a=1)], False, 5)
    delivery = exchange.receive(PATIENCE)
    assert result_of(delivery) == "add"
    assert exchange.is_over
    assert exchange.receive(0.01) is None
    assert owner.child.requests == [call("add", "id-1", a=1)]
    assert client.child.requests == []


def test_everything_that_belongs_to_a_call_comes_in_order(client: Node, owner: Node) -> None:
    def talk(exchange: ScriptedCall, requests: object) -> None:
        for number in range(300):
            exchange.say(b"%d" % number, event_id=f"e{number}" if number % 2 else None)
        exchange.answer("done")

    owner.child.scripts["talk"] = talk
    exchange = sent(client.reach(owner), [call("talk")], True, 5)
    deliveries = received(exchange, 301)
    assert [d.data for d in deliveries[:-1]] == [b"%d" % n for n in range(300)]
    assert [d.event_id for d in deliveries[:4]] == [None, "e1", None, "e3"]
    assert not any(d.is_response for d in deliveries[:-1])
    assert result_of(deliveries[-1]) == "done"
    assert exchange.is_over


class _HeldLog:
    """A log that does not answer before it is told to."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.logged: list[bytes] = []

    def begin(self, exchange: Exchange) -> str | None:
        return None

    def append(
        self, exchange: Exchange, messages: Sequence[ServerMessage], is_last: bool
    ) -> Sequence[str | None]:
        self.is_asked.set()
        assert self.may_answer.wait(PATIENCE)
        self.logged += [message.data for message in messages]
        return [f"e{number}" for number in range(len(messages))]

    def missed(self, exchange: Exchange, after: str) -> list[ServerMessage]:
        return []

    def continue_standing(self, exchange: Exchange, after: str | None, is_taken: bool) -> bool:
        return True

    def read_on(self, exchange: Exchange) -> None:
        exchange.end()


def test_a_stream_that_is_being_logged_holds_no_other_call_up(client: Node, owner: Node) -> None:
    log = _HeldLog()

    def talk(played: ScriptedCall, requests: object) -> None:
        played.exchange.attach(played, log)
        played.say(b"first")

    owner.child.scripts["talk"] = talk
    stream = sent(client.reach(owner), [call("talk")], True, 60)
    assert log.is_asked.wait(PATIENCE)
    assert client.ask(owner, call("add")) == "add"
    played = owner.child.exchanges[0]
    for number in range(100):
        played.say(b"%d" % number)
    played.answer("done")
    log.may_answer.set()
    deliveries = received(stream, 102)
    assert [one.data for one in deliveries[:-1]] == [b"first", *(b"%d" % n for n in range(100))]
    assert result_of(deliveries[-1]._replace(event_id=None)) == "done"
    assert log.logged[-1] == deliveries[-1].data
    eventually(lambda: client.calls == owner.calls == 0)


def test_each_request_of_a_batch_is_answered(client: Node, owner: Node) -> None:
    requests = [call("one", 1), call("two", "1"), call("three", 3)]
    exchange = sent(client.reach(owner), requests, False, 5)
    assert [result_of(d) for d in received(exchange, 3)] == ["one", "two", "three"]
    assert exchange.is_over
    assert not owner.child.exchanges[0].exchange.accepts_stream


def test_what_the_owner_knows_of_the_client_arrives(client: Node, owner: Node) -> None:
    owner.child.scripts["wait"] = silent
    exchange = sent(client.reach(owner), [call("wait")], True, 5)
    hosted = eventually(lambda: owner.child.exchanges)[0]
    assert hosted.exchange.accepts_stream
    assert not hosted.has_begun.is_set()
    exchange.begin_stream()
    exchange.begin_stream()
    assert hosted.has_begun.wait(PATIENCE)
    hosted.say(b"progress")
    assert received(exchange, 1)[0].data == b"progress"
    exchange.close()
    exchange.close()
    assert hosted.was_left.wait(PATIENCE)
    eventually(lambda: client.calls == owner.calls == 0)


@pytest.mark.parametrize("kind", [BackendLost, BackendTimeout, Cancelled, BackendError])
def test_a_failure_of_the_server_is_delivered(
    client: Node, owner: Node, kind: type[BackendError]
) -> None:
    owner.child.scripts["fail"] = lambda exchange, _: exchange.fail(kind("It broke (exit code 3)"))
    (delivery,) = received(sent(client.reach(owner), [call("fail")], False, 5), 1)
    assert type(delivery.failure) is kind
    assert "exit code 3" in delivery.failure.message
    assert b"exit code 3" in delivery.data


def test_a_call_that_is_never_answered_is_given_up_in_its_time(client: Node, owner: Node) -> None:
    owner.child.scripts["wait"] = silent
    exchange = sent(client.reach(owner), [call("wait", 7)], False, 0.2)
    (delivery,) = received(exchange, 1)
    assert isinstance(delivery.failure, BackendTimeout)
    assert jsonrpc.parse_message(delivery.data).id == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [BackendLost, BackendTimeout])
def test_a_call_that_the_owner_refuses_is_answered_by_why(
    client: Node, owner: Node, kind: type[BackendError]
) -> None:
    owner.child.refusal = kind("Not now")
    (delivery,) = received(sent(client.reach(owner), [call("add")], False, 5), 1)
    assert type(delivery.failure) is kind
    assert delivery.failure.message == "Not now"


def test_an_error_that_nobody_expected_does_not_leave_the_caller_waiting(
    client: Node, owner: Node
) -> None:
    owner.child.refusal = RuntimeError("this backend is broken")
    delivery = sent(client.reach(owner), [call("add")], False, 30).receive(2)
    assert delivery is not None, "nobody says that it failed"
    assert isinstance(delivery.failure, BackendLost)


def test_a_child_that_is_not_there_was_not_reached(client: Node, owner: Node) -> None:
    exchange = sent(client.reach(owner, "absent"), [call("add")], False, 5)
    with pytest.raises(BackendUnreached):
        exchange.receive(PATIENCE)


def test_what_did_not_get_to_the_child_was_not_reached(client: Node, owner: Node) -> None:
    owner.child.refusal = BackendUnreached("The server ended")
    with pytest.raises(BackendUnreached, match="The server ended"):
        sent(client.reach(owner), [call("add")], False, 5).receive(PATIENCE)


def test_a_conversation_that_fails_is_forgotten(client: Node, owner: Node) -> None:
    for child in ("child", "nowhere"):
        exchange = sent(client.reach(owner, child), [call("add")], True, 5)
        with contextlib.suppress(BackendUnreached):
            exchange.receive(PATIENCE)
        exchange.close()
    eventually(lambda: client.calls == owner.calls == 0)
    assert not client.relay.is_busy


def test_many_calls_at_once_each_get_their_own_answer(scene: Scene) -> None:
    one, two, three = scene.nodes

    def asking(here: Node, there: Node, name: str) -> bool:
        answers = [here.ask(there, call(f"{name}{number}")) for number in range(20)]
        return answers == [f"{name}{number}" for number in range(20)]

    pairs = [(one, two), (two, one), (one, three), (three, two), (two, three), (three, one)]
    assert all(
        run_together(
            [
                lambda here=here, there=there, n=n: asking(here, there, f"p{n}-")  # type: ignore[misc]
                for n, (here, there) in enumerate(pairs)
            ]
        )
    )
    assert sum(sum(node.child.executed.values()) for node in scene.nodes) == 120
    assert all(set(node.child.executed.values()) == {1} for node in scene.nodes)
    eventually(lambda: all(node.calls == 0 for node in scene.nodes))


# --- what is told --------------------------------------------------------------------------------


def test_a_notification_has_arrived_when_notify_returns(client: Node, owner: Node) -> None:
    said = Notification("notifications/initialized", jsonrpc.as_payload({"a": 1}))
    client.reach(owner).notify(said)
    assert owner.child.told == [said]


def test_a_response_has_arrived_when_respond_returns(client: Node, owner: Node) -> None:
    said = Response("q1", result=jsonrpc.as_payload({"roots": []}))
    client.reach(owner).respond(said)
    assert owner.child.told == [said]


@pytest.mark.parametrize(
    "failure", [BackendLost("It ended"), BackendUnreached("It never was"), BackendTimeout("Slow")]
)
def test_an_error_of_the_owner_is_raised_here(
    client: Node, owner: Node, failure: BackendError
) -> None:
    owner.child.refusal = failure
    with pytest.raises(type(failure), match=failure.message):
        client.reach(owner).notify(Notification("x"))
    with pytest.raises(type(failure), match=failure.message):
        client.reach(owner).respond(Response(1, result=jsonrpc.as_payload(1)))
    with pytest.raises(type(failure), match=failure.message):
        listening(client.reach(owner))


def test_nothing_can_be_told_to_a_child_that_is_not_there(client: Node, owner: Node) -> None:
    with pytest.raises(BackendUnreached):
        client.reach(owner, "absent").notify(Notification("x"))
    with pytest.raises(BackendUnreached):
        listening(client.reach(owner, "absent"))


def test_who_has_left_waits_for_no_standing_stream(
    client: Node, owner: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(owner.child, "listen", lambda exchange, after: goes_on.wait(PATIENCE))
    exchange = Exchange()
    exchange.has_left = lambda: True
    began = time.monotonic()
    with pytest.raises(ClientLeft):
        client.reach(owner).listen(exchange)
    assert time.monotonic() - began < 5
    goes_on.set()
    eventually(lambda: client.calls == owner.calls == 0)


def test_who_has_left_does_not_wait_until_something_is_told(client: Node, owner: Node) -> None:
    goes_on = threading.Event()
    owner.child.on_tell = lambda: goes_on.wait(PATIENCE)
    backend = client.relay.backend(owner.replica.id, "child")
    began = time.monotonic()
    with pytest.raises(ClientLeft):
        backend.notify(Notification("x"), lambda: True)
    assert time.monotonic() - began < 5
    goes_on.set()
    eventually(lambda: [told.method for told in owner.child.told] == ["x"])  # type: ignore[union-attr]
    eventually(lambda: client.calls == owner.calls == 0)


def test_what_is_told_to_one_child_keeps_its_order(client: Node, owner: Node) -> None:
    backend = client.reach(owner)
    for number in range(50):
        backend.notify(Notification(str(number)))
    assert [n.method for n in owner.child.told] == [str(n) for n in range(50)]  # type: ignore[union-attr]


def test_close_ends_the_child_and_leaves_nothing_behind(client: Node, owner: Node) -> None:
    client.reach(owner).close()
    assert owner.child.is_closed.wait(PATIENCE)
    eventually(lambda: owner.calls == 0)
    eventually(lambda: client.calls == 0, 1.5)


# --- standing streams ----------------------------------------------------------------------------


def test_a_standing_stream_brings_what_is_said(client: Node, owner: Node) -> None:
    stream = listening(client.reach(owner), after="e7")
    assert owner.child.asked_after == ["e7"]
    for number in range(200):
        owner.child.streams[0].say(b"%d" % number, f"e{number}")
    assert [d.data for d in received(stream, 200)] == [b"%d" % n for n in range(200)]
    assert not stream.is_over
    assert stream.receive(0.01) is None
    owner.child.streams[0].exchange.end()
    eventually(lambda: stream.receive(0.05) is None and stream.is_over)
    assert stream.was_replaced is False


def test_a_newer_stream_from_anywhere_replaces_an_older_one(scene: Scene) -> None:
    client, owner, other = scene.nodes
    older = listening(client.reach(owner))
    newer = listening(other.reach(owner))
    eventually(lambda: older.receive(0.05) is None and older.is_over)
    assert older.was_replaced is True
    owner.child.streams[-1].say(b"for the newer")
    assert received(newer, 1)[0].data == b"for the newer"


def test_a_stream_that_its_client_left_is_left_at_the_owner(client: Node, owner: Node) -> None:
    stream = listening(client.reach(owner))
    stream.close()
    assert owner.child.streams[0].was_left.wait(PATIENCE)
    eventually(lambda: client.calls == owner.calls == 0)


# --- the relay itself ----------------------------------------------------------------------------


def test_nothing_runs_before_the_first_use() -> None:
    before = threading.active_count()
    node = Node(LocalMailboxes())
    assert threading.active_count() == before
    assert node.relay.is_held
    node.relay.close()
    node.relay.close()
    with pytest.raises(StorageUnavailable):
        node.relay.start()
    with pytest.raises(StorageUnavailable):
        node.reach(node)


def test_start_may_be_repeated(client: Node) -> None:
    threads = threading.active_count()
    client.relay.start()
    assert threading.active_count() == threads


def test_a_replica_is_not_gone_while_its_relay_is_open(client: Node, owner: Node) -> None:
    assert client.relay.is_gone(owner.replica.id) is False


def test_a_child_is_found_by_whoever_has_it(client: Node, owner: Node) -> None:
    second = type(owner.child)()
    owner.relay.serve(lambda child_id, begins: {"second": second}.get(child_id), lambda: None)
    assert client.ask(owner, call("add"), "second") == "add"
    assert client.ask(owner, call("add")) == "add"
    assert (second.executed, owner.child.executed) == ({"add": 1}, {"add": 1})


def test_a_request_without_params_arrives_as_it_was(client: Node, owner: Node) -> None:
    assert client.ask(owner, Request(2**53, "ping")) == "ping"
    assert owner.child.requests == [Request(2**53, "ping")]
