"""Log lines into a pipe whose reader stalls: nobody waits, and what is left out is counted."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator

import pytest

from mcp_proxy.edge.log_writer import LogWriter
from tests.support.waiting import eventually

LINE = "x" * 100


class Pipe:
    """A pipe and what was read of it so far."""

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe()
        self.text = ""

    def read_on(self) -> str:
        """Everything that was written until now."""
        os.set_blocking(self.readable, False)
        try:
            while data := os.read(self.readable, 65536):
                self.text += data.decode()
        except BlockingIOError:
            pass
        return self.text

    def lines(self) -> int:
        """How many whole lines were written, and how many the notes say were left out."""
        left_out = sum(map(int, re.findall(r"^left out: (\d+)$", self.text, re.MULTILINE)))
        return self.text.count(f"{LINE}\n") + left_out


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.readable)
    os.close(made.writable)


@pytest.fixture
def writer(pipe: Pipe) -> Iterator[LogWriter]:
    made = LogWriter(pipe.writable, "left out: {}".format)
    yield made
    made.stop(10)


def test_without_a_thread_lines_are_written_at_once(pipe: Pipe, writer: LogWriter) -> None:
    writer.write("é")
    writer.write("\ud800")
    assert pipe.read_on() == "é\n\\ud800\n"


def test_without_a_thread_what_does_not_fit_is_left_out_and_counted(
    pipe: Pipe, writer: LogWriter
) -> None:
    for _ in range(2_000):
        writer.write(LINE)
    assert "left out" not in pipe.read_on()
    writer.write(LINE)
    pipe.read_on()
    assert pipe.lines() == 2_001
    assert pipe.text.endswith(f"\n{LINE}\n")


def test_lines_come_in_order_and_a_long_one_is_whole(pipe: Pipe, writer: LogWriter) -> None:
    writer.start()
    expected = [f"{number} {'y' * (number * 37 % 9_000)}" for number in range(150)]
    for line in expected:
        writer.write(line)
    eventually(lambda: pipe.read_on().splitlines() == expected)


def test_nobody_waits_for_a_reader_and_nothing_is_lost_uncounted(
    pipe: Pipe, writer: LogWriter
) -> None:
    writer.start()

    def write() -> None:
        for _ in range(5_000):
            writer.write(LINE)

    threads = [threading.Thread(target=write, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    eventually(lambda: pipe.read_on() and pipe.lines() == 20_000)
    assert "left out" in pipe.text
    writer.write("last")
    eventually(lambda: pipe.read_on().endswith("\nlast\n"))


def test_flush_waits_for_the_last_line_but_not_for_a_reader_that_stalls(
    pipe: Pipe, writer: LogWriter
) -> None:
    writer.start()
    writer.write("first")
    writer.flush()
    assert pipe.read_on() == "first\n"
    for _ in range(2_000):
        writer.write(LINE)
    before = time.monotonic()
    writer.flush()
    writer.flush()
    assert time.monotonic() - before < 5


def test_a_reader_that_has_gone_harms_nobody(writer: LogWriter, pipe: Pipe) -> None:
    writer.start()
    readable = os.dup(pipe.readable)
    os.dup2(os.open(os.devnull, os.O_RDONLY), pipe.readable)
    os.close(readable)
    writer.write("lost")
    writer.flush()
    assert writer.is_running


def test_a_fork_has_a_thread_of_its_own(pipe: Pipe, writer: LogWriter) -> None:
    writer.write("master")
    pid = os.fork()
    if pid == 0:
        try:
            writer.start()
            writer.write("worker")
            writer.flush()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert pipe.read_on() == "master\nworker\n"
    assert not writer.is_running
