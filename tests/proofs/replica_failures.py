"""Workers are killed and frozen, and Redis goes away, under the load of `replicas`."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.proofs.replicas import (
    CLIENTS,
    LOOK,
    PATIENCE,
    WORKERS,
    Callers,
    Hit,
    Scene,
    Verdict,
    classify,
    freeze,
    kill,
    late_executions,
    replicas,
    report,
    require_own_answers,
    require_single_executions,
    show,
    thaw,
)
from tests.support.proxy_process import is_alive
from tests.support.waiting import eventually

#: Seconds for the children of a killed worker to be gone.
GONE = 2.0

FROZEN = 30.0
AWAY = 20.0

# So that something is under way at every moment.
_SLOW = ("--slow", "0.3")

_SETTLING = 5.0


# --- kill -9 -------------------------------------------------------------------------------------


def kills() -> None:
    """One of four workers is killed: only what was in flight there fails, and all go on."""
    _kills(1)


def kills_of_each() -> None:
    """Every worker is killed in turn, when gunicorn has replaced the one before."""
    _kills(WORKERS)


def _kills(count: int) -> None:
    with replicas() as scene, Callers(scene, CLIENTS, *_SLOW) as crowd:
        started = crowd.wait_for_answers(0.0, 3, "not everybody has begun")
        crowd.wait_for_answers(started, 5, "not all go on")
        workers = set(scene.proxy.worker_pids())
        hits: list[Hit] = []
        for _ in range(count):
            alive = [worker for worker in workers if is_alive(worker)]
            victim = max(alive, key=lambda worker: len(scene.servers_of(worker)))
            hits.append(kill(scene, victim))
            eventually(lambda: len(scene.proxy.worker_pids()) == WORKERS, 10, "no new worker")
            crowd.wait_for_answers(hits[-1].end, 5, "not all go on after the kill")
        seconds = time.monotonic() - started
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= started], seconds)
        for hit in hits:
            print(
                f"  a worker with {len(hit.servers)} servers, {len(hit.owned_by(calls))} of them "
                f"of these clients, and {len(hit.ports)} connections was killed: its servers were "
                f"gone after {hit.servers_gone:.2f} s, and {_resumed(hit, crowd)}"
            )
        verdict = classify(hits, calls)
        show(verdict)
        judge(scene, crowd, verdict)
        assert all(hit.servers_gone < GONE for hit in hits)


def _resumed(hit: Hit, crowd: Callers) -> str:
    """How soon the sessions of a worker were served again."""
    owned = hit.owned_by(crowd.made())
    first: dict[int, float] = {}
    for call in crowd.made():
        if call.client in owned and call.is_answered and call.started > hit.end:
            first.setdefault(call.client, call.ended - call.started - call.seconds)
    times = sorted(first.values())
    return (
        f"{len(times)} of its {len(owned)} sessions went on, their first call after it took "
        f"{times[len(times) // 2]:.2f} s, {times[-1]:.2f} s at the most"
    )


def judge(scene: Scene, crowd: Callers, verdict: Verdict) -> None:
    """What holds after every kind of hit."""
    assert verdict.others == []
    assert verdict.later == []
    failed = [*verdict.owned, *verdict.connected]
    unclear = [call for call in failed if call.error.startswith(("no answer", "TimeoutError"))]
    assert unclear == [], "an error that says nothing"
    require_own_answers(crowd)
    require_single_executions(scene, crowd.made())


# --- SIGSTOP -------------------------------------------------------------------------------------


def frozen() -> None:
    """A worker stands still for half a minute: nothing is executed twice, whoever did it."""
    options = (*_SLOW, "--call-time", "90")
    with replicas() as scene, Callers(scene, CLIENTS, *options) as crowd:
        started = crowd.wait_for_answers(0.0, 3, "not everybody has begun")
        hit = freeze(scene, scene.busiest())
        while time.monotonic() < hit.begin + FROZEN:
            crowd.require_running()
            time.sleep(LOOK)
        hit = thaw(hit)
        crowd.wait_for_answers(hit.end, 5, "not all go on")
        seconds = time.monotonic() - started
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= started], seconds)
        owned = hit.owned_by(calls)
        moved = {c.client for c in calls if c.client in owned and c.owner not in (None, hit.worker)}
        print(
            f"  a worker with {len(hit.servers)} servers and {len(hit.ports)} connections stood "
            f"still for {hit.end - hit.begin:.0f} s: {len(moved)} of its {len(owned)} sessions "
            "were taken over"
        )
        verdict = classify([hit], calls)
        show(verdict)
        late = late_executions(scene)
        print(f"  executed by a server that had been replaced: {len(late)}", flush=True)
        stopped = [pid for pid in hit.servers if not is_alive(pid)]
        print(f"  servers of that worker that were stopped: {len(stopped)} of {len(hit.servers)}")
        judge(scene, crowd, verdict)
        assert late == []


# --- Redis ---------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """What the proxy said while its Redis was away."""

    healthy: int
    ready: int
    call: tuple[int, str | None]
    retry_after: str | None


def outage() -> None:
    """Redis is away for twenty seconds: calls fail meanwhile, then everything is as it was."""
    with replicas() as scene, Callers(scene, CLIENTS, *_SLOW) as crowd:
        session = raw_session(scene.proxy.port)
        started = crowd.wait_for_answers(0.0, 3, "not everybody has begun")
        servers = sorted(scene.proxy.server_pids())
        away = time.monotonic()
        scene.redis.stop()
        probes: list[Probe] = []
        while time.monotonic() < away + AWAY:
            crowd.require_running()
            probes.append(probe(scene, session))
            time.sleep(LOOK)
        scene.redis.start()
        back = time.monotonic()
        eventually(lambda: probe(scene, session).ready == 200, PATIENCE, "never ready again")
        ready = time.monotonic() - back
        crowd.wait_for_answers(back + _SETTLING, 5, "not all go on")
        same = sorted(scene.proxy.server_pids()) == servers
        seconds = time.monotonic() - started
        crowd.finish(PATIENCE)
        report([call for call in crowd.made() if call.started >= started], seconds)
        print(f"  {len(probes)} probes while it was away: {dict(Counter(probes))}")
        judge_outage(scene, crowd, servers, (away, back))
        print(f"  ready again {ready:.2f} s after Redis; the same servers: {same}", flush=True)
        assert same
        assert {probe.healthy for probe in probes} == {200}
        assert {probe.ready for probe in probes} == {503}
        assert {probe.call for probe in probes} == {(200, "store-unavailable")}
        assert all(probe.retry_after for probe in probes)


def judge_outage(
    scene: Scene, crowd: Callers, servers: Sequence[int], away: tuple[float, float]
) -> None:
    """Only calls of the outage failed, and every session has the server that it had."""
    calls = crowd.made()
    failed = [call for call in calls if call.error]
    late = [call for call in failed if call.started > away[1]]
    for error, count in Counter(call.error for call in failed).most_common():
        print(f"    {count} x {error}")
    last = max((call.started - away[1] for call in late), default=0.0)
    print(
        f"  failed: {len(failed)}, {len(late)} of them begun when it was back, until {last:.2f} s"
    )
    for call in sorted(late, key=lambda call: call.started)[-5:]:
        print(f"    {call}")
    moved = {c.client for c in calls if c.is_answered and c.pid not in servers}
    print(f"  sessions with another server than before: {len(moved)}", flush=True)
    early = [call for call in failed if call.ended < away[0]]
    assert early == []
    assert moved == set()
    assert last < _SETTLING
    require_own_answers(crowd)
    require_single_executions(scene, calls)


def raw_session(port: int) -> str:
    """The id of a new session."""
    about = {"name": "probe", "version": "1"}
    params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": about}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    answer, _ = ask(port, "POST", "/mcp", message)
    session: str = answer.headers["Mcp-Session-Id"]
    return session


def probe(scene: Scene, session: str) -> Probe:
    """Health, readiness and a ping in a session that is there."""
    port = scene.proxy.port
    healthy, _ = ask(port, "GET", "/healthz")
    ready, _ = ask(port, "GET", "/readyz")
    ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
    call, _ = ask(port, "POST", "/mcp", ping, session)
    said = (call.status, call.headers["X-MCP-Proxy-Error"])
    return Probe(healthy.status, ready.status, said, call.headers["Retry-After"])


def ask(
    port: int, method: str, path: str, message: Any = None, session: str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "Connection": "close",
    }
    if session is not None:
        headers["Mcp-Session-Id"] = session
    try:
        connection.request(method, path, None if message is None else json.dumps(message), headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()
