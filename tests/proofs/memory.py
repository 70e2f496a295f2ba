"""Four workers without Redis: each session is in the memory of one, and is served by every one."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from tests.proofs.given_connections import show_ways, wait_until
from tests.proofs.replicas import (
    PATIENCE,
    WORKERS,
    Call,
    Callers,
    Scene,
    kill,
    late_executions,
    replicas,
    report,
    require_own_answers,
    require_single_executions,
)
from tests.support.waiting import eventually

_CLIENTS = 60

# Requests after which a worker is replaced in the load that shows that.
_MAX_REQUESTS = "400"


def memory(seconds: float = 60.0) -> None:
    """No call fails while nothing is hit, nor while workers leave; a killed one costs its own."""
    undisturbed(seconds)
    leaving(seconds)
    recycled(seconds)
    killed(seconds)


def undisturbed(seconds: float) -> None:
    """Two SDKs, every request on a connection of its own: what is not local is passed."""
    print("undisturbed", flush=True)
    with (
        replicas(passing="on", redis_url="") as scene,
        Callers(scene, _CLIENTS, both_sdks=True) as crowd,
    ):
        begin = crowd.wait_for_answers(0.0, 1, "not everybody has begun")
        wait_until(crowd, begin + seconds)
        _require_no_failure(scene, crowd, begin)


def leaving(seconds: float) -> None:
    """Workers are taken away, added, and all replaced."""
    print("workers are taken away, added, and replaced", flush=True)
    with (
        replicas(passing="on", redis_url="") as scene,
        Callers(scene, _CLIENTS, both_sdks=True) as crowd,
    ):
        begin = crowd.wait_for_answers(0.0, 1, "not everybody has begun")
        turns = 0
        while time.monotonic() < begin + seconds:
            before = set(scene.proxy.worker_pids())
            for number, count in ((signal.SIGTTOU, WORKERS - 1), (signal.SIGTTIN, WORKERS)):
                os.kill(scene.proxy.master_pid, number)
                _wait_for_workers(scene, count)
            os.kill(scene.proxy.master_pid, signal.SIGHUP)
            eventually(lambda: not before & set(scene.proxy.worker_pids()), 60)  # noqa: B023
            _wait_for_workers(scene, WORKERS)
            crowd.require_running()
            turns += 1
        print(f"  {turns} times")
        _require_no_failure(scene, crowd, begin)


def recycled(seconds: float) -> None:
    """Each worker is replaced after so many requests."""
    print(f"max_requests {_MAX_REQUESTS}", flush=True)
    options = ("--max-requests", _MAX_REQUESTS)
    with (
        replicas(options=options, passing="on", redis_url="") as scene,
        Callers(scene, _CLIENTS, both_sdks=True) as crowd,
    ):
        begin = crowd.wait_for_answers(0.0, 1, "not everybody has begun")
        workers = set(scene.proxy.worker_pids())
        until = begin + seconds
        while time.monotonic() < until:
            wait_until(crowd, min(until, time.monotonic() + 1))
            workers |= set(scene.proxy.worker_pids())
        print(f"  {len(workers)} workers")
        assert len(workers) > WORKERS, "no worker was replaced"
        _require_no_failure(scene, crowd, begin)


def killed(seconds: float) -> None:
    """The clients of a killed worker are told 404; nobody else sees anything."""
    print("one worker is killed", flush=True)
    with replicas(passing="on", redis_url="") as scene, Callers(scene, _CLIENTS) as crowd:
        begin = crowd.wait_for_answers(0.0, 2, "not everybody has begun")
        hit = kill(scene, scene.busiest())
        wait_until(crowd, begin + seconds)
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= begin], time.monotonic() - begin)
        owned = hit.owned_by(calls)
        failed = [call for call in calls if call.error]
        others = [c for c in failed if c.client not in owned and not hit.held(c)]
        later = [c for c in failed if c.client in owned and c.started > hit.end]
        print(
            f"  {len(owned)} sessions were there; {len(failed)} calls failed, {len(others)} others"
        )
        print(f"  what their clients got afterwards: {dict(Counter(c.error for c in later))}")
        assert owned, "nobody was hit"
        assert {call.client for call in later} == owned
        assert others == [], others[:3]
        require_single_executions(scene, calls)


def _wait_for_workers(scene: Scene, count: int) -> None:
    eventually(lambda: len(scene.proxy.worker_pids()) == count, 60)


def _require_no_failure(scene: Scene, crowd: Callers, begin: float) -> None:
    seconds = time.monotonic() - begin
    crowd.finish(PATIENCE)
    calls = crowd.made()
    counted: list[Call] = [call for call in calls if call.started >= begin]
    report(counted, seconds)
    show_ways(counted)
    errors = Counter(call.error for call in calls if call.error)
    assert errors == {}, errors
    require_own_answers(crowd)
    require_single_executions(scene, calls)
    assert late_executions(scene) == []
    assert not any(call.is_relayed for call in counted)
