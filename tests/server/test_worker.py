"""Our worker class in a real gunicorn: what it adds, and what of gunicorn's has to stay."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser
from gunicorn.http.wsgi import create
from gunicorn.workers.gthread import PollableMethodQueue, ThreadWorker

from mcp_proxy.config import ProxyConfig
from mcp_proxy.server.answers import JoinedResponse
from mcp_proxy.server.connection import PIECE, STAY, Connection
from mcp_proxy.server.gunicorn import gunicorn_settings
from mcp_proxy.server.worker import KeepaliveWorker
from tests.live import connections
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

WORKER = "mcp_proxy.server.worker.KeepaliveWorker"
GUNICORN = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn", "-k", WORKER)


class Held:
    """A gunicorn with the application of `held`, and the file that it waits for."""

    def __init__(self, process: ProxyProcess, file: Path) -> None:
        self.process = process
        self.tls: ssl.SSLContext | None = None  # what `connect` speaks
        self._file = file

    def connect(self) -> connections.Connection:
        return connections.Connection(self.process.port, self.tls)

    def release(self) -> None:
        self._file.touch()


@contextmanager
def serving(tmp_path: Path, *options: str, way: tuple[str, ...] = GUNICORN) -> Iterator[Held]:
    file = tmp_path / "released"
    way = (*way, "tests.live.held:app")
    environment = {"HELD_UNTIL": str(file)}
    with ProxyProcess(way=way, options=options, environment=environment) as process:
        try:
            yield Held(process, file)
        finally:
            file.touch()


# --- signals -------------------------------------------------------------------------------------


def test_what_ends_at_once_ends_in_the_main_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal may have interrupted what holds the pool's lock, for which its end waits."""
    worker: Any = KeepaliveWorker.__new__(KeepaliveWorker)
    worker.method_queue = PollableMethodQueue()
    worker.method_queue.init()
    ended: list[int] = []
    monkeypatch.setattr(ThreadWorker, "handle_quit", lambda _self, sig, _frame: ended.append(sig))
    with closing(worker.method_queue):
        worker.handle_quit(signal.SIGQUIT, None)
        assert ended == []
        worker.method_queue.run_callbacks(None)
    assert ended == [signal.SIGQUIT]


# --- connections ---------------------------------------------------------------------------------


def test_many_idle_connections_are_kept(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "2") as held, ExitStack() as stack:
        connections = [stack.enter_context(closing(held.connect())) for _ in range(40)]
        for _ in range(3):
            for connection in connections:
                assert connection.ask("/").status == 200


@pytest.mark.parametrize("pause", [0.0, STAY * 3])
def test_a_connection_is_good_for_the_next_request_whenever_it_comes(
    tmp_path: Path, pause: float
) -> None:
    with serving(tmp_path, "--threads", "4") as held, closing(held.connect()) as connection:
        for _ in range(5):
            assert connection.ask("/", body=b"x" * 10).status == 200
            time.sleep(pause)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_requests_sent_in_one_go_are_all_answered(tmp_path: Path, threads: str) -> None:
    with serving(tmp_path, "--threads", threads) as held, closing(held.connect()) as connection:
        connection.send("/", "/", "/")
        assert [connection.read().status for _ in range(3)] == [200, 200, 200]


def test_an_idle_connection_ends_after_the_keepalive_time(tmp_path: Path) -> None:
    options = ("--threads", "4", "--keep-alive", "1")
    with serving(tmp_path, *options) as held, closing(held.connect()) as connection:
        connection.ask("/")
        before = time.monotonic()
        assert connection.is_closed_by_server()
        assert time.monotonic() - before > 0.9


def test_without_keepalive_every_connection_is_closed(tmp_path: Path) -> None:
    options = ("--threads", "4", "--keep-alive", "0")
    with serving(tmp_path, *options) as held, closing(held.connect()) as connection:
        assert connection.ask("/").headers["Connection"] == "close"
        assert connection.is_closed_by_server()


def test_a_bad_request_on_a_kept_connection_is_a_400(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "4") as held, closing(held.connect()) as connection:
        connection.ask("/")
        connection.send_raw(b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n")
        assert connection.read().status == 400
        assert connection.is_closed_by_server()


def test_a_body_that_breaks_off_ends_the_connection_and_nothing_follows(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "4") as held, closing(held.connect()) as connection:
        with pytest.raises(EOFError):
            connection.ask("/broken")
        assert connection.is_closed_by_server()
        eventually(lambda: "broken on purpose" in held.process.log())


def test_an_empty_piece_sends_the_head_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "4") as held, closing(held.connect()) as connection:
        connection.send("/open")
        answer = connection.read_head()
        assert answer.status == 200
        held.release()
        assert answer.read().strip().isdigit()


# --- threads -------------------------------------------------------------------------------------


def test_a_worker_without_a_free_thread_leaves_connections_to_another(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "2", "--workers", "2") as held, ExitStack() as stack:
        waiting = [stack.enter_context(closing(held.connect())) for _ in range(3)]
        for connection in waiting:
            connection.send("/open")
        quick = []
        for _ in range(20):
            connection = stack.enter_context(closing(held.connect()))
            connection.send("/?said=it")
            quick.append(connection)
        # On a slow machine a worker takes some before it is full, and afterwards one now and then.
        eventually(lambda: held.process.log().count("said=it") >= 5)
        held.release()
        assert [connection.read().status for connection in waiting + quick] == [200] * 23


def test_more_busy_connections_than_threads_are_all_served(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "3") as held, ExitStack() as stack:
        connections = [stack.enter_context(closing(held.connect())) for _ in range(12)]
        for _ in range(5):
            for connection in connections:
                connection.send("/")
            assert {connection.read().status for connection in connections} == {200}


