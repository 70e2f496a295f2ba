"""What passes through the transparent proxy, byte by byte, in both ways."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from mcp_proxy import ProxyOptions, TransparentProxy
from mcp_proxy.errors import (
    BackendDraining,
    BackendLost,
    SessionUnknown,
)
from mcp_proxy.wire import sse
from tests.proofs.hell import drip, flood
from tests.servers.http_backend import (
    Act,
    Feed,
    HttpBackend,
    Leave,
    Turn,
    raw,
    reply,
    reset,
    silent,
    stream,
)
from tests.support.front import Answer, Json, McpClient
from tests.support.transparent import BOTH, LocalFront, Transparent, transparent
from tests.support.waiting import eventually

JSON = "application/json"
BROKEN = (BackendLost, http.client.HTTPException, OSError)
MODERN_BODY = (
    b'{"jsonrpc":"2.0","id":1,"method":"hang","params":{"_meta":'
    b'{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}'
)


@pytest.fixture(scope="module")
def settings(settings: Json) -> Json:
    return {
        **settings,
        "forward_headers": ["X-Set: by proxy", "X-Gone:"],
        "trusted_proxies": ["10.0.0.1"],
    }


def pieces(answer: Answer) -> Iterator[bytes]:
    return (piece for piece in answer.pieces if piece)


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_event_passes_before_the_next_is_there(
    proxy: Transparent, target: HttpBackend, framing: str, method: str
) -> None:
    feed = Feed()
    target.on(method, "/events", stream(feed, framing=framing, length=32))
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}' if method == "POST" else None
    answer = proxy.request(method, "/events", body, Content_Type=JSON)
    assert answer.is_stream  # the headers are there before the first event
    events = pieces(answer)
    for number in range(4):
        feed.put(b"data:%d\n\n" % number)  # 8 bytes
        assert next(events) == b"data:%d\n\n" % number
    feed.put(None)
    rest = b"".join(events)
    if (method, framing) == ("POST", "close"):  # whose end is also that of a server that dies
        assert b'"error"' in rest
    else:
        assert rest == b""


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_a_standing_stream_may_be_silent_beyond_the_time_limit(
    proxy: Transparent, target: HttpBackend, framing: str
) -> None:
    feed = Feed()
    target.on("GET", "/mcp", stream(b": hello\n\n", feed, framing=framing))
    events = pieces(proxy.request("GET", "/mcp"))
    assert next(events) == b": hello\n\n"
    time.sleep(1.3)
    feed.put(b"data: 1\n\n")
    assert next(events) == b"data: 1\n\n"
    feed.put(None)


def test_a_stalled_answer_on_a_stream_ends_with_an_error(
    proxy: Transparent, target: HttpBackend
) -> None:
    target.rpc["stall"] = stream(b'data: {"jsonrpc":"2.0","method":"n"}\n\n', Feed())
    client = proxy.client().open()
    messages = client.call("stall", key="k").messages()
    assert messages[0]["method"] == "n"
    assert (messages[1]["id"], messages[1]["error"]["code"]) == ("k", -32000)
    cancelled = eventually(lambda: target.calls("notifications/cancelled"))
    assert cancelled[0].json["params"]["requestId"] == "k"


NOTE = b'data: {"jsonrpc":"2.0","method":"n"}\n\n'
RESPONSE = b'data: {"jsonrpc":"2.0","id":"k","result":{}}\n\n'


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("begun", [b"", NOTE, NOTE + b"data: {", b": comment\n\n"])
def test_a_stream_that_breaks_off_before_the_response_ends_with_an_error(
    proxy: Transparent, target: HttpBackend, framing: str, begun: bytes
) -> None:
    feed = Feed()
    target.rpc["break"] = stream(begun or b": x\n\n", feed, framing=framing)
    answer = proxy.client().open().call("break", key="k")
    feed.put(Feed.BREAK)
    *_, last = answer.events()  # a proper end
    message = json.loads(last.data or b"")
    assert (message["id"], message["error"]["code"]) == ("k", -32000)


def test_a_stream_that_can_be_resumed_breaks_off(proxy: Transparent, target: HttpBackend) -> None:
    feed = Feed()
    target.rpc["break"] = stream(b"id: 1\ndata: \n\n", feed)
    answer = proxy.client().open().call("break", key="k")
    feed.put(Feed.BREAK)
    with pytest.raises(BROKEN):
        answer.body()


def test_a_stream_whose_backend_is_gone_cannot_be_resumed(redis_url: str) -> None:
    with HttpBackend() as backend, transparent("wsgi", backend.url, redis_url) as proxy:
        feed = Feed()
        backend.rpc["break"] = stream(b"id: 1\ndata: \n\n", feed)
        found = proxy.client().open().call("break", key="k").events()
        assert next(found).id == b"1"
        backend.stop()
        (last,) = found
        assert json.loads(last.data or b"")["id"] == "k"


@pytest.mark.parametrize("more", [b"", NOTE, b"data: half"])
def test_a_break_after_the_response_is_an_end(
    proxy: Transparent, target: HttpBackend, more: bytes
) -> None:
    feed = Feed()
    target.rpc["break"] = stream(NOTE, RESPONSE + more, feed)
    answer = proxy.client().open().call("break", key="k")
    feed.put(Feed.BREAK)
    assert answer.body() == NOTE + RESPONSE + more


BATCH: list[dict[str, Any]] = [
    {"jsonrpc": "2.0", "id": 1, "method": "a"},
    {"jsonrpc": "2.0", "method": "n"},
    {"jsonrpc": "2.0", "id": "1", "method": "b"},
    {"jsonrpc": "2.0", "id": "k\u00e4", "method": "c"},
]
ONE = b'data: {"jsonrpc":"2.0","id":1,"result":{"result":1}}\n\n'
LAST = b'data: {"jsonrpc":"2.0","id":"k\\u00e4","error":{"code":1,"message":"x"}}\n\n'
BOTH_ONES = b'data: [{"jsonrpc":"2.0","id":1,"result":1},{"jsonrpc":"2.0","id":"1","result":1}]\n\n'
ASKED = b'data: {"jsonrpc":"2.0","id":1,"method":"ping","params":{"result":1}}\n\n'


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize(
    ("passed", "missing"),
    [
        (b": x\n\n", [1, "1", "k\u00e4"]),
        (NOTE + ASKED + b"data: {", [1, "1", "k\u00e4"]),
        (ONE, ["1", "k\u00e4"]),
        (LAST + ONE, ["1"]),
        (ONE.replace(b"1,", b'"1",', 1), [1, "k\u00e4"]),
        (BOTH_ONES, ["k\u00e4"]),
    ],
)
def test_each_request_of_a_batch_that_breaks_off_has_an_end(
    proxy: Transparent, target: HttpBackend, framing: str, passed: bytes, missing: list[Any]
) -> None:
    feed = Feed()
    client = proxy.client().open()
    target.on("POST", "/mcp", stream(passed, feed, framing=framing))
    answer = client.post(BATCH)
    feed.put(Feed.BREAK)
    body = answer.body()  # a proper end
    assert body.startswith(passed)
    decoder = sse.Decoder()
    messages = [json.loads(event.data or b"") for event in decoder.feed(body[len(passed) :])]
    assert [message["id"] for message in messages] == missing
    assert {message["error"]["code"] for message in messages} == {-32000}


def test_a_batch_whose_responses_have_passed_breaks_off_in_order(
    proxy: Transparent, target: HttpBackend
) -> None:
    feed = Feed()
    client = proxy.client().open()
    target.on("POST", "/mcp", stream(BOTH_ONES, LAST, feed))
    answer = client.post(BATCH)
    feed.put(Feed.BREAK)
    assert answer.body() == BOTH_ONES + LAST


def test_a_batch_that_can_be_resumed_breaks_off(proxy: Transparent, target: HttpBackend) -> None:
    feed = Feed()
    client = proxy.client().open()
    target.on("POST", "/mcp", stream(b"id: 1\n" + ONE, feed))
    answer = client.post(BATCH)
    feed.put(Feed.BREAK)
    with pytest.raises(BROKEN):
        answer.body()


def test_a_batch_that_stalls_has_an_error_for_each(proxy: Transparent, target: HttpBackend) -> None:
    client = proxy.client().open()
    target.on("POST", "/mcp", stream(ONE, Feed()))
    first, *rest = client.post(BATCH).messages()
    assert first["id"] == 1
    assert [message["id"] for message in rest] == ["1", "k\u00e4"]
    cancelled = target.last.json
    assert {notice["method"] for notice in cancelled} == {"notifications/cancelled"}
    assert [notice["params"]["requestId"] for notice in cancelled] == [1, "1", "k\u00e4"]


@pytest.mark.parametrize("headers", [("Content-Encoding: gzip",), ()])
def test_a_stream_that_cannot_be_changed_breaks_off(
    proxy: Transparent, target: HttpBackend, headers: tuple[str, ...]
) -> None:
    feed = Feed()
    framing = "chunked" if headers else "length"
    target.rpc["break"] = stream(NOTE, feed, framing=framing, headers=headers, length=1000)
    answer = proxy.client().open().call("break", key="k")
    feed.put(Feed.BREAK)
    with pytest.raises(BROKEN):
        answer.body()


# --- silence -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=BOTH)
def lively(
    request: pytest.FixtureRequest, target: HttpBackend, redis_server: Any
) -> Iterator[Transparent]:
    settings = {"keepalive_interval": 0.3, "request_timeout": 1}
    with transparent(request.param, target.url, redis_server.url, **settings) as proxy:
        yield proxy


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_a_silent_stream_gets_comments_between_its_events(
    lively: Transparent, target: HttpBackend, framing: str
) -> None:
    target.reset()
    feed = Feed()
    target.on("GET", "/mcp", stream(b"data: 1\n\n", feed, framing=framing))
    answer = lively.request("GET", "/mcp", Accept="text/event-stream")
    assert answer.headers["X-Accel-Buffering"] == "no"
    events = pieces(answer)
    assert next(events) == b"data: 1\n\n"
    begun = time.monotonic()
    assert [next(events) for _ in range(4)] == [b": keepalive\n\n"] * 4
    assert 0.9 < time.monotonic() - begun < 3
    feed.put(b"data: 2\n")  # an event that is not complete
    assert next(events) == b"data: 2\n"
    time.sleep(0.7)
    feed.put(b"\ndata: 3\r\n\r\n")
    assert next(events) == b"\ndata: 3\r\n\r\n"
    assert next(events) == b": keepalive\n\n"
    feed.put(b"data: 4\n\n")
    assert b"data: 4\n\n" in (next(events), next(events))
    lively.leave()


def test_a_silent_answer_has_comments_and_still_its_time_limit(
    lively: Transparent, target: HttpBackend
) -> None:
    target.reset()
    target.rpc["stall"] = stream(NOTE, Feed())
    begun = time.monotonic()
    body = lively.client().open().call("stall", key="k").body()
    assert 0.9 < time.monotonic() - begun < 3
    assert body.startswith(NOTE + b": keepalive\n\n" * 3 + b"\n\nevent: message\ndata: {")
    lively.leave()


def test_several_events_in_one_packet_are_no_silence(
    lively: Transparent, target: HttpBackend
) -> None:
    target.reset()
    events = [b"data: %d\n\n" % number for number in range(50)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    target.on("GET", "/mcp", raw(head + chunks + b"0\r\n\r\n"))
    answer = lively.request("GET", "/mcp", Accept="text/event-stream")
    assert answer.body() == b"".join(events)


def test_a_stalled_json_answer_is_a_failure(proxy: Transparent, target: HttpBackend) -> None:
    feed = Feed()
    target.rpc["stall"] = stream(b'{"jsonrpc"', feed, content_type=JSON)
    answer = proxy.client().open().call("stall", key=7)
    assert (answer.status, answer.failure) == (200, "server-timeout")
    assert answer.message()["id"] == 7


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_LOST_HEAD = b"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n"
_EARLY = b"HTTP/1.1 103 Early\r\n\r\n"


@pytest.mark.parametrize(
    ("act", "failure"),
    [
        (drip(_HEAD, b"X: y\r\n"), "server-timeout"),
        (drip(b"", _EARLY), "server-timeout"),
        (flood(b"", _EARLY), "bad-answer"),
        (drip(_LOST_HEAD + b"Content-Length: 9999\r\n\r\n", b" "), "server-timeout"),
        (drip(_LOST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), "server-timeout"),
    ],
    ids=["head", "1xx", "many 1xx", "lost session", "lost session in chunks"],
)
def test_an_answer_that_never_ends_is_a_failure(
    proxy: Transparent, target: HttpBackend, act: Any, failure: str
) -> None:
    client = proxy.client().open()
    target.rpc["drip"] = act
    answer = client.call("drip", key=7)
    assert (answer.status, answer.failure, answer.message()["id"]) == (200, failure, 7)
    del target.rpc["drip"]
    client.result("drip")


@pytest.mark.parametrize(
    "act",
    [
        drip(_HEAD + b"Content-Length: 9999\r\n\r\n", b" "),
        drip(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        drip(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    ],
    ids=["length", "chunks", "trailers"],
)
def test_a_json_answer_has_a_time_limit_as_a_whole(
    proxy: Transparent, target: HttpBackend, act: Any
) -> None:
    target.rpc["drip"] = act
    answer = proxy.client().open().call("drip")
    assert (answer.status, answer.failure) == (200, "server-timeout")
    eventually(lambda: target.calls("notifications/cancelled"))


def broken(*heads: str, body: bytes = b'{"jsonrpc":"2.0",', ending: Act | None = None) -> Act:
    """A JSON answer whose end does not come."""
    head = "".join(f"{line}\r\n" for line in heads).encode()

    def act(turn: Turn) -> None:
        turn.send(_HEAD + head + b"\r\n" + body)
        if ending is not None:
            ending(turn)
        raise Leave

    return act


BROKEN_JSON = pytest.mark.parametrize(
    "act",
    [
        broken("Content-Length: 99"),
        broken("Content-Length: 99", body=b""),
        broken("Content-Length: 99", ending=reset),
        broken("Transfer-Encoding: chunked", body=b'5\r\n{"a":\r\n'),
        broken("Transfer-Encoding: chunked", body=b'99\r\n{"a":'),
        broken("Transfer-Encoding: chunked", body=b"nonsense\r\n"),
        broken("Transfer-Encoding: chunked", body=b'5\r\n{"a":\r\n', ending=reset),
        broken("Connection: close"),
        broken("Content-Length: 99", "Content-Encoding: gzip", body=b"\x1f\x8b"),
    ],
    ids=[
        "length",
        "no byte",
        "reset",
        "chunks",
        "chunk",
        "bad chunk",
        "reset chunks",
        "end",
        "gzip",
    ],
)


@BROKEN_JSON
def test_a_json_answer_that_breaks_off_is_a_failure(
    proxy: Transparent, target: HttpBackend, act: Act
) -> None:
    """Clients wait for ever for what never ends: Python's SDK 1.x did."""
    client = proxy.client().open()
    target.rpc["tools/call"] = act
    answer = client.call("tools/call", key=7)
    assert (answer.status, answer.failure) == (200, "bad-answer")
    assert answer.headers["Content-Type"] == JSON
    message = answer.message()
    assert (message["id"], message["error"]["code"]) == (7, -32000)
    assert target.executed["tools/call"] == 1  # it may have been executed
    del target.rpc["tools/call"]
    client.result("tools/call")


