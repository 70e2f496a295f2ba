"""Half of what is possible, for half an hour: nothing fails, and nothing grows.

Clients of both eras call a legacy stdio server through two workers, with sessions in memory and
then in Redis. Sessions come and go, some of them without a word, and about once a minute a worker
has had its `max_requests` and is replaced. Every request has a connection of its own, so that half
of them reach the worker that has not the session.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import NamedTuple

import redis

from mcp_proxy import ProxyConfig
from tests.clients.programs import ROOT
from tests.proofs.replicas import LABELLED
from tests.proofs.wires import PATIENCE, Failed, Legacy, Modern
from tests.proofs.worker import Footprint, footprint
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

#: For each of the two ways to keep sessions, in seconds.
SECONDS = 1800.0

#: What the medians of the last third of the time may be above those of the first. Of memory that is
#: 9 MB in an hour.
GROWN = {"memory": 3.0, "threads": 6, "descriptors": 12, "children": 8, "keys": 24, "store": 4.0}

#: What a worker may keep of descriptors and threads once nobody has a session, above an unused one:
#: the threads of its pool, and those that go on when they were needed once.
KEPT = {"descriptors": 24, "threads": ProxyConfig().threads + 24}

_WORKERS = 2
_LEGACY = 8
_MODERN = 4
_CALLS = 50  # of one client, before it ends its session
_LEFT = 5  # each so-manieth session is left without a word
_TTL = 20.0
_RECYCLED_EVERY = 60.0
_RECYCLED_LEAST = 5  # times in all, where there is less time
_TRIAL = 15.0  # seconds for which all that is possible is asked for
_LOOK = 1.0
_GONE_TIME = 3 * _TTL
_BEHIND = 1.0  # seconds that a client catches up, where answers were slow

_MAILBOXES = b"mcp-proxy:mailbox:"

# Records of the deployment, and of the home of the modern clients.
_FACTS = 4


def soak(seconds: float = SECONDS) -> None:
    """Both ways to keep sessions, one after the other; each has `seconds`."""
    for is_shared in (False, True):
        with nullcontext() if not is_shared else RedisServer() as server:
            print("sessions in Redis" if is_shared else "sessions in memory", flush=True)
            most = _possible(server)
            _half(server, most, seconds)


class Rates(NamedTuple):
    """What was possible, in a second."""

    calls: float
    requests: float


class Clients:
    """Threads that call, `rate` times a second together or as fast as they are answered."""

    def __init__(self, port: int, rate: float | None = None) -> None:
        self._port = port
        self._interval = 0.0 if rate is None else (_LEGACY + _MODERN) / rate
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # guards the three below
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._sessions = itertools.count(1)
        self._threads = [
            threading.Thread(target=self._run, args=(number,))
            for number in range(_LEGACY + _MODERN)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        due = time.monotonic()
        while not self._is_over.is_set():
            client = Legacy(self._port) if number < _LEGACY else Modern(self._port)
            try:
                due = self._call_often(client, number, due)
            except Failed as error:
                with self._lock:
                    self.failures.append(f"client {number}: {error}")
            finally:
                self._count(requests=len(client.ports))

    def _call_often(self, client: Legacy | Modern, number: int, due: float) -> float:
        """One session, or as many modern calls; returns when the next call is due."""
        if isinstance(client, Legacy):
            client.open()
        for call in range(_CALLS):
            self._is_over.wait(max(0.0, due - time.monotonic()))
            if self._is_over.is_set():
                break
            due = max(due + self._interval, time.monotonic() - _BEHIND)
            text = f"{number} {call} {id(client)}"
            found = client.call("echo", {"text": text}).structured
            if found != {"text": text}:
                raise Failed(f"for {text!r} came {found}")
            self._count(**{f"{'legacy' if isinstance(client, Legacy) else 'modern'} calls": 1})
        if isinstance(client, Legacy):
            self._end(client)
        return due

    def _end(self, client: Legacy) -> None:
        with self._lock:
            is_left = next(self._sessions) % _LEFT == 0
        if not is_left:
            with client.sent("DELETE", None, client.headers, PATIENCE) as response:
                if response.status != 204:
                    raise Failed(f"the end of a session: {response.status} {response.read()!r}")
        self._count(**{"sessions left" if is_left else "sessions ended": 1})

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)


@contextmanager
def _proxy(server: RedisServer | None, *options: str) -> Iterator[ProxyProcess]:
    settings = {
        "MCP_PROXY_WORKERS": str(_WORKERS),
        "MCP_PROXY_SESSION_TTL": str(_TTL),
        "MCP_PROXY_LOG_LEVEL": "warning",
        "MCP_PROXY_REDIS_URL": "" if server is None else server.url,
    }
    command = [sys.executable, "-S", str(ROOT / "tests" / "servers" / "legacy.py")]
    with ProxyProcess(command, environment=settings, way=LABELLED, options=options) as proxy:
        try:
            yield proxy
        except BaseException as error:
            error.add_note(f"the proxy wrote:\n{proxy.log()[-4000:]}")
            raise
    assert "Traceback" not in proxy.log(), proxy.log()[-6000:]


def _possible(server: RedisServer | None) -> Rates:
    """What these clients reach as fast as they can."""
    with _proxy(server) as proxy:
        started = time.monotonic()
        with Clients(proxy.port) as clients:
            time.sleep(_TRIAL)
        seconds = time.monotonic() - started
    assert clients.failures == [], clients.failures[:5]
    calls = sum(n for name, n in clients.counts.items() if name.endswith(" calls"))
    found = Rates(calls / seconds, clients.counts["requests"] / seconds)
    print(f"  possible: {found.calls:.0f} calls/s in {found.requests:.0f} requests/s", flush=True)
    return found


def _half(server: RedisServer | None, most: Rates, seconds: float) -> None:
    """Half of it, and everything that is watched."""
    every = min(_RECYCLED_EVERY, seconds / _RECYCLED_LEAST)
    until_recycled = max(50, round(most.requests / 2 * every))
    options = ["--max-requests", str(until_recycled * 3 // 4)]  # and up to half of it more
    options += ["--max-requests-jitter", str(until_recycled // 2)]
    with _proxy(server, *options) as proxy, _client_of(server) as store:
        unused = [footprint(pid) for pid in proxy.worker_pids()]
        with Clients(proxy.port, most.calls / 2) as clients:
            watched = Watched(proxy, store)
            watched.watch(seconds)
        _report(clients, watched, seconds)
        recycled = len(watched.workers) - _WORKERS
        assert recycled >= seconds / every / 2, "too few workers were recycled"
        assert clients.failures == [], clients.failures[:5]
        watched.require_flat()
        _require_gone(proxy, store, unused)


@contextmanager
def _client_of(server: RedisServer | None) -> Iterator[redis.Redis | None]:
    if server is None:
        yield None
        return
    with server.client() as client:
        yield client


class Sample(NamedTuple):
    """What there was at a moment; memory in MB. Of the workers the largest figure of any."""

    memory: float
    threads: int
    descriptors: int
    children: int
    keys: int
    store: float
    master: float
    master_descriptors: int

    def __str__(self) -> str:
        worker = Footprint(self.memory, self.threads, self.descriptors, self.children)
        return (
            f"worker {worker}; master {self.master:.1f} MB, {self.master_descriptors} descriptors; "
            f"Redis {self.keys} keys, {self.store:.1f} MB"
        )


class Watched:
    """A proxy under load: samples of what it has, and every worker that there was."""

    def __init__(self, proxy: ProxyProcess, store: redis.Redis | None) -> None:
        self._proxy = proxy
        self._store = store
        self.samples: list[Sample] = []
        self.workers: set[int] = set()

    def watch(self, seconds: float) -> None:
        """Takes samples for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(_LOOK)
            workers = self._proxy.worker_pids()
            self.workers |= set(workers)
            with contextlib.suppress(OSError):  # one of them has just ended
                self.samples.append(self._sample([footprint(pid) for pid in workers]))

    def _sample(self, workers: Sequence[Footprint]) -> Sample:
        master = footprint(self._proxy.master_pid)
        return Sample(
            memory=max(worker.memory for worker in workers),
            threads=max(worker.threads for worker in workers),
            descriptors=max(worker.descriptors for worker in workers),
            children=max(worker.children for worker in workers),
            keys=0 if self._store is None else int(self._store.dbsize()),
            store=0 if self._store is None else _memory_of(self._store),
            master=master.memory,
            master_descriptors=master.descriptors,
        )

    def thirds(self) -> tuple[Sample, Sample]:
        """The medians of the first and of the last third."""
        length = len(self.samples) // 3
        return _medians(self.samples[:length]), _medians(self.samples[-length:])

    def require_flat(self) -> None:
        """Fails where the last third has more of anything than it may."""
        first, last = self.thirds()
        for name, most in {**GROWN, "master": 2.0, "master_descriptors": 0}.items():
            grown = getattr(last, name) - getattr(first, name)
            assert grown <= most, f"{name}: {grown:+.1f}"


