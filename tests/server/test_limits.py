"""What the system does not give: files, and threads. Nobody's worker ends for it."""

from __future__ import annotations

import resource
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import ConfigError
from mcp_proxy.server import answers, gunicorn, machine
from mcp_proxy.server.worker import KeepaliveWorker
from tests.live.connections import Connection
from tests.server.test_worker import WORKER, serving
from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.waiting import eventually

FEW_THREADS = ("-m", "gunicorn", "-c", "python:tests.live.few_threads", "-k", WORKER)


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_a_worker_without_a_file_for_a_connection_waits_for_one(tmp_path: Path) -> None:
    with serving(tmp_path) as held:
        (worker,) = held.process.worker_pids()
        _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (open_files(worker) + 12, hard))
        with closing(held.connect()) as first, ExitStack() as stack:
            assert first.ask("/").status == 200
            for _ in range(40):
                stack.enter_context(closing(held.connect()))
            eventually(lambda: "Accepting pauses" in held.process.log())
            assert first.ask("/").status == 200
        with closing(held.connect()) as connection:
            assert connection.ask("/").status == 200
        assert held.process.worker_pids() == [worker]
        assert held.process.log().count("Accepting pauses") < 10


def test_a_worker_serves_with_the_threads_that_it_gets(tmp_path: Path) -> None:
    with ProxyProcess(way=(*FEW_THREADS, "tests.live.held:app")) as process, ExitStack() as stack:
        (worker,) = process.worker_pids()
        assert "Only 6 of 16 threads can be started; 4 are used" in process.log()
        many = [stack.enter_context(closing(Connection(process.port))) for _ in range(30)]
        for connection in many:
            connection.send("/")
        assert {connection.read().status for connection in many} == {200}
        assert process.worker_pids() == [worker]


def test_a_request_for_which_no_thread_can_be_started_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot happen with threads made ahead; if it does, the worker goes on."""
    refused: list[tuple[str, ...]] = []

    class Pool:
        def submit(self, *_: object) -> None:
            raise RuntimeError("can't start new thread")

    worker = KeepaliveWorker.__new__(KeepaliveWorker)
    worker.__dict__.update(
        {"busy": 0, "threads": 4, "tpool": Pool(), "wsgi": None, "_slow_count": 1, "_waiting": {}}
    )
    worker.served = set()
    monkeypatch.setattr(KeepaliveWorker, "_refuse", lambda _self, *given: refused.append(given))
    conn: Any = type("Waiting", (), {"counts_as_slow": True})()
    worker.enqueue_req(conn)
    ((connection, status, message, kind),) = refused
    assert (worker.busy, connection, kind) == (0, conn, "overloaded")
    assert (worker._slow_count, conn.counts_as_slow) == (0, False), (
        "its place among the slow is free again"
    )
    answer = answers.refusal(status, message, kind)
    assert b"X-MCP-Proxy-Error: overloaded\r\n" in answer
    assert b"-32000" in answer


@pytest.mark.parametrize(
    ("files", "sessions", "connections"), [(1024, 120, 480), (16_384, 256, 4096), (128, 8, 65)]
)
def test_sessions_and_connections_fit_into_the_limit_of_files(
    monkeypatch: pytest.MonkeyPatch, files: int, sessions: int, connections: int
) -> None:
    monkeypatch.setattr(machine, "files_to_have", lambda: files)
    config = ProxyConfig()
    assert machine.within_files(config).max_sessions == sessions
    assert gunicorn.gunicorn_settings(config)["worker_connections"] == connections


@pytest.mark.parametrize(("files", "connections"), [(1024, 480), (16_384, 10_000), (128, 32)])
def test_connections_of_greenlets_fit_into_the_limit_of_files(
    monkeypatch: pytest.MonkeyPatch, files: int, connections: int
) -> None:
    monkeypatch.setattr(machine, "files_to_have", lambda: files)
    config = ProxyConfig(worker_class="gevent")
    assert gunicorn.gunicorn_settings(config)["worker_connections"] == connections


def test_a_file_system_that_cannot_be_written_to_is_met_with_memory_or_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert machine.heartbeat_directory() is None
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    monkeypatch.setattr(machine, "_SHARED_MEMORY", str(tmp_path))
    assert machine.heartbeat_directory() == str(tmp_path)
    monkeypatch.setattr(machine, "_SHARED_MEMORY", "/no/such/directory")
    with pytest.raises(ConfigError, match="set TMPDIR"):
        machine.heartbeat_directory()


def test_a_lower_limit_of_sessions_is_told_when_starting() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    way = ("-c", _WITH_FEW_FILES, *GUNICORN[2:])
    with ProxyProcess(way=way) as process:
        assert (
            "max_sessions is 48 instead of 256: a worker may have 448 files open" in process.log()
        )
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


_WITH_FEW_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (448, 448))
sys.argv[0] = "gunicorn"
runpy.run_module("gunicorn", run_name="__main__")
"""
