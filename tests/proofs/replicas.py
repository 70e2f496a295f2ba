"""Four workers over one Redis, no request near its session on purpose: nothing fails or strays."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.programs import HERE, python_with_mcp1
from tests.proofs.crowd import Crowd
from tests.proofs.sockets import peers_of
from tests.support.proxy_process import ProxyProcess, children_of, is_alive, is_guardian
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

WORKERS = 4
CLIENTS = 100

PATIENCE = 120.0
LOOK = 0.25

_TALLY = Path(__file__).resolve().parents[1] / "servers" / "tally.py"
_PROGRAM = HERE / "replica_client.py"

#: How to start a proxy each of whose responses names its worker.
LABELLED = ("-m", "gunicorn", "-c", "python:mcp_proxy.gunicorn_conf", "tests.proofs.labelled:app")

# Each worker must have served at least this part of its fair share of the requests.
_FAIR = 0.2


class Call(NamedTuple):
    """One call of a client. `owner` is the worker that held the session, None: not answered.

    `requests` are the client's notes: method, its port, the worker that answered, status or
    error, and whether it had been passed to that worker.
    """

    client: int
    number: int
    kind: str
    token: str
    started: float
    ended: float
    seconds: float
    pid: int | None
    owner: int | None
    error: str
    wrong: str
    requests: list[list[Any]]

    @property
    def is_answered(self) -> bool:
        """Whether the right answer came."""
        return self.owner is not None

    @property
    def is_relayed(self) -> bool:
        """Whether another worker than the owner got the call, and answered it."""
        return self.is_answered and self.requests[0][2] != self.owner

    @property
    def is_passed(self) -> bool:
        """Whether another worker than the owner got the call, and passed it with its connection."""
        return self.is_answered and not self.is_relayed and bool(self.requests[0][4])

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether the call was under way at some moment of that time."""
        return self.started <= end and self.ended >= begin


class Execution(NamedTuple):
    """A line of the servers' file."""

    token: str
    number: int
    pid: int


class Scene:
    """A proxy of four workers, its Redis, and what its servers have executed."""

    def __init__(self, redis: RedisServer, proxy: ProxyProcess, executions: Path) -> None:
        self.redis = redis
        self.proxy = proxy
        self._executions = executions

    def executions(self) -> list[Execution]:
        """Everything that was executed, in order."""
        lines = [line.split() for line in self._executions.read_text().splitlines()]
        return [Execution(token, int(number), int(pid)) for token, number, pid in lines]

    def servers_of(self, worker: int) -> list[int]:
        """The stdio servers of a worker."""
        return [pid for pid in children_of(worker) if not is_guardian(pid)]

    def busiest(self) -> int:
        """The worker with the most servers."""
        return max(self.proxy.worker_pids(), key=lambda worker: len(self.servers_of(worker)))


@contextmanager
def replicas(
    *, workers: int = WORKERS, options: Sequence[str] = (), **settings: str
) -> Iterator[Scene]:
    """The scene; `settings` are further ones of the proxy, `options` of gunicorn.

    What a worker does not have is relayed, unless they say otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="proof-") as folder, RedisServer() as redis:
        executions = Path(folder) / "executions"
        executions.touch()
        environment = {
            "MCP_PROXY_WORKERS": str(workers),
            "MCP_PROXY_REDIS_URL": redis.url,
            "MCP_PROXY_LOG_LEVEL": "warning",
            "MCP_PROXY_PASSING": "off",
            **{f"MCP_PROXY_{name.upper()}": value for name, value in settings.items()},
        }
        command = [sys.executable, "-I", "-S", str(_TALLY), "--executions", str(executions)]
        with ProxyProcess(command, environment=environment, way=LABELLED, options=options) as proxy:
            try:
                yield Scene(redis, proxy, executions)
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{proxy.log()[-4000:]}")
                raise


class Callers(Crowd):
    """The crowd of `replica_client.py`."""

    def __init__(
        self, scene: Scene, clients: int = CLIENTS, *options: str, both_sdks: bool = False
    ) -> None:
        other = python_with_mcp1() if both_sdks else sys.executable
        super().__init__(
            [sys.executable, other], [scene.proxy.port], clients, options, program=_PROGRAM
        )

    def made(self) -> list[Call]:
        """Every call so far, in the order of their ends."""
        found = [_call(line) for line in self.lines() if "call" in line]
        return sorted(found, key=lambda call: call.ended)

    def wait_for_answers(self, since: float, count: int, what: str) -> float:
        """Waits until each client has had answers to `count` calls that it began after `since`.

        Returns when that was.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            self.require_running()
            calls = [call for call in self.made() if call.is_answered and call.started > since]
            answered = Counter(call.client for call in calls)
            if len(answered) == self.clients and min(answered.values()) >= count:
                return time.monotonic()
            behind = sorted(set(range(self.clients)) - {c for c, n in answered.items() if n > 1})
            assert time.monotonic() < deadline, f"{what}: clients {behind}"
            time.sleep(LOOK)


