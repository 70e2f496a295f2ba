"""Streamable HTTP in front of a stdio server, through the test client and real gunicorn."""

from __future__ import annotations

import base64
import gzip
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import StreamableProxy
from tests.support.front import SCRIPTED, Answer, McpClient, WsgiFront
from tests.support.proxies import GunicornProxy, Replicas, WsgiProxy, replicas, running
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

Proxy = WsgiProxy | GunicornProxy | Replicas

BOTH = ["wsgi", "gunicorn"]
QUICK: dict[str, Any] = {"sse_after": 0.3, "keepalive_interval": 0.2}


@pytest.fixture(scope="module", params=[*BOTH, "local replicas", "redis replicas"])
def proxy(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Proxy]:
    """One replica in each way, and several, where no request lands on the replica of the last."""
    store = {"redis_url": redis_server.url, "redis_prefix": f"test-{uuid.uuid4().hex}:"}
    if request.param == "local replicas":
        with replicas(3, **QUICK) as several:
            yield several
    elif request.param == "redis replicas":
        with replicas(2, **store, **QUICK) as several:
            yield several
    else:
        with running(request.param, **QUICK) as proxy:
            yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[McpClient]:
    client = proxy.client().open()
    yield client
    if client.session:
        client.delete().body()


def seen(client: McpClient) -> list[dict[str, Any]]:
    """What has reached the server of this session."""
    # Without event streams: a message of the server must not go out on this very call.
    answer = client.call("seen", Accept="application/json")
    messages: list[dict[str, Any]] = answer.message()["result"]["messages"]
    return messages


# --- initialize ----------------------------------------------------------------------------------


def test_initialize_names_a_session(proxy: Proxy) -> None:
    client = proxy.client()
    answer = client.initialize()
    assert answer.status == 200
    assert client.session is not None
    assert client.session.isascii()
    assert answer.message()["result"]["serverInfo"]["name"] == "scripted"
    client.delete().body()


def test_initialize_is_answered_in_json_although_the_client_takes_streams() -> None:
    with running("wsgi", sse_after=60) as proxy:
        assert proxy.client().initialize().headers["Content-Type"] == "application/json"


def test_each_session_has_a_server_of_its_own(proxy: Proxy) -> None:
    one, other = proxy.client().open(), proxy.client().open()
    assert one.result("count")["calls"] == 1
    assert one.result("count")["calls"] == 2
    assert other.result("count")["calls"] == 1
    for client in (one, other):
        client.delete().body()


def test_a_session_header_on_initialize_is_ignored(proxy: Proxy) -> None:
    client = proxy.client()
    client.session = "never-issued"
    answer = client.initialize()
    assert answer.status == 200
    assert client.session != "never-issued"
    client.delete().body()


@pytest.mark.parametrize("way", BOTH)
def test_a_refused_initialize_opens_no_session(way: str) -> None:
    with running(way, [*SCRIPTED, "--refuse"]) as proxy:
        answer = proxy.client().initialize()
        assert answer.status == 200
        assert "Mcp-Session-Id" not in answer.headers
        assert answer.error() == {"code": -32602, "message": "not today"}


@pytest.mark.parametrize("way", BOTH)
def test_a_server_that_dies_at_once_is_an_error_that_says_so(way: str) -> None:
    with running(way, [*SCRIPTED, "--die-on-initialize"]) as proxy:
        client = proxy.client()
        answer = client.initialize()
        assert (answer.status, answer.failure) == (200, "server-exited")
        assert "Mcp-Session-Id" not in answer.headers
        error = answer.error()
        assert error["code"] == -32000
        assert "exit code 3" in error["message"]
        assert "database" not in error["message"]  # stderr is for the log
        assert client.initialize().failure == "server-exited"  # the second in a row
        assert "exit code 3" in not_ready(client)


@pytest.mark.parametrize("way", BOTH)
def test_a_command_that_does_not_exist_is_an_error_and_not_ready(way: str) -> None:
    with running(way, ["/no/such/server"]) as proxy:
        client = proxy.client()
        answer = client.initialize()
        assert (answer.status, answer.failure) == (200, "server-start-failed")
        assert answer.error()["code"] == -32000
        assert "/no/such/server" in not_ready(client)


def test_a_working_directory_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "work"
    directory.mkdir()
    with running("gunicorn", SCRIPTED, cwd=str(directory)) as proxy:
        directory.rmdir()
        client = proxy.client()
        message = client.initialize().error()["message"]
        assert message == "The server cannot be started: its working directory does not exist"
        assert f"its working directory {directory} does not exist" in not_ready(client)


def not_ready(client: McpClient) -> str:
    """What /readyz says once it is red."""

    def said() -> str:
        ready = client.front.request("GET", "/readyz", {}, None)
        body = ready.body().decode()
        return body if ready.status == 503 else ""

    return eventually(said)


