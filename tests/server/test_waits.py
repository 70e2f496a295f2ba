"""Nobody waits for a slow client: neither the main loop of our worker class nor other clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.server.test_worker import Held, serving

_SLOW_CLIENTS = 32
_CLOSE = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


# --- clients that close late ---------------------------------------------------------------------


@contextmanager
def clients_that_close(held: Held, late: float) -> Iterator[None]:
    """Clients that ask once a connection, and close it `late` seconds after the answer."""
    is_over = threading.Event()

    def ask_again_and_again() -> None:
        while not is_over.is_set():
            with closing(held.connect()) as connection:
                connection.send_raw(_CLOSE)
                connection.read()
                is_over.wait(late)

    threads = [threading.Thread(target=ask_again_and_again) for _ in range(_SLOW_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def answers_beside(held: Held, late: float) -> int:
    """The answers that one well-behaved client gets in a second and a half beside such clients."""
    count = 0
    with clients_that_close(held, late), closing(held.connect()) as connection:
        connection.ask("/")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            connection.ask("/")
            count += 1
    return count


def test_clients_that_close_late_cost_the_others_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as held:
        at_once = answers_beside(held, 0.0)
        late = [answers_beside(held, late) for late in (0.05, 0.1, 0.2)]
    assert min(late) >= at_once / 2, (at_once, late)


def test_sockets_left_open_after_an_answer_keep_nobody_from_being_served(tmp_path: Path) -> None:
    with serving(tmp_path) as held, ExitStack() as stack:
        for _ in range(64):
            connection = stack.enter_context(closing(held.connect()))
            connection.send_raw(_CLOSE)
            connection.read()
        before = time.monotonic()
        with closing(held.connect()) as other:
            assert other.ask("/").status == 200
        assert time.monotonic() - before < 2


@pytest.mark.parametrize("sends", [b"", b"x" * 100_000])
def test_a_connection_that_is_not_kept_ends_after_two_seconds(tmp_path: Path, sends: bytes) -> None:
    with serving(tmp_path) as held, closing(held.connect()) as connection:
        connection.send_raw(_CLOSE + sends)
        assert connection.read().status == 200
        assert connection.is_closed_by_server()
        before = time.monotonic()
        while True:
            try:
                connection.send_raw(b"y")
            except (ConnectionResetError, BrokenPipeError):
                break
            time.sleep(0.05)
        assert 1 < time.monotonic() - before < 5
