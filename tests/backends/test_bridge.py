"""The bridge and its switchboard: who gets which message of one child."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec import Raw

from mcp_proxy.backends import bridge as bridging
from mcp_proxy.backends import exchange as exchanging
from mcp_proxy.backends import switchboard as switching
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.backends.switchboard import Switchboard
from mcp_proxy.errors import (
    BackendError,
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    Cancelled,
    ClientLeft,
)
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from tests.support.exchanges import listening, sent
from tests.support.front import SCRIPTED
from tests.support.waiting import eventually

MakeBridge = Callable[..., Bridge]


@pytest.fixture
def make_bridge() -> Iterator[MakeBridge]:
    """Makes bridges of a scripted server with options."""
    supervisor = Supervisor(Replica())

    def make(*options: str, argv: tuple[str, ...] = SCRIPTED) -> Bridge:
        server = StdioServer("test", (*argv, *options))
        return Bridge(supervisor, server, 1 << 26, lambda lost: None)

    yield make
    supervisor.close()


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> Bridge:
    return make_bridge()


def request(name: str, key: Any = 1, **params: Any) -> Request:
    return Request(key, name, jsonrpc.as_payload(params))


def received(exchange: Any, count: int = 1) -> list[Any]:
    """The next messages, decoded; a deadline that passes fails the test."""
    found = []
    for _ in range(count):
        delivery = exchange.receive(10)
        assert delivery is not None
        found.append(jsonrpc.parse_message(delivery.data))
    return found


def ask(bridge: Bridge, name: str, **params: Any) -> Any:
    (answer,) = received(sent(bridge, [request(name, **params)], False, 10))
    assert isinstance(answer, Response)
    return answer


def note(number: int, **params: Any) -> dict[str, Any]:
    return {"method": "notifications/message", "params": {"n": number, **params}}


def test_what_nobody_can_take_waits_for_the_standing_stream(bridge: Bridge) -> None:
    for number in range(3):
        ask(bridge, "later", message=note(number), seconds=0)
    eventually(lambda: "waiting=3" in repr(bridge))
    stream = listening(bridge)
    assert all(isinstance(m, Notification) for m in received(stream, 3))
    assert "waiting=0" in repr(bridge)


def test_what_waits_is_bounded_and_a_request_that_is_given_up_is_answered(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(switching, "MAX_WAITING", 2)
    question = {"id": "q", "method": "roots/list"}
    for message in (question, note(1), note(2), note(3)):
        ask(bridge, "later", message=message, seconds=0)
    eventually(lambda: "refused a roots/list" in caplog.text)
    eventually(lambda: "dropped a notifications/message" in caplog.text)
    seen = bytes(ask(bridge, "seen").result)
    assert b"No client is listening that could answer" in seen


def test_what_a_departed_client_did_not_take_waits_for_the_next(bridge: Bridge) -> None:
    stream = listening(bridge)
    ask(bridge, "later", message=note(1), seconds=0)
    eventually(lambda: stream.backlog > 0)
    stream.close()
    stream.close()  # harmless
    assert isinstance(received(listening(bridge))[0], Notification)


def test_a_call_goes_on_when_its_client_leaves(bridge: Bridge) -> None:
    exchange = sent(bridge, [request("sleep", seconds=0.2)], True, 10)
    exchange.close()
    assert not bridge.is_watched
    eventually(lambda: "calls=0" in repr(bridge))
    assert ask(bridge, "count").result is not None


def test_a_call_whose_client_left_is_still_given_up_in_time(bridge: Bridge) -> None:
    exchange = sent(bridge, [request("silence")], True, 0.1)
    exchange.close()

    def is_given_up() -> bool:
        bridge.expire_left_calls()
        return "calls=0" in repr(bridge)

    eventually(is_given_up)
    assert b"time limit" in bytes(ask(bridge, "seen").result)


def test_a_slow_client_makes_its_server_wait_and_nothing_is_lost(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "MAX_BACKLOG", 1000)
    exchange = sent(bridge, [request("notify", count=200, params={"x": "y" * 100})], True, 30)
    eventually(lambda: exchange.backlog > 1000)
    assert exchange.backlog < 2000
    assert len(received(exchange, 201)) == 201
    assert exchange.is_over
    assert exchange.receive(0.01) is None


def test_a_slow_client_that_leaves_frees_its_server(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "MAX_BACKLOG", 1000)
    exchange = sent(bridge, [request("notify", count=200, params={"x": "y" * 100})], True, 30)
    eventually(lambda: exchange.backlog > 1000)
    exchange.close()
    assert ask(bridge, "count").result is not None


def test_a_message_of_50_mb_passes_both_ways(bridge: Bridge) -> None:
    size = 50_000_000
    exchange = sent(bridge, [request("big", size=size)], False, 60)
    delivery = exchange.receive(60)
    assert delivery is not None
    assert len(delivery.data) > size
    text = jsonrpc.as_payload({"text": "x" * size})
    (answer,) = received(sent(bridge, [Request(1, "echo", text)], False, 60))
    assert isinstance(answer, Response)
    assert len(bytes(answer.result)) >= size


def test_a_line_over_the_limit_is_logged_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(Replica())
    bridge = Bridge(supervisor, StdioServer("t", SCRIPTED), 40_000, lambda lost: None)
    late = sent(bridge, [request("big", size=100_000)], False, 1)
    assert ask(bridge, "count").result is not None
    delivery = late.receive(5)
    assert delivery is not None
    assert isinstance(delivery.failure, BackendError)
    assert "dropped a line of 100" in caplog.text
    supervisor.close()


def test_an_answer_after_the_time_limit_reaches_nobody(bridge: Bridge) -> None:
    late = sent(bridge, [request("sleep", seconds=0.3)], False, 0.1)
    assert late.receive(5) is not None
    again = sent(bridge, [request("sleep", seconds=0.5, token="second")], False, 5)
    (answer,) = received(again)
    assert b"second" in bytes(answer.result)


def test_a_cancelled_request_of_the_server_follows_its_request(bridge: Bridge) -> None:
    ours = sent(bridge, [request("ask", method="roots/list", id="q")], True, 10)
    received(ours)
    stream = listening(bridge)
    other = sent(bridge, [request("sleep", key=2, seconds=1)], True, 10)
    cancel = {"method": "notifications/cancelled", "params": {"requestId": "q"}}
    ask(bridge, "later", message=cancel, seconds=0)
    (message,) = received(ours)
    assert isinstance(message, Notification)
    assert stream.backlog == other.backlog == 0


@pytest.mark.parametrize("rest", [b"", b',{"jsonrpc":"2.0","method":"c"}' * 300, b',"\xff"'])
def test_what_is_wrong_in_a_batch_of_the_server_fails_its_call_alone(
    bridge: Bridge, rest: bytes
) -> None:
    stream = listening(bridge)
    batch = (
        b'[{"jsonrpc":"2.0","method":"a"},7,{"jsonrpc":"1.0","id":$id,"result":{}},'
        b'[{"jsonrpc":"2.0","method":"nested"}],{"jsonrpc":"2.0","method":"b"}' + rest + b"]\n"
    )
    call = request("raw", bytes=base64.b64encode(batch).decode())
    answered = sent(bridge, [call], False, 600)
    failed = answered.receive(10)
    assert failed is not None
    assert failed.failure is not None
    assert [m.method for m in received(stream, 2)] == ["a", "b"]


def test_a_batch_of_the_server_is_taken_apart(bridge: Bridge) -> None:
    stream = listening(bridge)
    batch = b'[{"jsonrpc":"2.0","method":"a"},{"jsonrpc":"2.0","method":"b"}]\n'
    answered = sent(bridge, [request("raw", bytes=base64.b64encode(batch).decode())], False, 5)
    assert [m.method for m in received(stream, 2)] == ["a", "b"]
    received(answered)


def test_progress_that_nobody_can_take_is_not_kept(bridge: Bridge) -> None:
    params = jsonrpc.as_payload({"_meta": {"progressToken": 1}})
    received(sent(bridge, [Request(1, "progress", params)], False, 5))
    assert "waiting=0" in repr(bridge)


@pytest.mark.parametrize("token", [0, ""])
def test_progress_under_an_empty_token_finds_its_call(bridge: Bridge, token: Any) -> None:
    params = jsonrpc.as_payload({"_meta": {"progressToken": token}, "seconds": 0.1})
    other = sent(
        bridge, [request("sleep", key=2, seconds=0.5, _meta={"progressToken": 9})], True, 5
    )
    mine = sent(bridge, [Request(1, "progress", params)], True, 5)
    progress, answer = received(mine, 2)
    assert isinstance(progress, Notification)
    assert isinstance(answer, Response)
    assert isinstance(received(other)[0], Response)


def test_a_server_that_cancels_its_request_0_is_understood(bridge: Bridge) -> None:
    ours = sent(bridge, [request("ask", method="roots/list", id=0)], True, 10)
    received(ours)
    listening(bridge)
    cancel = {"method": "notifications/cancelled", "params": {"requestId": 0}}
    ask(bridge, "later", message=cancel, seconds=0)
    assert isinstance(received(ours)[0], Notification)


def test_a_message_at_the_limit_of_nesting_costs_only_itself(bridge: Bridge) -> None:
    stream = listening(bridge)
    for depth in range(900, 1000):
        nested = b"[" * depth + b"]" * depth
        line = b'{"jsonrpc":"2.0","method":"x","params":{"a":%s}}\n' % nested
        ask(bridge, "raw", bytes=base64.b64encode(line).decode())
    ask(bridge, "later", message=note(1), seconds=0)
    delivered = iter(lambda: stream.receive(10), None)
    assert any(b"notifications/message" in delivery.data for delivery in delivered)


def test_a_call_to_a_server_that_has_just_ended_did_not_reach_it(bridge: Bridge) -> None:
    bridge._child.close_stdin()
    with pytest.raises(BackendUnreached, match="The server exited"):
        sent(bridge, [request("count")], False, 5)
    assert "calls=0" in repr(bridge)


def written_after_the_exit(bridge: Bridge, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """Has the next line be written when it is known that the child has exited."""

    def late(*given: Any) -> None:
        os.kill(bridge._child.pid, signal.SIGKILL)
        eventually(lambda: "calls=0" in repr(bridge))
        write(*given)

    monkeypatch.setattr(bridge._child, "write", late)


def test_a_call_that_is_written_when_the_exit_was_noticed_did_not_reach_the_server(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = sent(bridge, [request("silence")], False, 60)
    written_after_the_exit(bridge, monkeypatch, bridge._child.write)
    with pytest.raises(BackendUnreached, match=r"The server exited \(signal SIGKILL"):
        sent(bridge, [request("count", key=2), request("count", key=3)], False, 60)
    delivery = silent.receive(5)
    assert delivery is not None
    assert "before it answered" in str(delivery.failure)


@pytest.mark.parametrize("failure", [None, BackendLost("half of it was written")])
def test_a_call_that_was_taken_of_a_server_that_exits_is_answered(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, failure: BackendLost | None
) -> None:
    def take(*_: Any) -> None:
        if failure is not None:
            raise failure

    written_after_the_exit(bridge, monkeypatch, take)
    exchange = sent(bridge, [request("count", key=2), request("count", key=3)], False, 60)
    for _ in range(2):
        delivery = exchange.receive(5)
        assert delivery is not None
        assert "The server exited (signal SIGKILL) before it answered" in str(delivery.failure)


def test_a_lost_bridge_refuses_everything(bridge: Bridge) -> None:
    stream = listening(bridge)
    sent(bridge, [request("die")], False, 5).receive(5)
    eventually(lambda: not bridge.is_alive)
    assert stream.receive(1) is None
    assert stream.is_over
    for act in (
        lambda: sent(bridge, [request("x")], False, 5),
        lambda: bridge.notify(Notification("x")),
        lambda: listening(bridge),
    ):
        with pytest.raises(BackendLost, match="exit code 1"):
            act()


def test_a_reader_that_fails_ends_its_child_and_the_calls_in_flight_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unforeseen(Exception):
        pass

    def fail(*_: object) -> None:
        raise Unforeseen

    lost: list[Bridge] = []
    supervisor = Supervisor(Replica())
    with monkeypatch.context() as patch:
        patch.setattr(Switchboard, "pop", fail)
        bridge = Bridge(supervisor, StdioServer("test", SCRIPTED), 1 << 26, lost.append)
        silent = sent(bridge, [request("silence")], False, 600)
        answered = sent(bridge, [request("count", key=2)], False, 600)
        for exchange in (silent, answered):
            delivery = exchange.receive(10)
            assert delivery is not None
            assert isinstance(delivery.failure, BackendLost)
            assert "The server exited (" in str(delivery.failure)
            assert "before it answered" in str(delivery.failure)
    eventually(lambda: lost == [bridge])
    assert not bridge.is_alive
    eventually(lambda: supervisor.children == 0)
    assert re.search(r"the thread mcp-child-\d+ failed", caplog.text)
    supervisor.close()


def test_a_closed_bridge_says_so(bridge: Bridge) -> None:
    exchange = sent(bridge, [request("silence")], True, 60)
    bridge.close()
    delivery = exchange.receive(1)
    assert delivery is not None
    expected = "The session has ended and the server was stopped before it answered"
    assert str(delivery.failure) == expected


def test_ending_the_stream_ends_only_that(bridge: Bridge) -> None:
    bridge.end_stream()
    stream = listening(bridge)
    bridge.end_stream()
    assert stream.receive(1) is None
    assert stream.is_over
    assert not stream.was_replaced
    assert bridge.is_alive


def test_what_is_held_back_from_an_outdated_server_can_be_cancelled_and_left(
    bridge: Bridge,
) -> None:
    sent(bridge, [request("sleep", seconds=600)], False, 600)
    bridge.outdate(0)
    cancelled, left, overdue, other = (
        sent(bridge, [request("count", key=key)], False, seconds)
        for key, seconds in ((2, 600), (3, 600), (4, 0.1), (5, 600))
    )
    bridge.notify(Notification("notifications/cancelled", jsonrpc.as_payload({"requestId": 2})))
    left.close()
    for exchange, kind in ((cancelled, Cancelled), (overdue, BackendTimeout)):
        message = exchange.receive(10)
        assert message is not None
        assert isinstance(message.failure, kind)
    assert not bridge.end_between_calls()
    again: list[Exchange] = []
    left.resend = other.resend = again.append
    bridge.close()
    other.receive(10)
    left.receive(0)
    assert again == [other]


def test_initialize_is_never_cancelled(make_bridge: MakeBridge) -> None:
    bridge = make_bridge("--slow-start", "60")
    opening = sent(bridge, [Request("i", "initialize")], False, 0.1)
    cancelled = jsonrpc.as_payload({"requestId": "i"})
    bridge.notify(Notification("notifications/cancelled", cancelled))
    failed = opening.receive(5)
    assert failed is not None
    assert isinstance(failed.failure, BackendTimeout)
    seen = bytes(ask(bridge, "seen").result)
    assert b"initialize" in seen
    assert b"cancelled" not in seen


def test_repr_is_a_state_dump(bridge: Bridge) -> None:
    stream = listening(bridge)
    assert "stream=True" in repr(bridge)
    assert "backlog=0" in repr(stream)


def test_write_failures_of_a_cancellation_are_survived(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(bridging, "WRITE_TIMEOUT", 0.1)
    exchange = sent(bridge, [request("silence")], False, 0.2)
    with bridge._child._write_lock:
        delivery = exchange.receive(5)
    assert delivery is not None
    assert delivery.failure is not None
    assert "does not read its input" in caplog.text


def test_a_request_is_not_written_once_its_client_has_left(bridge: Bridge) -> None:
    exchange = Exchange([request("count")], False, 30)
    exchange.has_left = lambda: True
    with bridge._child._write_lock, pytest.raises(ClientLeft):
        bridge.send(exchange)
    assert not bridge.is_busy
    assert b'"calls":1' in bytes(ask(bridge, "count").result).replace(b" ", b"")


# Reads nothing for a time; then each request is answered with the length of its line.
_LATE = """
import json, sys, time
time.sleep(float(sys.argv[1]))
for line in sys.stdin:
    key = json.loads(line)["id"]
    print(json.dumps({"jsonrpc": "2.0", "id": key, "result": len(line)}), flush=True)
