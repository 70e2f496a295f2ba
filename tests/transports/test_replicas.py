"""One session at several replicas: whichever gets a request, the same server answers."""

from __future__ import annotations

import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mcp_proxy.relay.lease import boottime
from mcp_proxy.relay.relay import Relay
from mcp_proxy.storage.session import Session
from tests.support.front import McpClient
from tests.support.proxies import Replicas, Replicated, replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually
from tests.transports.calls import NOTE, hold, methods, pid_of, release, say, seen

# Where something begins and where it goes on; the first replica is the owner.
PAIRS = [(0, 1), (1, 0), (1, 2)]

A_DAY = 24 * 3600 * 1000


def test_every_replica_reaches_the_one_server(three: Replicas) -> None:
    clients = three.opened()
    counts = [client.result("count") for client in clients]
    assert [count["calls"] for count in counts] == [1, 2, 3]
    assert len({count["pid"] for count in counts}) == 1
    assert [replica.children for replica in three.each] == [1, 0, 0]


def test_answers_are_what_the_owner_would_send(three: Replicas) -> None:
    clients = three.opened()
    for client in clients:
        answer = client.call("echo", {"a": [1]}, key="k")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
        assert answer.message() == {"jsonrpc": "2.0", "id": "k", "result": {"a": [1]}}
        failed = client.call("fail", {"code": -32002, "message": "no"})
        assert (failed.status, failed.error()) == (200, {"code": -32002, "message": "no"})
        assert client.notify("notifications/x").status == 202


def test_large_messages_pass_both_ways(three: Replicas) -> None:
    _, other, _ = three.opened()
    text = "".join(map(chr, range(32, 127))) * 30_000  # 2.8 MB
    assert other.result("echo", {"text": text}) == {"text": text}
    answer = other.call("big", {"size": 9_000_000}, Accept="text/event-stream")
    assert len(answer.message()["result"]["text"]) == 9_000_000


def test_many_messages_stay_in_order(three: Replicas) -> None:
    _, other, _ = three.opened()
    *notes, answer = other.call("notify", {"count": 500}).messages()
    assert [note["params"]["number"] for note in notes] == list(range(500))
    assert answer["result"] == {}


def test_many_calls_at_once_each_get_their_answer(three: Replicas) -> None:
    clients = three.opened()

    def call(number: int) -> bool:
        client = clients[number % 3]
        answer = client.call("echo", {"number": number}, key=number % 2).message()
        return bool(answer["id"] == number % 2 and answer["result"] == {"number": number})

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(call, range(240)))


def test_equal_ids_and_tokens_of_two_replicas_do_not_cross(three: Replicas) -> None:
    clients = three.opened()

    def call(number: int) -> list[dict[str, Any]]:
        params = {"_meta": {"progressToken": "t"}, "seconds": 0.3 - number / 10, "for": number}
        return clients[number].call("progress", params, key=1).messages()

    answers = run_together([lambda n=n: call(n) for n in range(3)])
    for number, (progress, answer) in enumerate(answers):
        assert progress["params"] == {"progressToken": "t", "progress": 1}
        assert (answer["id"], answer["result"]) == (1, {"for": number})


def test_a_batch_is_answered_anywhere(three: Replicas) -> None:
    _, other, _ = three.opened("2025-03-26")
    calls = [
        {"jsonrpc": "2.0", "id": key, "method": "echo", "params": {"n": n}}
        for n, key in enumerate((1, "1", 2))
    ]
    note = {"jsonrpc": "2.0", "method": "notifications/x"}
    parsed = json.loads(other.post([*calls, note]).body())
    found = {(type(m["id"]), m["id"], m["result"]["n"]) for m in parsed}
    assert found == {(int, 1, 0), (str, "1", 1), (int, 2, 2)}
    assert "notifications/x" in methods(other)


# --- messages of the server ----------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "answered"), PAIRS)
def test_sampling_is_answered_at_another_replica(
    three: Replicas, asked: int, answered: int
) -> None:
    clients = three.opened()
    messages = clients[asked].call("ask", {"method": "sampling/createMessage", "id": "q"}).stream()
    assert next(messages)["method"] == "sampling/createMessage"
    reply = {"jsonrpc": "2.0", "id": "q", "result": {"role": "assistant"}}
    assert clients[answered].post(reply).status == 202
    assert next(messages)["result"]["result"] == {"role": "assistant"}
    assert clients[answered].post(reply).status == 202  # nobody waits for a second one
    assert sum(message.get("id") == "q" for message in seen(clients[0])) == 1