def _medians(samples: Sequence[Sample]) -> Sample:
    return Sample(*(median(column) for column in zip(*samples, strict=True)))


def _memory_of(store: redis.Redis) -> float:
    return int(store.info("memory")["used_memory"]) / 2**20


def _report(clients: Clients, watched: Watched, seconds: float) -> None:
    counts = ", ".join(f"{clients.counts[name]} {name}" for name in sorted(clients.counts))
    calls = sum(n for name, n in clients.counts.items() if name.endswith(" calls"))
    print(
        f"  {seconds:.0f} s, {calls / seconds:.0f} calls/s: {counts}\n"
        f"  {len(clients.failures)} failures; {len(watched.workers)} workers\n"
        f"  the most:    {Sample(*(max(c) for c in zip(*watched.samples, strict=True)))}"
    )
    for name, sample in zip(("first third", "last third"), watched.thirds(), strict=True):
        print(f"  {name + ':':12} {sample}", flush=True)


def _require_gone(
    proxy: ProxyProcess, store: redis.Redis | None, unused: Sequence[Footprint]
) -> None:
    """Once nobody has a session a worker has what it had before, and Redis what is everybody's."""
    eventually(lambda: not proxy.server_pids(), _GONE_TIME, "servers are left")
    if store is not None:
        eventually(lambda: len(_keys(store)) <= _FACTS, _GONE_TIME, "keys are left")
    left = [footprint(pid) for pid in proxy.worker_pids()]
    for worker in left:
        print(f"  afterwards:  {worker}", flush=True)
    for name, more in KEPT.items():
        most = max(getattr(worker, name) for worker in unused) + more
        assert max(getattr(worker, name) for worker in left) <= most, (name, unused)


def _keys(store: redis.Redis) -> list[bytes]:
    """All keys but mailboxes, one of which each worker has."""
    return [key for key in store.scan_iter(count=1000) if not key.startswith(_MAILBOXES)]
