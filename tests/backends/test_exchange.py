"""The exchange: one answer on its way from whoever has it to whoever reads it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from mcp_proxy.backends.exchange import MAX_BACKLOG, Exchange, ServerMessage
from mcp_proxy.errors import BackendError, BackendLost, BackendUnreached, InvalidRequest
from mcp_proxy.wire.jsonrpc import Request

PING = [Request(1, "ping")]
ANSWER = ServerMessage(b"{}", is_response=True)
NOTE = ServerMessage(b"note", is_response=False)


class Source:
    """A source that remembers what it was told, and answers by a failure when time is over."""

    def __init__(self) -> None:
        self.failures: list[BackendError] = []
        self.begun = 0
        self.left = 0

    def stream_begun(self, exchange: Exchange) -> None:
        self.begun += 1

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        self.failures.append(failure)
        exchange.offer(ServerMessage(b"{}", is_response=True, failure=failure))

    def leave(self, exchange: Exchange) -> None:
        self.left += 1


class Log:
    """A log that numbers what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, bool]] = []
        self.appends = 0
        self.read: list[Exchange] = []

    def begin(self, exchange: Exchange) -> str | None:
        return self._note("begin", False)

    def append(
        self, exchange: Exchange, messages: Sequence[ServerMessage], is_last: bool
    ) -> Sequence[str | None]:
        self.appends += 1
        last = len(messages) - 1
        return [
            self._note(message.data.decode(), is_last and number == last)
            for number, message in enumerate(messages)
        ]

    def _note(self, what: str, is_last: bool) -> str:
        self.logged.append((what, is_last))
        return f"e{len(self.logged)}"

    def missed(self, exchange: Exchange, after: str) -> list[ServerMessage]:
        return [ServerMessage(b"late", False, event_id=f"{after}+")]

    def continue_standing(self, exchange: Exchange, after: str | None, is_taken: bool) -> bool:
        return True

    def read_on(self, exchange: Exchange) -> None:
        self.read.append(exchange)


def attached(*requests: Request, log: Log | None = None) -> tuple[Exchange, Source]:
    """An exchange with its source."""
    exchange, source = Exchange(requests), Source()
    exchange.attach(source, log)
    return exchange, source


def test_a_deadline_that_moves_is_noticed_by_a_waiting_receiver() -> None:
    exchange, source = attached(*PING)
    exchange.set_deadline(time.monotonic() + 60, BackendError)
    exchange.set_deadline(time.monotonic() + 0.05, lambda: BackendError("soon"))
    message = exchange.receive(30)
    assert message is not None
    assert str(message.failure) == "soon"
    exchange.expire_if_due()
    assert len(source.failures) == 1


def test_without_words_of_its_own_a_deadline_says_that_there_was_no_answer() -> None:
    exchange, source = Exchange(PING, timeout=0.02), Source()
    exchange.attach(source)
    message = exchange.receive(30)
    assert message is not None
    assert str(message.failure) == "The server did not answer within 0.02 seconds"


def test_a_source_that_keeps_time_itself_gets_some_grace() -> None:
    exchange = Exchange(PING, timeout=0.01)
    exchange.attach(Source(), grace=60)
    assert exchange.receive(0.05) is None
    assert not exchange.is_due


def test_drain_returns_messages_and_no_sentinels() -> None:
    exchange, _ = attached()
    exchange.offer(NOTE)
    exchange.set_deadline(time.monotonic() + 60)
    exchange.end()
    assert exchange.drain() == [NOTE]


def test_it_is_over_when_every_request_was_answered() -> None:
    exchange, source = attached(Request(1, "a"), Request(2, "b"))
    for message in (ANSWER, NOTE, ANSWER):
        exchange.offer(message)
    assert [exchange.receive(1) for _ in range(3)] == [ANSWER, NOTE, ANSWER]
    assert exchange.is_over
    assert exchange.is_stream
    assert exchange.receive(0) is None
    exchange.close()
    assert source.left == 0