"""
LATE = (sys.executable, "-c", _LATE)


def left_with_half_a_line(bridge: Bridge) -> Exchange:
    """The exchange of a request of which the server has taken a part when its client leaves."""
    exchange = Exchange([request("large", pad="x" * 1_000_000)], False, 60)
    exchange.has_left = lambda: True
    bridge.send(exchange)
    exchange.has_left = None
    return exchange


def test_what_a_client_that_leaves_has_begun_to_say_is_said_by_another_thread(
    make_bridge: MakeBridge,
) -> None:
    bridge = make_bridge("8", argv=LATE)
    began = time.monotonic()
    exchange = left_with_half_a_line(bridge)
    assert time.monotonic() - began < 6
    assert int(bytes(ask(bridge, "small").result)) < 100  # and no line is mixed with another
    (answer,) = received(exchange)
    assert int(bytes(answer.result)) > 1_000_000


def test_half_a_line_that_is_never_taken_ends_the_server(
    make_bridge: MakeBridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridging, "WRITE_TIMEOUT", 2.5)
    bridge = make_bridge("600", argv=LATE)
    delivery = left_with_half_a_line(bridge).receive(20)
    assert delivery is not None
    assert isinstance(delivery.failure, BackendLost)
    assert "half a message was taken" in caplog.text


def test_nobody_who_has_left_waits_until_the_server_takes_something(bridge: Bridge) -> None:
    stream = listening(bridge)
    ask(bridge, "later", message={"id": "q", "method": "roots/list"}, seconds=0)
    assert received(stream)[0].id == "q"

    def has_left() -> bool:
        return True

    with bridge._child._write_lock:
        for act in (
            lambda: bridge.notify(Notification("x"), has_left),
            lambda: bridge.respond(Response("q", Raw(b"{}")), has_left),
            lambda: bridge.submit(request("count"), 60, has_left),
        ):
            with pytest.raises(ClientLeft):
                act()
    (told,) = received(stream)
    assert (told.id, b"took nothing" in bytes(told.error)) == (1, True)
    assert not bridge.is_busy
    assert b'"x"' not in bytes(ask(bridge, "seen").result)


def test_an_initialized_that_was_not_said_is_said_by_us(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ask(bridge, "initialize", protocolVersion="2025-11-25")
    with bridge._child._write_lock, pytest.raises(ClientLeft):
        bridge.notify(Notification("notifications/initialized"), lambda: True)
    ask(bridge, "count")
    assert "the server gets ours" in caplog.text


def test_a_call_whose_time_is_over_waits_for_no_server_that_takes_nothing(bridge: Bridge) -> None:
    exchange = sent(bridge, [request("silence")], False, 0.2)
    began = time.monotonic()
    with bridge._child._write_lock:
        delivery = exchange.receive(20)
    assert delivery is not None
    assert isinstance(delivery.failure, BackendTimeout)
    assert time.monotonic() - began < 8
    assert bridge.is_alive


def raw(bridge: Bridge, line: bytes) -> None:
    """Has the server write a line."""
    ask(bridge, "raw", bytes=base64.b64encode(line + b"\n").decode())


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b'{"jsonrpc":"2.0","id":"ID","result":{"a":1}}', Response("i", Raw(b'{"a":1}'))),
        (b'{"jsonrpc":"2.0","id":ID,"result":{},"error":null}', Response("i", Raw(b"{}"))),
        (
            b'{"jsonrpc":"2.0","id":ID,"result":null,"error":{}}',
            Response("i", error=Raw(b'{"code":-32000,"message":"{}"}')),
        ),
        (b'{"jsonrpc":"2.0","id":ID,"result":{"a":NaN}}', Response("i", Raw(b'{"a":null}'))),
        (b'{"jsonrpc":"2.0","id":ID,"result":"\xff"}', Response("i", Raw(b'"\xef\xbf\xbd"'))),
        (b'\xef\xbb\xbf{"jsonrpc":"2.0","id":ID,"result":1}', Response("i", Raw(b"1"))),
        (
            b'{"jsonrpc":"2.0","id":ID,"error":"no"}',
            Response("i", error=Raw(b'{"code":-32000,"message":"\\"no\\""}')),
        ),
    ],
)
def test_what_a_server_writes_a_little_wrong_is_understood(
    bridge: Bridge, line: bytes, answer: Response
) -> None:
    waiting = sent(bridge, [request("silence", "i")], False, 30)
    raw(bridge, line.replace(b"ID", b"1"))
    (found,) = received(waiting)
    assert found == answer


@pytest.mark.parametrize("key", [b'"id":null,', b""])
def test_an_error_without_an_id_is_the_answer_to_the_only_call(
    bridge: Bridge, key: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    line = b'{"jsonrpc":"2.0",%s"error":{"code":-32700,"message":"no"}}' % key
    waiting = sent(bridge, [request("silence", "i")], False, 30)
    raw(bridge, line)  # this call is in flight, too: the error could be either's
    assert waiting.receive(0.2) is None
    ask(bridge, "later", message={"id": None, "error": {"code": -32700, "message": "no"}})
    assert received(waiting) == [Response("i", error=Raw(b'{"code": -32700, "message": "no"}'))]


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","id":1,"result":{"a":',
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","id":1,"result":{"a":undefined}}',
        b'{"jsonrpc":"1.0","id":1,"result":{}}',
    ],
)
def test_an_answer_that_cannot_be_read_fails_its_call_at_once(bridge: Bridge, line: bytes) -> None:
    waiting = sent(bridge, [request("silence", "i")], False, 30)
    raw(bridge, line)
    message = waiting.receive(5)
    assert message is not None
    assert message.failure is not None
    assert "cannot be read" in message.failure.message
    assert "body" not in message.failure.message
    assert ask(bridge, "echo", a=1).result == Raw(b'{"a": 1}')


def test_a_server_that_prints_is_quoted_a_few_times_and_then_counted(
    bridge: Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    raw(bridge, b"\n".join(b"hello %d" % number for number in range(1000)))
    shown = [record.getMessage() for record in caplog.records]
    assert len(shown) == bridging.NOISE_SHOWN
    assert "hello 0" in shown[0]
    assert "the line is not JSON" in shown[0]
    bridge.close()
    eventually(lambda: "[test] 995 more lines on stdout were no messages" in caplog.text)


def test_requests_that_clients_ignore_are_refused_in_the_end(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(switching, "MAX_ASKED", 3)
    stream = listening(bridge)
    for number in range(5):
        ask(bridge, "later", message={"id": f"q{number}", "method": "roots/list"}, seconds=0)
        assert stream.receive(10) is not None
    eventually(lambda: caplog.text.count("refused a roots/list") == 2)
    seen = json.loads(bytes(ask(bridge, "seen").result))["messages"]
    refused = [message["id"] for message in seen if "error" in message]
    assert refused == ["q0", "q1"]
    bridge.respond(Response("q4", Raw(b"{}")))
    seen = json.loads(bytes(ask(bridge, "seen").result))["messages"]
    assert any(message.get("id") == "q4" for message in seen)


def test_cancelling_one_call_of_a_batch_cancels_that_one(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridging, "CANCEL_GRACE", 0.2)
    calls = [request("silence", "a"), request("sleep", "b", seconds=1), request("silence", "c")]
    batch = sent(bridge, calls, False, 2)
    cancel = jsonrpc.as_payload({"requestId": "a"})
    bridge.notify(Notification("notifications/cancelled", cancel))
    first, second, third = (batch.receive(10) for _ in calls)
    assert first is not None
    assert second is not None
    assert third is not None
    assert isinstance(first.failure, Cancelled)
    assert jsonrpc.parse_message(first.data).id == "a"  # type: ignore[union-attr]
    assert second.failure is None
    assert jsonrpc.parse_message(second.data).id == "b"  # type: ignore[union-attr]
    assert isinstance(third.failure, BackendTimeout)
    seen = json.loads(bytes(ask(bridge, "seen").result))["messages"]
    told = [m["params"]["requestId"] for m in seen if m["method"] == "notifications/cancelled"]
    assert told == [1, 3]


def test_a_second_cancellation_does_not_lengthen_the_time_of_a_call(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridging, "CANCEL_GRACE", 0.3)
    call = sent(bridge, [request("silence", "a")], False, 60)
    until = time.monotonic() + 10
    while (answer := call.receive(0.05)) is None:
        assert time.monotonic() < until
        bridge.notify(Notification("notifications/cancelled", Raw(b'{"requestId":"a"}')))
    assert isinstance(answer.failure, Cancelled)


# --- a client's notifications/initialized that was lost ------------------------------------------


def heard(bridge: Bridge) -> list[str]:
    """The methods that the server was sent, before it is asked for them."""
    messages = json.loads(bytes(ask(bridge, "seen").result))["messages"]
    return [message["method"] for message in messages if message["method"] != "seen"]


def test_a_server_that_was_not_told_is_told_once_before_the_next_request(bridge: Bridge) -> None:
    ask(bridge, "initialize", protocolVersion="2025-06-18")
    ask(bridge, "ping")
    ask(bridge, "echo")
    bridge.notify(Notification("notifications/initialized"))
    ask(bridge, "echo")
    told = ["initialize", "ping", "notifications/initialized", "echo", "echo"]
    assert heard(bridge) == told


def test_a_server_that_was_told_by_its_client_is_not_told_again(bridge: Bridge) -> None:
    ask(bridge, "initialize", protocolVersion="2025-06-18")
    bridge.notify(Notification("notifications/initialized"))
    ask(bridge, "echo")
    assert heard(bridge) == ["initialize", "notifications/initialized", "echo"]


def test_over_the_older_wire_a_server_is_told_as_well(bridge: Bridge) -> None:
    stream = listening(bridge)
    bridge.submit(request("initialize", protocolVersion="2024-11-05"), 10)
    received(stream)
    bridge.submit(request("echo"), 10)
    received(stream)
    assert heard(bridge) == ["initialize", "notifications/initialized", "echo"]
