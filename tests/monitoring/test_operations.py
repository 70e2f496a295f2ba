"""Which operations are counted, with which labels, and when."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy import ProxyConfig, create_app, metrics
from mcp_proxy.edge.operations import Operations
from mcp_proxy.errors import BackendExited, ClientLeft
from mcp_proxy.metrics import (
    BACKEND_ERRORS,
    CALLS,
    OPERATIONS,
    REFUSED,
    RESTARTED,
    SESSIONS_ENDED,
    SESSIONS_STARTED,
    Metric,
    MetricsPage,
)
from mcp_proxy.wire import jsonrpc
from tests.servers.http_backend import HttpBackend, reply, reset, stream
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.modern_client import ModernClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def page() -> Iterator[MetricsPage]:
    """Where this process counts while a test runs."""
    made = MetricsPage(1)
    metrics.use(made.take(0))
    yield made
    metrics.use(None)


@pytest.fixture
def client() -> Iterator[McpClient]:
    """A client of the scripted server, in this process."""
    app = create_app(ProxyConfig(command=SCRIPTED, metrics=True))
    try:
        yield McpClient(WsgiFront(app), "/mcp")
    finally:
        app.close()


def counted(page: MetricsPage, metric: Metric) -> dict[tuple[str, ...], float]:
    """How often each series of a metric was counted; those that never were are left out."""
    found = {
        key.labels: value[0] if len(value) == 1 else sum(value[:-1])
        for key, value in page.read().items()
        if key.metric is metric
    }
    return {labels: count for labels, count in found.items() if count}


def pending(page: MetricsPage, *messages: dict[str, Any], is_shared: bool = False) -> Operations:
    counters = metrics.current()
    assert counters is not None
    operations = Operations(counters, "s", is_shared)
    for message in messages:
        found = jsonrpc.parse(json.dumps({"jsonrpc": "2.0", **message}).encode())
        operations.begin_all(found, 0.0, "local")
    return operations


def call(tool: str, number: int = 1) -> dict[str, Any]:
    return {"id": number, "method": "tools/call", "params": {"name": tool}}


def answer(number: int = 1, **outcome: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": number, **outcome}).encode()


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "error_type"),
    [
        (answer(error={"code": -32601}), 404, "-32601"),
        (b"<html>", 502, "502"),
        (answer(result={}), 200, ""),
        (b"", 202, ""),
    ],
)
def test_a_status_counts_where_the_answer_says_nothing(
    page: MetricsPage, data: bytes, status: int, error_type: str
) -> None:
    pending(page, {"id": 1, "method": "ping"}).answered(data, None, status)
    assert counted(page, OPERATIONS) == {("s", "ping", "", error_type): 1}


@pytest.mark.parametrize(
    ("data", "error_type"),
    [
        (answer(result={}), ""),
        (answer(result={"isError": False}), ""),
        (answer(result={"content": [{"text": '{"isError": true, "error": 1}'}]}), ""),
        (answer(result={"structuredContent": {"error": {"code": 5}, "isError": True}}), ""),
        (answer(result={"isError": True}), "tool_error"),
        (b'{"jsonrpc":"2.0","id":1,"result":{"isError" : true}}', "tool_error"),
        (answer(error={"code": -32602, "message": "no"}), "-32602"),
        (answer(error={"code": "odd", "message": "no"}), "other"),
        (b"not JSON", ""),
    ],
)
def test_an_answer_tells_how_a_call_has_ended(
    page: MetricsPage, data: bytes, error_type: str
) -> None:
    pending(page, call("known")).answered(answer(result={}))
    pending(page, call("known")).answered(data)
    found = counted(page, OPERATIONS)
    found["s", "tools/call", "known", ""] -= 1
    assert found["s", "tools/call", "known", error_type] == 1


def test_a_tool_that_no_server_knows_and_an_unknown_method_get_no_series(
    page: MetricsPage,
) -> None:
    for number in range(200):
        pending(page, call(f"guessed {number}")).answered(answer(error={"code": -32602}))
        pending(page, call(f"guessed {number}")).answered(answer(result={"isError": True}))
        pending(page, {"id": 1, "method": f"x/{number}"}).answered(answer(result={}))
    assert counted(page, OPERATIONS) == {
        ("s", "tools/call", "", "-32602"): 200,
        ("s", "tools/call", "", "tool_error"): 200,
        ("s", "other", "", ""): 200,
    }


def test_the_answers_of_a_batch_are_told_apart_by_their_ids(page: MetricsPage) -> None:
    messages = [call("one", 1), call("two", 2), call("two", 3)]
    operations = pending(page, *messages)
    operations.answered(answer(3, error={"code": -32000}))
    operations.answered(b"[" + answer(2, result={}) + b"," + answer(1, result={}) + b"]")
    operations.close("never")
    assert counted(page, OPERATIONS) == {
        ("s", "tools/call", "", "-32000"): 1,
        ("s", "tools/call", "one", ""): 1,
        ("s", "tools/call", "two", ""): 1,
    }


def test_what_the_proxy_answers_itself_has_the_kind_of_the_failure(page: MetricsPage) -> None:
    pending(page, call("t")).answered(answer(error={"code": -32000}), BackendExited("gone"))
    pending(page, call("t")).answered(answer(error={"code": -32000}), ClientLeft())
    pending(page, call("t")).close("client-left")
    assert counted(page, OPERATIONS) == {
        ("s", "tools/call", "", "server-exited"): 1,
        ("s", "tools/call", "", "client-left"): 2,
    }


def test_on_a_shared_stream_only_the_answer_with_its_id_ends_an_operation(
    page: MetricsPage,
) -> None:
    operations = pending(page, call("t", 7), is_shared=True)
    operations.answered(answer(8, result={}))
    assert counted(page, OPERATIONS) == {}
    operations.answered(answer(7, result={}))
    assert counted(page, OPERATIONS) == {("s", "tools/call", "t", ""): 1}


# --- through the proxy ---------------------------------------------------------------------------


def test_each_call_is_counted_once_and_a_session_when_it_ends(
    page: MetricsPage, client: McpClient
) -> None:
    client.open()
    for _ in range(5):
        client.call("tools/call", {"name": "echo"})
    client.delete()
    found = counted(page, OPERATIONS)
    assert found["default", "tools/call", "echo", ""] == 5
    assert found["default", "initialize", "", ""] == 1
    assert found["default", "notifications/initialized", "", ""] == 1
    assert counted(page, CALLS) == {("default", "local"): 6}
    assert counted(page, SESSIONS_ENDED) == {("default",): 1}
    (labels,) = counted(page, SESSIONS_STARTED)
    assert labels[0] == "default"


def test_an_answer_as_a_stream_is_counted_when_its_last_event_is_there(
    page: MetricsPage, client: McpClient
) -> None:
    client.open()
    assert len(client.call("progress", {"_meta": {"progressToken": 1}}).messages()) > 1
    assert counted(page, OPERATIONS)["default", "other", "", ""] == 1


def test_a_server_that_exits_is_a_backend_error(page: MetricsPage, client: McpClient) -> None:
    client.open()
    client.call("die")
    assert counted(page, BACKEND_ERRORS) == {("default", "server-exited"): 1}
    assert counted(page, OPERATIONS)["default", "other", "", "server-exited"] == 1


def test_what_is_refused_is_counted_by_the_reason(page: MetricsPage, client: McpClient) -> None:
    client.front.request("POST", "/mcp", {"Origin": "http://evil.example"}, b"{}")
    client.front.request("PUT", "/mcp", {}, None)
    client.front.request("POST", "/mcp", {"Content-Type": "application/json"}, b"{")
    reasons = {labels[1]: count for labels, count in counted(page, REFUSED).items()}
    assert reasons == {"forbidden": 1, "method-not-allowed": 1, "parse-error": 1}


def test_nothing_is_counted_where_nobody_asks(client: McpClient, page: MetricsPage) -> None:
    metrics.use(None)
    client.open()
    client.call("ping")
    assert counted(page, OPERATIONS) == {}


# --- what is served ------------------------------------------------------------------------------


def test_metrics_are_served_where_they_are_asked_for(client: McpClient) -> None:
    client.open()
    client.call("tools/call", {"name": "echo"})
    answer = client.front.request("GET", "/metrics", {}, None)
    text = answer.body().decode()
    assert answer.status == 200
    assert "# TYPE mcp_server_operation_duration_seconds histogram" in text
    assert re.search(
        r'mcp_server_operation_duration_seconds_count\{error_type="",gen_ai_tool_name="echo",'
        r'mcp_method_name="tools/call",mcp_server="default"\} 1\.0',
        text,
    )
    assert 'mcp_proxy_children{worker="0"} 1.0' in text


def test_metrics_are_for_our_own_hosts_and_origins(client: McpClient) -> None:
    for name, value in {"Host": "evil.example", "Origin": "http://evil.example"}.items():
        assert client.front.request("GET", "/metrics", {name: value}, None).status == 403


def test_metrics_are_not_served_unless_they_are_asked_for() -> None:
    app = create_app(ProxyConfig(command=SCRIPTED))
    try:
        assert WsgiFront(app).request("GET", "/metrics", {}, None).status == 404
    finally:
        app.close()


# --- in front of HTTP servers --------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as made:
        yield made


@pytest.fixture
def http_client(backend: HttpBackend) -> Iterator[McpClient]:
    """A client of an HTTP server, through the transparent proxy."""
    with create_app(ProxyConfig(target_url=(f"{backend.url}/mcp",), metrics=True)) as app:
        front = LocalFront(app)
        yield McpClient(front, "/mcp")
        front.close()


def test_calls_to_an_http_server_are_counted_as_json_and_as_a_stream(
    page: MetricsPage, backend: HttpBackend, http_client: McpClient
) -> None:
    http_client.open()
    http_client.call("tools/call", {"name": "plain"})
    ok = {"jsonrpc": "2.0", "id": 5, "result": {}}
    backend.rpc["tools/call"] = stream(f"data: {json.dumps(ok)}\n\n".encode())
    counted_before = counted(page, OPERATIONS)
    assert counted_before["default", "tools/call", "plain", ""] == 1
    answer = http_client.call("tools/call", {"name": "streamed"}, 5)
    seen = []
    for message in answer.stream():
        seen.append(message)
        assert counted(page, OPERATIONS)["default", "tools/call", "streamed", ""] == 1
    assert seen == [ok]
    http_client.delete()
    assert counted(page, SESSIONS_ENDED) == {("default",): 1}


def test_an_http_server_that_breaks_off_or_refuses_is_an_error(
    page: MetricsPage, backend: HttpBackend, http_client: McpClient
) -> None:
    http_client.open()
    backend.rpc["tools/call"] = reset
    http_client.call("tools/call", {"name": "t"})
    backend.rpc["tools/call"] = reply(503, b"busy", "Content-Type: text/plain")
    http_client.call("tools/call", {"name": "t"})
    found = counted(page, OPERATIONS)
    assert found["default", "tools/call", "", "server-unreachable"] == 1
    assert found["default", "tools/call", "", "503"] == 1
    assert counted(page, BACKEND_ERRORS) == {("default", "server-unreachable"): 1}


def test_a_server_that_is_started_for_a_new_caller_is_no_restart(
    page: MetricsPage, caplog: pytest.LogCaptureFixture
) -> None:
    """Else five new callers of 2026-07-28 were five lost servers to whoever is alerted of those."""
    caplog.set_level("INFO")
    with create_app(ProxyConfig(command=SCRIPTED, metrics=True, idle_timeout=0.5)) as app:
        for caller in ("Bearer a", "Bearer b"):
            modern = ModernClient(WsgiFront(app), authorization=caller)
            assert modern.call("echo").message()["id"] == 1
        client = McpClient(WsgiFront(app)).open()
        eventually(lambda: "a session is idle" in caplog.text)
        assert client.call("ping")
        assert counted(page, RESTARTED) == {}
        assert "started again" not in caplog.text
        client.call("die")
        client.call("ping")
        assert counted(page, RESTARTED) == {("default",): 1}
        assert "the server of this session was started again" in caplog.text