def test_a_standing_stream_ends_when_it_is_ended() -> None:
    exchange, _ = attached()
    exchange.offer(ANSWER)
    exchange.end(replaced=True)
    assert exchange.poll() == ANSWER
    assert exchange.poll() is None
    assert (exchange.is_over, exchange.was_replaced) == (True, True)


def test_the_source_is_told_once_that_a_stream_begins_and_that_its_client_left() -> None:
    exchange, source = attached(*PING)
    closed: list[bool] = []
    exchange.on_close = lambda: closed.append(True)
    for act in (exchange.begin_stream, exchange.begin_stream, exchange.close, exchange.close):
        act()
    assert (source.begun, source.left, closed) == (1, 1, [True])


def test_what_the_hook_raises_the_receiver_gets() -> None:
    def refuse(message: ServerMessage) -> None:
        raise BackendLost(message.data.decode())

    exchange, _ = attached(*PING)
    exchange.on_response = refuse
    exchange.offer(ANSWER)
    with pytest.raises(BackendLost, match=r"\{\}"):
        exchange.receive(1)
    assert exchange.receive(1) is None
    assert exchange.is_over


def test_what_was_not_reached_is_sent_again_once() -> None:
    exchange, _ = attached(*PING)
    second = Source()

    def resend(same: Exchange) -> None:
        same.attach(second)
        same.offer(ANSWER)

    exchange.resend = resend
    exchange.begin_stream()
    exchange.refuse(BackendUnreached("gone"))
    assert exchange.receive(1) == ANSWER
    assert second.begun == 1


@pytest.mark.parametrize("kind", [BackendUnreached, BackendLost])
def test_what_must_not_be_sent_again_is_raised(kind: type[BackendError]) -> None:
    exchange, _ = attached(*PING)
    exchange.resend = (lambda same: None) if kind is BackendLost else None
    exchange.refuse(kind("gone"))
    with pytest.raises(kind, match="gone"):
        exchange.receive(1)


def test_an_answer_that_is_no_stream_is_not_logged() -> None:
    log = Log()
    exchange, _ = attached(*PING, log=log)
    exchange.offer(ANSWER)
    assert exchange.receive(1) == ANSWER
    assert log.logged == []


def test_a_stream_is_logged_from_its_beginning() -> None:
    log = Log()
    exchange, _ = attached(*PING, log=log)
    exchange.offer(NOTE)
    exchange.offer(ANSWER)
    found = [exchange.poll() for _ in range(3)]
    assert [message.event_id for message in found if message] == ["e1", "e2", "e3"]
    assert log.logged == [("begin", False), ("note", False), ("{}", True)]


def test_a_stream_that_begins_before_anything_comes_says_so() -> None:
    log = Log()
    exchange, _ = attached(*PING, log=log)
    exchange.begin_stream()
    assert exchange.receive(1) == ServerMessage(b"", False, event_id="e1")


def test_a_stream_whose_client_left_is_read_on_and_not_left() -> None:
    log = Log()
    exchange, source = attached(*PING, log=log)
    exchange.begin_stream()
    exchange.close()
    assert (log.read, source.left, exchange.is_closed) == ([exchange], 0, False)


def test_a_stream_that_goes_on_brings_what_was_missed_and_what_was_logged_since() -> None:
    log = Log()
    exchange, _ = attached(log=log)
    missed = ServerMessage(b"missed", False, event_id="e8")
    exchange.continue_after("e7", [missed])
    assert exchange.receive(1) == missed
    exchange.offer(NOTE)
    found = [exchange.receive(1) for _ in range(2)]
    assert [message.data for message in found if message] == [b"late", b"note"]


