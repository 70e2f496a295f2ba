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
from tests.server.test_worker import WORKER, Held, serving
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

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
        with closing(held.connect()) as other:
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
        taken(held, stack, 4)
        with closing(held.connect()) as other:
            get(other, "/probe")
            assert other.read().status == 200
        assert kept[0].is_closed_by_server()
        get(kept[-1], "/probe")
        assert kept[-1].read().status == 200