@pytest.mark.parametrize("way", BOTH)
def test_logs_before_the_initialize_result_make_a_stream_that_names_the_session(way: str) -> None:
    with running(way, [*SCRIPTED, "--log-first", "2"]) as proxy:
        client = proxy.client()
        answer = client.initialize()
        assert client.session is not None
        messages = answer.messages()
        assert [m.get("method") for m in messages] == ["notifications/message"] * 2 + [None]
        assert client.result("count")["calls"] == 1


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, "", "1", 1, 2**60, 2**53 + 1, "a\nb", "ü"])
def test_the_answer_carries_the_id_as_it_came(client: McpClient, key: Any) -> None:
    answer = client.call("echo", {"x": 1}, key).message()
    assert answer["id"] == key
    assert type(answer["id"]) is type(key)


def test_two_calls_under_one_id_each_get_their_answer(client: McpClient) -> None:
    def call(number: int) -> Any:
        params = {"seconds": 0.1 * (3 - number), "token": number}
        return client.call("sleep", params, key=1).message()["result"]["token"]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(call, range(3))) == [0, 1, 2]


def test_progress_tokens_of_two_calls_do_not_cross(client: McpClient) -> None:
    def call(number: int) -> list[dict[str, Any]]:
        params = {"_meta": {"progressToken": "t"}, "seconds": 0.1, "for": number}
        return client.call("progress", params, key="same").messages()

    with ThreadPoolExecutor(4) as pool:
        for number, messages in enumerate(pool.map(call, range(4))):
            progress, answer = messages
            assert progress["params"] == {"progressToken": "t", "progress": 1}
            assert answer["result"] == {"for": number}


def test_payloads_pass_as_the_bytes_they_were(client: McpClient) -> None:
    result = (
        b'{"n": 1.10,  "big": 123456789012345678901234567890, "e": 1E400, "u": "\\u00fc\xc3\xbc"}'
    )
    params = {"bytes": base64.b64encode(result).decode()}
    assert result in client.call("raw_answer", params).body()


def test_a_pretty_printed_body_reaches_the_server_as_one_line(client: McpClient) -> None:
    body = (
        b'{\r\n "jsonrpc": "2.0",\n "id": 5,\n "method": "echo",\n "params": {\n  "a": "b"\n }\n}'
    )
    assert client.post(body).message()["result"] == {"a": "b"}


def test_an_error_of_the_server_passes(client: McpClient) -> None:
    answer = client.call("fail", {"code": -32002, "message": "no", "data": {"k": [1]}})
    assert answer.status == 200
    assert answer.error() == {"code": -32002, "message": "no", "data": {"k": [1]}}


def test_a_large_result_passes(client: McpClient) -> None:
    assert len(client.result("big", {"size": 3_000_000})["text"]) == 3_000_000


def test_a_large_result_passes_on_a_stream(client: McpClient) -> None:
    answer = client.call("big", {"size": 300_000}, Accept="text/event-stream")
    assert len(answer.message()["result"]["text"]) == 300_000


# --- JSON or stream ------------------------------------------------------------------------------


def test_an_answer_that_comes_first_is_json(client: McpClient) -> None:
    assert client.call("echo").headers["Content-Type"] == "application/json"


def test_what_precedes_the_answer_makes_it_a_stream(client: McpClient) -> None:
    answer = client.call("notify", {"count": 2})
    assert answer.is_stream
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert [m.get("params", {}).get("number") for m in answer.messages()] == [0, 1, None]


def test_a_slow_answer_becomes_a_stream_with_keepalives(client: McpClient) -> None:
    answer = client.call("sleep", {"seconds": 0.9})
    assert answer.is_stream
    body = answer.body()
    assert body.count(b": keepalive\n\n") >= 2
    assert b'"slept": 0.9' in body


