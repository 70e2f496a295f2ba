"""A worker without a free thread: who waits, for how long, and what is answered nevertheless."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from mcp_proxy.app import create_app
from mcp_proxy.config import ProxyConfig
from tests.live.connections import Connection
from tests.server.test_worker import Held, serving
from tests.server.ways_in import WayIn, impatient
from tests.support.front import HttpFront, McpClient, WsgiFront
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

PATIENCE = 2.0


def taken(held: Held, stack: ExitStack, count: int) -> list[Connection]:
    """Connections each of which has a thread until `release`."""
    made = []
    for _ in range(count):
        connection = stack.enter_context(closing(held.connect()))
        connection.send("/open")
        assert connection.read_head().status == 200
        made.append(connection)
    return made


def get(connection: Connection, target: str) -> None:
    connection.send_raw(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


# --- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/probe", "/probe?x=1"])
def test_a_probe_is_answered_while_every_thread_is_taken(way_in: WayIn, target: str) -> None:
    with way_in.serving("--threads", "2") as held, ExitStack() as stack:
        taken(held, stack, 2)
        for _ in range(5):
            with closing(held.connect()) as connection:
                for _ in range(3):
                    get(connection, target)
                    answer = connection.read_head()
                    assert (answer.status, answer.read()) == (200, b"MainThread")


def test_a_probe_that_is_no_request_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "2") as held, closing(held.connect()) as connection:
        connection.send_raw(b"GET /probe HTTP/1.1\r\nHost: a\r\nX\x01: y\r\n\r\n")
        answer = connection.read()
        assert (answer.status, answer.headers["Content-Type"]) == (400, "application/json")
        assert "Traceback" not in held.process.log()


def test_a_new_connection_is_accepted_while_every_thread_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "2") as held, ExitStack() as stack:
        taken(held, stack, 2)
        for _ in range(10):
            with closing(held.connect()) as connection:
                get(connection, "/probe")
                assert connection.read().status == 200


@pytest.mark.parametrize(
    "request_of_a_probe",
    [
        b"POST /probe HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
        b"GET /probe HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx",
        b"GET /probe HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n\r\n",
        b"GET http://a/probe HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_more_than_a_probe_has_a_thread(tmp_path: Path, request_of_a_probe: bytes) -> None:
    with serving(tmp_path) as held, closing(held.connect()) as connection:
        connection.send_raw(request_of_a_probe)
        answer = connection.read_head()
        assert answer.status == 200
        assert answer.read() != b"MainThread"


def test_a_probe_in_http_1_0_ends_its_connection(tmp_path: Path) -> None:
    with serving(tmp_path) as held, closing(held.connect()) as connection:
        connection.send_raw(b"GET /probe HTTP/1.0\r\n\r\n")
        answer = connection.read_head()
        assert (answer.status, answer.headers["Connection"]) == (200, "close")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_told_while_calls_hold_every_thread(path: str) -> None:
    with ProxyProcess(options=("--threads", "4")) as proxy, ExitStack() as stack:
        clients = [McpClient(HttpFront(proxy.base)).open() for _ in range(2)]
        body = {"jsonrpc": "2.0", "method": "tools/call"}
        for number in range(4):  # one session has half of the threads at the most
            arguments = {"name": "count", "arguments": {"to": 1, "pause": 600}}
            connection = stack.enter_context(closing(Connection(proxy.port)))
            data = json.dumps({**body, "id": number, "params": arguments}).encode()
            head = (
                f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Mcp-Session-Id: {clients[number % 2].session}\r\nAccept: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            )
            connection.send_raw(head.encode() + data)
        took = []
        for _ in range(20):
            before = time.monotonic()
            assert HttpFront(proxy.base).request("GET", path, {}, None).status == 200
            took.append(time.monotonic() - before)
        assert sorted(took)[10] < 2, took  # half a second, on a machine with time for it


# --- requests that wait for a thread -------------------------------------------------------------


def test_queued_requests_are_served_in_their_order(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "1") as held, ExitStack() as stack:
        taken(held, stack, 1)
        queued = [stack.enter_context(closing(held.connect())) for _ in range(5)]
        for number, connection in enumerate(queued):
            get(connection, f"/?said={number}")
            with closing(held.connect()) as probe:  # it is answered once the others have arrived
                get(probe, "/probe")
                assert probe.read().status == 200
        held.release()
        assert [connection.read().status for connection in queued] == [200] * 5
        said = [line for line in held.process.log().splitlines() if line.startswith("said=")]
        assert said == [f"said={number}" for number in range(5)]


def test_a_client_that_leaves_while_it_waits_is_forgotten_unexecuted(way_in: WayIn) -> None:
    with way_in.serving("--threads", "1") as held, ExitStack() as stack:
        taken(held, stack, 1)
        with closing(held.connect()) as leaving:
            get(leaving, "/?said=left")
        staying = stack.enter_context(closing(held.connect()))
        get(staying, "/?said=stayed")
        end = time.monotonic() + 1.5
        eventually(lambda: time.monotonic() > end)  # half a connection may be a whole request
        held.release()
        assert staying.read().status == 200
        assert "said=left" not in held.process.log()


def test_a_request_that_finds_no_thread_in_time_is_answered_without_one(tmp_path: Path) -> None:
    with impatient(tmp_path, "--threads", "1") as held, ExitStack() as stack:
        taken(held, stack, 1)
        queued = stack.enter_context(closing(held.connect()))
        queued.send("/?said=it", body=b"1234")
        answer = queued.read_head()
        assert (answer.status, answer.headers["X-Overloaded"]) == (200, "yes")
        assert answer.read() == b"1234"
        assert queued.is_closed_by_server()
        held.release()
        assert "said=it" not in held.process.log()


@pytest.fixture
def client() -> Iterator[McpClient]:
    """A client whose requests find no thread."""
    app = create_app(ProxyConfig(command=("false",)))
    yield McpClient(WsgiFront(app.overloaded))
    app.close()


@pytest.mark.parametrize("key", [0, "1", 2**60])
def test_a_call_without_a_thread_has_its_error_under_its_id(client: McpClient, key: object) -> None:
    answer = client.post({"jsonrpc": "2.0", "id": key, "method": "tools/list"})
    assert (answer.status, answer.headers["X-MCP-Proxy-Error"]) == (200, "overloaded")
    assert answer.headers["Retry-After"] == "5"
    message = answer.message()
    assert (message["id"], message["error"]["code"]) == (key, -32000)


def test_what_asks_for_nothing_is_accepted_without_a_thread(client: McpClient) -> None:
    answer = client.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (answer.status, answer.headers["X-MCP-Proxy-Error"]) == (202, "overloaded")


def test_a_get_without_a_thread_is_503(client: McpClient) -> None:
    assert client.request("GET", None).status == 503


# --- bodies that are not taken -------------------------------------------------------------------


def test_nobody_is_told_to_send_a_body_that_is_too_large(tmp_path: Path) -> None:
    with impatient(tmp_path) as held, closing(held.connect()) as connection:
        connection.send_raw(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100001\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.read().status == 413
