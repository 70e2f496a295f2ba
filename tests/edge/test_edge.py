"""The surround of every request: bodies, errors, streams, logs, connections."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from mcp_proxy import ProxyConfig, ProxyOptions
from mcp_proxy.edge import logs
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.edge import Edge, StreamLimit, render
from mcp_proxy.edge.reply import STATUS_LINES, Reply, empty_reply, json_reply, stream_reply
from mcp_proxy.edge.request import PASS_TO, ClientRequest, RequestIds
from mcp_proxy.errors import (
    BodyTooLarge,
    InvalidRequest,
    Overloaded,
    StorageUnavailable,
)


def request_with(body: bytes = b"", **headers: str) -> ClientRequest:
    return ClientRequest(
        create_environ("/mcp", method="POST", data=body, headers=headers), RequestIds()
    )


# --- requests ------------------------------------------------------------------------------------


def test_a_body_of_the_limit_is_read_and_one_more_byte_is_not() -> None:
    assert request_with(b"x" * 10).read_body(10) == b"x" * 10
    with pytest.raises(BodyTooLarge, match="larger than 10 bytes"):
        request_with(b"x" * 11).read_body(10)


@pytest.mark.parametrize("can_be_passed", [False, True])
def test_a_body_is_kept_only_where_another_worker_may_get_it(can_be_passed: bool) -> None:
    request = request_with(b"x" * 10)
    if can_be_passed:
        request.environ[PASS_TO] = lambda *_: False
    request.read_body(10)
    assert request.body == (b"x" * 10 if can_be_passed else b"")
    request.pass_to("another", "session")
    assert request.body == b""


def test_a_chunked_body_is_limited_too() -> None:
    environ = create_environ("/mcp", method="POST")
    environ.pop("CONTENT_LENGTH", None)
    environ |= {"wsgi.input": io.BytesIO(b"x" * 100), "wsgi.input_terminated": True}
    with pytest.raises(BodyTooLarge):
        ClientRequest(environ, RequestIds()).read_body(99)


def test_a_body_that_ends_early_is_an_error() -> None:
    environ = create_environ("/mcp", method="POST", data=b"abc")
    environ["CONTENT_LENGTH"] = "5"
    with pytest.raises(InvalidRequest, match="ended early"):
        ClientRequest(environ, RequestIds()).read_body(100)


def test_a_stream_may_give_a_body_bit_by_bit() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(1 if size else 0)

    environ = create_environ("/mcp", method="POST", data=b"abcde")
    environ["wsgi.input"] = Trickle(b"abcdefgh")
    assert ClientRequest(environ, RequestIds()).read_body(5) == b"abcde"


def test_a_body_is_not_touched_when_its_length_is_over_the_limit() -> None:
    environ = create_environ("/mcp", method="POST", data=b"x" * 11)
    with pytest.raises(BodyTooLarge):
        ClientRequest(environ, RequestIds()).read_body(10)
    assert environ["wsgi.input"].read() == b"x" * 11


@pytest.mark.parametrize("length", ["-1", "1e3", "\u0661", "+3", " 3"])
def test_a_length_that_is_none_is_not_believed(length: str) -> None:
    environ = create_environ("/mcp", method="POST", data=b"abc")
    environ["CONTENT_LENGTH"] = length
    assert ClientRequest(environ, RequestIds()).read_body(100) in (b"", b"abc")


def test_request_ids_are_new_and_a_fork_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = RequestIds()
    ours = [ids.new() for _ in range(3)]
    assert len(set(ours)) == 3
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert ids.new()[:8] != ours[0][:8]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\u00e4"])
def test_a_bad_request_id_is_replaced(given: str) -> None:
    environ = create_environ("/mcp")
    environ["HTTP_X_REQUEST_ID"] = given
    assert len(ClientRequest(environ, RequestIds()).id) == 16


def test_headers_are_found_by_their_names() -> None:
    request = request_with(**{"Last-Event-ID": "7"})
    assert request.header("last-event-id") == "7"
    assert request.header("Absent") is None


def test_without_accept_only_json_is_taken() -> None:
    request = request_with()
    assert request.accepts("application/json")
    assert not request.accepts("text/event-stream")


# --- errors --------------------------------------------------------------------------------------


def test_an_error_is_rendered_with_its_status_code_and_headers() -> None:
    error = StorageUnavailable()
    error.request_id = ""
    reply = render(error, request_with(), "json-rpc")
    assert reply.status == 503
    assert ("Retry-After", "1") in reply.headers
    assert ("X-MCP-Proxy-Error", "store-unavailable") in reply.headers
    assert isinstance(reply.body, bytes)
    assert json.loads(reply.body)["id"] == ""


def test_an_unknown_status_still_has_a_line() -> None:
    assert STATUS_LINES[299] == "299 Unknown"


def serve(edge: Edge, handle: Any, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    app = lambda env, start: edge.serve(env, start, handle)  # noqa: E731
    body, status, headers = run_wsgi_app(app, create_environ("/mcp", environ_overrides=environ))
    content = b"".join(body)
    if hasattr(body, "close"):
        body.close()
    return status, dict(headers), content


def test_what_nobody_foresaw_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def explode(request: ClientRequest) -> Reply:
        raise ValueError("a secret detail")

    status, _, body = serve(Edge(ProxyConfig()), explode)
    assert status == "500 Internal Server Error"
    assert b"secret" not in body
    assert "a secret detail" in caplog.text


def test_a_draining_edge_serves_nothing_new() -> None:
    edge = Edge(ProxyConfig())
    edge.is_draining = True

    def begin_work(request: ClientRequest) -> Reply:
        edge.require_open()
        return empty_reply(202)

    status, headers, _ = serve(edge, begin_work)
    assert status == "503 Service Unavailable"
    assert "Retry-After" in headers


# --- standing streams ----------------------------------------------------------------------------


def test_streams_are_counted_up_to_the_limit() -> None:
    streams = StreamLimit(1)
    streams.acquire()
    with pytest.raises(Overloaded):
        streams.acquire()
    streams.release()
    streams.acquire()
    assert repr(streams) == "<StreamLimit 1/1>"


# --- connections ---------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    yield server, client
    for end in (server, client, listener):
        end.close()


def test_a_client_that_closed_has_left(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    connection = ClientConnection({"gunicorn.socket": server})
    assert not connection.has_left()
    client.sendall(b"the next request")
    assert not connection.has_left()
    client.close()
    assert connection.has_left()
    server.close()
    assert connection.has_left()


def test_the_kernel_is_told_when_to_give_up(pair: tuple[socket.socket, socket.socket]) -> None:
    server, _ = pair
    ClientConnection({"gunicorn.socket": server}).give_up_after(2.5)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500


def test_waitress_says_it_itself() -> None:
    assert ClientConnection({"waitress.client_disconnected": lambda: True}).has_left()


def test_elsewhere_nobody_knows() -> None:
    connection = ClientConnection({})
    connection.give_up_after(1)
    assert not connection.has_left()


# --- logs ----------------------------------------------------------------------------------------


class CountingBody:
    """A body that counts how often it is closed."""

    closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"x"

    def close(self) -> None:
        self.closed += 1


def test_a_stream_is_logged_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    edge = Edge(ProxyConfig())
    body = CountingBody()
    serve(edge, lambda request: stream_reply(body))
    (record,) = caplog.records
    assert record.fields["status"] == 200  # type: ignore[attr-defined]
    assert body.closed == 1


def test_lines_of_a_request_carry_its_id() -> None:
    record = logging.LogRecord("mcp_proxy.x", logging.INFO, "", 0, "hello", (), None)
    token = logs.current_request.set("abc")
    try:
        assert "[abc]: hello" in logs.TextFormatter().format(record)
        assert json.loads(logs.JsonFormatter().format(record))["request"] == "abc"
    finally:
        logs.current_request.reset(token)
    assert "request" not in json.loads(logs.JsonFormatter().format(record))


def test_the_time_of_json_lines_has_a_zone() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), None)
    time = datetime.fromisoformat(json.loads(logs.JsonFormatter().format(record))["time"])
    assert time.utcoffset() == timedelta(0)
    assert abs(time.timestamp() - record.created) < 0.01


def test_json_lines_carry_the_exception() -> None:
    try:
        raise ValueError("oh")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), info)
    assert "ValueError: oh" in json.loads(logs.JsonFormatter().format(record))["exception"]


def test_configure_replaces_what_it_set_before(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("mcp_proxy")
    before = (logger.handlers, logger.level, logger.propagate)
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    try:
        logs.configure("json", "warning")
        logs.configure("text", "info")
        logging.getLogger("mcp_proxy.x").info("once")
        assert capfd.readouterr().err.count("once") == 1
    finally:
        logger.handlers, logger.level, logger.propagate = before


def test_a_body_is_closed_when_the_server_refuses_the_headers() -> None:
    body = CountingBody()

    def refuse(*_: object) -> Any:
        raise ValueError("no such header")

    environ = create_environ("/mcp")
    with pytest.raises(ValueError, match="no such header"):
        Edge(ProxyOptions()).serve(environ, refuse, lambda request: stream_reply(body))
    assert body.closed == 1


@pytest.mark.parametrize("failure", [ValueError("bad"), Exception("a server's own error")])
def test_a_body_that_the_server_cannot_read_is_the_clients_fault(failure: Exception) -> None:
    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise failure

    environ = create_environ("/mcp", method="POST")
    environ.pop("CONTENT_LENGTH", None)
    environ |= {"wsgi.input": Broken(), "wsgi.input_terminated": True}
    with pytest.raises(InvalidRequest, match=r"framing|ended early"):
        ClientRequest(environ, RequestIds()).read_body(99)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/mcp", "/mcp"),
        ("/é", "/é"),
        ("/a\nb\r\x1b[31m", "/a\\nb\\r\\x1b[31m"),
        ("/\u2028\x85", "/\\u2028\\x85"),
        ("/" + "x" * 10_000, "/" + "x" * 199 + "[...]"),
    ],
)
def test_what_a_client_says_stays_on_its_log_line(said: str, shown: str) -> None:
    assert logs.escaped(said) == shown


def test_no_message_begins_a_second_line_of_the_text_log() -> None:
    made = logging.LogRecord("mcp_proxy", logging.INFO, "", 0, "a\nb \x1b[2J %s", ("c\r\td",), None)
    line = logs.TextFormatter().format(made)
    assert line.endswith(": a\\nb \\x1b[2J c\\r\td")
    assert "\n" not in line


def test_an_answer_to_head_has_the_length_of_the_body_and_no_body() -> None:
    def answer(method: str, status: int) -> tuple[list[bytes], dict[str, str]]:
        found: list[tuple[str, str]] = []
        environ = create_environ("/healthz", method=method)
        reply = json_reply(b'{"status":"ok"}', status)
        body = Edge(ProxyOptions()).serve(
            environ, lambda _, headers, *__: found.extend(headers), lambda request: reply
        )
        return list(body), dict(found)

    for status in (200, 503):
        (body,), with_body = answer("GET", status)
        assert answer("HEAD", status)[0] == []
        assert answer("HEAD", status)[1]["Content-Length"] == with_body["Content-Length"]
        assert with_body["Content-Length"] == str(len(body))
