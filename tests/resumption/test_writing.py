"""Streams that are read on, into the log, when their clients have left."""

from __future__ import annotations

import pytest

from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.errors import BackendError, StorageUnavailable
from mcp_proxy.resumption.writing import ReadOnWorker
from mcp_proxy.wire.jsonrpc import Request
from tests.support.waiting import eventually


class Chatterbox:
    """A source that says something as soon as it was read, until its time is over."""

    def __init__(self) -> None:
        self.said = 0
        self.exchange = Exchange([Request(1, "talk")], timeout=0.1)
        self.exchange.attach(self, on_read=self.say)
        self.say()

    def say(self) -> None:
        self.said += 1
        self.exchange.offer(ServerMessage(b"{}", is_response=False))

    def stream_begun(self, exchange: Exchange) -> None: ...

    def leave(self, exchange: Exchange) -> None: ...

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        exchange.offer(ServerMessage(b"{}", is_response=True, failure=failure))


def test_deadlines_are_looked_at_while_somebody_talks_all_the_time() -> None:
    worker, talk = ReadOnWorker(), Chatterbox()
    worker.add(talk.exchange)
    try:
        eventually(lambda: talk.exchange.is_over)
        eventually(lambda: "<ReadOnWorker 0>" in repr(worker))
        assert talk.said > 1
    finally:
        worker.stop(5)


def test_a_stream_that_cannot_be_read_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    def fail(message: ServerMessage) -> None:
        raise StorageUnavailable

    worker, talk = ReadOnWorker(), Chatterbox()
    talk.exchange.on_response = fail
    worker.add(talk.exchange)
    try:
        eventually(lambda: "reading a stream on failed" in caplog.text)
        eventually(lambda: "<ReadOnWorker 0>" in repr(worker))
    finally:
        worker.stop(5)


def test_a_call_that_nobody_answers_is_given_up_although_others_were_read_before() -> None:
    worker = ReadOnWorker()
    try:
        for _ in range(2):
            silent = Exchange([Request(1, "silence")], timeout=0.1)
            silent.attach(Answering())
            silent.begin_stream()
            worker.add(silent)
            eventually(lambda silent=silent: silent.is_over)  # type: ignore[misc]
    finally:
        worker.stop(5)


class Answering:
    """A source that says nothing until time is over."""

    def stream_begun(self, exchange: Exchange) -> None: ...

    def leave(self, exchange: Exchange) -> None: ...

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        exchange.offer(ServerMessage(b"{}", is_response=True, failure=failure))