def test_an_initialize_whose_answer_breaks_off_opens_no_session(
    proxy: Transparent, target: HttpBackend
) -> None:
    target.rpc["initialize"] = broken("Content-Length: 99", "Mcp-Session-Id: half-a-session")
    answer = proxy.client().initialize()
    assert (answer.status, answer.failure) == (200, "bad-answer")
    assert "Mcp-Session-Id" not in answer.headers
    with pytest.raises(SessionUnknown):
        proxy.manager.load("half-a-session")


def test_each_request_of_a_batch_whose_answer_breaks_off_has_an_error(
    proxy: Transparent, target: HttpBackend
) -> None:
    target.on("POST", "/mcp", broken("Content-Length: 99"))
    body = b'[{"jsonrpc":"2.0","id":1,"method":"a"},{"jsonrpc":"2.0","id":"2","method":"b"}]'
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert answer.failure == "bad-answer"
    assert [each["id"] for each in json.loads(answer.body())] == [1, "2"]


def test_under_failure_status_http_it_is_502(target: HttpBackend, redis_url: str) -> None:
    target.reset()
    target.on("POST", "/mcp", broken("Content-Length: 99"))
    with transparent("wsgi", target.url, redis_url, failure_status="http") as proxy:
        body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
        answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert (answer.status, answer.failure) == (502, "bad-answer")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_large_json_answer_streams_and_breaks_off(
    proxy: Transparent, target: HttpBackend, framing: str
) -> None:
    feed = Feed()
    start = b'{"jsonrpc":"2.0","id":1,"result":"' + b"x" * 70_000
    act = stream(start, feed, framing=framing, length=80_000, content_type=JSON)
    target.on("POST", "/mcp", act)
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert answer.status == 200
    assert next(pieces(answer))  # before its end is there
    feed.put(Feed.BREAK)
    with pytest.raises(BROKEN):
        list(answer.pieces)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("size", [0, 100, 65_000, 70_000, 1_000_000])