def test_a_client_that_takes_only_json_gets_json_however_slow(client: McpClient) -> None:
    answer = client.call("sleep", {"seconds": 0.5}, Accept="application/json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.message()["result"]["slept"] == 0.5


def test_a_client_that_takes_only_streams_gets_one(client: McpClient) -> None:
    answer = client.call("echo", {"a": 1}, Accept="text/event-stream")
    assert answer.is_stream
    assert answer.message()["result"] == {"a": 1}


def test_stream_events_arrive_before_the_answer_is_there(client: McpClient) -> None:
    release = {"seconds": 2, "_meta": {"progressToken": 7}}
    answer = client.call("progress", release)
    messages = answer.stream()
    assert next(messages)["params"]["progressToken"] == 7
    # The answer is two seconds away: the server can still be asked in between.
    assert client.result("count")["calls"] >= 1
    answer.close()


# --- messages of the server ----------------------------------------------------------------------


def test_sampling_goes_out_on_the_call_and_its_answer_comes_back(client: McpClient) -> None:
    answer = client.call("ask", {"method": "sampling/createMessage", "params": {"maxTokens": 1}})
    messages = answer.stream()
    asked = next(messages)
    assert asked["method"] == "sampling/createMessage"
    posted = client.post({"jsonrpc": "2.0", "id": asked["id"], "result": {"role": "assistant"}})
    assert (posted.status, posted.body()) == (202, b"")
    assert next(messages)["result"]["result"] == {"role": "assistant"}


def test_an_answer_that_nobody_waits_for_does_not_reach_the_server(client: McpClient) -> None:
    assert client.post({"jsonrpc": "2.0", "id": "stray", "result": {}}).status == 202
    assert all(message.get("id") != "stray" for message in seen(client))


def test_a_ping_of_the_server_without_any_listener_is_answered(client: McpClient) -> None:
    client.result("later", {"message": {"id": "are-you-there", "method": "ping"}})
    eventually(lambda: any(m.get("id") == "are-you-there" for m in seen(client)))


def test_a_ping_of_the_server_is_answered_by_a_client_that_listens(client: McpClient) -> None:
    with closing(client.listen()) as stream:
        messages = stream.stream()
        client.result("later", {"message": {"id": "there?", "method": "ping"}})
        assert next(messages)["method"] == "ping"
        client.post({"jsonrpc": "2.0", "id": "there?", "result": {"from": "the client"}})
        answers = [message for message in seen(client) if message.get("id") == "there?"]
        assert [answer["result"] for answer in answers] == [{"from": "the client"}]


_PINGS_FIRST = """
import json, sys
asked = json.loads(sys.stdin.readline())
print(json.dumps({"jsonrpc": "2.0", "id": "there?", "method": "ping"}), flush=True)
assert json.loads(sys.stdin.readline()) == {"jsonrpc": "2.0", "id": "there?", "result": {}}
info = {"name": "a", "version": "1"}
result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": info}
print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
sys.stdin.read()
"""


def test_a_ping_before_the_answer_to_initialize_is_answered_by_the_proxy() -> None:
    with StreamableProxy([sys.executable, "-c", _PINGS_FIRST]) as proxy:
        answer = McpClient(WsgiFront(proxy)).initialize()
        assert not answer.is_stream
        assert answer.message()["result"]["serverInfo"]["name"] == "a"


def test_the_standing_stream_gets_what_belongs_to_no_call(client: McpClient) -> None:
    stream = client.listen()
    assert stream.status == 200
    messages = stream.stream()
    client.result("later", {"message": {"method": "notifications/message", "params": {"n": 1}}})
    assert next(messages)["params"] == {"n": 1}
    stream.close()


def test_a_newer_standing_stream_replaces_the_older_and_tells_it_to_stay_away(
    client: McpClient,
) -> None:
    older = client.listen()
    events = older.events()
    newer = client.listen()
    assert newer.status == 200
    retry = [event.retry for event in events if event.retry is not None]
    assert retry == [24 * 3600 * 1000]
    client.result("later", {"message": {"method": "notifications/message", "params": {}}})
    assert next(newer.stream())["method"] == "notifications/message"
    newer.close()


def test_with_two_calls_in_flight_a_message_goes_to_the_standing_stream(client: McpClient) -> None:
    stream = client.listen()
    messages = stream.stream()
    slow = [client.call("sleep", {"seconds": 1.5}) for _ in range(1)]
    notes = client.call("notify", {"count": 1})
    assert [m.get("method") for m in notes.messages()] == [None]
    assert next(messages)["method"] == "notifications/message"
    for answer in (*slow, stream):
        answer.close()


# --- cancellation --------------------------------------------------------------------------------


def test_a_cancellation_reaches_the_server_under_its_own_id(client: McpClient) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: client.call("silence", {"mark": 1}, key="mine").message())
        eventually(lambda: any(m.get("method") == "silence" for m in seen(client)))
        client.notify("notifications/cancelled", {"requestId": "mine", "reason": "changed my mind"})
        (silence,) = [m for m in seen(client) if m.get("method") == "silence"]
        (cancelled,) = [m for m in seen(client) if m.get("method") == "notifications/cancelled"]
        assert cancelled["params"] == {"requestId": silence["id"], "reason": "changed my mind"}
        answer = call.result(timeout=10)
    assert answer["id"] == "mine"
    assert "cancelled" in answer["error"]["message"]


def test_a_cancellation_of_nothing_stays_here(client: McpClient) -> None:
    assert client.notify("notifications/cancelled", {"requestId": 999}).status == 202
    assert all(m.get("method") != "notifications/cancelled" for m in seen(client))


