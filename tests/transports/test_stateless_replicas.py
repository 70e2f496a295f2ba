"""Modern calls at several replicas: one home a key, wherever a request comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.modern_client import (
    ASKABLE,
    SUBSCRIPTION,
    ModernClient,
    Trace,
    answering,
    asked_in,
    called,
    server_of,
)
from tests.support.proxies import Replicas, replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually
from tests.transports.test_stateless import leaving


class Pair:
    """Two replicas in front of a server of one era."""

    def __init__(self, era: str, several: Replicas, trace: Trace) -> None:
        self.era = era
        self.several = several
        self.trace = trace

    def clients(self, **options: Any) -> list[ModernClient]:
        """One client, at each replica; the home lives at the first."""
        first = ModernClient(self.several[0].front, **options)
        first.pid()
        return [first, first.at(self.several[1].front)]


@contextmanager
def pair_of(era: str, path: Path, **settings: Any) -> Iterator[Pair]:
    trace = Trace(path / "trace")
    command = server_of(era, "--trace", str(trace.path))
    quick = {"sse_after": 3, "keepalive_interval": 0.2}
    with replicas(2, command=command, **quick, **settings) as several:
        yield Pair(era, several, trace)


@pytest.fixture(params=["modern", "legacy"])
def pair(request: pytest.FixtureRequest, store: dict[str, Any], tmp_path: Path) -> Iterator[Pair]:
    with pair_of(request.param, tmp_path, **store) as pair:
        yield pair


@pytest.fixture(params=["modern", "legacy"])
def fleeting_pair(
    request: pytest.FixtureRequest, store: dict[str, Any], tmp_path: Path
) -> Iterator[Pair]:
    """Two that take one another for gone after a second without a sign."""
    with pair_of(request.param, tmp_path, lease=1.0, **store) as pair:
        yield pair


def test_a_key_has_one_server_wherever_its_calls_come(pair: Pair) -> None:
    first, second = pair.clients()
    assert second.pid() == first.pid()
    # What the second has started to learn the era ends.
    eventually(lambda: [replica.children for replica in pair.several.each] == [1, 0])
    second.told("counter")
    assert first.told("counter")["count"] == 2


def test_first_calls_at_both_at_once_share_one_server(pair: Pair) -> None:
    clients = [ModernClient(replica.front) for replica in pair.several.each] * 4
    pids = run_together([client.pid for client in clients])
    assert len(set(pids)) == 1
    # What was started to learn the era, and is no home, has ended.
    eventually(lambda: sum(replica.children for replica in pair.several.each) == 1)


def test_callers_share_a_server_by_what_they_authorize_with(pair: Pair) -> None:
    clients = [
        ModernClient(replica.front, authorization=authorization)
        for replica in pair.several.each
        for authorization in ("Bearer a", "Bearer b", None)
    ]
    pids = [client.pid() for client in clients]
    assert pids[:3] == pids[3:]
    assert len(set(pids)) == 3


def test_answers_are_what_the_owner_would_send(pair: Pair) -> None:
    for client in pair.clients():
        missing = client.call("no/such", key="m")
        assert (missing.status, missing.error()["code"]) == (404, -32601)
        message = client.call("tools/call", called("echo", text="x"), "k").message()
        assert (message["id"], message["result"]["structuredContent"]) == ("k", {"text": "x"})
        lacking = client.call("tools/call", called("ask"), "c")
        expected = (400, -32021) if pair.era == "modern" else (200, -32602)
        assert (lacking.status, lacking.error()["code"]) == expected
        assert client.call("server/discover").message()["result"]["resultType"] == "complete"


def test_progress_and_logs_come_to_another_replica(pair: Pair) -> None:
    _, second = pair.clients()
    answer = second.call("tools/call", called("count", to=3), "p", token="t")
    *progress, last = answer.messages()
    assert [note["params"]["progress"] for note in progress] == [1, 2, 3]
    assert {note["params"]["progressToken"] for note in progress} == {"t"}
    assert last["id"] == "p"
    logs = second.call("tools/call", called("log"), log_level="error").messages()
    assert [it["params"]["level"] for it in logs[:-1]] == ["error"]


def test_equal_ids_and_tokens_at_two_replicas_do_not_cross(pair: Pair) -> None:
    """T75."""
    clients = pair.clients()

    def count(number: int) -> list[Any]:
        params = called("count", to=3 + number, pause=0.05)
        return clients[number].call("tools/call", params, 1, token="x").messages()

    for number, (*progress, last) in enumerate(
        run_together([lambda n=n: count(n) for n in range(2)])
    ):
        assert [note["params"]["progress"] for note in progress] == list(range(1, 4 + number))
        assert last["result"]["structuredContent"] == {"counted": 3 + number}


def test_a_header_that_repeats_an_argument_is_checked_by_the_owner(pair: Pair) -> None:
    for client in pair.clients():
        params = called("header", region="us-west1", query="q")
        answer = client.call("tools/call", params)
        assert answer.message()["result"]["structuredContent"]["region"] == "us-west1"
        for wrong in ("", "eu"):
            refused = client.call("tools/call", params, "h", Mcp_Param_Region=wrong)
            assert (refused.status, refused.error()["code"]) == (400, -32020)


# --- who leaves ----------------------------------------------------------------------------------


def test_closing_a_stream_elsewhere_cancels_the_call(pair: Pair) -> None:
    """T69."""
    _, second = pair.clients()
    answer = second.call("tools/call", called("slow", label="left"), token="t")
    assert next(answer.stream())["method"] == "notifications/progress"
    answer.close()
    pair.trace.wait("cancelled", end=" left")
    assert second.pid()


def test_leaving_elsewhere_while_json_is_waited_for_cancels_the_call(pair: Pair) -> None:
    """T69."""
    has_left = threading.Event()
    client = leaving(pair.clients()[1], has_left)
    with ThreadPoolExecutor(1) as pool:
        params = called("slow", label="json")
        call = pool.submit(lambda: client.call("tools/call", params, Accept="application/json"))
        pair.trace.wait("started", end=" json")
        has_left.set()
        pair.trace.wait("cancelled", end=" json")
        assert call.result(10).status == 499


def test_a_subscription_stands_at_another_replica(pair: Pair) -> None:
    """T71, T72."""
    first, second = pair.clients()
    answer = second.listen("l", toolsListChanged=True, resourceSubscriptions=["demo://watched"])
    messages = answer.stream()
    assert next(messages)["method"] == "notifications/subscriptions/acknowledged"
    first.done("notify", kinds=["prompts", "tools"])
    note = next(messages)
    assert note["method"] == "notifications/tools/list_changed"
    assert note["params"]["_meta"] == {SUBSCRIPTION: "l"}
    if pair.era == "legacy":
        pair.trace.wait("subscribed")
    first.done("notify", kinds=["updated"])
    assert next(messages)["params"]["uri"] == "demo://watched"
    answer.close()
    eventually(lambda: not pair.several[0].app.owner.backends[0].is_watched)


@pytest.mark.parametrize("at", [0, 1])
def test_a_subscription_ends_in_order_where_its_server_is_handed_over(pair: Pair, at: int) -> None:
    """T73."""
    client = pair.clients()[at]
    answer = client.listen("l", toolsListChanged=True)
    messages = answer.stream()
    next(messages)
    pair.several[0].app.end_streams()
    last = next(messages)
    assert (last["id"], last["result"]["resultType"]) == ("l", "complete")
    assert last["result"]["_meta"][SUBSCRIPTION] == "l"
    assert next(messages, None) is None
    answer.close()


# --- the owner goes ------------------------------------------------------------------------------


def test_another_replica_takes_over_when_the_owner_has_gone(fleeting_pair: Pair) -> None:
    first, second = fleeting_pair.clients()
    pid = first.pid()
    fleeting_pair.several[0].app.close()
    assert second.pid() != pid
    eventually(lambda: [it.children for it in fleeting_pair.several.each] == [0, 1])


def test_what_was_in_flight_when_the_owner_went_has_an_answer(fleeting_pair: Pair) -> None:
    _, second = fleeting_pair.clients()
    with ThreadPoolExecutor(1) as pool:
        params = called("slow", label="lost")
        call = pool.submit(lambda: second.call("tools/call", params, "mine").message())
        fleeting_pair.trace.wait("started", end=" lost")
        fleeting_pair.several[0].app.close()
        message = call.result(20)
    assert (message["id"], message["error"]["code"]) == ("mine", -32000)
    assert second.pid()


def test_a_replica_that_leaves_hands_its_homes_over(pair: Pair) -> None:
    first, second = pair.clients()
    pid = first.pid()
    pair.several[0].app.hand_over()
    eventually(lambda: pair.several[0].children == 0)
    assert second.pid() != pid
    assert pair.several[1].children == 1


# --- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked_at", "answered_at"), [(0, 1), (1, 0), (1, 1)])
def test_a_retry_may_come_anywhere(pair: Pair, asked_at: int, answered_at: int) -> None:
    """T89."""
    clients = pair.clients(capabilities=ASKABLE)
    asked = clients[asked_at].asked("ask")
    answer = clients[answered_at].tool("ask", retry=answering(asked))
    answers = answer.message()["result"]["structuredContent"]["answers"]
    assert answers["form"]["content"] == {"answer": "ten"}


def test_progress_after_a_retry_elsewhere_has_the_token_and_the_id_of_the_retry(pair: Pair) -> None:
    """T89."""
    first, second = pair.clients(capabilities=ASKABLE)
    asked = asked_in(first.call("tools/call", called("chain", rounds=1), "one", token="t1"))
    retry = {**called("chain", rounds=1), **answering(asked)}
    *progress, last = second.call("tools/call", retry, "two", token="t2").messages()
    assert [note["params"]["progressToken"] for note in progress] == ["t2"]
    assert (last["id"], last["result"]["resultType"]) == ("two", "complete")


def test_a_chain_goes_from_replica_to_replica(pair: Pair) -> None:
    clients = pair.clients(capabilities=ASKABLE)
    answer = clients[0].tool("chain", rounds=4)
    for number in range(4):
        asked = asked_in(answer)
        answer = clients[number % 2].tool("chain", rounds=4, retry=answering(asked))
    assert len(answer.message()["result"]["structuredContent"]["answers"]) == 4


def test_a_retry_after_the_owner_has_gone_is_refused(fleeting_pair: Pair) -> None:
    clients = fleeting_pair.clients(capabilities=ASKABLE)
    asked = clients[0].asked("ask")
    fleeting_pair.several[0].app.close()
    answer = clients[1].tool("ask", retry=answering(asked))
    assert answer.status == 200
    error = answer.error()
    assert (error["code"], error["data"]) == (-32602, {"reason": "invalid_request_state"})
    again = clients[1].asked("ask")
    assert clients[1].tool("ask", retry=answering(again)).message()["result"]


def test_a_stranger_at_another_replica_cannot_answer(pair: Pair) -> None:
    first, second = pair.clients(capabilities=ASKABLE)
    asked = first.asked("ask")
    thief = second.known_as("Bearer thief").tool("ask", retry=answering(asked))
    assert thief.error()["code"] == -32602
    assert second.tool("ask", retry=answering(asked)).message()["result"]


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_each_replica_may_have_homes_of_its_own(
    era: str, store: dict[str, Any], tmp_path: Path
) -> None:
    """A question goes back to the server that has asked it, wherever the retry comes."""
    with pair_of(era, tmp_path, stateless_children="per-replica", **store) as pair:
        first, second = pair.clients(capabilities=ASKABLE)
        assert first.pid() != second.pid()
        for one, other in ((first, second), (second, first)):
            retry = answering(asked_in(one.tool("ask", kind="form")))
            told = other.tool("ask", retry=retry, kind="form").message()
            assert told["result"]["resultType"] == "complete", told