def _call(line: dict[str, Any]) -> Call:
    return Call(
        client=line["client"],
        number=line["call"],
        kind=line["kind"],
        token=line["token"],
        started=line["started"],
        ended=line["ended"],
        seconds=line.get("seconds", 0.0),
        pid=line.get("pid"),
        owner=line.get("owner"),
        error=line.get("error", ""),
        wrong=line.get("wrong", ""),
        requests=line["requests"],
    )


# --- figures and claims that all runs share ------------------------------------------------------


def report(calls: Sequence[Call], seconds: float) -> None:
    """Prints the figures that every run has."""
    answered = [call for call in calls if call.is_answered]
    failed = sum(bool(call.error) for call in calls)
    crossed = sum(bool(call.wrong) for call in calls)
    kinds = Counter(call.kind for call in calls)
    workers = Counter(note[2] for call in calls for note in call.requests if note[2])
    print(
        f"{len(calls)} calls in {seconds:.1f} s ({len(calls) / seconds:.0f}/s): "
        f"{', '.join(f'{kinds[kind]} {kind}' for kind in sorted(kinds))}\n"
        f"  {failed} failed, {crossed} crossed\n"
        f"  passed: {sum(c.is_passed for c in answered) / len(answered):.1%}, "
        f"relayed: {sum(c.is_relayed for c in answered) / len(answered):.1%}; "
        f"requests at each worker: {sorted(workers.values())}\n"
        f"  all              {quantiles(answered)}"
    )
    for kind in sorted(kinds):
        for is_relayed in (False, True):
            chosen = [c for c in answered if c.kind == kind and c.is_relayed == is_relayed]
            print(f"  {kind:<9}{'relayed' if is_relayed else 'owned':<8} {quantiles(chosen)}")
    sys.stdout.flush()


def quantiles(calls: Sequence[Call]) -> str:
    """Milliseconds that calls took beyond what they asked for, as words."""
    times = sorted(1000 * (call.ended - call.started - call.seconds) for call in calls)
    if not times:
        return "none"
    return f"p50 {times[len(times) // 2]:.1f} ms, p99 {times[len(times) * 99 // 100]:.1f} ms"


def require_own_answers(crowd: Callers) -> None:
    """No answer, question or progress was another session's or another call's."""
    wrong = [call for call in crowd.made() if call.wrong]
    assert wrong == [], wrong
    assert [end["strange"] for end in crowd.ends() if end["strange"]] == []
    several = [end for end in crowd.ends() if len(end["sessions"]) != 1]
    assert several == [], "a client has had more than one session"


def require_single_executions(scene: Scene, calls: Sequence[Call]) -> None:
    """Nothing was executed twice, and what was answered once."""
    counts = Counter((execution.token, execution.number) for execution in scene.executions())
    twice = [key for key, count in counts.items() if count > 1]
    print(f"  executed: {len(counts)} calls, {len(twice)} of them twice", flush=True)
    assert twice == []
    unknown = [c for c in calls if c.is_answered and counts[c.token, c.number] != 1]
    assert unknown == [], "answered, but not executed"


def late_executions(scene: Scene) -> list[Execution]:
    """What a server executed after another one had taken its place."""
    current: dict[str, int] = {}
    before: dict[str, set[int]] = defaultdict(set)
    late: list[Execution] = []
    for execution in scene.executions():
        token, pid = execution.token, execution.pid
        if pid in before[token]:
            late.append(execution)
        elif current.setdefault(token, pid) != pid:
            before[token].add(current[token])
            current[token] = pid
    return late


# --- the load ------------------------------------------------------------------------------------