def test_a_json_answer_of_any_size_arrives_as_it_was_sent(
    proxy: Transparent, target: HttpBackend, framing: str, size: int
) -> None:
    sent = json.dumps({"jsonrpc": "2.0", "id": 1, "result": "x" * size}).encode()
    parts = [sent[i : i + 9000] for i in range(0, len(sent), 9000)]
    act = stream(*parts, framing=framing, length=len(sent), content_type=JSON, headers=("X-A: b",))
    target.on("POST", "/mcp", act)
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert (answer.status, answer.body()) == (200, sent)
    assert answer.headers["X-A"] == "b"


def test_the_explanation_of_a_refusal_that_breaks_off_costs_no_header(
    proxy: Transparent, target: HttpBackend
) -> None:
    """What a client must do it reads in the head."""
    head = b"HTTP/1.1 401 No\r\nContent-Type: application/json\r\nWWW-Authenticate: Bearer x=y\r\n"
    target.on("POST", "/mcp", raw(head + b"Content-Length: 9\r\n\r\n{"))
    body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer x=y")


def test_an_answer_that_has_broken_off_is_one_line_of_the_log(
    target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    target.on("GET", "/short", raw(_HEAD + b"Content-Length: 10\r\n\r\n{}"))
    with transparent("gunicorn", target.url, redis_url) as proxy:
        answer = proxy.request("GET", "/short")
        with pytest.raises(BROKEN):
            answer.body()
        assert proxy.process is not None
        log = proxy.process.log
        eventually(lambda: "The server closed 8 bytes too early" in log())
        assert "Traceback" not in log()


def test_an_initialize_again_that_never_ends_is_a_failure(
    proxy: Transparent, target: HttpBackend
) -> None:
    client = proxy.client().open()
    target.sessions.clear()
    events = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    for act in (flood(events, b": x\n\n" * 100), drip(events, b": x\n\n")):
        target.rpc["initialize"] = act
        assert client.call("tools/call").failure == "server-timeout"
    del target.rpc["initialize"]
    client.result("tools/call")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/octet-stream"])
def test_what_goes_on_is_not_cut_after_the_time_limit(
    proxy: Transparent, target: HttpBackend, content_type: str, method: str
) -> None:
    feed = Feed()
    target.on(method, "/long", stream(feed, content_type=content_type))
    answer = proxy.request(method, "/long", b"x" if method == "POST" else None)
    found = pieces(answer)
    for _ in range(6):
        time.sleep(0.3)
        feed.put(b"data: 1\n\n")
        assert next(found) == b"data: 1\n\n"
    feed.put(None)
    assert list(found) == []


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("content_type", [JSON, "text/event-stream"])
def test_a_short_body_is_never_a_clean_end(
    proxy: Transparent, target: HttpBackend, framing: str, content_type: str
) -> None:
    feed = Feed()
    act = stream(b"data: 1\n\n", feed, framing=framing, length=100, content_type=content_type)
    target.on("GET", "/short", act)
    answer = proxy.request("GET", "/short")
    found = pieces(answer)
    assert next(found) == b"data: 1\n\n"
    feed.put(Feed.BREAK)
    with pytest.raises(BROKEN):
        list(found)


def test_streams_beyond_the_limit_are_503(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/mcp", stream(b": hello\n\n", Feed()))
    target.on("GET", "/other", reply(200))
    answers = [proxy.request("GET", "/mcp") for _ in range(2)]
    assert [next(pieces(answer)) for answer in answers] == [b": hello\n\n"] * 2
    third = proxy.request("GET", "/mcp")
    assert (third.status, third.failure) == (503, "overloaded")
    assert third.headers["Retry-After"]
    assert third.error()["code"] == -32000
    assert proxy.request("GET", "/other").status == 200
    for answer in answers:
        answer.close()

    def has_place() -> bool:
        answer = proxy.request("GET", "/mcp")
        answer.close()
        return answer.status == 200

    eventually(has_place)


# --- answers as they are -------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 400, 401, 403, 404, 405, 418, 429, 500, 503])
def test_statuses_headers_and_bodies_pass(
    proxy: Transparent, target: HttpBackend, status: int
) -> None:
    fields = ['WWW-Authenticate: Bearer a="b", c="d"', "Set-Cookie: a=1", "Set-Cookie: b=2"]
    target.on("POST", "/mcp", reply(status, b'{"a": 1.10}', "Content-Type: x/y; Z=1", *fields))
    answer = proxy.request("POST", "/mcp", b"\xff\x00", Content_Type="application/octet-stream")
    assert answer.status == status
    assert answer.headers["Content-Type"] == "x/y; Z=1"
    assert answer.headers["WWW-Authenticate"] == 'Bearer a="b", c="d"'
    found: Any = answer.headers
    cookies = (
        found.get_all("Set-Cookie") if hasattr(found, "get_all") else found.getlist("Set-Cookie")
    )
    assert cookies == ["a=1", "b=2"]
    assert answer.body() == b'{"a": 1.10}'
    assert target.last.body == b"\xff\x00"


@pytest.mark.parametrize("size", [0, 100, 70_000, 300_000])
@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("status", [400, 404])
def test_a_refusal_in_a_session_passes_whatever_its_size(
    proxy: Transparent, target: HttpBackend, status: int, framing: str, size: int
) -> None:
    client = proxy.client().open()
    body = b"x" * size
    target.rpc["r"] = (
        stream(body, framing=framing, length=size, content_type="text/html", status=status)
        if size or framing == "length"
        else reply(status)
    )
    answer = client.call("r")
    assert (answer.status, answer.body()) == (status, body)
    assert len(target.calls("initialize")) == 1


def test_204_and_304_have_no_body(proxy: Transparent, target: HttpBackend) -> None:
    for status in (204, 304):
        target.on("PUT", "/none", reply(status, b"", "ETag: x"))
        answer = proxy.request("PUT", "/none")
        assert (answer.status, answer.headers["ETag"], answer.body()) == (status, "x", b"")
        assert "Content-Length" not in answer.headers


def test_head(proxy: Transparent, target: HttpBackend) -> None:
    target.on("HEAD", "/file", reply(200, b"", "X-A: 1", length=12345))
    answer = proxy.request("HEAD", "/file")
    assert (answer.status, answer.headers["Content-Length"]) == (200, "12345")
    assert answer.body() == b""


def test_gzip_passes_untouched(proxy: Transparent, target: HttpBackend) -> None:
    packed = gzip.compress(b"hello" * 100)
    target.on("GET", "/z", reply(200, packed, "Content-Encoding: gzip"))
    answer = proxy.request("GET", "/z", Accept_Encoding="gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.body() == packed
    assert target.last.header("Accept-Encoding") == "gzip"


def test_informational_answers_are_passed_over(proxy: Transparent, target: HttpBackend) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    target.on("GET", "/early", raw(b"HTTP/1.1 100 Continue\r\n\r\n" + early + early + final))
    answer = proxy.request("GET", "/early")
    assert (answer.status, answer.body()) == (200, b"ok")
    assert "Link" not in answer.headers


def test_http_1_0_without_a_length(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/old", raw(b"HTTP/1.0 200 OK\r\nContent-Type: a/b\r\n\r\nbody"))
    assert proxy.request("GET", "/old").body() == b"body"


def test_a_length_beside_chunks_means_nothing(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/both", stream(b"hello world", headers=("Content-Length: 3",)))
    assert proxy.request("GET", "/both").body() == b"hello world"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "server-unreachable"),
        (b"nonsense\r\n\r\n", "bad-answer"),
        (b"HTTP/1.1 200 OK\r\nX", ""),
    ],
)
def test_what_is_no_answer_is_a_failure(
    proxy: Transparent, target: HttpBackend, data: bytes, kind: str
) -> None:
    target.on("POST", "/mcp", raw(data))
    answer = proxy.request(
        "POST", "/mcp", b'{"jsonrpc":"2.0","id":7,"method":"x"}', Content_Type=JSON
    )
    if data.startswith(b"HTTP"):
        assert answer.status == 200
        return
    assert (answer.status, answer.failure) == (200, kind)
    message = answer.message()
    assert (message["id"], message["error"]["code"]) == (7, -32000)


def test_a_large_answer_passes(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/large", reply(200, bytes(20_000_000)))
    assert sum(map(len, pieces(proxy.request("GET", "/large")))) == 20_000_000


# --- requests as they are ------------------------------------------------------------------------


def test_headers_of_the_request_pass(proxy: Transparent, target: HttpBackend) -> None:
    given = {
        "Authorization": "Bearer t",
        "Traceparent": "00-a-b-01",
        "Mcp-Param-Region": "eu",
        "Mcp-Unheard-Of": "1",
        "Last-Event-Id": "e-1",
        "Accept": "text/event-stream",
    }
    if proxy.way == "gunicorn":  # werkzeug's client has cookies of its own
        given["Cookie"] = "a=1; b=2"
    proxy.request("GET", "/other", **given)
    for name, value in given.items():
        assert target.last.header(name) == value
    assert target.last.header("X-Set") == "by proxy"
    assert target.last.header("Host") == f"127.0.0.1:{target.port}"


def test_headers_of_the_connection_and_our_own_do_not(
    proxy: Transparent, target: HttpBackend
) -> None:
    given = {
        "Connection": "close, X-Hop",
        "X-Hop": "1",
        "Keep-Alive": "5",
        "TE": "trailers",
        "Proxy-Authorization": "secret",
        "X-Gone": "1",
        "X-Set": "by client",
        "X-Forwarded-For": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
    }
    proxy.request("GET", "/other", **given)
    unwanted = {"x-hop", "keep-alive", "te", "proxy-authorization", "x-gone", "forwarded"}
    assert not target.last.names & (unwanted | {"user-agent", "accept-encoding"})
    assert [v for n, v in target.last.headers if n == "X-Set"] == ["by proxy"]
    if proxy.way == "gunicorn":  # werkzeug's client has no address
        assert target.last.header("X-Forwarded-For") == "127.0.0.1"
    assert target.last.header("X-Forwarded-Proto") == "http"
    assert target.last.header("X-Forwarded-Host")


def test_several_cookie_headers_are_one_list(target: HttpBackend, redis_url: str) -> None:
    target.reset()
    head = b"GET /x HTTP/1.1\r\nHost: localhost\r\nCookie: a=1,2\r\nCookie: b=3\r\n"
    target.on("GET", "/x", reply(200))
    with transparent("gunicorn", target.url, redis_url) as proxy:
        assert proxy.process is not None
        with socket.create_connection(("127.0.0.1", proxy.process.port)) as sock:
            sock.sendall(head + b"Connection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert target.last.header("Cookie") == "a=1,2; b=3"


@pytest.mark.parametrize("name", ["Host", "host"])
def test_the_host_can_be_set(target: HttpBackend, name: str) -> None:
    app = TransparentProxy(target.url, options=ProxyOptions(forward_headers=(f"{name}: set:1",)))
    with app, closing(LocalFront(app)) as front:
        target.reset()
        assert McpClient(front).open().result("x")["backend"] == "target"
        assert [v for n, v in target.last.headers if n.lower() == "host"] == ["set:1"]
        # What the server says of itself is said of the proxy.
        target.on("POST", "/mcp", reply(307, b"", "Location: https://set:1/moved"))
        target.on("POST", "/moved", reply(200))
        assert McpClient(front).call("x").status == 200
        assert target.last.target == "/moved"
        target.on("GET", "/login", reply(302, b"", "Location: http://set:1/in"))
        answer = front.request("GET", "/login", {}, None)
        assert answer.headers["Location"] == "/in"


def test_the_clients_host_can_be_preserved(target: HttpBackend) -> None:
    # A server that is told its public name puts it into 401 and into RFC 9728 documents.
    options = ProxyOptions(preserve_host=True, allowed_hosts=("*",))
    app = TransparentProxy(target.url, options=options)
    with app, closing(LocalFront(app)) as front:
        target.reset()
        client = McpClient(front)
        client.initialize(Host="public.example:81").body()
        assert target.last.header("Host") == "public.example:81"
        target.sessions.clear()  # a session is initialized again with that name, too
        assert client.call("x", Host="public.example").status == 200
        assert {seen.header("Host") for seen in target.seen[1:]} == {"public.example"}
        target.on("GET", "/login", reply(302, b"", "Location: https://public.example/in?next=/"))
        answer = front.request("GET", "/login", {"Host": "public.example"}, None)
        assert answer.headers["Location"] == "/in?next=/"


def test_headers_of_the_backends_connection_do_not_pass(
    proxy: Transparent, target: HttpBackend
) -> None:
    fields = ["Connection: X-Hop, keep-alive", "X-Hop: 1", "Keep-Alive: 5", "X-Kept: 1"]
    target.on("GET", "/hop", reply(200, b"", *fields))
    answer = proxy.request("GET", "/hop")
    assert "X-Hop" not in answer.headers
    assert "Keep-Alive" not in answer.headers
    assert answer.headers["X-Kept"] == "1"


@pytest.mark.parametrize("field", [b"X-Odd: a\x01b", b"X-Odd: a\x00b", b"Trailers: X-Odd"])
def test_a_header_that_no_server_sends_does_not_pass(
    proxy: Transparent, target: HttpBackend, field: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + field
    target.on("GET", "/odd", raw(head + b"\r\nX-Kept: 1\r\n\r\ndata: 1\n\n"))
    for _ in range(3):  # there are places for two streams
        answer = proxy.request("GET", "/odd")
        assert (answer.status, answer.headers["X-Kept"]) == (200, "1")
        assert "X-Odd" not in answer.headers
        assert answer.body() == b"data: 1\n\n"


def test_a_folded_header_passes_in_one_line(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/fold", reply(200, b"", "X-Folded: a\r\n  b"))
    assert proxy.request("GET", "/fold").headers["X-Folded"] == "a b"


@pytest.mark.parametrize(
    "head",
    [
        b"200 OK\r\nContent-Length: five",
        b"200 OK\r\nContent-Length: -5",
        b"200 OK\r\nContent-Length: 5, 5",
        b"200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
        b"101 Switching Protocols\r\nUpgrade: x",
    ],
)
def test_an_answer_whose_end_is_unknown_is_a_failure(
    proxy: Transparent, target: HttpBackend, head: bytes
) -> None:
    def act(turn: Turn) -> None:
        turn.send(b"HTTP/1.1 " + head + b"\r\n\r\nhello")
        turn.wait_until_gone()

    target.on("GET", "/odd", act)
    answer = proxy.request("GET", "/odd")
    assert (answer.status, answer.failure) == (502, "bad-answer")
    target.on("POST", "/mcp", act)
    body = b'{"jsonrpc":"2.0","id":7,"method":"x"}'
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert (answer.status, answer.failure, answer.message()["id"]) == (200, "bad-answer", 7)
    eventually(lambda: len(target.gone) == 2)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "OPTIONS", "PROPFIND"])
def test_other_methods_and_paths_pass(proxy: Transparent, target: HttpBackend, method: str) -> None:
    target.on(method, "/.well-known/oauth", reply(200, b"found"))
    body = b"data" if method == "PUT" else None
    assert proxy.request(method, "/.well-known/oauth?a=%20b", body).body() == b"found"
    assert (target.last.method, target.last.target) == (method, "/.well-known/oauth?a=%20b")
    assert target.last.body == (body or b"")


@pytest.mark.parametrize(
    "body", [b"not json", b"", b"\xff", b"[]", b'[{"jsonrpc":"2.0","id":1,"method":"a"}]']
)
def test_bodies_that_are_no_message_pass(
    proxy: Transparent, target: HttpBackend, body: bytes
) -> None:
    target.on("POST", "/mcp", reply(400, b"what?"))
    answer = proxy.request("POST", "/mcp", body, Content_Type=JSON)
    assert (answer.status, answer.body(), target.last.body) == (400, b"what?", body)


# --- redirects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("location", ["/mcp/", "{base}/mcp/", "mcp/"])
def test_redirects_of_the_endpoint_keep_method_and_body(
    proxy: Transparent, target: HttpBackend, status: int, location: str
) -> None:
    where = location.format(base=target.url)
    target.on("POST", "/mcp", reply(status, b"moved", f"Location: {where}"))
    client = proxy.client().open()
    assert client.session in target.sessions
    client.result("tools/call", {"a": 1})
    first, second = target.seen[-2:]
    assert (first.target, second.target) == ("/mcp", "/mcp/")
    assert second.method == "POST"
    assert second.body == first.body
    assert second.header("Mcp-Session-Id") == client.session
    assert target.executed["tools/call"] == 1


def test_a_session_behind_a_redirect_is_initialized_again(
    proxy: Transparent, target: HttpBackend
) -> None:
    target.on("POST", "/mcp", reply(307, b"moved", "Location: /mcp/"))
    client = proxy.client().open()
    target.sessions.clear()
    assert client.result("tools/call")["backend"] == "target"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_of_other_paths_pass_with_their_cookies(
    proxy: Transparent, target: HttpBackend, method: str, status: int
) -> None:
    where = f"Location: {target.url}/home?a=1#top"
    target.on(method, "/login", reply(status, b"moved", where, "Set-Cookie: a=1", "Set-Cookie: b"))
    answer = proxy.request(method, "/login", b"x" if method == "POST" else None)
    assert (answer.status, answer.headers["Location"]) == (status, "/home?a=1#top")
    assert [value for name, value in answer.headers.items() if name == "Set-Cookie"] == ["a=1", "b"]
    assert answer.body() == b"moved"
    assert [seen.target for seen in target.seen] == ["/login"]


@pytest.mark.parametrize("status", [301, 302])
def test_redirects_of_the_endpoint_that_may_change_the_method_pass(
    proxy: Transparent, target: HttpBackend, status: int
) -> None:
    target.on("POST", "/mcp", reply(status, b"", f"Location: {target.url}/login"))
    answer = proxy.request("POST", "/mcp", b"{}", Content_Type=JSON)
    assert (answer.status, answer.headers["Location"]) == (status, "/login")


@pytest.mark.parametrize("location", ["http://elsewhere.invalid/mcp", "//elsewhere.invalid/x"])
@pytest.mark.parametrize("path", ["/moved", "/mcp"])
def test_redirects_elsewhere_pass(
    proxy: Transparent, target: HttpBackend, path: str, location: str
) -> None:
    target.on("GET", path, reply(307, b"", f"Location: {location}"))
    answer = proxy.request("GET", path)
    assert (answer.status, answer.headers["Location"]) == (307, location)


def test_a_redirect_leads_below_the_mount(target: HttpBackend) -> None:
    target.reset()
    target.on("GET", "/login", reply(302, b"", "Location: /home"))
    with TransparentProxy(target.url) as app:
        environ = create_environ("/login", "http://localhost/servers/x/")
        _, status, given = run_wsgi_app(app, environ, buffered=True)
    assert (status[:3], given["Location"]) == ("302", "/servers/x/home")


def test_redirects_in_a_circle_end(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/mcp", reply(307, b"", "Location: /mcp"))
    assert proxy.request("GET", "/mcp").status == 307
    assert len(target.seen) == 6


REQUEST = b'{"jsonrpc":"2.0","id":7,"method":"x"}'
REFUSED = pytest.mark.parametrize(
    ("status", "location", "where", "why"),
    [
        (
            307,
            "http://elsewhere.invalid/a?b=very#very",
            "http://elsewhere.invalid/a",
            "another host",
        ),
        (307, "http://u:very@elsewhere.invalid/a", "", "no usable URL"),
        (307, "", "", "no usable URL"),
        (308, "//elsewhere.invalid/a", "http://elsewhere.invalid/a", "another host"),
        (307, "http://127.0.0.1:1/mcp?k=very", "http://127.0.0.1:1/mcp", "another port"),
        (307, "/mcp?k=very", "/mcp", "5 redirects"),
        (307, "ftp://elsewhere.invalid/very", "", "no usable URL"),
        (307, "http://[very", "", "no usable URL"),
        (302, "/login?k=very", "/login", "302"),
    ],
)


@REFUSED
def test_a_redirect_of_the_endpoint_that_is_not_followed_says_why(
    proxy: Transparent, target: HttpBackend, status: int, location: str, where: str, why: str
) -> None:
    client = proxy.client().open()
    for method in ("GET", "POST", "DELETE"):
        target.on(method, "/mcp", reply(status, b"moved", f"Location: {location}"))
    answer = client.call("tools/call", key=7)
    assert (answer.status, answer.failure) == (200, "bad-answer")
    message = answer.message()
    assert message["id"] == 7
    sentence = message["error"]["message"]
    assert sentence.startswith("The server redirects")
    assert where in sentence
    assert why in sentence
    assert "very" not in sentence
    hops = len([seen for seen in target.seen if seen.rpc == "tools/call"])
    assert hops == (6 if where == "/mcp" else 1)
    for failed in (client.listen(), client.delete()):
        assert (failed.status, failed.failure) == (502, "bad-answer")
        assert failed.error()["message"] == sentence
    assert target.last.method == "DELETE"
    assert client.notify("notifications/x").status == 202
    target.reset()
    client.result("tools/call")  # no session has ended by it


def test_a_redirect_that_is_not_followed_is_one_warning_a_minute(
    target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    target.on("POST", "/mcp", reply(307, b"", "Location: http://elsewhere.invalid/a?secret=very"))
    with transparent("gunicorn", target.url, redis_url) as proxy:
        for _ in range(3):
            assert proxy.request("POST", "/mcp", REQUEST, Content_Type=JSON).failure == "bad-answer"
        assert proxy.process is not None
        log = proxy.process.log
        eventually(lambda: log().count("POST /mcp x -> 200") == 3)
    (line,) = [line for line in log().splitlines() if "WARNING" in line and "redirect" in line]
    assert "http://elsewhere.invalid/a" in line
    assert "very" not in line


# --- pages in browsers ---------------------------------------------------------------------------


def cors_of(answer: Answer) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in answer.headers.items():
        if name.lower().startswith("access-control-"):
            found.setdefault(name.lower(), []).append(value)
    return found


def test_a_page_hears_one_voice(proxy: Transparent, target: HttpBackend) -> None:
    theirs = ("Access-Control-Allow-Origin: *", "access-control-expose-headers: X-Own", "A: b")
    target.on("POST", "/mcp", reply(200, b"{}", *theirs, "Access-Control-Allow-Credentials: true"))
    page = "http://localhost:5173"
    answer = proxy.request("POST", "/mcp", b"{}", Origin=page, Content_Type=JSON)
    found = cors_of(answer)
    assert found["access-control-allow-origin"] == [page]
    assert len(found["access-control-expose-headers"]) == 1
    assert "access-control-allow-credentials" not in found
    assert answer.headers["A"] == "b"


def test_without_a_page_the_servers_word_stays(proxy: Transparent, target: HttpBackend) -> None:
    target.on("GET", "/x", reply(200, b"", "Access-Control-Allow-Origin: *"))
    assert cors_of(proxy.request("GET", "/x")) == {"access-control-allow-origin": ["*"]}


def test_a_preflight_is_answered_by_the_proxy(proxy: Transparent, target: HttpBackend) -> None:
    answer = proxy.request(
        "OPTIONS",
        "/mcp",
        Origin="http://localhost:5173",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="x-api-key,traceparent",
    )
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Headers"] == "x-api-key, traceparent"
    assert target.seen == []


# --- connections ---------------------------------------------------------------------------------


def test_connections_are_reused(proxy: Transparent, target: HttpBackend) -> None:
    target.on("HEAD", "/head", reply(200, length=5))
    target.on("PUT", "/none", reply(204))
    target.on("GET", "/chunks", stream(b"a", b"b", content_type="a/b"))
    for method, path in [
        ("GET", "/x"),
        ("HEAD", "/head"),
        ("PUT", "/none"),
        ("GET", "/chunks"),
    ] * 3:
        proxy.request(method, path).body()
    assert (
        len({seen.connection for seen in target.seen}) < 6
    )  # an answer may be there before its end


@pytest.mark.parametrize("way", BOTH)
def test_a_backend_may_close_after_each_request(way: str, redis_url: str) -> None:
    with (
        HttpBackend(requests_per_connection=1) as backend,
        transparent(way, backend.url, redis_url) as proxy,
    ):
        client = proxy.client()
        client.initialize().body()
        for _ in range(20):
            # Its closing has to be there: a request that meets it on the way is lost, and says so.
            eventually(lambda: backend.open_connections == 0)
            client.result("tools/call")
        assert len(backend.calls("initialize")) == 1
        assert backend.executed["tools/call"] == 20


@pytest.mark.parametrize("way", BOTH)
def test_idle_connections_are_not_used_again(way: str, redis_url: str) -> None:
    with HttpBackend() as backend, transparent(way, backend.url, redis_url) as proxy:
        proxy.request("GET", "/a").body()
        time.sleep(2.2)
        proxy.request("GET", "/a").body()
        assert backend.seen[0].connection != backend.seen[1].connection


# --- clients that leave --------------------------------------------------------------------------


def leaving(base: str, body: bytes, session: str = "") -> None:
    """Sends a request and leaves without waiting."""
    port = int(base.rpartition(":")[2])
    fields = f"Mcp-Session-Id: {session}\r\n" if session else ""
    head = f"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n{fields}"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.3)


@pytest.fixture
def unhurried(target: HttpBackend, redis_url: str) -> Iterator[Transparent]:
    """gunicorn with all the time in the world: only the client's leaving can end a call."""
    target.reset()
    with transparent("gunicorn", target.url, redis_url, request_timeout=60, threads=8) as proxy:
        yield proxy


@pytest.mark.parametrize(
    "act",
    [
        silent,
        stream(Feed()),
        stream(Feed(), framing="close"),
        stream(b": a\n\n", Feed(), framing="close"),
    ],
    ids=["silent", "chunked", "close", "close-begun"],
)
def test_a_modern_call_is_closed_when_its_client_leaves(
    unhurried: Transparent, target: HttpBackend, act: Any
) -> None:
    target.rpc["hang"] = act
    assert unhurried.process is not None
    leaving(unhurried.process.base, MODERN_BODY)
    eventually(lambda: target.gone, 20)  # a third of the time limit


def test_a_client_that_leaves_costs_its_session_nothing(
    unhurried: Transparent, target: HttpBackend
) -> None:
    client = unhurried.client().open()
    target.rpc["hang"] = silent
    assert unhurried.process is not None
    body = b'{"jsonrpc":"2.0","id":9,"method":"hang"}'
    leaving(unhurried.process.base, body, client.session or "")
    eventually(lambda: target.gone, 5)
    client.result("tools/call")
    assert target.executed["initialize"] == 1


@pytest.mark.parametrize("rpc", ["initialize", "notifications/initialized"])
def test_a_client_that_leaves_frees_its_thread_while_its_session_is_initialized_again(
    unhurried: Transparent, target: HttpBackend, rpc: str
) -> None:
    client = unhurried.client().open()
    target.sessions.clear()
    target.rpc[rpc] = silent
    assert unhurried.process is not None
    body = b'{"jsonrpc":"2.0","id":9,"method":"tools/call"}'
    leaving(unhurried.process.base, body, client.session or "")
    eventually(lambda: target.gone, 5)  # half of the time that the call has
    log = unhurried.process.log
    eventually(lambda: " POST /mcp tools/call -> 499 " in log(), 5)
    target.reset()
    client.result("tools/call")  # the claim was given back
    assert target.executed["initialize"] == 1


def test_a_client_that_leaves_while_the_last_piece_is_sent_harms_no_other(
    target: HttpBackend,
) -> None:
    """The connection is another call's as soon as the last byte was read."""
    from mcp_proxy.backends.http import HttpCall, HttpClient
    from mcp_proxy.wire.urls import Address

    target.reset()
    client = HttpClient(1, 4)
    address = Address("http", "127.0.0.1", target.port)
    first = HttpCall(client, address, "GET", "/a", {}, b"")
    first.send(1)
    target.on("GET", "/a", reply(200, b"hello"))
    assert first.read(100)
    feed = Feed()
    target.on("GET", "/b", stream(b"one", feed))
    second = HttpCall(client, address, "GET", "/b", {}, b"")
    second.send(1)
    assert target.seen[0].connection == target.seen[1].connection
    first.abort()
    first.wait_for_ever()
    feed.put(b"two")
    feed.put(None)
    assert second.read(100) == b"onetwo"
    first.close()
    second.close()
    client.close()


# --- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_sigterm_ends_streams_cleanly_and_lets_calls_finish(
    target: HttpBackend, redis_url: str, framing: str
) -> None:
    target.reset()

    def slow(turn: Turn) -> None:
        time.sleep(1.5)
        turn.result({"slow": True})

    with transparent("gunicorn", target.url, redis_url, threads=8) as proxy:
        client = proxy.client().open()
        target.on("GET", "/mcp", stream(b": hello\n\n", Feed(), framing=framing))
        target.rpc["slow"] = slow
        events = pieces(client.listen())
        assert next(events) == b": hello\n\n"
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: client.call("slow").message())
            eventually(lambda: target.calls("slow"))
            begun = time.monotonic()
            assert proxy.process is not None
            os.kill(proxy.process.master_pid, signal.SIGTERM)
            assert list(events) == []  # a clean end
            assert call.result(20)["result"] == {"slow": True}
        proxy.process.wait(15)
        assert time.monotonic() - begun < 12


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize("content_type", ["application/x", "text/event-stream"])
def test_a_proxy_that_closes_ends_streams_and_breaks_other_answers_off(
    target: HttpBackend, framing: str, content_type: str
) -> None:
    target.reset()
    act = stream(b"data: 1\n\n", Feed(), framing=framing, length=100, content_type=content_type)
    target.on("POST", "/mcp", act)
    with TransparentProxy(target.url) as proxy:
        front = LocalFront(proxy)
        body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
        found = pieces(front.request("POST", "/mcp", {"Content-Type": JSON}, body))
        assert next(found) == b"data: 1\n\n"
        assert proxy.is_busy
        proxy.close()
        if content_type == "application/x":
            with pytest.raises(BackendDraining):
                list(found)
        elif framing == "length":  # nothing can be added
            assert list(found) == []
        else:
            assert b'"id":1,"error":' in b"".join(found)
        front.close()
        assert not proxy.is_busy


def test_a_proxy_that_closes_answers_for_a_json_answer_that_is_not_whole(
    target: HttpBackend,
) -> None:
    target.reset()
    target.on("POST", "/mcp", stream(b'{"a"', Feed(), content_type=JSON))
    with TransparentProxy(target.url) as proxy, ThreadPoolExecutor(1) as pool:
        body = b'{"jsonrpc":"2.0","id":1,"method":"x"}'
        front = LocalFront(proxy)
        call = pool.submit(front.request, "POST", "/mcp", {"Content-Type": JSON}, body)
        eventually(lambda: target.seen and proxy.is_busy)
        proxy.close()
        answer = call.result(20)
        assert (answer.status, answer.failure) == (200, "draining")
        assert not proxy.is_busy


# --- more ways to ask ----------------------------------------------------------------------------


def test_a_chunked_request_arrives_with_its_length(
    unhurried: Transparent, target: HttpBackend
) -> None:
    target.on("POST", "/up", reply(200, b"got it"))
    assert unhurried.process is not None
    with socket.create_connection(("127.0.0.1", unhurried.process.port)) as sock:
        head = b"POST /up HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
        assert b" 200 " in sock.recv(1000)
    assert target.last.body == b"abcdefg"
    assert target.last.header("Content-Length") == "7"
    assert "transfer-encoding" not in target.last.names


@pytest.mark.parametrize("way", BOTH)
def test_an_open_stream_keeps_its_session_alive(
    way: str, target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    with transparent(way, target.url, redis_url, session_ttl=1) as proxy:
        client, other = proxy.client().open(), proxy.client().open()
        answer = client.listen()
        events = pieces(answer)
        assert next(events) == b": hello\n\n"
        sessions = [proxy.manager.peek(str(one.session)) for one in (client, other)]
        assert all(sessions)
        over = time.monotonic() + 2.5  # more than two lives of a session without a stream
        eventually(lambda: not proxy.manager.peek(str(other.session)) and time.monotonic() > over)
        assert client.call("tools/call").status == 200
        assert other.call("tools/call").status == 404
        answer.close()
        eventually(lambda: not proxy.manager.peek(str(client.session)))
        assert client.call("tools/call").status == 404
        proxy.leave()


@pytest.mark.parametrize("way", BOTH)
def test_a_body_over_the_limit_is_413(way: str, target: HttpBackend, redis_url: str) -> None:
    target.reset()
    settings = {"max_body_bytes": 10, "unknown_session_status": 404}
    with transparent(way, target.url, redis_url, **settings) as proxy:
        assert proxy.request("POST", "/mcp", b"x" * 11).status == 413
        assert proxy.request("GET", "/mcp", Mcp_Session_Id="never-issued").status == 404
        assert target.seen == []


@pytest.mark.parametrize("value", ["a b", "é", "x" * 1025])
def test_what_cannot_be_a_session_id_is_400(
    proxy: Transparent, target: HttpBackend, value: str
) -> None:
    answer = proxy.request("GET", "/mcp", Mcp_Session_Id=value)
    assert (answer.status, answer.error()["code"]) == (400, -32600)
    assert target.seen == []


def test_below_a_mount_the_path_is_what_follows_it(target: HttpBackend) -> None:
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    from tests.support.front import McpClient

    target.reset()
    proxy = TransparentProxy(target.url + "/mcp")
    front = LocalFront(DispatcherMiddleware(reject, {"/a/b": proxy}))  # type: ignore[arg-type]
    client = McpClient(front, "/a/b/mcp").open()
    client.result("tools/call")
    assert {seen.target for seen in target.seen} == {"/mcp"}
    front.request("PUT", "/a/b/other%20one?q=%20", {}, b"")
    assert target.last.target == "/other%20one?q=%20"
    front.close()
    proxy.close()


def reject(environ: Any, start_response: Any) -> list[bytes]:
    start_response("404 Not Found", [])
    return []


def test_a_stream_that_has_not_begun_does_not_delay_the_end(
    target: HttpBackend, redis_url: str
) -> None:
    target.reset()
    with transparent("gunicorn", target.url, redis_url, threads=8) as proxy:
        client = proxy.client().open()
        target.on("GET", "/mcp", silent)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.listen)
            eventually(lambda: target.last.method == "GET")
            assert proxy.process is not None
            begun = time.monotonic()
            os.kill(proxy.process.master_pid, signal.SIGTERM)
            assert call.result(20).status == 503
        proxy.process.wait(10)
        assert time.monotonic() - begun < 4


def test_a_call_that_a_proxy_that_closes_cuts_off_may_have_acted(target: HttpBackend) -> None:
    target.reset()
    options = ProxyOptions(failure_status="http")
    with TransparentProxy(target.url, options=options) as proxy, ThreadPoolExecutor(1) as pool:
        client = McpClient(LocalFront(proxy)).open()
        target.rpc["hang"] = silent
        call = pool.submit(client.call, "hang")
        eventually(lambda: target.calls("hang"))
        proxy.close()
        answer = call.result(20)
        assert (answer.status, answer.failure) == (502, "draining")
        assert "Retry-After" not in answer.headers


def test_a_call_that_hangs_at_the_end_is_told(target: HttpBackend, redis_url: str) -> None:
    """After the drain nobody waits for a backend any more."""
    target.reset()
    with transparent("gunicorn", target.url, redis_url, threads=8) as proxy:
        client = proxy.client().open()
        target.rpc["hang"] = silent
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.call, "hang")
            eventually(lambda: target.calls("hang"))
            assert proxy.process is not None
            os.kill(proxy.process.master_pid, signal.SIGTERM)
            answer = call.result(20)
            assert (answer.status, answer.failure) == (200, "draining")
            assert answer.error()["code"] == -32000
        proxy.process.wait(10)


@pytest.mark.parametrize("content_type", [JSON, "text/event-stream"])
def test_a_backend_that_dies_under_an_answer_leaves_one_line_in_the_log(
    target: HttpBackend, redis_url: str, content_type: str
) -> None:
    target.reset()
    feed = Feed()
    target.on("GET", "/mcp", stream(b": hello\n\n", feed, content_type=content_type))
    with transparent("gunicorn", target.url, redis_url, threads=8) as proxy:
        assert proxy.process is not None
        client = proxy.client().open()
        before = len(proxy.process.log())
        found = pieces(client.listen())
        assert next(found) == b": hello\n\n"
        feed.put(Feed.BREAK)
        with pytest.raises(http.client.IncompleteRead):  # no proper end
            list(found)

        def lines() -> list[str]:
            assert proxy.process is not None
            return proxy.process.log()[before:].splitlines()

        eventually(lambda: any("GET /mcp" in line for line in lines()))
        assert client.result("tools/call")
        eventually(lambda: any("tools/call" in line for line in lines()))
        (line,) = [line for line in lines() if " POST /mcp " not in line]
        assert "bad-answer: The server broke off" in line
