"""A proxy whose socket systemd holds: who connects during a restart waits, and is not refused."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import requests

from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import inherited
from tests.support.startable import Startable
from tests.support.waiting import eventually

_ACTIVATOR = str(Path(__file__).with_name("activator.py"))
_CLIENTS = 8
_CALLS = 50  # of all clients, by one process of the proxy
_STOP_TIME = 30.0


class Service(Startable):
    """What systemd does: it keeps sockets, by their names, and starts the proxy with them."""

    def __init__(
        self,
        directory: Path,
        workers: int,
        names: Sequence[str] = ("mcp-wsgi-proxy.socket",),
    ) -> None:
        self._directory = directory
        self.workers = workers
        self._sockets = {
            name: socket.create_server(("127.0.0.1", 0), backlog=2048) for name in names
        }
        self._process: subprocess.Popen[bytes] | None = None
        (self.base,) = [self.base_of(name) for name in names if name != "admin"]

    def base_of(self, name: str) -> str:
        """The address of a socket."""
        return f"http://127.0.0.1:{self._sockets[name].getsockname()[1]}"

    def start(self) -> None:
        given = {name: each.fileno() for name, each in self._sockets.items()}
        told = ",".join(f"{name}={number}" for name, number in given.items())
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, _ACTIVATOR, told),
                    *(sys.executable, "-m", "mcp_proxy", "--workers", str(self.workers)),
                    *("--session-dir", str(self._directory / "sessions"), "--", *SCRIPTED),
                ],
                pass_fds=list(given.values()),
                stdout=log,
                stderr=log,
                env={**inherited(), "MCP_PROXY_BIND": "127.0.0.1:1"},  # which nobody could bind
            )

    def stop(self) -> int:
        """As `systemctl stop`: SIGTERM to the first process."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_STOP_TIME)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()
        for each in self._sockets.values():
            each.close()

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")


class Load:
    """Clients that make a new connection for each call, in sessions that go on."""

    def __init__(self, base: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards outcomes
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(base,)) for _ in range(_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def more(self) -> None:
        """Returns when all clients together have had some more answers."""
        wanted = self.outcomes.total() + _CALLS
        eventually(lambda: self.outcomes.total() >= wanted, 30, f"no calls: {self.outcomes}")

    def _run(self, base: str) -> None:
        client = McpClient(HttpFront(base)).open()
        while not self._is_over.is_set():
            try:
                answer = client.call("echo", {"text": "x"})
                outcome = f"{answer.status} {answer.failure}"
                if answer.message().get("result") == {"text": "x"}:
                    outcome = "ok"
            except requests.RequestException as error:
                outcome = type(error).__name__
            with self._lock:
                self.outcomes[outcome] += 1


@pytest.fixture(params=[1, pytest.param(2, marks=needs.MEMORY)])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, request.param) as service:
        eventually(lambda: requests.get(f"{service.base}/readyz", timeout=20).ok)
        yield service


def test_the_socket_of_systemd_goes_before_the_address_of_the_settings(service: Service) -> None:
    assert f"default: {service.base}/mcp" in service.log()


def test_a_restart_loses_no_connection_and_no_session(
    service: Service,
) -> None:
    with Load(service.base) as load:
        load.more()
        for _ in range(2):
            assert service.stop() == 0
            service.start()
            load.more()
    # Of two workers one may end first, and the other is asked for its sessions: again in a moment.
    allowed = {"ok", "200 draining"} if service.workers > 1 else {"ok"}
    assert set(load.outcomes) <= allowed, f"{load.outcomes}\n{service.log()}"
    assert load.outcomes["200 draining"] <= 2 * _CLIENTS


def test_who_connects_while_nothing_runs_is_answered_afterwards(service: Service) -> None:
    service.stop()
    with socket.create_connection(("127.0.0.1", int(service.base.rpartition(":")[2]))) as early:
        early.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        service.start()
        early.settimeout(20)
        assert early.recv(64).startswith(b"HTTP/1.1 200 ")


# --- the admin socket ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("admin", "main"), ("main", "admin")], ids=str)
def test_the_admin_socket_of_systemd_is_known_by_its_name(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    with Service(tmp_path, 1, names) as service:
        admin = service.base_of("admin")
        eventually(lambda: requests.get(f"{service.base}/readyz", timeout=20).ok)
        for _ in range(2):
            assert requests.get(f"{admin}/metrics", timeout=20).ok
            assert requests.get(f"{admin}/mcp", timeout=20).status_code == 404
            assert requests.get(f"{service.base}/metrics", timeout=20).status_code == 404
            assert f"metrics and probes at {admin}/metrics" in service.log()
            service.stop()
            service.start()
