"""One child process that speaks MCP over its standard streams: one JSON message a line, both ways.

This module starts the process, frames and writes messages, and signals the process group. The
supervisor decides when to stop the process; the bridge interprets the messages.

Threads: each child has a reader thread, which alone reads its standard output. Writers come from
any thread and take turns; a line that is begun when its client leaves may be ended by another one.
The supervisor's thread does the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import IO

from mcp_proxy.errors import (
    BackendExited,
    BackendLost,
    BackendNotStarted,
    BackendTimeout,
    ClientLeft,
    RequestId,
)
from mcp_proxy.processes.guardian import CHILD_VARIABLE, REPLICA_VARIABLE
from mcp_proxy.processes.noise import NoiseLog
from mcp_proxy.servers import StdioServer

log = logging.getLogger(__name__)

# Variables that gunicorn adds to its own environment.
_OF_GUNICORN = frozenset({"SERVER_SOFTWARE"})

# What children get unless it is set: a Python server that does not flush would be silent.
_DEFAULTS = {"PYTHONUNBUFFERED": "1"}

# Lines of stderr that are logged at once, and a second after that.
_STDERR_FIRST = 200
_STDERR_RATE = 10.0

_OOM_SCORE = 500
_MAX_OOM_SCORE = 1000

# Seconds between looks at whether the client has left whose message the server does not take.
_LOOK = 1.0

_BUFFER = 16 * 1024
_TAIL_LINES = 20
_LINE_SHOWN = 2000  # characters of a line of noise or stderr that the log gets


class LineStart(bytes):
    """The start of a line that is longer than `max_message_bytes` allows; it may name a call."""


class Child:
    """A running server process.

    The constructor starts the process and raises BackendNotStarted if that fails. `session` is for
    the log.
    """

    def __init__(
        self,
        server: StdioServer,
        replica_id: str,
        max_message: int,
        cpu_affinity: frozenset[int] | None,
    ) -> None:
        self.name = server.name
        self.session = ""
        self.headers: Mapping[str, str] = {}
        self.untaken: Collection[RequestId] = ()
        self.may_refuse = False
        self.at_eof = threading.Event()
        #: What its descendants have in their environment.
        self.tag = secrets.token_hex(8)
        self._max_message = max_message
        self._write_lock = threading.Lock()  # one message at a time
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._stderr_log = NoiseLog(server.name, "lines on stderr", _STDERR_FIRST, _STDERR_RATE)
        #: Whether it was sent a signal to end it before it had exited.
        self.was_ended = False
        #: Whether the last lines of stderr were too many to be logged.
        self.is_flooding = False
        self._partial = b""
        tags = {REPLICA_VARIABLE: replica_id, CHILD_VARIABLE: self.tag}
        self._process = _start(server, tags, cpu_affinity)
        self.pid = self._process.pid
        self._stdin, self._stdout, self.stderr = _pipes(self._process)
        self._output = os.fstat(self._stdout.fileno()).st_ino
        self._is_over = False
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self.stderr.fileno(), False)

    @property
    def end_sentence(self) -> str:
        """What clients are told of its end."""
        return "The server was ended" if self.was_ended else "The server exited"

    @property
    def end_in_log(self) -> str:
        """What the log says of it."""
        ended = "the server was ended by the proxy"
        return ended if self.was_ended else "the server exited by itself"

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid} returncode={self._process.returncode}>"

    @property
    def label(self) -> str:
        """What log lines call the process: its server, its id and the end of its session's."""
        session = f" session={self.session[-8:]}" if self.session else ""
        return f"{self.name} pid={self.pid}{session}"

    # --- output ----------------------------------------------------------------------------------

    def read_lines(self, on_line: Callable[[bytes], None]) -> None:
        """Reads until the server closes its output; the body of the reader thread.

        `on_line` gets every line without its line break, of one that is too long a LineStart, and
        may block to slow the server down.
        """
        try:
            while (line := self._next_line()) is not None and not self._is_over:
                on_line(line)
        finally:
            self.close_output()

    def close_output(self) -> None:
        """Closes our end of the output. For the reader, or where there is none."""
        self._stdout.close()
        self.at_eof.set()

    def end_reading(self) -> None:
        """Has the reader end although the output is open: a process that left the group holds it.

        A line break of our own wakes it, since nothing else ends a read that has begun.
        """
        self._is_over = True
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            path = f"/proc/self/fd/{self._stdout.fileno()}"
            output = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            try:
                if os.fstat(output).st_ino == self._output:
                    os.write(output, b"\n")
            finally:
                os.close(output)

    def _next_line(self) -> bytes | None:
        """The next line, of one that is too long the start; None at the end of the output."""
        try:
            if line := self._stdout.readline(self._max_message + 1):
                if line.endswith(b"\n"):
                    return line.rstrip(b"\r\n")
                if len(line) <= self._max_message:
                    return line
                self._skip_rest(line)
                return LineStart(line[:_LINE_SHOWN])
        except (OSError, ValueError):
            log.debug("[%s] reading ended", self.label, exc_info=True)
        return None

    def _skip_rest(self, start: bytes) -> None:
        size = len(start)
        while (piece := self._stdout.readline(_BUFFER)) and not piece.endswith(b"\n"):
            size += len(piece)
        log.error(
            "[%s] dropped a line of %d bytes, more than max_message_bytes allows: %s",
            self.label,
            size + len(piece),
            shown(start),
        )

    def drain_stderr(self) -> int | None:
        """Logs new output of the server on stderr, without blocking.

        Returns the number of bytes, 0 at the end of stderr, None when there is nothing yet.
        """
        try:
            data = os.read(self.stderr.fileno(), 65536)
        except BlockingIOError:
            return None
        except OSError:
            return 0
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[: _LINE_SHOWN + 1] if data else b""
        if not data and rest:
            lines.append(rest)
        self.is_flooding = False
        for number, line in enumerate(lines):
            if not self._stderr_log.allows():
                self.is_flooding = True
                self._stderr_log.leave_out(len(lines) - number - 1)
                break
            log.info("[%s] stderr: %s", self.label, shown(line))
        self._tail.extend(line[: _LINE_SHOWN + 1] for line in lines[-_TAIL_LINES:])
        return len(data)

    @property
    def stderr_tail(self) -> list[str]:
        """The last lines of stderr, for the log and for `check`; never for a client."""
        return [shown(line) for line in self._tail]

    # --- input -----------------------------------------------------------------------------------

    def write(
        self,
        line: bytes,
        timeout: float,
        has_left: Callable[[], bool] | None = None,
        hand_on: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Writes one message; returns when the pipe has taken it all.

        Raises BackendUnreached when the server has closed its input and got nothing of the message,
        BackendLost when it may have got a part, and BackendTimeout when it did not read its input
        for `timeout` seconds; after that a message may be incomplete, so the server must be
        stopped. Raises ClientLeft when `has_left` says so before the server got any of it.

        Half a message would spoil every other. So where the client leaves after a part was written
        `hand_on` is called, with a function that writes the rest, raises what this does, and is for
        another thread; nobody else writes until it has returned.
        """
        deadline = time.monotonic() + timeout
        while not self._write_lock.acquire(timeout=min(_LOOK, timeout)):
            _require_time(deadline, has_left)
        rest: memoryview | None = None
        try:
            rest = self._write_all(memoryview(line + b"\n"), deadline, has_left)
        finally:
            if not rest:
                self._write_lock.release()
        if rest:
            finish = partial(self._finish, rest, deadline)
            finish() if hand_on is None else hand_on(finish)

    def _finish(self, rest: memoryview, deadline: float) -> None:
        """Writes the rest of a message whose client has left, and ends its turn."""
        try:
            self._write_all(rest, deadline, None)
        finally:
            self._write_lock.release()

    def _write_all(
        self, data: memoryview, deadline: float, has_left: Callable[[], bool] | None
    ) -> memoryview:
        """Writes `data`; returns what is left of it where the client leaves in between."""
        size = len(data)
        while data:
            try:
                data = data[os.write(self._stdin.fileno(), data) :]
            except BlockingIOError:
                try:
                    self._wait_writable(deadline, has_left)
                except ClientLeft:
                    if len(data) == size:
                        raise
                    break
            except (OSError, ValueError) as error:
                kind = BackendExited if len(data) == size else BackendLost
                raise kind("The server has closed its input") from error
        return data

    def _wait_writable(self, deadline: float, has_left: Callable[[], bool] | None) -> None:
        poll = select.poll()
        poll.register(self._stdin.fileno(), select.POLLOUT)
        while not poll.poll(max(0.0, min(_LOOK, deadline - time.monotonic())) * 1000):
            _require_time(deadline, has_left)

    def close_stdin(self) -> None:
        """Closes the server's input, which asks it to exit (MCP 2025-11-25, lifecycle, "Shutdown").

        Does nothing while a writer is stuck, whose file descriptor could be reused; then only the
        signals that follow end the server.
        """
        if self._write_lock.acquire(timeout=0.1):
            with contextlib.suppress(OSError):
                self._stdin.close()
            self._write_lock.release()

    # --- the end ---------------------------------------------------------------------------------

    def end(self, number: signal.Signals) -> None:
        """Signals the group of a process that has not exited, to end it."""
        self.was_ended = True
        self.signal_group(number)

    def signal_group(self, number: signal.Signals) -> None:
        """Signals the whole process group, if it still exists."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def has_exited(self) -> bool:
        """Whether the process has exited; it is not reaped, so its group id is not reused."""
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        except ChildProcessError:
            return True

    def reap(self) -> str:
        """Kills the rest of the process group; returns the exit status in words."""
        self.signal_group(signal.SIGKILL)
        status = self._process.wait()
        self.close_stdin()
        self.stderr.close()
        self._stderr_log.flush()
        return describe_exit(status)

    def discard(self) -> None:
        """Kills a process that nobody reads yet."""
        self.reap()
        self.close_output()


def _require_time(deadline: float, has_left: Callable[[], bool] | None) -> None:
    """Raises BackendTimeout when a writer's time is over, ClientLeft when its client has left."""
    if time.monotonic() >= deadline:
        raise BackendTimeout("The server does not read its input")
    if has_left is not None and has_left():
        raise ClientLeft


def _start(
    server: StdioServer, tags: Mapping[str, str], cpu_affinity: frozenset[int] | None
) -> subprocess.Popen[bytes]:
    try:
        with _cpus(cpu_affinity):
            process = subprocess.Popen(
                server.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=_BUFFER,
                env={**_DEFAULTS, **_inherited(os.environ), **server.env, **tags},
                cwd=server.cwd,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        log.error("[%s] cannot start %s: %s", server.name, server, error)
        is_lost = server.cwd is not None and not os.path.isdir(server.cwd)
        reason = "its working directory does not exist" if is_lost else _reason(error)
        raise BackendNotStarted(f"The server cannot be started: {reason}") from error
    _offer_to_oom_killer(process.pid)
    return process


def _offer_to_oom_killer(pid: int) -> None:
    """Out of memory the kernel ends a child rather than the worker with all of them."""
    with contextlib.suppress(OSError, ValueError):  # no Linux
        ours = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
        score = min(_MAX_OOM_SCORE, ours + _OOM_SCORE)
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score), encoding="ascii")


def _pipes(
    process: subprocess.Popen[bytes],
) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment without our settings, which may hold a Redis password."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("MCP_PROXY_") and name not in _OF_GUNICORN
    }


@contextlib.contextmanager
def _cpus(cpu_affinity: frozenset[int] | None) -> Iterator[None]:
    """Runs this thread, and children that it starts, on these CPUs under the normal policy.

    So children are not pinned to the one CPU of their worker.
    """
    if cpu_affinity is None:
        yield
        return
    before, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    _schedule(cpu_affinity, os.SCHED_OTHER)
    try:
        yield
    finally:
        _schedule(before, policy)


def _schedule(cpus: Set[int], policy: int) -> None:
    os.sched_setaffinity(0, cpus)
    with contextlib.suppress(OSError):  # where it is forbidden the policy was never changed
        os.sched_setscheduler(0, policy, os.sched_param(0))


def describe_exit(status: int) -> str:
    """A return code of subprocess in words: "exit code 1", "signal SIGKILL"."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def shown(line: bytes) -> str:
    """A line as text for the log, shortened if it is long."""
    text = line[:_LINE_SHOWN].decode("utf-8", "replace").rstrip("\r")
    return text if len(line) <= _LINE_SHOWN else text + " [...]"