def test_the_standing_stream_is_at_any_replica(three: Replicas) -> None:
    _, other, third = three.opened()
    stream = other.listen()
    messages = stream.stream()
    for number in range(3):
        say(third, number)
        assert next(messages)["params"]["n"] == number
    ask = {"id": "q", "method": "roots/list"}
    third.result("later", {"message": ask})
    assert next(messages)["method"] == "roots/list"
    third.post({"jsonrpc": "2.0", "id": "q", "result": {"roots": []}})
    eventually(lambda: any(message.get("id") == "q" for message in seen(third)))
    stream.close()


def test_what_waited_is_delivered_to_the_first_stream_anywhere(three: Replicas) -> None:
    owner, other, _ = three.opened()
    for number in range(3):
        say(owner, number)
    stream = other.listen()
    messages = stream.stream()
    assert [next(messages)["params"]["n"] for _ in range(3)] == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize(("first", "second"), [*PAIRS, (1, 1)])
def test_a_newer_stream_anywhere_ends_the_older_anywhere(
    three: Replicas, first: int, second: int
) -> None:
    clients = three.opened()
    older = clients[first].listen()
    events = older.events()
    say(clients[2], 1)
    assert next(events).data  # it stands
    newer = clients[second].listen()
    assert [event.retry for event in events] == [A_DAY]
    messages = newer.stream()
    say(clients[0], 2)
    assert next(messages)["params"]["n"] == 2
    newer.close()


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_streams_opened_in_a_row_the_second_stays(
    three: Replicas, first: int, second: int
) -> None:
    clients = three.opened()
    older, newer = clients[first].listen(), clients[second].listen()
    assert [event.retry for event in older.events()] == [A_DAY]
    say(clients[0], 1)
    assert next(newer.stream())["params"]["n"] == 1
    newer.close()


def test_a_stream_that_was_left_elsewhere_gets_nothing_any_more(three: Replicas) -> None:
    owner, other, third = three.opened()
    left = other.listen()
    messages = left.stream()
    say(owner, 1)
    next(messages)
    left.close()
    eventually(lambda: not three[0].app.owner.backends[-1].is_watched)
    say(owner, 2)
    stream = third.listen()
    assert next(stream.stream())["params"]["n"] == 2
    stream.close()


# --- cancellation, departure, time ---------------------------------------------------------------


def test_a_cancellation_comes_from_another_replica(three: Replicas) -> None:
    owner, other, third = three.opened()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: other.call("silence", key="mine").message())
        eventually(lambda: "silence" in methods(owner))
        third.notify("notifications/cancelled", {"requestId": "mine", "reason": "enough"})
        eventually(lambda: "notifications/cancelled" in methods(owner))
        (silence,) = [m for m in seen(owner) if m.get("method") == "silence"]
        (cancelled,) = [m for m in seen(owner) if m.get("method") == "notifications/cancelled"]
        assert cancelled["params"] == {"requestId": silence["id"], "reason": "enough"}
        answer = call.result(timeout=10)
    assert answer["id"] == "mine"
    assert "cancelled" in answer["error"]["message"]


def test_a_client_that_leaves_elsewhere_cancels_nothing(three: Replicas) -> None:
    owner, other, _ = three.opened()
    call = hold(other, "h")
    assert next(call.stream())["params"]["progress"] == 0
    call.close()
    release(owner, "h")
    assert pid_of(other) == pid_of(owner)
    assert "notifications/cancelled" not in methods(owner)


@pytest.mark.parametrize("sse_after", [5.0, 0.1])
def test_the_time_limit_holds_anywhere(store: dict[str, Any], sse_after: float) -> None:
    with replicas(2, **store, request_timeout=1.5, sse_after=sse_after) as several:
        owner, other = several.opened()
        answer = other.call("silence", key="late")
        assert answer.status == 200
        assert answer.failure == ("server-timeout" if sse_after > 1 else None)
        message = answer.message()
        assert message["id"] == "late"
        assert message["error"]["message"] == "The server did not answer within 1.5 seconds"
        assert methods(owner).count("notifications/cancelled") == 1


