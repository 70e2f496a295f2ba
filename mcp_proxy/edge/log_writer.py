"""Log lines on their way to a file of this process, whose reader may stall.

No thread waits in a log line. Lines that find no room are left out; when the log goes on, it says
how many they were. gunicorn's master, which has no thread of ours, writes what fits at once. A
worker has a thread for it, which `start` begins after the fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from mcp_proxy.background import Worker

# Bytes of lines that wait.
_WAITING_BYTES = 1024 * 1024

# Seconds for which the thread collects lines, to write them together.
_COLLECTING_TIME = 0.005

# Milliseconds between two looks whether the thread is to stop.
_LOOK = 1000

# Where poll(2) says that a pipe is writable, so many bytes fit; and lines of several processes are
# not mixed within them (pipe(7)).
_PIECE = select.PIPE_BUF

# Seconds for which the exit waits for the last lines.
_LAST_LINES = 1.0


class LogWriter(Worker):
    """Writes lines to `descriptor`. `describe` makes a line of the number that were left out."""

    def __init__(self, descriptor: int, describe: Callable[[int], str]) -> None:
        super().__init__("mcp-log-writer")
        self._descriptor = descriptor
        self._describe = describe
        # A signal handler may log while its thread is in here: reentrant, as SimpleQueue is.
        self._lock = threading.RLock()  # guards what follows
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._waiting = 0  # bytes of lines that are not written yet
        self._left_out = 0
        self._is_given_up = False  # whether the exit has waited in vain

    def write(self, line: str) -> None:
        """Has a line written, without its line break. Never waits."""
        data = _encoded(line)
        if not self.was_started:
            self._write_what_fits(data)
            return
        with self._lock:
            if self._waiting + len(data) > _WAITING_BYTES:
                self._left_out += 1
                return
            note = self._note()
            self._waiting += len(note) + len(data)
            self._lines.put(note + data)
        if not self.is_running:
            with contextlib.suppress(RuntimeError):  # the system has no thread: the next line tries
                self.start()

    def flush(self) -> None:
        """Waits until everything is written; at exit, so a second at most and only once."""
        deadline = time.monotonic() + _LAST_LINES
        while self.is_running and self._waiting and not self._is_given_up:
            time.sleep(_COLLECTING_TIME)
            self._is_given_up = time.monotonic() > deadline

    def prepare(self) -> None:
        self._lock = threading.RLock()
        self._lines = queue.SimpleQueue()
        self._waiting = self._left_out = 0

    def wake(self) -> None:
        self._lines.put(b"")

    def run_once(self) -> None:
        lines = [self._lines.get()]
        time.sleep(_COLLECTING_TIME)
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._lines.get_nowait())
        try:
            for piece in _pieces(lines):
                self._write_piece(piece)
        finally:
            self._go_on(sum(map(len, lines)))

    def _go_on(self, written: int) -> None:
        """Makes room for lines; says how many had none, if no other line does that."""
        with self._lock:
            self._waiting -= written
            if self._left_out and not self._waiting:
                note = self._note()
                self._waiting += len(note)
                self._lines.put(note)

    def _note(self) -> bytes:
        """The line about those that were left out until now, empty if none was."""
        count, self._left_out = self._left_out, 0
        return _encoded(self._describe(count)) if count else b""

    def _write_piece(self, piece: bytes) -> None:
        while not self._is_writable(_LOOK):
            if self.is_stopping:
                return
        with contextlib.suppress(OSError):  # nobody reads any more
            os.write(self._descriptor, piece)

    def _write_what_fits(self, data: bytes) -> None:
        if not self._is_writable(0):
            self._left_out += 1
            return
        for piece in _pieces([self._note(), data]):
            if self._is_writable(0):
                with contextlib.suppress(OSError):
                    os.write(self._descriptor, piece)

    def _is_writable(self, timeout: int) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(timeout))


class LogHandler(logging.Handler):
    """A handler of the standard library's logging over a LogWriter."""

    def __init__(self, writer: LogWriter, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.write(self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self.writer.flush()


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode("utf-8", "backslashreplace")


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in pieces that can be written at once: whole lines as far as that goes."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > _PIECE:
            yield piece
            piece = b""
        while len(line) > _PIECE:
            yield line[:_PIECE]
            line = line[_PIECE:]
        piece += line
    if piece:
        yield piece
