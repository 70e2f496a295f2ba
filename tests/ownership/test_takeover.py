"""A session whose owner is gone: orderly, cut off, or with a child that crashed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mcp_proxy.sessions import claims
from tests.support.front import McpClient
from tests.support.proxies import Replicas, replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually
from tests.transports.calls import hold, judging, methods, pid_of, release, say, seen

LEASE = 1.0

# What a take-over may take once it is possible: the start of a server on a busy machine.
AT_ONCE = 5.0


def is_gone(several: Replicas, number: int) -> bool:
    """Whether the others see no mailbox of a replica."""
    return not several.mailboxes[-1].is_open(several[number].app.owner.replica.id)


def cut_off(several: Replicas, number: int) -> None:
    """Separates a living replica from the others until its lease is over."""
    several[number].line.cut()
    eventually(lambda: is_gone(several, number))


# --- the orderly end -----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 8])
def test_after_the_orderly_end_of_the_owner_the_next_request_is_served_at_once(
    fleeting: Replicas, seconds: float
) -> None:
    owner, other, third = fleeting.opened("2025-03-26")
    owner.result("logging/setLevel", {"level": "warning"})
    other.result("resources/subscribe", {"uri": "a:1"})
    third.result("resources/subscribe", {"uri": "a:2"})
    other.result("resources/unsubscribe", {"uri": "a:1"})
    before = pid_of(owner)
    judging(fleeting)
    fleeting[0].app.close(seconds)
    began = time.monotonic()
    after = other.result("count")
    assert time.monotonic() - began < AT_ONCE
    assert after["calls"] == 1
    assert after["pid"] != before
    assert pid_of(third) == after["pid"]
    assert fleeting[1].children == 1
    replayed = [(m["method"], m.get("params")) for m in seen(third)][:4]
    assert [method for method, _ in replayed] == [
        "initialize",
        "notifications/initialized",
        "logging/setLevel",
        "resources/subscribe",
    ]
    assert replayed[0][1]["protocolVersion"] == "2025-03-26"
    assert replayed[0][1]["capabilities"] == {"sampling": {}}
    assert replayed[2][1] == {"level": "warning"}
    assert replayed[3][1] == {"uri": "a:2"}


def test_a_call_of_another_replica_is_finished_before_the_owner_goes(three: Replicas) -> None:
    owner, other, third = three.opened()
    before = pid_of(owner)
    stream = third.listen()
    call = hold(other, "h")
    messages = call.stream()
    assert next(messages)["params"]["progress"] == 0
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(three[0].app.close, 8)
        assert [event.retry for event in stream.events()] == []  # it may be opened elsewhere
        release(other, "h")
        assert next(messages)["result"]["held"] == "h"
        call.close()
        draining.result(timeout=15)
    assert pid_of(third) != before
    assert three[2].children == 1


def test_a_relayed_call_is_answered_before_its_client_s_replica_goes(three: Replicas) -> None:
    owner, other, _ = three.opened()
    call = hold(other, "h")
    messages = call.stream()
    assert next(messages)["params"]["progress"] == 0
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(three[1].app.close, 8)
        eventually(lambda: three[1].app.edge.is_draining)
        release(owner, "h")
        assert next(messages)["result"]["held"] == "h"
        call.close()
        draining.result(timeout=15)


@pytest.mark.parametrize("ending", [0, 1], ids=["of the server", "of the client"])
def test_a_relayed_call_that_the_end_of_a_replica_cuts_off_says_so(
    three: Replicas, ending: int
) -> None:
    _, other, _ = three.opened()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(other.call, "silence", Accept="application/json")
        eventually(lambda: three[0].app.owner.is_busy)
        three[ending].app.close(0.2)
        answer = call.result(15)
        assert answer.failure == "draining"
        assert "Retry-After" not in answer.headers, "the call may have acted"


def test_what_is_taken_over_already_is_not_handed_over(three: Replicas) -> None:
    owner, _, _ = three.opened()
    manager, held = three[0].app.manager, three[0].app.owner
    assert owner.session is not None
    claimed = claims.claim(manager, manager.load(owner.session), "other", lambda who: False)
    assert claimed is not None
    held.hand_over()
    eventually(lambda: three[0].children == 0)
    assert claims.settle(manager, claimed)


def test_a_draining_replica_takes_no_new_work_but_passes_answers_on(three: Replicas) -> None:
    owner, other, third = three.opened()
    messages = third.call("ask", {"method": "roots/list", "id": "q"}).stream()
    next(messages)
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(three[0].app.close, 8)
        eventually(lambda: three[0].app.edge.is_draining)
        refused = owner.call("count")
        assert (refused.failure, refused.headers["Retry-After"]) == ("draining", "5")
        assert owner.post({"jsonrpc": "2.0", "id": "q", "result": {"roots": []}}).status == 202
        assert next(messages)["result"]["result"] == {"roots": []}
        draining.result(timeout=15)
    assert other.result("count")["calls"] == 1


def test_closing_with_a_call_of_another_replica_under_way(fleeting: Replicas) -> None:
    _, other, _ = fleeting.opened()
    judging(fleeting)
    call = hold(other, "h", key="mine")
    fleeting[0].app.close()
    assert fleeting[0].children == 0  # its children are ended
    answer = call.message()
    assert (answer["id"], answer["error"]["code"]) == ("mine", -32000)
    assert other.result("count")["calls"] == 1


# --- cut off -------------------------------------------------------------------------------------


def test_many_who_find_the_owner_gone_start_one_server(fleeting: Replicas) -> None:
    _, other, third = fleeting.opened()
    before = pid_of(other)
    judging(fleeting)
    cut_off(fleeting, 0)
    pids = run_together([lambda c=c: pid_of(c) for c in [other, third] * 4])
    assert len(set(pids)) == 1
    assert before not in pids
    assert fleeting[1].children + fleeting[2].children == 1


def test_the_old_owner_stops_its_server_when_it_finds_out(fleeting: Replicas) -> None:
    owner, other, _ = fleeting.opened()
    judging(fleeting)
    cut_off(fleeting, 0)
    after = pid_of(other)
    assert fleeting[0].children == 1
    fleeting[0].line.mend()
    eventually(lambda: fleeting[0].children == 0)
    assert pid_of(owner) == after


def test_an_owner_that_was_not_missed_keeps_its_server(fleeting: Replicas) -> None:
    owner, other, _ = fleeting.opened()
    before = pid_of(other)
    cut_off(fleeting, 0)
    fleeting[0].line.mend()
    eventually(lambda: not is_gone(fleeting, 0))
    assert pid_of(owner) == pid_of(other) == before


def test_calls_in_flight_learn_within_the_lease_that_the_owner_is_gone(
    fleeting: Replicas,
) -> None:
    _, other, third = fleeting.opened()
    judging(fleeting)
    stream = other.listen()
    streamed = hold(third, "h", key="mine")
    with ThreadPoolExecutor(1) as pool:
        plain = pool.submit(lambda: other.call("silence", key=7, Accept="application/json"))
        eventually(lambda: "silence" in methods(third))
        fleeting[0].line.cut()
        began = time.monotonic()
        answer = plain.result(timeout=10)
        message = streamed.message()
        took = time.monotonic() - began
    assert (answer.status, answer.failure) == (200, "server-exited")
    assert (message["id"], answer.message()["id"]) == ("mine", 7)
    assert "gone" in message["error"]["message"]
    assert message["error"]["code"] == -32000
    assert took < LEASE + AT_ONCE
    assert list(stream.events()) == []  # its client opens another
    again = third.listen()
    say(other, 1)
    assert next(again.stream())["params"]["n"] == 1
    again.close()


def test_an_owner_that_is_cut_off_does_not_serve_what_was_taken_over(fleeting: Replicas) -> None:
    owner, other, _ = fleeting.opened()
    old = pid_of(owner)
    judging(fleeting)
    cut_off(fleeting, 0)
    new = pid_of(other)
    # The store can be reached, the new owner cannot.
    assert owner.call("count").error()["code"] == -32000
    fleeting[0].line.mend()
    eventually(lambda: not is_gone(fleeting, 0))
    assert pid_of(owner) == new != old


def test_a_replica_that_comes_back_is_served_at_once(fleeting: Replicas) -> None:
    owner, other, _ = fleeting.opened()
    pid_of(other)
    judging(fleeting)
    cut_off(fleeting, 1)
    fleeting[1].line.mend()
    assert other.result("count") == {"calls": 2, "pid": pid_of(owner)}


@pytest.mark.parametrize("way", ["delete", "store"])
def test_a_session_that_was_ended_meanwhile_has_its_server_stopped(
    fleeting: Replicas, way: str
) -> None:
    owner, other, _ = fleeting.opened()
    judging(fleeting)
    cut_off(fleeting, 0)
    assert other.session is not None
    if way == "delete":
        assert other.delete().status == 204
    else:
        fleeting[1].app.manager.end(other.session)
    fleeting[0].line.mend()
    eventually(lambda: fleeting[0].children == 0)
    assert owner.call("count").status == 404


def test_a_delete_while_the_session_is_taken_over_wins(store: dict[str, Any]) -> None:
    from tests.support.front import SCRIPTED

    slow = [*SCRIPTED, "--slow-start", "0.7"]
    with replicas(3, **store, lease=LEASE, command=slow) as several:
        _, other, third = several.opened()
        judging(several)
        cut_off(several, 0)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: other.call("count").status)
            eventually(lambda: several[1].children == 1)
            assert third.delete().status == 204
            assert call.result(timeout=10) == 404
        eventually(lambda: several[1].children == 0)
        assert several[2].children == 0


# --- the child crashed ---------------------------------------------------------------------------


def crash(client: McpClient) -> None:
    answer = client.call("die", {"code": 7}, key="k", Accept="application/json")
    assert (answer.status, answer.failure) == (200, "server-exited")
    expected = "The server exited (exit code 7) before it answered"
    assert answer.message() == {
        "jsonrpc": "2.0",
        "id": "k",
        "error": {"code": -32000, "message": expected},
    }


@pytest.mark.parametrize(("crashed_at", "next_at"), [(0, 1), (1, 0), (1, 2), (2, 2)])
def test_a_crashed_server_is_brought_back_by_whoever_is_asked_next(
    three: Replicas, crashed_at: int, next_at: int
) -> None:
    clients = three.opened()
    clients[1].result("logging/setLevel", {"level": "error"})
    before = pid_of(clients[2])
    crash(clients[crashed_at])
    after = clients[next_at].result("count")
    assert after["calls"] == 1
    assert after["pid"] != before
    eventually(
        lambda: (
            [replica.children for replica in three.each]
            == [int(number == next_at) for number in range(3)]
        )
    )
    assert {pid_of(client) for client in clients} == {after["pid"]}
    assert methods(clients[0])[2] == "logging/setLevel"


def test_the_log_names_the_session_whose_server_was_started_again(
    three: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    """By the end of its id: the whole would open the session to whoever reads the log."""
    caplog.set_level("INFO")
    client = three.opened()[0]
    assert client.session is not None
    crash(client)
    pid = pid_of(client)
    lines = [record.getMessage() for record in caplog.records]
    (line,) = (line for line in lines if "was started again" in line)
    assert f" pid={pid} session={client.session[-8:]}] " in line
    assert client.session not in line


def test_a_crash_that_everybody_notices_starts_one_server(three: Replicas) -> None:
    clients = three.opened()
    crash(clients[1])
    pids = run_together([lambda c=c: pid_of(c) for c in clients * 3])
    assert len(set(pids)) == 1
    eventually(lambda: sum(replica.children for replica in three.each) == 1)


def test_a_crash_ends_calls_and_streams_of_all_replicas(three: Replicas) -> None:
    clients = three.opened()
    stream = clients[2].listen()
    calls = [hold(client, f"h{number}") for number, client in enumerate(clients)]
    clients[1].call("die", {"signal": 9}).body()
    for call in calls:
        assert "SIGKILL" in call.error()["message"]
    assert list(stream.events()) == []
    again = clients[1].listen()
    say(clients[0], 1)
    assert next(again.stream())["params"]["n"] == 1
    again.close()


def test_a_notification_brings_a_crashed_server_back(three: Replicas) -> None:
    clients = three.opened()
    crash(clients[0])
    assert clients[1].notify("notifications/x").status == 202
    assert clients[2].result("seen")["messages"][-2]["method"] == "notifications/x"
