"""Sessions come and go by the thousand, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.proofs.worker import Footprint, footprint
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess, is_alive
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

#: What may be left over in the worker's memory, in MB.
MEMORY_LEFT = 10.0

_AT_ONCE = 8

# So few threads that the warm-up has all of them running: a pool that grows would look like a leak.
_OPTIONS = ("--log-level", "warning", "--threads", str(_AT_ONCE))
_WARM_UP = 8 * _AT_ONCE

# A pool of connections to Redis may have grown by one for each thread since it was last looked at.
_SPARE_DESCRIPTORS = _AT_ONCE + 2


@contextmanager
def proxy_over(store: str, *options: str) -> Iterator[tuple[ProxyProcess, Callable[[], int]]]:
    """A proxy over memory or Redis, and how many session records Redis has."""
    if store == "memory":
        with ProxyProcess(SCRIPTED, options=[*_OPTIONS, *options]) as process:
            yield process, lambda: 0
        return
    with RedisServer() as redis, redis.client() as client:
        given = [*_OPTIONS, "--redis-url", redis.url, *options]
        with ProxyProcess(SCRIPTED, options=given) as process:
            yield process, lambda: len(list(client.scan_iter("mcp-proxy:*:session:*")))


def open_session(process: ProxyProcess) -> McpClient:
    """A session that has made a call."""
    client = McpClient(HttpFront(process.base)).open()
    assert client.result("echo", {"a": 1}) == {"a": 1}
    return client


def open_and_delete(process: ProxyProcess) -> None:
    """The whole life of a session."""
    answer = open_session(process).delete()
    assert answer.status == 204, answer.body()


def many(act: Callable[[ProxyProcess], object], process: ProxyProcess, count: int) -> float:
    """Does it `count` times, several at once, and returns the seconds it took."""
    started = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(act, process) for _ in range(count)]:
            done.result()
    return time.monotonic() - started


def warmed_up(process: ProxyProcess) -> Footprint:
    """The footprint of a worker that has served a little and has nothing to do."""
    many(open_and_delete, process, _WARM_UP)
    (worker,) = process.worker_pids()
    eventually(lambda: footprint(worker).children == 0)
    return footprint(worker)


def settled(process: ProxyProcess, before: Footprint, records: Callable[[], int]) -> Footprint:
    """The footprint once everything is back where it was; fails if that does not come."""
    (worker,) = process.worker_pids()

    def is_back() -> bool:
        now = footprint(worker)
        is_small = now.descriptors <= before.descriptors + _SPARE_DESCRIPTORS
        is_still = now.threads <= before.threads and now.children == 0
        return is_small and is_still and records() == 0

    deadline = time.monotonic() + 60
    while not is_back():
        now = f"before {before}, now {footprint(worker)}, {records()} records"
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return footprint(worker)


def opened_and_deleted(store: str, count: int = 1000) -> None:
    """A thousand sessions are opened and deleted: the worker is as before."""
    with proxy_over(store) as (process, records):
        before = warmed_up(process)
        seconds = many(open_and_delete, process, count)
        after = settled(process, before, records)
        report(f"{count} sessions opened and deleted over {store}", before, after, seconds)


def opened_and_abandoned(store: str, count: int = 200) -> None:
    """Two hundred sessions are opened and left alone: gone with their time to live."""
    options = ("--session-ttl", "3", "--max-sessions", str(count + 50))
    with proxy_over(store, *options) as (process, records):
        before = warmed_up(process)
        seconds = many(open_session, process, count)
        after = settled(process, before, records)
        report(f"{count} sessions opened and abandoned over {store}", before, after, seconds)


def killed_worker(store: str, count: int = 20) -> None:
    """kill -9 of a worker with sessions: nothing of it is left two seconds later."""
    with proxy_over(store) as (process, _):
        many(open_session, process, count)
        (worker,) = process.worker_pids()
        servers = process.server_pids()
        assert len(servers) == count
        os.kill(worker, signal.SIGKILL)
        started = time.monotonic()
        while any(map(is_alive, servers)):
            assert time.monotonic() < started + 2, "servers outlived their worker"
        seconds = time.monotonic() - started
        print(f"kill -9 of a worker with {count} servers ({store}): all gone after {seconds:.2f} s")


def report(what: str, before: Footprint, after: Footprint, seconds: float) -> None:
    """Prints the figures; raises AssertionError if the memory has grown too much."""
    print(f"{what} in {seconds:.1f} s\n  before {before}\n  after  {after}", flush=True)
    grown = after.memory - before.memory
    assert grown < MEMORY_LEFT, f"the worker has grown by {grown:.1f} MB"
