"""The end of a worker, in a real gunicorn: what calls get of it, and clients that never stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from mcp_proxy.server.leaving import Leaving
from tests.server.test_worker import serving
from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually
from tests.transports.calls import hold, release

_PATIENCE = 40.0


class Caller:
    """A client on one connection that calls all the time, and counts what becomes of its calls."""

    def __init__(self, base: str, seconds: float) -> None:
        self._url = f"{base}/mcp"
        self._arguments = {"seconds": seconds}
        self._connection = requests.Session()
        self._connection.headers["Accept"] = "application/json, text/event-stream"
        self.calls = 0
        self.failures: list[str] = []

    def call_until(self, is_over: threading.Event) -> None:
        with self._connection:
            self._open()
            while not is_over.is_set():
                self.calls += 1
                try:
                    self._call()
                except requests.RequestException as error:
                    self.failures.append(repr(error))

    def _call(self) -> None:
        answer = self._post("sleep", self._arguments)
        if answer.status_code == 404:  # it was in the memory of a worker that has gone
            self._open()
        elif '"slept"' not in answer.text:
            self.failures.append(f"{answer.status_code} {answer.text}")

    def _open(self) -> None:
        self._connection.headers.pop("Mcp-Session-Id", None)
        answer = self._post("initialize", {"protocolVersion": "2025-06-18"})
        if answer.headers.get("Mcp-Session-Id") is None:
            self.failures.append(f"initialize: {answer.status_code} {answer.text}")
        self._connection.headers["Mcp-Session-Id"] = answer.headers.get("Mcp-Session-Id", "none")

    def _post(self, method: str, params: Any) -> requests.Response:
        message = {"jsonrpc": "2.0", "id": self.calls, "method": method, "params": params}
        return self._connection.post(self._url, json=message, timeout=_PATIENCE)


def failures_over_restarts(process: ProxyProcess, restarts: int) -> tuple[int, list[str]]:
    """How many calls clients make while workers are replaced so often, and which of them fail."""
    callers = [Caller(process.base, seconds) for seconds in (0, 0, 0, 0.05, 0.5, 1.5)]
    is_over = threading.Event()
    seen = set(process.worker_pids())
    first = len(seen)

    def are_enough() -> bool:
        seen.update(process.worker_pids())
        return len(seen) - first >= restarts

    with ThreadPoolExecutor(len(callers)) as pool:
        running = [pool.submit(caller.call_until, is_over) for caller in callers]
        try:
            eventually(are_enough, 120)
        finally:
            is_over.set()
        for one in running:
            one.result(_PATIENCE)
    failures = [failure for caller in callers for failure in caller.failures]
    return sum(caller.calls for caller in callers), failures


@pytest.mark.parametrize("workers", [1, 2])
def test_no_call_fails_as_workers_over_redis_have_served_their_requests(
    redis_server: RedisServer, redis_prefix: str, workers: int
) -> None:
    environment = {"MCP_PROXY_REDIS_URL": redis_server.url, "MCP_PROXY_REDIS_PREFIX": redis_prefix}
    options = ["--max-requests", "60", "--workers", str(workers)]
    with ProxyProcess(SCRIPTED, way=GUNICORN, options=options, environment=environment) as process:
        calls, failures = failures_over_restarts(process, 5)
        assert calls > 200
        assert failures == []


def test_no_call_fails_as_a_worker_with_sessions_in_memory_has_served_its_requests() -> None:
    with ProxyProcess(SCRIPTED, way=GUNICORN, options=["--max-requests", "60"]) as process:
        calls, failures = failures_over_restarts(process, 4)
        assert calls > 150
        assert failures == []


def test_a_worker_that_has_served_its_requests_goes_on_until_no_call_is_old(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--threads", "4", "--max-requests", "8") as held, ExitStack() as stack:
        (worker,) = held.process.worker_pids()
        old = stack.enter_context(closing(held.connect()))
        old.send("/held")
        is_old = time.monotonic() + 5.5
        eventually(lambda: time.monotonic() > is_old)
        with closing(held.connect()) as busy:
            until = time.monotonic() + 2.5  # the main loop looks each second at least
            said = [busy.ask("/").headers["Connection"] for _ in range(8)]
            while time.monotonic() < until:
                said.append(busy.ask("/").headers["Connection"])
                time.sleep(0.1)
            assert set(said) == {"keep-alive"}
            assert held.process.worker_pids() == [worker]
            held.release()
            assert old.read().status == 200
            eventually(lambda: busy.ask("/").headers["Connection"] == "close")
        eventually(lambda: held.process.worker_pids() not in ([], [worker]))
        with closing(held.connect()) as new:  # a worker that is still booting misses SIGTERM
            assert new.ask("/").status == 200


@needs.PATIENT_RECYCLING
def test_a_worker_that_has_served_its_requests_waits_for_old_calls_of_other_workers(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    environment = {"MCP_PROXY_REDIS_URL": redis_server.url, "MCP_PROXY_REDIS_PREFIX": redis_prefix}
    options = ["--max-requests", "20"]
    caller = ProxyProcess(SCRIPTED, way=GUNICORN, environment=environment)
    owner = ProxyProcess(SCRIPTED, way=GUNICORN, options=options, environment=environment)
    with caller, owner:
        client = McpClient(HttpFront(owner.base)).open()
        (worker,) = owner.worker_pids()
        relayed = client.at(HttpFront(caller.base))
        messages = hold(relayed, "h").stream()
        assert next(messages)["params"]["progress"] == 0
        is_old = time.monotonic() + 5.5
        eventually(lambda: time.monotonic() > is_old)
        for _ in range(20):
            assert "result" in client.call("echo").message()
        spent = time.monotonic() + 2.5  # the main loop looks each second at least
        eventually(lambda: time.monotonic() > spent)
        assert "it ends soon" in owner.log()
        assert owner.worker_pids() == [worker]
        release(client, "h")
        assert next(messages)["result"]["held"] == "h"
        eventually(lambda: owner.worker_pids() not in ([], [worker]), 20)
        assert client.call("count").has_succeeded  # a worker that is still booting misses SIGTERM


def methods_of(client: McpClient) -> list[str | None]:
    """The methods of what the client's server was sent."""
    return [message.get("method") for message in client.result("seen")["messages"]]