def load(seconds: float = 60.0) -> None:
    """A hundred SDK clients, half of them of the older SDK: no failed call, no crossed answer."""
    with replicas() as scene, Callers(scene, both_sdks=True) as crowd:
        begin = crowd.wait_for_answers(0.0, 1, "not everybody has begun")
        while time.monotonic() < begin + seconds:
            crowd.require_running()
            time.sleep(LOOK)
        seconds = time.monotonic() - begin
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= begin], seconds)
        errors = Counter(call.error for call in calls if call.error)
        print(f"  errors, from the first handshake on: {dict(errors)}")
        assert errors == {}
        require_own_answers(crowd)
        require_single_executions(scene, calls)
        require_spread(scene, calls)


def require_spread(scene: Scene, calls: Sequence[Call]) -> None:
    """Every worker served its part."""
    workers = Counter(note[2] for call in calls for note in call.requests)
    fair = sum(workers.values()) / WORKERS
    for worker in scene.proxy.worker_pids():
        assert workers[worker] > _FAIR * fair, f"{worker} served {workers[worker]} requests"


# --- a worker that is hit ------------------------------------------------------------------------


class Hit(NamedTuple):
    """A worker that was killed or frozen: between which moments that was done, what it held."""

    worker: int
    begin: float
    end: float
    ports: frozenset[int]
    servers: list[int]
    servers_gone: float

    def held(self, call: Call) -> bool:
        """Whether one of the call's connections was to this worker when it was hit."""
        return call.overlaps(self.begin, self.end) and any(
            note[1] in self.ports or note[2] == self.worker for note in call.requests
        )

    def owned_by(self, calls: Sequence[Call]) -> frozenset[int]:
        """The clients whose sessions were here."""
        last = {c.client: c.owner for c in calls if c.is_answered and c.ended < self.begin}
        return frozenset(client for client, owner in last.items() if owner == self.worker)


def kill(scene: Scene, worker: int) -> Hit:
    """kill -9, after a few milliseconds of SIGSTOP in which its connections are noted."""
    servers = scene.servers_of(worker)
    begin, ports = _freeze(scene, worker)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not is_alive(worker), 10, "the worker does not die")
    end = time.monotonic()
    deadline = end + 10
    while any(map(is_alive, servers)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return Hit(worker, begin, end, ports, servers, time.monotonic() - end)


def freeze(scene: Scene, worker: int) -> Hit:
    """SIGSTOP; ended by `thaw`."""
    servers = scene.servers_of(worker)
    begin, ports = _freeze(scene, worker)
    return Hit(worker, begin, time.monotonic(), ports, servers, 0.0)


def thaw(hit: Hit) -> Hit:
    """SIGCONT; the hit ends now."""
    os.kill(hit.worker, signal.SIGCONT)
    return hit._replace(end=time.monotonic())


def _freeze(scene: Scene, worker: int) -> tuple[float, frozenset[int]]:
    begin = time.monotonic()
    os.kill(worker, signal.SIGSTOP)
    eventually(lambda: _state(worker) == "T", 5, "the worker does not stop")
    return begin, peers_of(worker, scene.proxy.port)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Verdict(NamedTuple):
    """The failed calls around a hit."""

    owned: list[Call]  # in flight, on a session of the worker
    connected: list[Call]  # in flight, over a connection to the worker
    later: list[Call]  # on a session of the worker, begun after the hit
    others: list[Call]


def classify(hits: Sequence[Hit], calls: Sequence[Call]) -> Verdict:
    """Sorts the failed calls by what they had to do with the workers that were hit."""
    verdict = Verdict([], [], [], [])
    owned = [(hit, hit.owned_by(calls)) for hit in hits]
    for call in calls:
        if not call.error:
            continue
        if any(call.client in clients and call.overlaps(*hit[1:3]) for hit, clients in owned):
            verdict.owned.append(call)
        elif any(hit.held(call) for hit in hits):
            verdict.connected.append(call)
        elif any(call.client in clients and call.started > hit.end for hit, clients in owned):
            verdict.later.append(call)
        else:
            verdict.others.append(call)
    return verdict


def show(verdict: Verdict) -> None:
    """Prints how many there were of each, and the errors that their callers read."""
    kinds = {
        "in flight on a session of the worker": verdict.owned,
        "in flight over a connection to the worker": verdict.connected,
        "begun later on a session of the worker": verdict.later,
        "others": verdict.others,
    }
    for name, calls in kinds.items():
        print(f"  failed, {name}: {len(calls)}")
        for error, count in Counter(call.error for call in calls).most_common():
            print(f"    {count} x {error}")
    for call in (verdict.later + verdict.others)[:10]:
        print(f"    {call}")
    sys.stdout.flush()
