"""The proxy as its users run it: the real command in a process of its own, on a port of its own.

Everything that such a process starts inherits a mark in its environment, so that `stop` can tell
whether something was left behind, even a process that left its group and was given to init. The
process table is read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.startable import Startable
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]

#: The environment variable that marks everything one ProxyProcess started.
MARK = "PROXY_PROCESS_OF_TEST"

#: The environment variable with the kind of worker that proxies have unless a test names one.
WORKER_CLASS = "WORKER_CLASS_OF_TEST"

#: The three ways to start the proxy.
COMMAND = ("-m", "mcp_proxy")
GUNICORN = ("-m", "gunicorn", "-c", "python:mcp_proxy.gunicorn_conf", "mcp_proxy.wsgi:app")
GUNICORN_CHECKOUT = ("-m", "gunicorn", "wsgi:app")

_START_TIME = 20.0
_STOP_TIME = 30.0
_LEFTOVER_TIME = 3.0  # what a guardian and the kernel need to clean up
_LISTENING = re.compile(r"(https?)://127\.0\.0\.1:(\d+)")


class ProxyProcess(Startable):
    """A proxy in front of the stdio server `command`, the bundled demo server if there is none.

    `way` is one of the three above; `options` are the command line's own, or gunicorn's: then the
    environment configures the proxy. `environment` is added to ours. The constructor returns once
    /healthz answers, with TLS once it listens; it fails with the log if the process ends instead.
    """

    #: How many were made in this process.
    count = 0

    def __init__(
        self,
        command: Sequence[str] = (),
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        way: Sequence[str] = COMMAND,
        port: int = 0,
    ) -> None:
        ProxyProcess.count += 1
        self._mark = secrets.token_hex(8)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop
        self._log: str | None = None
        bind = f"127.0.0.1:{port}"
        settings = {} if way == COMMAND else _as_settings(bind, command)
        self._process = subprocess.Popen(
            [sys.executable, *way, *(_as_arguments(bind, options, command, way))],
            cwd=ROOT,
            env={**inherited(), **settings, **(environment or {}), MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            eventually(self._is_listening, _START_TIME, "the proxy does not listen")
        except BaseException as error:
            error.add_note(self.log())
            self._kill()
            self._output.close()
            raise

    def __repr__(self) -> str:
        return f"<ProxyProcess pid={self.master_pid} returncode={self._process.returncode}>"

    # --- where it is, what it said ---------------------------------------------------------------

    @property
    def base(self) -> str:
        """The address without a path, as far as it is known: before that, AssertionError."""
        listening = _LISTENING.search(self.log())
        assert listening is not None, "the proxy has not said yet where it listens"
        return f"{listening[1]}://127.0.0.1:{listening[2]}"

    @property
    def url(self) -> str:
        """The MCP endpoint of a single server."""
        return f"{self.base}/mcp"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.base.rpartition(":")[2])

    def log(self) -> str:
        """Everything written so far, standard output and standard error as they came."""
        if self._log is not None:
            return self._log
        descriptor = self._output.fileno()  # read without seeking: the position is the writers'
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "replace")

    # --- its processes ---------------------------------------------------------------------------

    @property
    def master_pid(self) -> int:
        """gunicorn's master."""
        return self._process.pid

    def worker_pids(self) -> list[int]:
        """gunicorn's workers: the master has no other children."""
        return children_of(self.master_pid)

    def worker_files(self) -> list[int]:
        """How many files each worker has open."""
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in self.worker_pids()]

    def server_pids(self) -> list[int]:
        """The stdio servers: what the workers have for children, their guardians apart."""
        children = [pid for worker in self.worker_pids() for pid in children_of(worker)]
        return [pid for pid in children if not is_guardian(pid)]

    def all_pids(self) -> list[int]:
        """Every living process that this proxy started, directly or not, and itself."""
        return [pid for pid in all_processes() if self._is_ours(pid)]

    def wait(self, timeout: float) -> int:
        """The exit code; raises AssertionError with the log if it does not end in time."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.log()}") from None

    def stop(self) -> None:
        """Ends it by SIGTERM, waits, and fails if anything is left; repeatable."""
        if self._log is not None:
            return
        try:
            if self._process.poll() is None:
                self._process.terminate()
            self.wait(_STOP_TIME)
            self._require_nothing_left()
        finally:
            self._kill()
            self._log = self.log()
            self._output.close()

    close = stop

    # --- inside ----------------------------------------------------------------------------------

    def _is_listening(self) -> bool:
        returncode = self._process.poll()
        assert returncode is None, f"the proxy ended with {returncode}"
        if _LISTENING.search(self.log()) is None:
            return False
        if self.base.startswith("https:"):
            return True  # it may ask for a certificate, and its log is to tell of no other client
        try:
            with urllib.request.urlopen(f"{self.base}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return True  # a transport on its own has no /healthz
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _require_nothing_left(self) -> None:
        try:
            eventually(lambda: not self.all_pids(), _LEFTOVER_TIME, "the proxy left something")
        except BaseException as error:
            left = {pid: command_line(pid) for pid in self.all_pids()}
            error.add_note(f"left: {left}\n{self.log()}")
            raise

    def _kill(self) -> None:
        for pid in self.all_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _is_ours(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return f"{MARK}={self._mark}".encode() in environment


def inherited() -> dict[str, str]:
    """Our environment (coverage's variables are in it) without settings of the proxy.

    But for its kind of worker, where all tests are to run with another one.
    """
    ours = {name: v for name, v in os.environ.items() if not name.startswith("MCP_PROXY_")}
    if WORKER_CLASS in os.environ:
        ours["MCP_PROXY_WORKER_CLASS"] = os.environ[WORKER_CLASS]
    return ours


def all_processes() -> list[int]:
    """The ids of all processes, as far as /proc shows them."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children_of(pid: int) -> list[int]:
    """The living children of a process."""
    return [child for child in all_processes() if is_alive(child) and _stat(child)[1] == str(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return _stat(pid)[0] not in ("", "Z", "X")


def command_line(pid: int) -> list[str]:
    """The arguments of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def is_guardian(pid: int) -> bool:
    """Whether the process is the one that cleans up after a worker that was killed."""
    return any(argument.endswith("guardian.py") for argument in command_line(pid))


def _stat(pid: int) -> tuple[str, str]:
    """State and parent of a process, two empty strings if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", ""
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, parent


def _as_settings(bind: str, command: Sequence[str]) -> dict[str, str]:
    settings = {"MCP_PROXY_BIND": bind}
    if command:
        settings["MCP_PROXY_COMMAND"] = shlex.join(command)
    return settings


def _as_arguments(
    bind: str, options: Sequence[str], command: Sequence[str], way: Sequence[str]
) -> list[str]:
    if way != COMMAND:
        return list(options)
    return ["--bind", bind, *options, *(["--", *command] if command else [])]