def test_a_source_without_a_thread_is_asked_for_more() -> None:
    exchange, asked = Exchange(), []

    def more(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            exchange.offer(NOTE)

    exchange.attach(Source(), read_more=more)
    assert exchange.receive(5) == NOTE
    assert len(asked) == 3


def test_who_serves_many_is_called_when_something_happens() -> None:
    exchange, _ = attached()
    calls: list[int] = []
    exchange.set_on_ready(lambda: calls.append(1))
    exchange.offer(NOTE)
    exchange.wake()
    exchange.end()
    assert len(calls) == 3


def test_who_comes_late_is_called_for_what_has_happened() -> None:
    exchange, _ = attached(*PING)
    calls: list[int] = []
    exchange.set_on_ready(lambda: calls.append(1))
    assert calls == []
    exchange.offer(ANSWER)
    exchange.set_on_ready(lambda: calls.append(2))
    assert calls == [1, 2]


def test_repr_is_a_state_dump() -> None:
    exchange, _ = attached(*PING)
    exchange.offer(ANSWER)
    assert "['ping'] unanswered=1 backlog=2" in repr(exchange)
    assert "standing" in repr(Exchange())


def test_what_a_modern_client_does_not_read_is_left_out_and_nobody_waits_for_it() -> None:
    """Its server has other clients."""
    exchange = Exchange([Request(1, "x")], timeout=60.0, cancels=True)
    line = ServerMessage(b"x" * MAX_BACKLOG, is_response=False)
    assert exchange.offer(line)
    assert exchange.offer(line)
    exchange.wait_for_room()
    assert not exchange.offer(line)
    assert exchange.offer(ServerMessage(b"{}", is_response=True))
    received = [exchange.receive(1.0) for _ in range(3)]
    assert [None if one is None else one.is_response for one in received] == [False, False, True]


# --- requests that are sent late -----------------------------------------------------------------


def test_a_source_learns_that_its_client_left_before_it_was_there() -> None:
    exchange, source = Exchange(PING), Source()
    exchange.begin_stream()
    exchange.close()
    exchange.attach(source)
    assert (source.begun, source.left) == (1, 0)
    exchange.note_sent()
    assert source.left == 1


def test_a_source_whose_client_is_there_is_told_nothing() -> None:
    exchange, source = attached(*PING)
    exchange.note_sent()
    assert source.left == 0


def test_whoever_cannot_send_refuses_by_any_error() -> None:
    exchange = Exchange(PING)
    exchange.refuse(InvalidRequest("not so"))
    with pytest.raises(InvalidRequest, match="not so"):
        exchange.receive(1)
    assert exchange.drain() == []


def test_what_has_come_of_a_stream_is_logged_in_one_go() -> None:
    log = Log()
    exchange, _ = attached(*PING, log=log)
    for number in range(5):
        exchange.offer(ServerMessage(b"%d" % number, is_response=False))
    exchange.offer(ServerMessage(b"answer", is_response=True))
    messages = []
    while (message := exchange.poll()) is not None:
        messages.append(message)
    assert [message.data for message in messages] == [b"", *b"0 1 2 3 4 answer".split()]
    assert [message.event_id for message in messages] == [f"e{n}" for n in range(1, 8)]
    assert log.logged[-2:] == [("4", False), ("answer", True)]
    assert log.appends == 1
    assert exchange.is_over


def test_of_a_standing_stream_no_more_is_logged_than_is_received() -> None:
    """What nobody has received goes to the stream that follows."""
    log = Log()
    exchange, _ = attached(log=log)
    for number in range(3):
        exchange.offer(ServerMessage(b"%d" % number, is_response=False))
    begin, first = exchange.poll(), exchange.poll()
    assert (begin, first) == (
        ServerMessage(b"", False, event_id="e1"),
        ServerMessage(b"0", False, event_id="e2"),
    )
    assert [message.data for message in exchange.drain()] == [b"1", b"2"]


def test_what_was_taken_before_a_response_was_refused_is_logged_and_received() -> None:
    def refuse(message: ServerMessage) -> None:
        raise BackendError("refused")

    log = Log()
    exchange, _ = attached(*PING, log=log)
    exchange.on_response = refuse
    exchange.offer(ServerMessage(b"1", is_response=False))
    exchange.offer(ServerMessage(b"answer", is_response=True))
    with pytest.raises(BackendError, match="refused"):
        exchange.poll()
    assert exchange.poll() == ServerMessage(b"", False, event_id="e1")
    assert exchange.poll() == ServerMessage(b"1", False, event_id="e2")
    assert exchange.is_over
