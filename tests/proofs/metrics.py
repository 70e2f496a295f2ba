"""What /metrics adds up to, against what was sent: exactly, and within bounds where workers die."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.proofs.wires import Failed, Legacy
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.scrapes import admin_port, get, has_free_thread, seconds_for, sum_of
from tests.support.waiting import eventually

#: Workers, and clients, each with a session of its own and a new connection for each request.
WORKERS = 4
CLIENTS = 12

#: Calls of each client while workers are recycled, and after how many requests they are.
CALLS = 150
MAX_REQUESTS = 120

#: Workers that are killed, and the seconds between two of them.
KILLS = 6
BETWEEN = 1.5

#: Seconds in which a scrape is answered while every thread is taken (the median).
SOON = 0.05

_COUNT = "mcp_server_operation_duration_seconds_count"


def metrics() -> None:
    """Everything that section 3 of the design names."""
    recycled()
    killed()
    while_every_thread_is_taken()


@contextmanager
def counting(*options: str, workers: int = WORKERS, threads: int = 16) -> Iterator[ProxyProcess]:
    """A proxy whose workers share their sessions over Redis."""
    with RedisServer() as redis:
        environment = {
            "MCP_PROXY_ADMIN_BIND": "127.0.0.1:0",
            "MCP_PROXY_REDIS_URL": redis.url,
            "MCP_PROXY_WORKERS": str(workers),
            "MCP_PROXY_THREADS": str(threads),
        }
        with ProxyProcess(SCRIPTED, way=GUNICORN, environment=environment, options=options) as made:
            yield made


class Load:
    """Clients that call at the same time; what they have sent, and what was answered."""

    def __init__(self, process: ProxyProcess) -> None:
        self._process = process
        self._lock = threading.Lock()  # guards the counts
        self.sent = self.answered = 0

    def run(self, goes_on: Callable[[int], bool]) -> None:
        """Runs all clients until `goes_on` says no of the number of calls that one has made."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            for each in [pool.submit(self._client, goes_on) for _ in range(CLIENTS)]:
                each.result()

    def _client(self, goes_on: Callable[[int], bool]) -> None:
        client = self._opened()
        made = 0
        while goes_on(made):
            made += 1
            with self._lock:
                self.sent += 1
            try:
                heard = client.call("echo", {"number": made})
            except Failed:
                client = self._opened()
                continue
            with self._lock:
                self.answered += 1
            if "result" not in heard.answer:
                client = self._opened()

    def _opened(self) -> Legacy:
        client = Legacy(self._process.port)
        eventually(lambda: _is_open(client), 30)
        return client


def _is_open(client: Legacy) -> bool:
    try:
        client.open()
    except Failed:
        return False
    return True


def counted(port: int) -> float:
    """How many calls of tools the workers have counted."""
    return sum_of(get(port, "/metrics")[1], _COUNT, mcp_method_name="tools/call")


def recycled() -> None:
    """Where no worker is killed the sum is exactly what was sent."""
    with counting("--max-requests", str(MAX_REQUESTS)) as process:
        port = admin_port(process)
        before = set(process.worker_pids())
        load = Load(process)
        load.run(lambda made: made < CALLS)
        found = counted(port)
        booted = process.log().count("Booting worker")
        ways = {
            way: sum_of(get(port, "/metrics")[1], "mcp_proxy_calls_total", way=way)
            for way in ("local", "passed", "relayed")
        }
        print(
            f"{WORKERS} workers, {booted - WORKERS} recycled: {load.sent} sent, "
            f"{load.answered} answered, {found:.0f} counted; {ways}",
            flush=True,
        )
        assert load.sent == CLIENTS * CALLS
        assert load.answered == load.sent == found
        assert before - set(process.worker_pids()), "no worker was recycled"


def killed() -> None:
    """Where some are killed it is no less than what was answered, no more than what was sent."""
    with counting() as process:
        port = admin_port(process)
        load = Load(process)
        is_over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(load.run, lambda made: not is_over.is_set())
            eventually(lambda: load.answered > CLIENTS, 60)
            for _ in range(KILLS):
                os.kill(random.choice(process.worker_pids()), signal.SIGKILL)
                time.sleep(BETWEEN)
            is_over.set()
            running.result()
        found = counted(port)
        print(
            f"{WORKERS} workers, {KILLS} killed: {load.sent} sent, {load.answered} answered, "
            f"{found:.0f} counted",
            flush=True,
        )
        assert load.answered <= found <= load.sent


def while_every_thread_is_taken() -> None:
    """Scrapes and probes of the admin socket wait for no thread of a worker."""
    with (
        counting(workers=1, threads=4) as process,
        ThreadPoolExecutor(12) as pool,
    ):
        port = admin_port(process)
        clients = [McpClient(HttpFront(process.base)).open() for _ in range(8)]
        get(port, "/readyz")
        held = [pool.submit(client.result, "sleep", {"seconds": 10}) for client in clients]
        eventually(lambda: not has_free_thread(process.port), 20)
        for path in ("/metrics", "/readyz"):
            taken = sorted(seconds_for(port, path) for _ in range(100))
            print(
                f"{path} while every thread is taken: median {statistics.median(taken) * 1e3:.1f} "
                f"ms, slowest {taken[-1] * 1e3:.1f} ms",
                flush=True,
            )
            assert statistics.median(taken) < SOON
        assert all(each.result()["slept"] == 10 for each in held)