@contextmanager
def stopping(*options: str, **environment: str) -> Iterator[tuple[ProxyProcess, McpClient]]:
    """A proxy whose calls have two seconds when it is told to stop, and a client of it."""
    graceful = ["--graceful-timeout", "10"]
    with ProxyProcess(
        SCRIPTED, way=GUNICORN, options=[*graceful, *options], environment=environment
    ) as process:
        yield process, McpClient(HttpFront(process.base))


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_a_call_that_outlasts_the_stop_is_told_so(
    store: str, redis_server: RedisServer, redis_prefix: str
) -> None:
    environment = {"MCP_PROXY_REDIS_URL": redis_server.url, "MCP_PROXY_REDIS_PREFIX": redis_prefix}
    with stopping(**environment if store == "redis" else {}) as (process, client):
        client.open()
        headers = {"Accept": "application/json"}
        with ThreadPoolExecutor(2) as pool:
            short = pool.submit(client.call, "sleep", {"seconds": 1.2}, **headers)
            long = pool.submit(client.call, "sleep", {"seconds": 60}, **headers)
            eventually(lambda: methods_of(client).count("sleep") == 2)
            os.kill(process.master_pid, signal.SIGTERM)
            before = time.monotonic()
            assert short.result(_PATIENCE).message()["result"]["slept"] == 1.2
            failed = long.result(_PATIENCE)
            took = time.monotonic() - before
        assert (failed.status, failed.failure) == (200, "draining")
        assert failed.error()["code"] == -32000
        assert 1.9 < took < 6
        assert process.wait(10) == 0
        assert time.monotonic() - before < 10


def test_nobody_is_left_waiting_for_workers_that_accept_no_more(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    environment = {"MCP_PROXY_REDIS_URL": redis_server.url, "MCP_PROXY_REDIS_PREFIX": redis_prefix}
    with stopping(**environment) as (process, client), ThreadPoolExecutor(1) as pool:
        client.open()
        headers = {"Accept": "application/json"}
        long = pool.submit(client.call, "sleep", {"seconds": 60}, **headers)
        eventually(lambda: methods_of(client).count("sleep") == 1)
        os.kill(process.master_pid, signal.SIGTERM)

        def is_refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", process.port)).close()
            except ConnectionRefusedError:
                return True
            return False

        eventually(is_refused)
        assert not long.done()
        assert long.result(_PATIENCE).failure == "draining"


class _Stoppable:
    """A worker and its application, as far as its end needs them."""

    alive, ppid = True, os.getppid()
    cfg = SimpleNamespace(graceful_timeout=8.0)
    is_shared = True

    def __init__(self) -> None:
        self.ended = threading.Event()

    def drain(self, *_: object) -> None:
        pass

    def close(self) -> None:
        self.ended.set()


class _Interrupted:
    """An event that is set while the signal comes once more, as it may at any time."""

    def __init__(self) -> None:
        self._inner = threading.Event()
        self._lock = threading.Lock()

    def set(self) -> None:
        assert self._lock.acquire(blocking=False), "the main thread would wait for itself"
        with contextlib.closing(SimpleNamespace(close=self._lock.release)):
            if not self._inner.is_set():
                signal.raise_signal(signal.SIGTERM)
            self._inner.set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._inner.wait(timeout)


def test_a_worker_that_is_told_to_stop_again_meanwhile_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gunicorn repeats the signal to a worker that is one too many."""
    worker = _Stoppable()
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # gunicorn's own
    with monkeypatch.context() as patched:
        ours = SimpleNamespace(Event=_Interrupted, Thread=threading.Thread)
        patched.setattr("mcp_proxy.server.leaving.threading", ours)
        leaving = Leaving(worker, worker)
    try:
        leaving.start()
        signal.raise_signal(signal.SIGTERM)
        assert worker.ended.wait(20)
    finally:
        signal.signal(signal.SIGTERM, before)