def test_other_notifications_reach_the_server(client: McpClient) -> None:
    answer = client.notify("notifications/roots/list_changed", {"a": 1})
    assert (answer.status, answer.body()) == (202, b"")
    eventually(
        lambda: any(m.get("method") == "notifications/roots/list_changed" for m in seen(client))
    )


# --- time limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BOTH)
def test_a_call_without_an_answer_in_time_fails_and_is_cancelled(way: str) -> None:
    with running(way, request_timeout=3, sse_after=30) as proxy:
        client = proxy.client().open()
        answer = client.call("silence", key="late")
        assert (answer.status, answer.failure) == (200, "server-timeout")
        message = answer.message()
        assert message["id"] == "late"
        assert message["error"]["code"] == -32000
        methods = [m.get("method") for m in seen(client)]
        assert methods.count("notifications/cancelled") == 1


@pytest.mark.parametrize("way", BOTH)
def test_on_a_stream_the_time_limit_is_an_error_event(way: str) -> None:
    with running(way, request_timeout=3, sse_after=0.1) as proxy:
        client = proxy.client().open()
        answer = client.call("silence", key=3)
        assert answer.is_stream
        assert answer.message()["error"]["message"] == "The server did not answer within 3 seconds"


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, "1", 2**60])
def test_an_id_that_was_never_issued_is_a_400_with_the_request_id(proxy: Proxy, key: Any) -> None:
    client = proxy.client()
    client.session = "never-issued"
    answer = client.call("echo", key=key)
    assert answer.status == 400
    expected = {"code": -32001, "message": "Session not found"}
    assert answer.message() == {"jsonrpc": "2.0", "id": key, "error": expected}


def test_without_a_request_id_the_error_has_none(proxy: Proxy) -> None:
    client = proxy.client()
    client.session = "never-issued"
    for answer in (client.notify("x"), client.listen(), client.delete()):
        assert answer.status == 400
        assert "id" not in answer.message()


def test_an_ended_session_is_a_404(proxy: Proxy) -> None:
    client = proxy.client().open()
    assert client.delete().status == 204
    for answer in (client.call("echo"), client.notify("x"), client.listen(), client.delete()):
        assert answer.status == 404
        expected = {"code": -32001, "message": "Session not found"}
        assert answer.message() == {"jsonrpc": "2.0", "error": expected}  # no id, by which Go knows


def test_an_id_of_our_form_that_is_gone_is_a_404(proxy: Proxy) -> None:
    client = proxy.client()
    client.session = f"mcp-{'0' * 8}-{'0' * 32}"
    answer = client.call("echo", key="k")
    assert answer.status == 404
    assert "id" not in answer.message()


def test_a_missing_session_is_a_400(proxy: Proxy) -> None:
    for answer in (
        proxy.client().call("echo"),
        proxy.client().notify("x"),
        proxy.client().delete(),
    ):
        assert answer.status == 400
        assert answer.error()["code"] == -32600


@pytest.mark.parametrize("headers", [{}, {"Accept": "text/event-stream"}, {"Accept": "text/html"}])
def test_a_get_without_a_session_is_a_405(proxy: Proxy, headers: dict[str, str]) -> None:
    answer = proxy.client().listen(**headers)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST, DELETE")
    assert answer.error()["code"] == -32600


@pytest.mark.parametrize("session", ["a b", "a" * 1025, "\u00fc"])
def test_what_cannot_be_an_id_is_a_400(proxy: Proxy, session: str) -> None:
    client = proxy.client()
    client.session = session.encode().decode("latin-1")
    assert client.call("echo").error()["code"] == -32600


def test_the_unknown_status_can_be_404() -> None:
    with running("wsgi", unknown_session_status=404) as proxy:
        client = proxy.client()
        client.session = "never-issued"
        assert client.call("echo").status == 404


def test_delete_ends_streams_and_calls(proxy: Proxy) -> None:
    client = proxy.client().open()
    stream = client.listen()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: client.call("silence", key=1).message())
        eventually(lambda: any(m.get("method") == "silence" for m in seen(client)))
        assert client.delete().status == 204
        assert "ended" in call.result(timeout=10)["error"]["message"]
    assert list(stream.stream()) == []


def test_a_session_is_over_after_its_time_to_live() -> None:
    with running("wsgi", session_ttl=0.4) as proxy:
        client = proxy.client().open()
        app = proxy.app
        eventually(lambda: app.parts.supervisor.children == 0)
        assert client.call("echo").status == 404


def test_an_open_stream_keeps_its_session_alive() -> None:
    with running("gunicorn", session_ttl=1, keepalive_interval=0.2) as proxy:
        client = proxy.client().open()
        pid = client.result("count")["pid"]
        stream = client.listen()
        events = iter(lambda: next(stream.pieces), None)
        for _ in range(15):  # keepalives, 0.2 s apart: three times the time to live
            next(events)
        assert client.result("count") == {"calls": 2, "pid": pid}
        stream.close()


