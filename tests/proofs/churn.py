"""Ten thousand sessions are opened and abandoned: what they cost stays bounded, and goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import redis

from tests.proofs.replica_failures import ask
from tests.proofs.worker import footprint
from tests.support.front import SCRIPTED
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

SESSIONS = 10_000

#: Sessions that may be alive at once, by their records.
ALIVE = 200

#: What a worker, and Redis, may grow by after the first fifth of the sessions, in MB.
MEMORY_GROWN = 12.0

# Children may outlive their records by a sweep, and those of the sessions that begin have none yet.
_CHILDREN = ALIVE + 100

_TTL = 2.0
_WORKERS = 2
_AT_ONCE = 8
_LOOK = 1.0
_GONE_TIME = 60.0
_SESSIONS = "mcp-proxy:default:session:*"
_MAILBOXES = "mcp-proxy:mailbox:*"

_OPTIONS = ("--log-level", "warning", "--workers", str(_WORKERS), "--session-ttl", str(_TTL))


class Sample(NamedTuple):
    """What there was at a moment; memory in MB, that of the largest worker and of Redis."""

    opened: int
    keys: int
    records: int
    mailboxes: int
    children: int
    worker: float
    store: float

    def __str__(self) -> str:
        return (
            f"{self.opened:6} opened: {self.keys:4} keys ({self.records} sessions, "
            f"{self.mailboxes} mailboxes), {self.children:4} children, "
            f"worker {self.worker:5.1f} MB, Redis {self.store:5.1f} MB"
        )


class Churn:
    """Opens sessions as long as there is room for more, and watches what they cost."""

    def __init__(self, process: ProxyProcess, client: redis.Redis) -> None:
        self.process = process
        self.client = client
        self.opened = 0
        self.samples: list[Sample] = []
        self._lock = threading.Lock()  # guards what follows
        self._left: dict[str, None] = {}  # sessions that were abandoned, in order
        self._room = threading.Semaphore(ALIVE)

    def open_many(self, count: int) -> float:
        """Opens and abandons so many sessions, and returns how long that took."""
        started = time.monotonic()
        is_over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(is_over,))
        watcher.start()
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                futures = [pool.submit(self._open) for _ in range(count)]
                done, waiting = wait(futures, return_when="FIRST_EXCEPTION")
                for future in waiting:
                    future.cancel()
                for future in done:
                    future.result()
        finally:
            is_over.set()
            watcher.join()
        return time.monotonic() - started

    def sample(self) -> Sample:
        """What there is now."""
        workers = [footprint(pid) for pid in self.process.worker_pids()]
        keys = [key.decode() for key in self.client.scan_iter(count=1000)]
        return Sample(
            opened=self.opened,
            keys=len(keys),
            records=sum(key.startswith(_SESSIONS[:-1]) for key in keys),
            mailboxes=sum(key.startswith(_MAILBOXES[:-1]) for key in keys),
            children=sum(worker.children for worker in workers),
            worker=max(worker.memory for worker in workers),
            store=int(self.client.info("memory")["used_memory"]) / 2**20,
        )

    def _open(self) -> None:
        """One session: a handshake and a call, each request over another connection."""
        self._room.acquire()
        port = self.process.port
        about = {"name": "churn", "version": "1"}
        params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
        answer, body = ask(port, "POST", "/mcp", _message("initialize", params, 1))
        assert answer.status == 200, body
        session = str(answer.headers["Mcp-Session-Id"])
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        answer, body = ask(port, "POST", "/mcp", ready, session)
        assert answer.status == 202, body
        answer, body = ask(port, "POST", "/mcp", _message("echo", {"to": session}, 2), session)
        assert answer.status == 200, body
        assert session.encode() in body
        with self._lock:
            self.opened += 1
            self._left[session] = None

    def _watch(self, is_over: threading.Event) -> None:
        next_sample = 0.0
        while not is_over.wait(0.1):
            self._make_room()
            if time.monotonic() > next_sample:
                next_sample = time.monotonic() + _LOOK
                self.samples.append(self.sample())

    def _make_room(self) -> None:
        """Lets one more session begin for each that has gone."""
        with self._lock:
            left = list(self._left)
        pipeline = self.client.pipeline(transaction=False)
        for session in left:
            pipeline.exists(_SESSIONS[:-1] + session)
        for session, is_there in zip(left, pipeline.execute(), strict=True):
            if not is_there:
                with self._lock:
                    del self._left[session]
                self._room.release()


def _message(method: str, params: object, key: int) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": key, "method": method, "params": params}


def sessions_churn(count: int = SESSIONS) -> None:
    """Opens and abandons `count` sessions through two workers and Redis."""
    with RedisServer() as server, server.client() as client:
        options = [*_OPTIONS, "--redis-url", server.url]
        with ProxyProcess(SCRIPTED, options=options) as process:
            churn = Churn(process, client)
            seconds = churn.open_many(count)
            print(f"{count} sessions in {seconds:.0f} s: {count / seconds:.1f} a second")
            show(churn.samples)
            judge(churn.samples, count)
            require_gone(churn)


def show(samples: list[Sample]) -> None:
    """Prints some of the samples, and the most there was of each."""
    step = max(1, len(samples) // 8)
    for sample in samples[step - 1 :: step]:
        print(f"  {sample}")
    most = Sample(*(max(column) for column in zip(*samples, strict=True)))
    print(f"  at the most   {most}", flush=True)


def judge(samples: list[Sample], count: int) -> None:
    """The cost is bounded: it is the same at the end as after the first fifth."""
    early = [s for s in samples if count / 10 <= s.opened <= count / 5]
    late = [s for s in samples if s.opened > count / 5]
    assert early, "too few samples"
    for name in ("worker", "store"):
        grown = _most(late, name) - _most(early, name)
        print(f"  {name}: {grown:+.1f} MB after the first fifth", flush=True)
        assert grown < MEMORY_GROWN, f"{name} has grown by {grown:.1f} MB"
    assert _most(samples, "records") <= ALIVE
    assert _most(samples, "children") <= _CHILDREN
    assert _most(samples, "mailboxes") <= _WORKERS
    others = max(sample.keys - sample.records - sample.mailboxes for sample in samples)
    assert others <= ALIVE, f"{others} other keys"


def _most(samples: list[Sample], name: str) -> float:
    return float(max(getattr(sample, name) for sample in samples))


def require_gone(churn: Churn) -> None:
    """Nothing is left but the mailboxes of the living workers."""
    ended = time.monotonic()
    gone = {
        "children": wait_for(lambda: not churn.process.server_pids(), "children are left"),
        "keys": wait_for(
            lambda: (now := churn.sample()).keys == now.mailboxes <= _WORKERS, "keys are left"
        ),
    }
    last = churn.sample()
    print(f"  gone after the last: {', '.join(f'{k} {v - ended:.1f} s' for k, v in gone.items())}")
    print(f"  {last}", flush=True)


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """When the condition came true; looks seldom, for each look costs."""
    deadline = time.monotonic() + _GONE_TIME
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return time.monotonic()