# --- the owner's authority -----------------------------------------------------------------------


class LookUps:
    """Counts what a replica asks the store for, and has its clock in the test's hands."""

    def __init__(self, replica: Replicated, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.now = boottime() + 1.0
        load = replica.app.manager.storage.load

        def counted(session_id: str) -> Session:
            self.count += 1
            return load(session_id)

        patch.setattr(replica.app.manager.storage, "load", counted)
        patch.setattr("mcp_proxy.ownership.owner.boottime", lambda: self.now)


def test_an_owner_asks_the_store_once_a_second(
    store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(2, **store) as several:
        owner, other = several.opened()
        counted = LookUps(several[0], monkeypatch)
        for expected in (1, 2, 3):
            for _ in range(5):
                owner.result("count")
            assert counted.count == expected
            counted.now += 1.0
        owner.call("logging/setLevel", {"level": "debug"})
        assert other.result("count")["calls"] == 16
        assert owner.delete().status == 204
        assert owner.call("count").status == 404
        assert other.call("count").status == 404


def test_a_replica_whose_lease_is_over_asks_the_store(
    store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(2, **store) as several:
        owner, _ = several.opened()
        owner.result("count")
        counted = LookUps(several[0], monkeypatch)
        monkeypatch.setattr(Relay, "is_held", property(lambda relay: False))
        for _ in range(3):
            owner.result("count")
        assert counted.count == 3


def test_a_server_that_was_lost_is_asked_for_in_the_store(
    store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with replicas(2, **store) as several:
        owner, other = several.opened()
        before = pid_of(owner)
        counted = LookUps(several[0], monkeypatch)
        os.kill(before, signal.SIGKILL)
        eventually(lambda: several[0].children == 0)
        assert pid_of(other) != before
        assert pid_of(owner) == pid_of(other)
        assert counted.count >= 1


def test_a_delete_waits_for_an_owner_to_know(three: Replicas) -> None:
    for _ in range(20):
        owner, other, _ = three.opened()
        owner.result("count")
        assert other.delete().status == 204
        assert owner.call("count").status == 404


# --- the end of a session ------------------------------------------------------------------------


@pytest.mark.parametrize("ended_at", range(3))
def test_a_delete_anywhere_ends_everything_everywhere(three: Replicas, ended_at: int) -> None:
    clients = three.opened()
    stream = clients[(ended_at + 1) % 3].listen()
    calls = [hold(client, f"h{number}") for number, client in enumerate(clients)]
    assert clients[ended_at].delete().status == 204
    for call in calls:
        assert "ended" in call.error()["message"]
    assert list(stream.events()) == []
    eventually(lambda: three[0].children == 0)
    for client in clients:
        assert client.call("count").status == 404
        assert client.listen().status == 404


def test_a_session_that_is_ended_in_the_store_loses_its_server(store: dict[str, Any]) -> None:
    with replicas(2, **store, session_ttl=2) as several:
        owner, _ = several.opened()
        assert owner.session is not None
        assert several[0].children == 1
        several[1].app.manager.end(owner.session)
        eventually(lambda: several[0].children == 0)


def test_an_expired_session_loses_its_server_unless_it_is_used_elsewhere(
    store: dict[str, Any],
) -> None:
    with replicas(2, **store, session_ttl=1) as several:
        _, other = several.opened()
        used: list[McpClient] = [other] * 15
        pids = set()
        for client in used:  # 0.2 s each: three times the time to live
            client.result("sleep", {"seconds": 0.2})
            pids.add(pid_of(client))
        assert len(pids) == 1
        eventually(lambda: several[0].children == 0)
        assert other.call("count").status == 404


def test_sessions_of_many_clients_at_many_replicas_do_not_mix(three: Replicas) -> None:
    opened = [three.client_at(number % 3).open() for number in range(6)]
    pids = [pid_of(client) for client in opened]
    assert len(set(pids)) == 6
    for client, (number, pid) in itertools.product(opened, enumerate(pids)):
        if client is opened[number]:
            assert all(pid_of(client.at(replica.front)) == pid for replica in three.each)
    answers = {client.call("notify", {"params": {"x": 1}}).message()["id"] for client in opened}
    assert answers
    assert NOTE not in methods(opened[0])
