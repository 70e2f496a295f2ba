"""What is not the client's fault, on the wire: the one place where errors become answers."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from typing import Any

import pytest
from werkzeug.test import create_environ

from mcp_proxy import ProxyConfig, ProxyOptions, errors
from mcp_proxy.edge import logs
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.reply import Reply, empty_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.wire import jsonrpc, sse
from tests.support.front import Answer, Json, WsgiFront

_SENTENCE = "The server exited (exit code 7) before it answered"
_REQUEST = b'{"jsonrpc":"2.0","id":"k","method":"tools/call"}'
_NOTIFICATION = b'{"jsonrpc":"2.0","method":"notifications/x"}'
_RESPONSE = b'{"jsonrpc":"2.0","id":1,"result":{}}'
_BATCH = b"[" + b",".join([_REQUEST, _NOTIFICATION, _REQUEST.replace(b'"k"', b"0")]) + b"]"
_BOTH = "application/json, text/event-stream"


def ask(
    error: Exception, body: bytes | None, method: str = "POST", accept: str = _BOTH, **options: Any
) -> Answer:
    """The answer where `error` is raised once the body was read."""
    edge = Edge(ProxyOptions(**options))

    def fail(request: ClientRequest) -> Reply:
        if body is not None:
            request.message = jsonrpc.parse(request.read_body(1000))
        raise error

    front = WsgiFront(lambda environ, start: edge.serve(environ, start, fail))
    return front.request(method, "/mcp", {"Accept": accept}, body)


def error_of(message: Json) -> Json:
    error: Json = message["error"]
    return error


FAILURES = [
    (errors.BackendLost("x"), "server-exited", 502),
    (errors.BackendExited("x"), "server-exited", 502),
    (errors.BackendDraining("x"), "draining", 502),
    (errors.BackendUnreached("x"), "server-unreachable", 502),
    (errors.BackendUnavailable("x"), "server-unreachable", 503),
    (errors.BackendNotStarted("x"), "server-start-failed", 502),
    (errors.BackendTimeout("x"), "server-timeout", 504),
    (errors.BadAnswer("x"), "bad-answer", 502),
    (errors.ConnectionBroken("x"), "server-unreachable", 502),
    (errors.StorageUnavailable("x"), "store-unavailable", 503),
    (errors.Overloaded("x"), "overloaded", 503),
    (errors.Draining(), "draining", 503),
]


@pytest.mark.parametrize(("error", "kind", "status"), FAILURES)
def test_a_request_gets_a_json_rpc_error_and_the_kind(
    error: errors.ProxyError, kind: str, status: int
) -> None:
    answer = ask(error, _REQUEST)
    assert (answer.status, answer.failure) == (200, kind)
    assert ("Retry-After" in answer.headers) == (status == 503)
    expected = {"code": -32000, "message": error.message}
    assert answer.message() == {"jsonrpc": "2.0", "id": "k", "error": expected}


@pytest.mark.parametrize(("error", "kind", "status"), FAILURES)
def test_the_setting_http_gives_the_status_and_the_same_answer(
    error: errors.ProxyError, kind: str, status: int
) -> None:
    answer = ask(error, _REQUEST, failure_status="http")
    assert (answer.status, answer.failure) == (status, kind)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert (answer.message()["id"], answer.status) == ("k", status)


@pytest.mark.parametrize("failure_status", ["json-rpc", "http"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(("error", "kind", "status"), FAILURES)
def test_without_a_message_the_status_says_it(
    error: errors.ProxyError, kind: str, status: int, method: str, failure_status: str
) -> None:
    answer = ask(error, None, method, failure_status=failure_status)
    assert (answer.status, answer.failure) == (status, kind)
    message = answer.message()
    assert (error_of(message)["code"], "id" in message) == (-32000, False)


@pytest.mark.parametrize("failure_status", ["json-rpc", "http"])
@pytest.mark.parametrize("body", [_NOTIFICATION, _RESPONSE, b"[" + _NOTIFICATION + b"]"])
def test_what_wants_no_answer_counts_as_accepted_and_is_logged(
    body: bytes, failure_status: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(errors.StorageUnavailable(), body, failure_status=failure_status)
    assert (answer.status, answer.failure, answer.body()) == (202, "store-unavailable", b"")
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "store-unavailable" in record.getMessage()


@pytest.mark.parametrize(("failure_status", "status"), [("json-rpc", 200), ("http", 502)])
def test_each_request_of_a_batch_has_its_error(failure_status: str, status: int) -> None:
    answer = ask(errors.BackendLost(_SENTENCE), _BATCH, failure_status=failure_status)
    assert (answer.status, answer.failure) == (status, "server-exited")
    found = json.loads(answer.body())
    assert [message["id"] for message in found] == ["k", 0]
    assert {error_of(message)["message"] for message in found} == {_SENTENCE}


@pytest.mark.parametrize("body", [_REQUEST, _BATCH])
def test_a_client_of_event_streams_gets_one_event_and_an_end(body: bytes) -> None:
    answer = ask(errors.Draining(), body, accept="text/event-stream")
    assert (answer.status, answer.failure, answer.is_stream) == (200, "draining", True)
    (event,) = sse.Decoder().feed(answer.body())
    found = json.loads(event.data or b"")
    first = found[0] if isinstance(found, list) else found
    assert (first["id"], error_of(first)["code"]) == ("k", -32000)


@pytest.mark.parametrize("failure_status", ["json-rpc", "http"])
def test_the_faults_of_clients_keep_their_status(failure_status: str) -> None:
    for error in (errors.InvalidRequest("x"), errors.SessionUnknown(), errors.MissingSession()):
        for body in (_REQUEST, _NOTIFICATION):
            answer = ask(error, body, failure_status=failure_status)
            assert (answer.status, answer.failure) == (400, None)
            assert answer.message().get("id") == ("k" if body == _REQUEST else None)


@pytest.mark.parametrize("body", [_REQUEST, _NOTIFICATION, _BATCH])
def test_the_end_of_a_session_is_told_without_an_id(body: bytes) -> None:
    answer = ask(errors.SessionEnded(), body)
    assert (answer.status, answer.failure) == (404, None)
    expected = {"code": -32001, "message": "Session not found"}
    assert answer.message() == {"jsonrpc": "2.0", "error": expected}


def test_what_nobody_foresaw_ends_no_session_either(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(ValueError("a secret detail"), _REQUEST)
    assert (answer.status, answer.failure) == (200, "internal-error")
    expected = {"code": -32603, "message": "Internal error"}
    assert answer.message() == {"jsonrpc": "2.0", "id": "k", "error": expected}
    assert "a secret detail" in caplog.text


def test_a_cancelled_call_has_not_failed() -> None:
    answer = ask(errors.Cancelled(), _REQUEST)
    assert (answer.status, answer.failure, answer.message()["id"]) == (200, None, "k")


def test_a_page_may_read_the_kind() -> None:
    edge = Edge(ProxyConfig())
    front = WsgiFront(
        lambda environ, start: edge.serve(environ, start, lambda request: empty_reply(202))
    )
    answer = front.request("POST", "/mcp", {"Origin": "http://localhost"}, b"")
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-MCP-Proxy-Error", "Mcp-Session-Id", "X-Request-ID"} <= set(exposed)


MODERN = [
    (errors.HeaderMismatch("x"), 400, -32020, None),
    (errors.MissingCapability({"roots": {}}), 400, -32021, {"requiredCapabilities": {"roots": {}}}),
    (
        errors.UnsupportedRevision("v9", ("2026-07-28",)),
        400,
        -32022,
        {"supported": ["2026-07-28"], "requested": "v9"},
    ),
    (errors.InvalidParams("x"), 400, -32602, None),
    (errors.MethodNotFound("ping"), 404, -32601, None),
]


@pytest.mark.parametrize("failure_status", ["json-rpc", "http"])
@pytest.mark.parametrize(("error", "status", "code", "data"), MODERN)
def test_what_is_wrong_with_a_modern_request_is_told_with_data(
    error: errors.ProxyError, status: int, code: int, data: Json | None, failure_status: str
) -> None:
    answer = ask(error, _REQUEST, failure_status=failure_status)
    message = answer.message()
    assert (answer.status, answer.failure, message["id"]) == (status, None, "k")
    expected: Json = {"code": code, "message": error.message}
    assert error_of(message) == (expected if data is None else {**expected, "data": data})


@pytest.mark.parametrize("body", [_REQUEST, _BATCH, None])
def test_a_failure_may_have_data_too(body: bytes | None) -> None:
    error = errors.BackendLost("x")
    error.data = {"reason": "y"}
    found = json.loads(ask(error, body).body())
    messages = found if isinstance(found, list) else [found]
    assert all(error_of(message)["data"] == {"reason": "y"} for message in messages)


# --- the access line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "body", "reason"),
    [
        (errors.BackendLost(_SENTENCE), _REQUEST, f"server-exited: {_SENTENCE}"),
        (errors.Overloaded("All taken"), _NOTIFICATION, "overloaded: All taken"),
        (errors.Forbidden("Origin 'x' is not allowed"), _REQUEST, "Origin 'x' is not allowed"),
        (errors.SessionEnded(), None, "Session not found"),
    ],
)
def test_the_access_line_says_why(
    error: errors.ProxyError, body: bytes | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    ask(error, body)
    (record,) = [each for each in caplog.records if each.name == "mcp_proxy.access"]
    assert f'reason="{reason}"' in logs.TextFormatter().format(record)
    assert json.loads(logs.JsonFormatter().format(record))["reason"] == reason


def test_a_reason_stays_on_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    ask(errors.InvalidRequest('a\n"b"'), _REQUEST)
    (record,) = [each for each in caplog.records if each.name == "mcp_proxy.access"]
    line = logs.TextFormatter().format(record)
    assert "\n" not in line
    assert line.endswith(r'reason="a\n\"b\""')


def test_what_succeeds_has_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    edge = Edge(ProxyConfig())
    edge.serve(create_environ("/mcp"), lambda *_: lambda _: None, lambda request: empty_reply(202))
    (record,) = caplog.records
    assert "reason" not in logs.TextFormatter().format(record)
    assert json.loads(logs.JsonFormatter().format(record))["reason"] == ""


def test_a_request_that_failed_is_forgotten_without_the_collector() -> None:
    edge = Edge(ProxyOptions())
    failures: list[weakref.ref[errors.ProxyError]] = []

    def fail(request: ClientRequest) -> Reply:
        failure = errors.ClientLeft()
        failures.append(weakref.ref(failure))
        raise failure

    gc.disable()
    try:
        edge.serve(create_environ("/mcp"), lambda *_: bytes, fail)
        assert [failure() for failure in failures] == [None]
    finally:
        gc.enable()
