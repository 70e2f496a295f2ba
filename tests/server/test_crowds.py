"""More connections, or more bytes of requests, than a worker holds: who has to go."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mcp_proxy.server.worker import KeepaliveWorker
from tests.live.connections import Connection
from tests.server.test_full_worker import get, taken
from tests.server.test_limits import open_files
from tests.server.test_slow_clients import HALF_HEAD
from tests.server.test_worker import GUNICORN, WORKER, Held, serving
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

WITH_FEW_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
sys.argv[0] = "gunicorn"
runpy.run_module("gunicorn", run_name="__main__")
"""

CROWDED = ("-m", "gunicorn", "-c", "python:tests.live.crowded_gunicorn", "-k", WORKER)


@contextmanager
def crowded(tmp_path: Path) -> Iterator[Held]:
    file = tmp_path / "released"
    way = (*CROWDED, "tests.live.held:app")
    with ProxyProcess(way=way, environment={"HELD_UNTIL": str(file)}) as process:
        yield Held(process, file)


def pass_by(seconds: float) -> None:
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > end)


def almost(connection: Connection, size: int) -> None:
    """Sends all of a request but its last byte."""
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1}\r\n\r\n"
    connection.send_raw(head.encode() + b"x" * size)


# --- bytes ---------------------------------------------------------------------------------------


def test_where_requests_take_too_much_memory_the_one_without_progress_goes(tmp_path: Path) -> None:
    with crowded(tmp_path) as held, ExitStack() as stack:
        silent, old, new = (stack.enter_context(closing(held.connect())) for _ in range(3))
        almost(old, 60_000)
        pass_by(1.5)
        almost(new, 60_000)
        assert old.read_head().status == 408
        new.send_raw(b"x")
        assert new.read().status == 200
        assert silent.ask("/").status == 200  # it holds nothing


class Arriving:
    """A connection that has been without progress for so many seconds, and holds so many bytes."""

    def __init__(self, name: str, age: float, size: int) -> None:
        self.name = name
        self.progress = time.monotonic() - age
        self.request = SimpleNamespace(data=bytes(size))


def arriving(ages: dict[str, float], size: int) -> dict[Arriving, None]:
    return {Arriving(name, age, size): None for name, age in ages.items()}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> KeepaliveWorker:
    """A worker without a main loop; `given_up` has the names of whom it gives up."""
    made = KeepaliveWorker.__new__(KeepaliveWorker)
    made.__dict__.update(
        {"keepalived_conns": deque(), "given_up": [], "max_arriving_bytes": 100, "_waiting": {}}
    )

    def give_up(self: Any, conn: Any) -> None:
        del self.arriving[conn]
        self._arriving_bytes -= len(conn.request.data)
        self.given_up.append(conn.name)

    monkeypatch.setattr(KeepaliveWorker, "_give_up", give_up)
    return made


@pytest.mark.parametrize(
    ("ages", "given_up"),
    [
        ({"a": 3.0, "b": 5.0, "c": 4.0}, ["b"]),
        ({"a": 3.0, "b": 5.0, "c": 4.0, "d": 6.0}, ["d", "b"]),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, []),
        ({"a": 0.0, "b": 0.0, "c": 9.0, "d": 0.0}, ["c"]),
    ],
)
def test_none_is_given_up_within_a_second(
    worker: Any, ages: dict[str, float], given_up: list[str]
) -> None:
    worker.arriving = arriving(ages, 40)
    worker._arriving_bytes = 40 * len(ages)
    worker._spare_memory(time.monotonic() - 1)
    assert worker.given_up == given_up


def test_what_holds_no_bytes_frees_none(worker: Any) -> None:
    worker.arriving = arriving({"silent": 9.0}, 0) | arriving({"a": 3.0, "b": 2.0, "c": 4.0}, 40)
    worker._arriving_bytes = 120
    worker._spare_memory(time.monotonic() - 1)
    assert worker.given_up == ["c"]


# --- connections ---------------------------------------------------------------------------------


def test_where_there_are_too_many_connections_the_request_without_progress_goes(
    tmp_path: Path,
) -> None:
    options = ("--threads", "4", "--worker-connections", "8")
    with serving(tmp_path, *options) as held, ExitStack() as stack:
        halves = []
        for _ in range(8):
            half = stack.enter_context(closing(held.connect()))
            half.send_raw(b"GET / HTTP/1.1\r\n")
            halves.append(half)
            pass_by(0.01)
        other = stack.enter_context(closing(held.connect()))
        assert other.ask("/").status == 200
        assert halves[0].read().status == 408
        halves[-1].send_raw(b"Host: localhost\r\n\r\n")
        assert halves[-1].read().status == 200