class Between(Connection):
    """A connection whose first request has been answered."""

    def __init__(self, surplus: bytes, is_plain: bool) -> None:
        ours, self.peer = socket.socketpair()
        super().__init__((1.0, 1000), Config(), ours, None, None)
        self.is_plain = is_plain
        self.begin(surplus)

    def finish(self) -> None:
        """Nothing has been read too far."""


ASKED = b"GET / HTTP/1.1\r\n\r\n"


def answers_of_a_thread(
    monkeypatch: pytest.MonkeyPatch, conn: Between, **state: Any
) -> tuple[int, Any]:
    """How often a thread of four answers on a connection, and what it says of it at the end."""
    answered: list[bytes] = []

    def handle(self: Any, conn: Any) -> bool:
        answered.append(bytes(conn.request.data))
        if len(answered) > 1:
            conn.begin()
        if len(answered) < 4:
            conn.peer.sendall(ASKED)
        return True

    monkeypatch.setattr(ThreadWorker, "handle", handle)
    worker = KeepaliveWorker.__new__(KeepaliveWorker)
    worker.__dict__.update({"alive": True, "busy": 1, "threads": 4, "closing": {}, **state})
    with conn.sock, conn.peer:
        is_kept = worker.handle(conn)
    return len(answered), is_kept


def test_a_thread_serves_what_comes_at_once_and_leaves_a_silent_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert answers_of_a_thread(monkeypatch, Between(b"", is_plain=True)) == (4, True)


@pytest.mark.parametrize("state", [{"busy": 3}, {"alive": False}])
def test_a_thread_does_not_stay_where_it_could_do_harm(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, Any]
) -> None:
    assert answers_of_a_thread(monkeypatch, Between(b"", is_plain=True), **state) == (1, True)


def test_a_thread_does_not_stay_where_bytes_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers_of_a_thread(monkeypatch, Between(b"", is_plain=False)) == (1, True)
    assert answers_of_a_thread(monkeypatch, Between(b"GET", is_plain=True)) == (1, True)


def test_a_thread_leaves_a_request_that_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.test_worker.ASKED", ASKED[:-1])
    conn = Between(b"", is_plain=True)
    assert answers_of_a_thread(monkeypatch, conn) == (1, True)
    assert bytes(conn.request.data) == ASKED


# --- the end of a worker -------------------------------------------------------------------------


def test_sigterm_lets_a_request_finish_and_says_that_the_connection_closes(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--threads", "4") as held, ExitStack() as stack:
        idle, busy = (stack.enter_context(closing(held.connect())) for _ in range(2))
        idle.ask("/")
        busy.send("/open")
        answer = busy.read_head()
        os.kill(held.process.master_pid, signal.SIGTERM)
        eventually(lambda: idle.ask("/").headers["Connection"] == "close")
        held.release()
        assert answer.read().strip().isdigit()
        assert held.process.wait(10) == 0


def test_a_busy_connection_does_not_keep_a_worker_beyond_max_requests(tmp_path: Path) -> None:
    with serving(tmp_path, "--threads", "4", "--max-requests", "5") as held:
        (worker,) = held.process.worker_pids()
        with closing(held.connect()) as connection:
            eventually(lambda: connection.ask("/").headers["Connection"] == "close")
        eventually(lambda: held.process.worker_pids() not in ([], [worker]))
        with closing(held.connect()) as connection:  # a worker that is still booting misses SIGTERM
            connection.ask("/")


# --- one write -----------------------------------------------------------------------------------


class Wire:
    """A socket that counts what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.sent.append(data)


class Asked:
    """As much of a request as a response looks at."""

    method = "POST"
    version = (1, 1)

    def should_close(self) -> bool:
        return False


def response_to(wire: Wire, *headers: tuple[str, str]) -> Any:
    response = JoinedResponse(Asked(), wire, None)
    response.start_response("200 OK", list(headers))
    return response


def test_head_and_first_piece_leave_together() -> None:
    wire = Wire()
    response = response_to(wire, ("Content-Length", "4"))
    response.write(b"ab")
    response.write(b"cd")
    response.close()
    first, second = wire.sent
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\nab")
    assert second == b"cd"


def test_a_chunk_is_joined_as_a_chunk() -> None:
    wire = Wire()
    response = response_to(wire)
    response.write(b"ab")
    response.close()
    first, last = wire.sent
    assert first.endswith(b"\r\n\r\n2\r\nab\r\n")
    assert last == b"0\r\n\r\n"


def test_a_large_piece_is_sent_in_parts() -> None:
    wire = Wire()
    large = b"x" * 1_000_000
    response_to(wire, ("Content-Length", str(len(large)))).write(large)
    assert b"".join(wire.sent[1:]) == large
    assert max(len(part) for part in wire.sent) == PIECE


def test_a_piece_that_cannot_be_sent_leaves_the_socket_where_it_was() -> None:
    wire = Wire()
    response = response_to(wire)
    with pytest.raises(TypeError):
        response.write("text")
    assert response.sock is wire


# --- who is believed -----------------------------------------------------------------------------


def test_no_header_changes_scheme_or_mount() -> None:
    config = Config()
    for name, value in gunicorn_settings(ProxyConfig()).items():
        config.set(name, value)
    head = (
        b"GET /mcp HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Ssl: on\r\nX-Forwarded-Protocol: ssl\r\nSCRIPT_NAME: /mcp\r\n\r\n"
    )
    client, server = ("127.0.0.1", 1), ("127.0.0.1", 2)
    request = next(RequestParser(config, iter([head]), client))
    _, environ = create(request, Wire(), client, server, config)
    assert environ["wsgi.url_scheme"] == "http"
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("", "/mcp")
