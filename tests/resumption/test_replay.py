"""Streams of calls that broke off and are resumed, on the owner and on other replicas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.resumption.replay import Replay
from mcp_proxy.storage.event_log import LocalEventLog
from mcp_proxy.wire.sse import Event
from tests.support.front import Answer, McpClient
from tests.support.proxies import Replicas, replicas
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually
from tests.transports.calls import hold, judging, methods, pid_of, release, say, seen

LATEST = "2025-11-25"

# Where a stream begins and where it is resumed; the first replica is the owner.
PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def parsed(event: Event) -> Any:
    return json.loads(event.data or b"null")


def progress_of(event: Event) -> int | None:
    """How far a call is, None for its answer."""
    told: int | None = parsed(event).get("params", {}).get("progress")
    return told


def resume(client: McpClient, after: Event) -> Answer:
    """The stream of an event, from there on."""
    assert after.id is not None
    return client.listen(Last_Event_ID=after.id.decode())


def messages_in(events: Iterator[Event]) -> list[Event]:
    return [event for event in events if event.data]


def left_after(answer: Answer, count: int) -> list[Event]:
    """The first events of a stream; then its client is gone."""
    events = list(islice(answer.events(), count))
    answer.close()
    return events


# --- what a stream looks like --------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
def test_a_stream_begins_with_an_event_to_resume_from(three: Replicas, at: int) -> None:
    client = three.opened(LATEST)[at]
    for answer in (hold(client, "h"), client.listen()):
        (first,) = left_after(answer, 1)
        assert first.id
        assert first == Event(id=first.id, retry=1000, data=b"")
    release(client, "h")


@pytest.mark.parametrize("at", [0, 1])
def test_a_call_that_is_merely_slow_has_one_too(three: Replicas, at: int) -> None:
    client = three.opened(LATEST)[at]
    for accept in ("application/json, text/event-stream", "text/event-stream"):
        answer = client.call("sleep", {"seconds": 0.5}, Accept=accept)
        first, last = answer.events()
        assert (first.data, first.retry) == (b"", 1000)
        assert parsed(last)["result"]["slept"] == 0.5
        assert len({first.id, last.id, None}) == 3


@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18"])
@pytest.mark.parametrize("at", [0, 1])
def test_older_clients_get_no_event_without_data(three: Replicas, version: str, at: int) -> None:
    client = three.opened(version)[at]
    call = hold(client, "h", after=1)
    release(client, "h")
    stream = client.listen()
    say(client, 1)
    for event in (*call.events(), next(stream.events())):
        assert event.data
        assert event.retry is None
    stream.close()


@pytest.mark.parametrize("version", ["2025-06-18", LATEST])
def test_every_event_has_an_id_that_is_unique_in_the_session(three: Replicas, version: str) -> None:
    clients = three.opened(version)
    standing = clients[1].listen()
    calls = [hold(client, f"h{n}", before=3, after=2) for n, client in enumerate(clients)]
    for number in range(3):
        say(clients[2], number)
        release(clients[0], f"h{number}")
    is_primed = int(version == LATEST)
    events = [event for call in calls for event in call.events()]
    assert len(events) == 3 * (is_primed + 3 + 2 + 1)
    events += islice(standing.events(), is_primed + 3)
    standing.close()
    ids = {event.id for event in events}
    assert None not in ids
    assert len(ids) == len(events)


def test_answers_in_json_are_not_logged(redis_server: RedisServer, redis_prefix: str) -> None:
    with replicas(2, redis_url=redis_server.url, redis_prefix=redis_prefix) as several:
        clients = several.opened(LATEST)
        for client in clients:
            for _ in range(3):
                assert not client.call("echo", {"a": 1}).is_stream
            assert client.call("echo", Accept="application/json").status == 200
            client.notify("notifications/x")
        with redis_server.client() as redis:
            assert redis.keys(f"{redis_prefix}*events:*") == []
            clients[1].call("notify").messages()
            assert len(redis.keys(f"{redis_prefix}*events:*")) == 1
            assert clients[1].delete().status == 204
            assert redis.keys(f"{redis_prefix}*events:*") == []


# --- the stream of a call ------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2025-06-18", LATEST])
@pytest.mark.parametrize(("begun", "resumed"), PAIRS)
def test_a_call_is_resumed_while_it_runs(
    three: Replicas, version: str, begun: int, resumed: int
) -> None:
    clients = three.opened(version)
    other = hold(clients[resumed], "other", before=4, after=4)  # whose events are not ours
    got = left_after(hold(clients[begun], "h", "mine", before=5, after=3), 3)
    resumption = resume(clients[resumed], got[-1])
    assert resumption.is_stream
    events = resumption.events()
    missing = 5 - (progress_of(got[-1]) or 0) - 1
    more = list(islice(events, missing))
    release(clients[begun], "other")
    other.messages()
    release(clients[begun], "h")
    rest = messages_in(events)  # ends by itself
    found = [event for event in (*got, *more, *rest) if event.data]
    assert [progress_of(event) for event in found] == [*range(8), None]
    answer = parsed(found[-1])
    assert (answer["id"], answer["result"]["held"]) == ("mine", "h")
    assert len({event.id for event in found}) == len(found)
    assert "notifications/cancelled" not in methods(clients[0])


@pytest.mark.parametrize(("begun", "resumed"), PAIRS)
def test_a_call_is_resumed_after_it_has_ended(three: Replicas, begun: int, resumed: int) -> None:
    clients = three.opened(LATEST)
    opening, first = left_after(hold(clients[begun], "h", before=3, after=2), 2)
    release(clients[begun], "h")
    for _ in range(2):  # as often as the client needs
        events = messages_in(resume(clients[resumed], opening).events())
        assert [progress_of(event) for event in events] == [0, 1, 2, 3, 4, None]
        again = messages_in(resume(clients[resumed], first).events())
        assert again == events[1:]
    assert messages_in(resume(clients[resumed], again[-1]).events()) == []


def test_every_place_in_a_stream_can_be_resumed_from(three: Replicas) -> None:
    _, other, third = three.opened(LATEST)
    call = hold(other, "h", before=6)
    release(other, "h")
    events = list(call.events())
    for number, event in enumerate(events):
        assert messages_in(resume(third, event).events()) == events[number + 1 :]


def test_many_events_are_resumed_in_order(three: Replicas) -> None:
    _, other, third = three.opened(LATEST)
    opening, *_ = left_after(hold(other, "h", before=400, after=400), 20)
    release(other, "h")
    events = messages_in(resume(third, opening).events())
    assert [progress_of(event) for event in events] == [*range(800), None]


def test_a_batch_is_resumed(three: Replicas) -> None:
    _, other, third = three.opened("2025-03-26")
    calls = [
        {"jsonrpc": "2.0", "id": name, "method": "hold", "params": {**params, "name": name}}
        for name in ("a", "b")
        for params in [{"_meta": {"progressToken": name}}]
    ]
    (first,) = left_after(other.post(calls), 1)
    for name in ("a", "b"):
        release(other, name)
    rest = [parsed(event) for event in messages_in(resume(third, first).events())]
    assert {message["id"] for message in rest if "id" in message} == {"a", "b"}
    assert len(rest) == 3


def test_a_question_of_the_server_is_answered_after_a_resumption(three: Replicas) -> None:
    _, other, third = three.opened(LATEST)
    (opening,) = left_after(other.call("ask", {"method": "roots/list", "id": "q"}), 1)
    events = resume(third, opening).events()
    assert parsed(next(events))["method"] == "roots/list"
    other.post({"jsonrpc": "2.0", "id": "q", "result": {"roots": []}})
    assert parsed(next(events))["result"]["result"] == {"roots": []}


def test_resuming_a_call_leaves_the_standing_stream_alone(three: Replicas) -> None:
    owner, other, third = three.opened(LATEST)
    standing = owner.listen().events()
    next(standing)
    (opening,) = left_after(hold(other, "h"), 1)
    resumption = resume(third, opening)
    release(other, "h")
    assert len(messages_in(resumption.events())) == 2
    say(other, 1)
    assert parsed(next(standing))["params"]["n"] == 1


# --- the owner is gone ---------------------------------------------------------------------------


def unanswered(events: Iterator[Event]) -> list[Any]:
    *_, answer = messages_in(events)
    assert parsed(answer)["error"]["code"] == -32000
    return [parsed(answer)["id"]]


def test_after_the_owner_closed_what_is_left_is_an_error(fleeting: Replicas) -> None:
    _, other, third = fleeting.opened(LATEST)
    opening, *_ = left_after(hold(other, "h", 7, before=3), 1)
    judging(fleeting)
    fleeting[0].app.close()
    events = messages_in(resume(third, opening).events())
    assert [progress_of(event) for event in events] == [0, 1, 2, None]
    assert unanswered(iter(events)) == [7]


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_after_the_owner_was_cut_off_what_is_left_is_an_error(
    fleeting: Replicas, is_taken_over: bool
) -> None:
    _, other, third = fleeting.opened(LATEST)
    opening, *_ = left_after(hold(other, "h", "1", before=3), 4)
    judging(fleeting)
    resumption = resume(third, opening).events()
    assert [progress_of(next(resumption)) for _ in range(3)] == [0, 1, 2]
    fleeting[0].line.cut()
    if is_taken_over:
        eventually(lambda: not fleeting.mailboxes[-1].is_open(fleeting[0].app.owner.replica.id))
        pid_of(other)
    assert unanswered(resumption) == ["1"]
    assert unanswered(resume(other, opening).events()) == ["1"]


def test_of_a_batch_only_what_is_unanswered_is_an_error(fleeting: Replicas) -> None:
    _, other, third = fleeting.opened("2025-03-26")
    meta = {"progressToken": "t"}
    calls = [
        {"jsonrpc": "2.0", "id": 1, "method": "hold", "params": {"name": "h", "_meta": meta}},
        {"jsonrpc": "2.0", "id": "1", "method": "hold", "params": {"name": "k", "_meta": meta}},
        {"jsonrpc": "2.0", "id": 2, "method": "silence"},
    ]
    first, *_ = left_after(other.post(calls), 2)
    release(other, "k")
    judging(fleeting)
    events = resume(third, first).events()
    found = [parsed(next(events)) for _ in range(2)]
    assert [message.get("id") for message in found] == [None, "1"]
    fleeting[0].line.cut()
    rest = [parsed(event) for event in messages_in(events)]
    assert {message["id"] for message in rest} == {1, 2}
    assert all("error" in message for message in rest)


def test_after_a_crash_the_error_says_how_the_server_ended(three: Replicas) -> None:
    _, other, third = three.opened(LATEST)
    opening, *_ = left_after(hold(other, "h", 7), 1)
    other.call("die", {"code": 3}).body()
    *_, answer = messages_in(resume(third, opening).events())
    assert parsed(answer)["id"] == 7
    assert "exit code 3" in parsed(answer)["error"]["message"]


# --- what cannot be resumed ----------------------------------------------------------------------

RUBBISH = [
    *("*", "$", "0-0", "-", "+", ">", "(1-1", "x", "-1", "1-", "1.5", "0", "00", "1 2"),
    *("999999999-0", "99999999999999999999-1", "18446744073709551615-18446744073709551615"),
    *("x" * 5000, "9" * 5000, f"{'9' * 2000}-{'9' * 2000}", "../../x", '"; DROP', "\u00fc"),
]


@pytest.mark.parametrize("at", [0, 1])
def test_rubbish_is_a_400_and_nothing_leaks(three: Replicas, at: int) -> None:
    client = three.opened(LATEST)[at]
    left_after(hold(client, "h", secret="s3cret"), 2)
    release(client, "h")
    for rubbish in RUBBISH:
        answer = client.listen(Last_Event_ID=rubbish)
        assert answer.status == 400, rubbish[:40]
        body = answer.body()
        assert json.loads(body)["error"]["code"] == -32600
        assert b"held" not in body
    assert seen(client)


def test_the_event_of_another_session_is_a_400(three: Replicas) -> None:
    victim, thief = three.opened(LATEST)[1], three.opened(LATEST)[2]
    left_after(hold(thief, "t"), 1)
    for stream in (hold(victim, "h"), victim.listen()):
        (opening,) = left_after(stream, 1)
        answer = resume(thief, opening)
        assert answer.status == 400
        assert answer.error()["code"] == -32600


def test_an_ended_session_cannot_be_resumed(three: Replicas) -> None:
    clients = three.opened(LATEST)
    (opening,) = left_after(hold(clients[1], "h"), 1)
    assert clients[2].delete().status == 204
    assert [resume(client, opening).status for client in clients] == [404] * 3


def test_an_answer_too_large_to_keep_is_an_error_on_resumption(three: Replicas) -> None:
    _, other, third = three.opened(LATEST)
    size = 1_100_000
    (opening,) = left_after(hold(other, "h", 5, size=size), 1)
    whole = hold(other, "k", size=size)
    for name in ("h", "k"):
        release(other, name)
    assert len(whole.message()["result"]["text"]) == size
    told, answer = messages_in(resume(third, opening).events())
    assert progress_of(told) == 0
    assert parsed(answer)["id"] == 5
    assert "too large" in parsed(answer)["error"]["message"]


def test_a_stream_goes_on_without_ids_while_the_log_is_away(
    own_redis: Callable[..., RedisServer],
) -> None:
    redis = own_redis()
    with replicas(2, redis_url=redis.url, sse_after=0.3) as several:
        owner, _ = several.opened(LATEST)
        events = owner.call("notify", {"count": 8, "pause": 0.25}).events()
        assert next(events).id
        assert next(events).id
        redis.stop()
        rest = list(events)
        assert rest[-1].id is None
        found = [parsed(event) for event in rest]
        assert [message["params"]["number"] for message in found[:-1]] == list(range(1, 8))
        assert found[-1]["result"] == {}
        redis.start()
        assert owner.result("count")["calls"] == 1


# --- what ends a resumed stream ------------------------------------------------------------------


def left_stream(timeout: float, is_draining: bool = False) -> Exchange:
    """A call that nobody answers, resumed after its opening."""
    log = LocalEventLog()
    event = log.find("s", log.append("s", "child/1", b"[7]", False))
    assert event is not None
    return Replay(log, "s", event, lambda: False, timeout, lambda: is_draining).exchange


def test_without_an_answer_a_resumed_stream_ends_in_its_time() -> None:
    stream = left_stream(0.2)
    delivery = eventually(lambda: stream.receive(0.1))
    answer = json.loads(delivery.data)
    assert answer["id"] == 7
    assert answer["error"]["message"] == "The server did not answer within 0.2 seconds"
    assert stream.receive(5) is None
    assert stream.is_over


def test_a_resumed_stream_ends_when_its_replica_stops() -> None:
    stream = left_stream(60, is_draining=True)
    assert stream.receive(5) is None
    assert stream.is_over


def test_a_message_that_was_too_large_to_keep_is_no_beginning() -> None:
    log = LocalEventLog()
    event = log.find("s", log.append("s", "child/1", b"[7]", False))
    assert event is not None
    log.append("s", "child/1", b"", False)
    replay = Replay(log, "s", event, lambda: True, 60, lambda: False)
    message = replay.exchange.receive(5)
    assert message is not None
    assert json.loads(message.data)["id"] == 7
