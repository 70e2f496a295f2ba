"""TLS in our worker class: a handshake or a request that is not whole costs the others nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import ssl
import time
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config

from mcp_proxy.edge import logs
from mcp_proxy.server import connection as server_connection
from mcp_proxy.server.tls import HandshakeFailures
from mcp_proxy.server.worker import KeepaliveWorker
from tests.live.connections import Connection
from tests.server.test_full_worker import get
from tests.server.test_slow_clients import slowest_answer
from tests.server.test_worker import Held
from tests.server.ways_in import WayIn, speaking_tls, with_certificate
from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.tls import Certificates
from tests.support.waiting import eventually

_HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
_LARGE = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
_ODD = b"\r\nPOST / HTTP/1.1\r\nHost: localhost\r\n"

#: Parts of requests, none of which is whole.
HALVES = (_HEAD[:30], _HEAD, _HEAD + b"12345", _ODD, _LARGE + b"1")


class TlsServer(WayIn):
    """A gunicorn with a certificate, and what its clients begin with."""

    tls: ssl.SSLContext

    def __init__(self, tmp_path: Path, certificates: Certificates) -> None:
        super().__init__(tmp_path, with_certificate(certificates), speaking_tls(certificates))

    def hello(self) -> bytes:
        """The first bytes of a client."""
        out = ssl.MemoryBIO()
        client = self.tls.wrap_bio(ssl.MemoryBIO(), out, server_hostname="127.0.0.1")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        return out.read()


@pytest.fixture
def server(tmp_path: Path, certificates: Certificates) -> TlsServer:
    return TlsServer(tmp_path, certificates)


def begun(held: Held, data: bytes) -> Connection:
    """A connection on which these bytes have been sent as they are."""
    connection = Connection(held.process.port)
    connection.send_raw(data)
    return connection


# --- clients that are slow -----------------------------------------------------------------------


def test_halves_of_handshakes_and_requests_cost_the_others_nothing(server: TlsServer) -> None:
    hello = server.hello()
    with server.serving("--threads", "2") as held, ExitStack() as stack:
        for data in (b"", hello[:10], hello):
            halves = [stack.enter_context(closing(begun(held, data))) for _ in range(200)]
        for half in halves:
            assert half.file.read(1), "the server's turn has come"
        for data in HALVES:
            for _ in range(20):
                stack.enter_context(closing(held.connect())).send_raw(data)
        assert slowest_answer(held, 3) < 2


def test_a_handshake_goes_on_where_the_client_reads_slowly(
    tmp_path: Path, certificates: Certificates, server: TlsServer
) -> None:
    chain = tmp_path / "chain.pem"
    server_certificate = Path(certificates.path("server.pem")).read_bytes()
    chain.write_bytes(server_certificate + Path(certificates.path("ca.pem")).read_bytes() * 100)
    config = Config()
    config.set("certfile", str(chain))
    config.set("keyfile", certificates.path("server.key"))
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    theirs.setblocking(False)
    conn = server_connection.Connection((1.0, 1000), config, ours, ("127.0.0.1", 1), None)
    client = server.tls.wrap_socket(
        theirs, server_hostname="127.0.0.1", do_handshake_on_connect=False
    )
    waited_for = set()
    with closing(conn), client:
        while conn.needs_handshake:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            assert conn.shake_hands()
            waited_for.add(conn.waits_for)
    assert waited_for == {selectors.EVENT_READ, selectors.EVENT_WRITE}


def test_a_connection_that_says_nothing_is_closed_without_a_word(server: TlsServer) -> None:
    with server.impatient() as held, ExitStack() as stack:
        for connection in (begun(held, b""), held.connect()):
            stack.enter_context(closing(connection))
            assert connection.is_closed_by_server()
        assert "TLS" not in held.process.log()


# --- a worker without a free thread --------------------------------------------------------------


def call(connection: Connection, method: str, params: dict[str, Any], *headers: str) -> None:
    data = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    lines = (
        "POST /mcp HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        "Accept: application/json, text/event-stream",
        f"Content-Length: {len(data)}",
        *headers,
    )
    connection.send_raw("\r\n".join(lines).encode() + b"\r\n\r\n" + data)


def test_health_is_told_while_calls_hold_every_thread(server: TlsServer) -> None:
    with ExitStack() as stack:
        four = {"MCP_PROXY_THREADS": "4"}
        proxy = stack.enter_context(
            ProxyProcess(way=GUNICORN, options=server.options, environment=four)
        )

        def connect() -> Connection:
            return stack.enter_context(closing(Connection(proxy.port, server.tls)))

        first = connect()
        client = {"protocolVersion": "2025-06-18", "capabilities": {}}
        call(first, "initialize", {**client, "clientInfo": {"name": "a", "version": "1"}})
        answer = first.read_head()
        assert answer.status == 200
        session = f"Mcp-Session-Id: {answer.headers['Mcp-Session-Id']}"
        for _ in range(4):
            slow = {"name": "count", "arguments": {"to": 1, "pause": 600}}
            call(connect(), "tools/call", slow, session)
        took = []
        for path in ("/healthz", "/readyz") * 10:
            before = time.monotonic()
            probe = connect()
            get(probe, path)
            assert probe.read().status == 200
            took.append(time.monotonic() - before)
        assert sorted(took)[10] < 0.5, took


# --- clients that behave -------------------------------------------------------------------------


def test_bodies_of_every_kind_are_read(server: TlsServer) -> None:
    chunked = (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    with server.serving("--threads", "4") as held, closing(held.connect()) as connection:
        for size in (0, 10, 100_000, 1_000_000):
            assert connection.ask("/", body=b"x" * size).status == 200
        connection.send_raw((chunked + _HEAD + b"1234567890") * 5)
        assert [connection.read().status for _ in range(10)] == [200] * 10
        for byte in _HEAD + b"1234567890":
            connection.send_raw(bytes([byte]))
        assert connection.read().status == 200


def test_many_connections_are_kept(server: TlsServer) -> None:
    with server.serving("--threads", "2") as held, ExitStack() as stack:
        many = [stack.enter_context(closing(held.connect())) for _ in range(40)]
        for _ in range(3):
            for connection in many:
                connection.send("/")
            assert {connection.read().status for connection in many} == {200}


def test_a_large_answer_is_sent_whole(server: TlsServer) -> None:
    with server.serving("--threads", "2") as held, closing(held.connect()) as connection:
        connection.send("/large")
        assert len(connection.read_head().read()) == 8 * 1024 * 1024


def test_the_end_of_an_answer_is_told_from_a_broken_connection(server: TlsServer) -> None:
    with server.serving() as held:
        plain = socket.create_connection(("127.0.0.1", held.process.port), timeout=20)
        with server.tls.wrap_socket(
            plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
        ) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while connection.recv(1000):
                pass  # without an alert this would be an SSLEOFError


def test_a_client_with_a_certificate_is_served_where_one_is_asked_for(
    server: TlsServer, certificates: Certificates
) -> None:
    server.tls.load_cert_chain(certificates.path("client.pem"), certificates.path("client.key"))
    asked_for = ("--cert-reqs", "2", "--ca-certs", certificates.path("ca.pem"))
    with server.serving(*asked_for) as held, closing(held.connect()) as connection:
        assert connection.ask("/").status == 200


def test_http_2_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.set("http_protocols", "h2,h1")
    worker = KeepaliveWorker(1, 1, [], SimpleNamespace(), 30, config, logging.getLogger())
    worker.tmp.close()
    assert config.http_protocols == ["h1"]
    assert "does not offer HTTP/2" in caplog.text


def test_a_renewed_certificate_is_used_at_once(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with TlsServer(tmp_path, certificates).serving() as held:
        address = ("127.0.0.1", held.process.port)
        for owner in ("server", "client"):
            for kind in ("pem", "key"):
                renewed = Path(certificates.path(f"{owner}.{kind}")).read_bytes()
                Path(certificates.path(f"server.{kind}")).write_bytes(renewed)
            used = ssl.get_server_certificate(address)
            assert used == Path(certificates.path(f"{owner}.pem")).read_text()


# --- what fails ----------------------------------------------------------------------------------


def failures(held: Held) -> list[str]:
    return [line for line in held.process.log().splitlines() if "TLS with" in line]


def the_failure(held: Held) -> str:
    """The line about the only failure; nothing else is said, and the worker goes on."""
    eventually(lambda: failures(held))
    (line,) = failures(held)
    assert "Traceback" not in held.process.log()
    return line


def test_plain_http_is_told_in_a_line(server: TlsServer) -> None:
    with server.serving() as held, closing(begun(held, b"GET / HTTP/1.1\r\n\r\n")) as connection:
        assert connection.is_closed_by_server()
        assert "TLS with 127.0.0.1 failed: [SSL: HTTP_REQUEST]" in the_failure(held)
        with closing(held.connect()) as other:
            assert other.ask("/").status == 200


def test_a_client_that_does_not_know_the_authority_is_told_in_a_line(
    server: TlsServer, certificates: Certificates
) -> None:
    with server.serving() as held:
        held.tls = speaking_tls(certificates, known=False)
        with pytest.raises(ssl.SSLCertVerificationError):
            held.connect()
        assert "UNKNOWN_CA" in the_failure(held)


def test_a_client_without_a_certificate_is_told_and_its_failure_is_a_line(
    server: TlsServer, certificates: Certificates
) -> None:
    asked_for = ("--cert-reqs", "2", "--ca-certs", certificates.path("ca.pem"))
    with server.serving(*asked_for) as held, closing(held.connect()) as connection:
        connection.send("/")  # bytes that nobody reads must not cost the client its alert
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            connection.file.read(1)
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in the_failure(held)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_a_handshake_that_does_not_end_in_time_is_told_in_a_line(
    server: TlsServer, part: float
) -> None:
    hello = server.hello()
    with server.impatient() as held:
        before = time.monotonic()
        with closing(begun(held, hello[: int(len(hello) * part)])) as connection:
            while connection.file.read(1):
                pass  # what the server has said in its turn
        assert 1.5 < time.monotonic() - before < 4
        assert "TLS with 127.0.0.1 failed: the handshake did not end in time" in the_failure(held)


def test_who_only_connects_and_leaves_is_not_told(server: TlsServer) -> None:
    """Load balancers do so every few seconds."""
    with server.serving() as held:
        for _ in range(3):
            begun(held, b"").close()
        with closing(held.connect()) as connection:
            assert connection.ask("/").status == 200
        assert not failures(held)


def test_failures_in_a_row_are_one_line(server: TlsServer) -> None:
    with server.serving() as held:
        for _ in range(20):
            with closing(begun(held, b"nonsense" * 10)) as connection:
                assert connection.is_closed_by_server()
        assert "Traceback" not in held.process.log()
        assert len(failures(held)) == 1


def test_failures_are_counted_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    lines: list[str] = []
    log = SimpleNamespace(warning=lambda line, *given: lines.append(line % given))
    failures = HandshakeFailures(log)
    for number in range(3):
        failures.add(("127.0.0.1", number), "a reason")
        failures.report()
    now += 61
    failures.add("", "another")
    assert lines == [
        "TLS with 127.0.0.1 failed: a reason",
        "TLS with a unix socket failed: another (the last of 3)",
    ]
    failures.add("", "a third")
    now += 61
    failures.report()
    failures.report()
    assert lines[2:] == ["TLS with a unix socket failed: a third"]


def test_a_client_that_ends_in_the_middle_of_a_handshake_is_told(server: TlsServer) -> None:
    with server.serving() as held:
        with closing(begun(held, server.hello())) as connection:
            assert connection.file.read(1)
        assert "EOF" in the_failure(held) or "reset" in the_failure(held)