@pytest.mark.parametrize("way", BOTH)
def test_too_many_sessions_are_an_error_with_retry_after(way: str) -> None:
    with running(way, max_sessions=1) as proxy:
        first = proxy.client().open()
        answer = proxy.client().initialize()
        assert (answer.status, answer.failure) == (200, "overloaded")
        assert answer.error()["code"] == -32000
        assert int(answer.headers["Retry-After"]) > 0
        assert "Mcp-Session-Id" not in answer.headers
        first.delete().body()
        eventually(lambda: proxy.client().initialize().has_succeeded)


def test_too_many_streams_are_a_503_and_calls_are_still_served() -> None:
    with running("gunicorn", max_streams=1) as proxy:
        client = proxy.client().open()
        other = proxy.client().open()
        stream = client.listen()
        answer = other.listen()
        assert (answer.status, answer.failure) == (503, "overloaded")
        assert "Retry-After" in answer.headers
        assert other.result("count")["calls"] == 1
        stream.close()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"x"}{}', -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"x","params":' + b"[" * 100_000, -32700),
        (b"null", -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"x"}', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"x"}', -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"x"}', -32600),
        (b'{"jsonrpc":"2.0","id":1e999,"method":"x"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"x","params":3}', -32600),
        (b'{"jsonrpc":"2.0","id":1}', -32600),
    ],
)
def test_rubbish_is_a_400_that_says_what_is_wrong(
    client: McpClient, body: bytes, code: int
) -> None:
    answer = client.post(body)
    assert answer.status == 400
    assert answer.error()["code"] == code
    assert client.result("count")["calls"] >= 1


@pytest.mark.parametrize("version", ["1999-01-01", "2026-07-28", "rubbish"])
def test_a_version_header_that_is_not_served_is_a_400(client: McpClient, version: str) -> None:
    for answer in (
        client.call("echo", Mcp_Protocol_Version=version),
        client.listen(Mcp_Protocol_Version=version),
    ):
        assert answer.status == 400


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_known_version_headers_are_served(client: McpClient, version: str) -> None:
    assert client.call("echo", Mcp_Protocol_Version=version).status == 200


def test_a_foreign_origin_is_a_403_and_reaches_nobody(client: McpClient) -> None:
    answer = client.call("echo", Origin="http://evil.example.com")
    assert answer.status == 403
    assert answer.error()["code"] == -32600
    assert all(m.get("method") != "echo" for m in seen(client))


@pytest.mark.parametrize(
    "origin", ["http://localhost", "http://localhost:3000", "http://127.0.0.1:9", "http://[::1]:9"]
)
def test_a_loopback_origin_is_served_and_may_read(client: McpClient, origin: str) -> None:
    answer = client.call("echo", Origin=origin)
    assert answer.status == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Mcp-Session-Id" in answer.headers["Access-Control-Expose-Headers"]


def test_a_preflight_is_answered(proxy: Proxy) -> None:
    answer = proxy.client().request("OPTIONS", None, Origin="http://localhost:3000")
    assert answer.status == 204
    assert "DELETE" in answer.headers["Access-Control-Allow-Methods"]


def test_a_foreign_host_is_a_403_on_a_loopback_bind(client: McpClient) -> None:
    assert client.call("echo", Host="evil.example.com").status == 403


def test_a_body_over_the_limit_is_a_413() -> None:
    for way in BOTH:
        with running(way, max_body_bytes=1000) as proxy:
            client = proxy.client().open()
            answer = client.call("echo", {"text": "x" * 2000})
            assert answer.status == 413
            assert answer.error()["code"] == -32600


@pytest.mark.parametrize("encoding", ["gzip", "br", "Identity, deflate"])
def test_an_encoded_body_is_a_415(client: McpClient, encoding: str) -> None:
    answer = client.post(b"whatever it is", Content_Encoding=encoding)
    assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "identity")
    assert "Content-Encoding" in answer.error()["message"]


def test_identity_is_no_encoding(client: McpClient) -> None:
    assert client.initialize(Content_Encoding="Identity").has_succeeded


def test_another_content_type_is_a_415(client: McpClient) -> None:
    answer = client.post(b"{}", Content_Type="text/plain")
    assert answer.status == 415


def test_nothing_acceptable_is_a_406(client: McpClient) -> None:
    assert client.call("echo", Accept="text/html").status == 406
    assert client.listen(Accept="application/json").status == 406


def test_other_methods_are_a_405_that_names_the_allowed(client: McpClient) -> None:
    answer = client.request("PUT", b"{}")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, POST, DELETE"


