"""Standing streams that broke off and are resumed, on the owner and on other replicas."""

from __future__ import annotations

from itertools import islice

import pytest

from mcp_proxy.wire.sse import Event
from tests.support.front import Answer, McpClient
from tests.support.proxies import Replicas
from tests.support.waiting import eventually
from tests.transports.calls import hold, pid_of, release, said, say

LATEST = "2025-11-25"
A_DAY = 24 * 3600 * 1000

PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def resume(client: McpClient, after: Event) -> Answer:
    assert after.id is not None
    return client.listen(Last_Event_ID=after.id.decode())


def read(answer: Answer, count: int) -> list[Event]:
    """So many messages of a stream, whose opening is passed over."""
    return list(islice((event for event in answer.events() if event.data), count))


def unwatched(several: Replicas) -> None:
    """Waits until the owner knows that nobody listens."""
    (bridge,) = several[0].app.owner.backends
    eventually(lambda: not bridge.is_watched)


@pytest.mark.parametrize("version", ["2025-06-18", LATEST])
@pytest.mark.parametrize(("begun", "resumed"), PAIRS)
def test_a_standing_stream_goes_on_with_what_came_meanwhile(
    three: Replicas, version: str, begun: int, resumed: int
) -> None:
    clients = three.opened(version)
    stream = clients[begun].listen()
    say(clients[0], 0)
    (last,) = read(stream, 1)
    stream.close()
    unwatched(three)
    for number in (1, 2, 3):
        say(clients[2], number)
    again = resume(clients[resumed], last)
    events = again.events()
    missed = list(islice(events, 3))
    for number in (4, 5):
        say(clients[begun], number)
    found = [*missed, *islice(events, 2)]
    assert [said(event) for event in found] == [1, 2, 3, 4, 5]
    assert len({event.id for event in (last, *found)}) == 6
    again.close()


@pytest.mark.parametrize(("begun", "resumed"), PAIRS)
def test_what_was_sent_and_not_received_comes_again(
    three: Replicas, begun: int, resumed: int
) -> None:
    clients = three.opened(LATEST)
    stream = clients[begun].listen()
    for number in range(4):
        say(clients[0], number)
    sent = read(stream, 4)  # of which the client, say, got the first
    stream.close()
    unwatched(three)
    say(clients[0], 4)
    again = resume(clients[resumed], sent[0])
    events = list(islice(again.events(), 4))
    assert [said(event) for event in events] == [1, 2, 3, 4]
    assert [event.id for event in events[:3]] == [event.id for event in sent[1:]]
    again.close()


def test_a_stream_is_resumed_before_its_loss_was_noticed(three: Replicas) -> None:
    owner, other, third = three.opened(LATEST)
    stream = other.listen()
    say(owner, 0)
    (last,) = read(stream, 1)
    for number in (1, 2):
        say(owner, number)
    again = resume(third, last)
    events = again.events()
    say(owner, 3)
    late = [said(event) for event in stream.events() if event.data]  # ends: it was replaced
    numbers = []
    while 3 not in numbers:
        numbers.append(said(next(events)))
    assert numbers == sorted(numbers)  # nothing twice
    assert sorted({*late, *numbers}) == [1, 2, 3]
    again.close()


def test_a_stream_is_resumed_again_and_again(three: Replicas) -> None:
    clients = three.opened(LATEST)
    answer = clients[1].listen()
    (last,) = islice(answer.events(), 1)  # its opening
    for number in range(6):
        answer.close()
        unwatched(three)
        say(clients[0], number)
        answer = resume(clients[number % 3], last)
        (last,) = read(answer, 1)
        assert said(last) == number
    answer.close()


def test_events_of_calls_are_not_part_of_it(three: Replicas) -> None:
    owner, other, third = three.opened(LATEST)
    stream = other.listen()
    say(owner, 0)
    (last,) = read(stream, 1)
    stream.close()
    unwatched(three)
    call = hold(owner, "h", before=5)
    release(third, "h")
    assert len(call.messages()) == 6
    say(owner, 1)
    again = resume(third, last)
    say(owner, 2)
    assert [said(event) for event in read(again, 2)] == [1, 2]
    again.close()


@pytest.mark.parametrize(("newer_at", "resumed"), [(0, 1), (1, 0), (1, 2), (1, 1)])
def test_resuming_an_older_stream_does_not_end_a_newer_one(
    three: Replicas, newer_at: int, resumed: int
) -> None:
    clients = three.opened(LATEST)
    older = clients[1].listen()
    for number in range(3):
        say(clients[0], number)
    sent = read(older, 3)
    newer = clients[newer_at].listen()
    assert [event.retry for event in older.events()] == [A_DAY]
    again = resume(clients[resumed], sent[0])
    *missed, last = again.events()  # ends by itself
    assert [said(event) for event in missed] == [1, 2]
    assert last.retry == A_DAY
    say(clients[0], 3)
    assert [said(event) for event in read(newer, 1)] == [3]
    newer.close()


def test_an_older_stream_is_resumed_once_the_newer_is_gone(three: Replicas) -> None:
    owner, other, third = three.opened(LATEST)
    older = other.listen()
    say(owner, 0)
    (last,) = read(older, 1)
    newer = third.listen()
    say(owner, 1)
    read(newer, 1)
    newer.close()
    unwatched(three)
    again = resume(other, last)
    say(owner, 2)
    assert [said(event) for event in read(again, 1)] == [2]  # not what the newer one had got
    again.close()


@pytest.mark.parametrize("resumed", range(3))
def test_a_stream_goes_on_with_the_server_that_came_after_a_crash(
    three: Replicas, resumed: int
) -> None:
    clients = three.opened(LATEST)
    stream = clients[1].listen()
    for number in range(2):
        say(clients[0], number)
    sent = read(stream, 2)
    clients[0].call("die").body()
    assert list(stream.events()) == []
    again = resume(clients[resumed], sent[0])
    events = again.events()
    assert said(next(events)) == 1
    say(clients[2], 2)
    assert said(next(events)) == 2
    again.close()


def test_a_stream_goes_on_when_the_owner_has_gone(three: Replicas) -> None:
    owner, other, third = three.opened(LATEST)
    stream = other.listen()
    for number in range(2):
        say(owner, number)
    sent = read(stream, 2)
    before = pid_of(owner)
    three[0].app.close(timeout=8)
    assert list(stream.events()) == []
    again = resume(third, sent[0])
    events = again.events()
    assert said(next(events)) == 1
    assert pid_of(other) != before
    say(other, 2)
    assert said(next(events)) == 2
    again.close()
