"""Four workers over one Redis, which pass connections to where their sessions are."""

from __future__ import annotations

import http.client
import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.message import Message
from typing import Any

from tests.proofs.labelled import LABEL, WAY
from tests.proofs.replica_failures import judge
from tests.proofs.replicas import (
    LOOK,
    PATIENCE,
    WORKERS,
    Call,
    Callers,
    Hit,
    Scene,
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
from tests.support.waiting import eventually

_CLIENTS = 60

# Connections that are passed at the same time, where very many are.
_AT_ONCE = 8

_ABOUT = {"name": "proof", "version": "1"}
_PARAMS = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": _ABOUT}

# Seconds for which a worker stands still: shorter than its lease, so its sessions stay.
_FROZEN = 5.0

# Of the calls that another worker gets, how many are passed at least while nothing is hit.
_PASSED = 0.95

# How many calls are made for each that is to be passed, at most: the owner may accept many itself.
_MOST = 20


def passing(seconds: float = 30.0) -> None:
    """No call fails, whichever worker gets it, and nearly all are passed. Then two are hit."""
    many()
    undisturbed(seconds)
    hit(seconds)


def many(count: int = 1000) -> None:
    """So many connections that are passed leave no file open."""
    with replicas(workers=2, passing="on") as scene, closing(_connection(scene)) as first:
        begun = _posted(first, {"id": 1, "method": "initialize", "params": _PARAMS}, None)
        counts: Counter[str] = Counter()
        files: list[list[int]] = []
        for wanted in (count // 10, count):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                parts = [
                    pool.submit(_pass, scene, begun, (wanted - counts["passed"]) // _AT_ONCE)
                    for _ in range(_AT_ONCE)
                ]
                for part in parts:
                    counts += part.result()
            time.sleep(1.0)
            files.append(sorted(scene.proxy.worker_files()))
    print(f"{dict(counts)}; files of the workers, early and late: {files}", flush=True)
    assert counts["passed"] > _PASSED * (counts["passed"] + counts["relayed"]), counts
    assert all(late <= early + 4 for early, late in zip(*files, strict=True)), files


def _pass(scene: Scene, begun: Message, count: int) -> Counter[str]:
    """How the calls of a session came to its owner, until so many were passed.

    What another worker has answered was relayed: only the owner has the session's server.
    """
    ways: Counter[str] = Counter()
    while ways["passed"] < count:
        assert ways.total() < _MOST * (count + 10), ways
        with closing(_connection(scene)) as connection:
            request = {"id": ways.total() + 2, "method": "tools/list"}
            found = _posted(connection, request, begun["Mcp-Session-Id"])
        ways[found[WAY] if found[LABEL] == begun[LABEL] else "relayed"] += 1
    return ways


def _connection(scene: Scene) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", scene.proxy.port, timeout=PATIENCE)


def _posted(
    connection: http.client.HTTPConnection, message: dict[str, Any], session: str | None
) -> Message:
    """The headers of the answer to a message."""
    headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
    if session is not None:
        headers["Mcp-Session-Id"] = session
    connection.request("POST", "/mcp", json.dumps({"jsonrpc": "2.0", **message}), headers)
    answer = connection.getresponse()
    assert "result" in json.loads(answer.read())
    return answer.headers


def undisturbed(seconds: float) -> None:
    """Every request on a connection of its own, so most of them reach the wrong worker."""
    with replicas(passing="on") as scene, Callers(scene, _CLIENTS, both_sdks=True) as crowd:
        begin = crowd.wait_for_answers(0.0, 1, "not everybody has begun")
        files = scene.proxy.worker_files()
        wait_until(crowd, begin + seconds)
        seconds = time.monotonic() - begin
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= begin], seconds)
        show_ways([call for call in calls if call.started >= begin])
        print(f"  files of the workers: {files}, then {scene.proxy.worker_files()}")
        errors = Counter(call.error for call in calls if call.error)
        assert errors == {}, errors
        require_own_answers(crowd)
        require_single_executions(scene, calls)
        others = [call for call in calls if call.is_passed or call.is_relayed]
        assert sum(call.is_passed for call in others) > _PASSED * len(others)


def hit(seconds: float) -> None:
    """One worker is killed and another one stands still, with calls on their way to both."""
    options = ("--slow", "0.3", "--call-time", "90")
    with (
        replicas(log_level="info", passing="on") as scene,
        Callers(scene, _CLIENTS, *options) as crowd,
    ):
        begin = crowd.wait_for_answers(0.0, 2, "not everybody has begun")
        wait_until(crowd, begin + seconds / 4)
        hits = [kill(scene, scene.busiest())]
        eventually(lambda: len(scene.proxy.worker_pids()) == WORKERS, 10, "no new worker")
        crowd.wait_for_answers(hits[0].end, 3, "not all go on after the kill")
        hits.append(_freeze_for(scene, crowd, _FROZEN))
        crowd.wait_for_answers(hits[1].end, 3, "not all go on after the freeze")
        wait_until(crowd, begin + seconds)
        seconds = time.monotonic() - begin
        crowd.finish(PATIENCE)
        calls = crowd.made()
        report([call for call in calls if call.started >= begin], seconds)
        show_ways([call for call in calls if call.started >= begin])
        print(f"  requests taken back: {scene.proxy.log().count('is taken back')}")
        verdict = classify(hits, calls)
        show(verdict)
        late = late_executions(scene)
        assert late == []
        judge(scene, crowd, verdict)
        frozen = [call for call in verdict.owned if call.overlaps(*hits[1][1:3])]
        assert frozen == [], "a call failed since its worker stood still for a moment"


def _freeze_for(scene: Scene, crowd: Callers, seconds: float) -> Hit:
    found = freeze(scene, scene.busiest())
    wait_until(crowd, found.begin + seconds)
    return thaw(found)


def wait_until(crowd: Callers, until: float) -> None:
    """Waits until that (monotonic) time, while the clients run."""
    while time.monotonic() < until:
        crowd.require_running()
        time.sleep(LOOK)


def show_ways(calls: Sequence[Call]) -> None:
    """Prints how many calls were passed, relayed and local."""
    answered = [call for call in calls if call.is_answered]
    passed = sum(call.is_passed for call in answered)
    relayed = sum(call.is_relayed for call in answered)
    print(
        f"  of {len(answered)} answered calls {passed} were passed, {relayed} relayed, "
        f"{len(answered) - passed - relayed} local",
        flush=True,
    )