def test_both_spellings_of_the_path_serve_without_a_redirect(proxy: Proxy) -> None:
    for path in ("/mcp", "/mcp/"):
        client = McpClient(proxy.client().front, path).open()
        assert client.result("echo", {"a": 1}) == {"a": 1}
        client.delete().body()


def test_other_paths_are_a_404(proxy: Proxy) -> None:
    assert McpClient(proxy.client().front, "/mcpx").initialize().status == 404


# --- batches -------------------------------------------------------------------------------------


@pytest.fixture
def batching(proxy: Proxy) -> Iterator[McpClient]:
    client = proxy.client().open("2025-03-26")
    yield client
    client.delete().body()


def request_of(key: Any, method: str = "echo", **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": key, "method": method, "params": params}


def test_a_batch_is_answered_as_an_array(batching: McpClient) -> None:
    answer = batching.post([request_of(1, n=1), request_of("1", n=2), request_of(2, n=3)])
    assert answer.status == 200
    parsed = json.loads(answer.body())
    assert {(type(m["id"]), m["id"], m["result"]["n"]) for m in parsed} == {
        (int, 1, 1),
        (str, "1", 2),
        (int, 2, 3),
    }


def test_a_batch_in_which_something_precedes_is_a_stream(batching: McpClient) -> None:
    answer = batching.post([request_of(1, "notify", count=1), request_of(2, n=2)])
    assert answer.is_stream
    messages = answer.messages()
    assert {m["id"] for m in messages if "id" in m} == {1, 2}
    assert [m["method"] for m in messages if "method" in m] == ["notifications/message"]


def test_a_batch_without_requests_is_a_202(batching: McpClient) -> None:
    note = {"jsonrpc": "2.0", "method": "notifications/x"}
    answer = batching.post([note, note])
    assert (answer.status, answer.body()) == (202, b"")


def test_initialize_in_a_batch_is_refused(batching: McpClient) -> None:
    assert batching.post([request_of(1, "initialize")]).status == 400


def test_later_revisions_have_no_batches(client: McpClient) -> None:
    answer = client.post([request_of(1)])
    assert answer.status == 400
    assert answer.error()["code"] == -32600


def test_a_revision_that_we_do_not_list_is_served_where_it_was_negotiated(proxy: Proxy) -> None:
    client = proxy.client().open("2024-10-07")
    named = {"MCP-Protocol-Version": "2024-10-07"}
    assert client.post(request_of(1), **named).message()["id"] == 1
    note = {"jsonrpc": "2.0", "method": "notifications/x"}
    assert client.post(note, **named).status == 202
    for other in ("2023-01-01", "nonsense"):
        answer = client.post(request_of(2), **{"MCP-Protocol-Version": other})
        assert (answer.status, answer.error()["code"]) == (400, -32600)
    assert client.request("DELETE", None, **named).status == 204


def test_a_batch_has_to_be_of_this_session(proxy: Proxy) -> None:
    assert proxy.client().post([request_of(1)]).status == 400


# --- the server fails ----------------------------------------------------------------------------


def test_a_call_in_flight_learns_how_the_server_ended(client: McpClient) -> None:
    answer = client.call("die", {"code": 7}, Accept="application/json")
    assert (answer.status, answer.failure) == (200, "server-exited")
    assert answer.error() == {
        "code": -32000,
        "message": "The server exited (exit code 7) before it answered",
    }


def test_on_a_stream_the_end_of_the_server_is_an_error_event(client: McpClient) -> None:
    answer = client.call("die", {"signal": 9}, Accept="text/event-stream")
    message = answer.message()
    assert message["error"]["message"] == "The server exited (signal SIGKILL) before it answered"


def test_the_next_request_starts_the_server_again_as_it_was(client: McpClient) -> None:
    client.result("logging/setLevel", {"level": "warning"})
    client.result("resources/subscribe", {"uri": "a:1"})
    client.result("resources/subscribe", {"uri": "a:2"})
    client.result("resources/unsubscribe", {"uri": "a:1"})
    before = client.result("count")["pid"]
    client.call("die", {"code": 0}).body()
    after = client.result("count")
    assert after["calls"] == 1
    assert after["pid"] != before
    replayed = [(m["method"], m.get("params")) for m in seen(client)][:4]
    assert [method for method, _ in replayed] == [
        "initialize",
        "notifications/initialized",
        "logging/setLevel",
        "resources/subscribe",
    ]
    assert replayed[0][1]["protocolVersion"] == "2025-06-18"
    assert replayed[0][1]["capabilities"] == {"sampling": {}}
    assert replayed[2][1] == {"level": "warning"}
    assert replayed[3][1] == {"uri": "a:2"}


def test_many_requests_that_notice_the_loss_start_one_server(client: McpClient) -> None:
    client.call("die").body()
    barrier = threading.Barrier(8)

    def call(_: int) -> int:
        barrier.wait()
        pid: int = client.result("count")["pid"]
        return pid

    with ThreadPoolExecutor(8) as pool:
        pids = set(pool.map(call, range(8)))
    assert len(pids) == 1


def test_a_server_that_keeps_ending_is_given_time(client: McpClient) -> None:
    def refused() -> Answer | None:  # each replica counts for itself
        answer = client.call("die", Accept="application/json")
        assert answer.status == 200
        assert answer.failure in ("server-exited", "server-start-failed")
        return answer if "Retry-After" in answer.headers else None

    answer = eventually(refused)
    assert "keeps ending" in answer.error()["message"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_noise_on_stdout_is_skipped(client: McpClient) -> None:
    noise = b'hello\n\n{"not": "rpc"}\n[1]\n{broken\n\xff\xfe\n'
    client.result("raw", {"bytes": base64.b64encode(noise).decode()})
    assert client.result("echo", {"a": 1}) == {"a": 1}


def test_an_error_without_a_code_is_one_that_clients_can_read(client: McpClient) -> None:
    line = b'{"jsonrpc":"2.0","id":$id,"error":{"message":"boom"}}\n'
    answer = client.call("raw", {"bytes": base64.b64encode(line).decode()})
    assert answer.error() == {"code": -32000, "message": "boom"}


def test_an_answer_that_nobody_waits_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mcp_proxy.backends.bridge")
    line = b'{"jsonrpc":"2.0","id":"999","result":{}}\n'
    with running("wsgi") as proxy:
        proxy.client().open().result("raw", {"bytes": base64.b64encode(line).decode()})
        assert "nobody waits for the answer with the id '999'" in caplog.text


def test_invalid_unicode_costs_a_character_not_the_answer(client: McpClient) -> None:
    result = b'{"text": "a\xffb \\ud83d c"}'
    params = {"bytes": base64.b64encode(result).decode()}
    assert client.result("raw_answer", params)["text"] == "a\ufffdb \ufffd c"


def test_what_clients_write_a_little_wrong_reaches_the_server_right(client: McpClient) -> None:
    for params in ("null", '{"_meta":null}', '{"_meta":{"progressToken":null}}'):
        body = f'{{"jsonrpc":"2.0","id":"n","method":"echo","params":{params}}}'.encode()
        assert client.post(b"\xef\xbb\xbf" + body).status == 200
    params = r'{"_meta":{"progressToken":1},"a":"\ud83d"}'
    half = f'{{"jsonrpc":"2.0","id":"n","method":"echo","params":{params}}}'.encode()
    for _ in range(2):
        assert client.post(half).status == 200
    asked = [m for m in client.result("seen")["messages"] if m.get("method") == "echo"]
    told = [m.get("params") for m in asked]
    with_half = {"_meta": {"progressToken": 1}, "a": "\ufffd"}  # repaired on the way back only
    assert told == [None, {}, {"_meta": {}}, with_half, with_half]


def test_a_compressed_body_is_an_unsupported_media_type(client: McpClient) -> None:
    answer = client.post(gzip.compress(b"{}"))
    assert answer.status == 415
    assert "gzip" in answer.error()["message"]


def test_a_flood_on_stderr_hurts_nobody(client: McpClient) -> None:
    client.result("complain", {"lines": 5_000})
    assert client.result("echo", {"a": 1}) == {"a": 1}


def test_a_line_over_the_limit_is_dropped_and_the_session_lives() -> None:
    with running("wsgi", max_message_bytes=10_000, request_timeout=30) as proxy:
        client = proxy.client().open()
        began = time.monotonic()
        answer = client.call("big", {"size": 50_000})
        assert answer.failure == "bad-answer"
        assert answer.error()["message"] == (
            "The server's answer cannot be read: the line is longer than max_message_bytes allows"
        )
        assert time.monotonic() - began < 10
        assert client.result("echo", {"a": 1}) == {"a": 1}


def test_a_server_that_stops_reading_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcp_proxy.backends import bridge

    monkeypatch.setattr(bridge, "WRITE_TIMEOUT", 0.5)
    with running("wsgi") as proxy:
        client = proxy.client().open()
        client.result("stop_reading")
        answer = client.call("echo", {"text": "x" * 2_000_000})
        assert answer.failure in ("server-exited", "server-timeout")
        eventually(lambda: client.call("count").has_succeeded)


# --- failures that are not the client's fault ----------------------------------------------------


@pytest.mark.parametrize("way", BOTH)
def test_a_client_of_streams_gets_a_failed_initialize_as_one_event(way: str) -> None:
    with running(way, [*SCRIPTED, "--die-on-initialize"]) as proxy:
        answer = proxy.client().initialize(Accept="text/event-stream")
        assert (answer.status, answer.failure, answer.is_stream) == (200, "server-exited", True)
        assert "Mcp-Session-Id" not in answer.headers
        (message,) = answer.messages()
        assert (message["id"], "exit code 3" in message["error"]["message"]) == (0, True)


@pytest.mark.parametrize("way", BOTH)
def test_a_client_of_streams_learns_of_its_session_at_once(way: str) -> None:
    with running(way) as proxy:
        client = proxy.client()
        answer = client.initialize(Accept="text/event-stream")
        assert (answer.is_stream, answer.failure) == (True, None)
        assert "result" in answer.message()
        assert client.result("count")["calls"] == 1


def test_the_setting_http_gives_a_lost_server_its_status() -> None:
    with running("wsgi", failure_status="http", request_timeout=3) as proxy:
        client = proxy.client().open()
        lost = client.call("die", {"code": 7}, key="k")
        assert (lost.status, lost.failure) == (502, "server-exited")
        assert (lost.message()["id"], lost.status) == ("k", 502)
        slow = client.call("silence")
        assert (slow.status, slow.failure) == (504, "server-timeout")


def test_each_call_of_a_batch_learns_how_the_server_ended(proxy: Proxy) -> None:
    client = proxy.client().open("2025-03-26")
    calls = [{**request_of(number), "method": "silence"} for number in (1, 2)]
    die = {**request_of(3), "method": "die", "params": {"code": 7}}
    answer = client.post([*calls, die], Accept="application/json")
    assert (answer.status, answer.failure) == (200, "server-exited")
    messages = answer.messages()
    assert sorted(message["id"] for message in messages) == [1, 2, 3]
    assert all("exit code 7" in message["error"]["message"] for message in messages)


@pytest.mark.parametrize(("failure_status", "status"), [("json-rpc", 200), ("http", 504)])
def test_a_batch_that_fails_in_flight_is_one_array_with_the_status_of_a_call(
    failure_status: str, status: int
) -> None:
    calls = [{**request_of(number), "method": "silence"} for number in ("a", 2)]
    with running("wsgi", failure_status=failure_status, request_timeout=3) as proxy:
        client = proxy.client().open("2025-03-26")
        failed = client.post(calls, Accept="application/json")
        assert (failed.status, failed.failure) == (status, "server-timeout")
        assert [(m["id"], m["error"]["code"]) for m in failed.messages()] == [
            ("a", -32000),
            (2, -32000),
        ]
        # What was answered is not to be lost: then the batch has succeeded, but for some calls.
        partly = client.post([*calls, request_of(3)], Accept="application/json")
        assert (partly.status, partly.failure) == (200, "server-timeout")
        assert sorted(str(m["id"]) for m in partly.messages() if "error" in m) == ["2", "a"]


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json, text/event-stream"])
def test_a_batch_that_fails_in_a_stream_has_an_event_for_each_call_and_an_end(accept: str) -> None:
    calls = [{**request_of(number), "method": "silence"} for number in ("a", 2)]
    with running("wsgi", request_timeout=3, sse_after=0.1) as proxy:
        answer = proxy.client().open("2025-03-26").post(calls, Accept=accept)
        assert answer.is_stream
        assert [(m["id"], m["error"]["code"]) for m in answer.messages()] == [
            ("a", -32000),
            (2, -32000),
        ]


@pytest.mark.parametrize("how", ["--die-on-initialize", "--refuse"])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", ""])
def test_a_failed_initialize_names_no_session_whatever_precedes_it(how: str, accept: str) -> None:
    headers = {"Accept": accept} if accept else {}
    with running("wsgi", [*SCRIPTED, "--log-first", "2", how]) as proxy:
        answer = proxy.client().initialize(**headers)
        assert "Mcp-Session-Id" not in answer.headers
        assert (answer.status, "error" in answer.message()) == (200, True)


def test_a_failed_initialize_under_http_has_its_status_and_no_session() -> None:
    with running("wsgi", [*SCRIPTED, "--die-on-initialize"], failure_status="http") as proxy:
        for accept in ("text/event-stream", "application/json"):
            answer = proxy.client().initialize(Accept=accept)
            assert (answer.status, answer.failure) == (502, "server-exited")
            assert "Mcp-Session-Id" not in answer.headers
            assert answer.message()["id"] == 0


def test_a_failure_inside_a_stream_is_in_the_access_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "mcp_proxy.access")
    with running("wsgi") as proxy:
        client = proxy.client().open()
        client.call("die", {"code": 7}, Accept="text/event-stream").body()
    lines = [each.getMessage() for each in caplog.records if each.name == "mcp_proxy.access"]
    expected = 'reason="server-exited: The server exited (exit code 7) before it answered"'
    assert [expected in line for line in lines if " die " in line] == [True]