def test_where_there_are_too_many_connections_the_one_idle_for_longest_goes(
    tmp_path: Path,
) -> None:
    options = ("--threads", "4", "--worker-connections", "8", "--keep-alive", "60")
    with serving(tmp_path, *options) as held, ExitStack() as stack:
        kept = [stack.enter_context(closing(held.connect())) for _ in range(4)]
        for connection in kept:
            assert connection.ask("/").status == 200
            pass_by(0.2)  # a thread stays for a moment
        pass_by(1)
        taken(held, stack, 4)
        stack.enter_context(closing(held.connect())).send_raw(HALF_HEAD)  # which is new
        assert kept[0].is_closed_by_server()
        get(kept[-1], "/probe")
        assert kept[-1].read().status == 200


FEW = ("--threads", "4", "--worker-connections", "8", "--keep-alive", "60")

#: What a client of a crowd sends, and what it then has.
CROWDS = {"silent": b"", "half": HALF_HEAD, "kept": b"GET /probe HTTP/1.1\r\nHost: a\r\n\r\n"}


def crowd(held: Held, stack: ExitStack, data: bytes, size: int) -> list[Connection]:
    """So many connections at once, each of which sends that."""
    made = [stack.enter_context(closing(held.connect())) for _ in range(size)]
    for connection in made:
        connection.send_raw(data)
    return made


def probe_for(held: Held, seconds: float) -> float:
    """The longest time that a new client's probe took meanwhile."""
    slowest, end = 0.0, time.monotonic() + seconds
    while (before := time.monotonic()) < end:
        with closing(held.connect()) as probe:
            get(probe, "/probe")
            assert probe.read().status == 200
        slowest = max(slowest, time.monotonic() - before)
    return slowest


@pytest.mark.parametrize("kind", CROWDS)
def test_new_clients_are_served_at_once_beyond_the_bound_of_connections(
    tmp_path: Path, kind: str
) -> None:
    with serving(tmp_path, *FEW) as held, ExitStack() as stack:
        many = crowd(held, stack, CROWDS[kind], 200)
        assert probe_for(held, 3) < 2  # half a second, on a machine with time for it
        if kind == "half":
            assert many[0].read().status == 408
        with closing(held.connect()) as other:
            assert other.ask("/").status == 200
        if kind == "kept":
            answers = [connection.read() for connection in many]
            assert {answer.status for answer in answers} == {200}
            kept = [a for a in answers if a.headers.get("Connection") != "close"]
            assert len(kept) <= 8  # nobody has to be closed: so many are not kept
        else:
            assert held.process.log().count("The worker has more than 8 connections") == 1


def test_beyond_the_bound_of_connections_no_more_are_closed_than_have_to_be(tmp_path: Path) -> None:
    with serving(tmp_path, *FEW) as held, ExitStack() as stack:
        old = crowd(held, stack, HALF_HEAD, 6)
        pass_by(0.3)
        new = crowd(held, stack, HALF_HEAD, 6)
        pass_by(3)
        for connection in (*old[4:], *new):
            connection.send_raw(b"Length: 0\r\n\r\n")
        assert [connection.read().status for connection in old] == [408] * 4 + [200] * 2
        assert [connection.read().status for connection in new] == [200] * 6


def test_where_requests_alone_are_as_many_as_there_may_be_connections_the_next_are_refused(
    tmp_path: Path,
) -> None:
    options = ("--threads", "1", "--worker-connections", "4")
    with serving(tmp_path, *options) as held, ExitStack() as stack:
        taken(held, stack, 1)
        queued = crowd(held, stack, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 3)
        assert probe_for(held, 0.5) < 2
        with closing(held.connect()) as other:
            other.send("/")
            assert other.read_head().headers["X-Overloaded"] == "yes"
        held.release()
        assert [connection.read().status for connection in queued] == [200] * 3


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CROWDS)
def test_files_are_kept_back_however_many_clients_come(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path, way=("-c", WITH_FEW_FILES, *GUNICORN[2:])) as held, ExitStack() as stack:
        crowd(held, stack, CROWDS[kind], 400)
        (worker,) = held.process.worker_pids()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert open_files(worker) < 200 - 48
            pass_by(0.05)
        assert probe_for(held, 1) < 2
        assert "No file descriptors" not in held.process.log()
        assert "Traceback" not in held.process.log()
        assert held.process.worker_pids() == [worker]
