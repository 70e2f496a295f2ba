"""SDK clients over HTTP+SSE: four workers, one Redis, no message near its stream on purpose."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tests.clients.programs import HERE, node, node_modules, python_with_mcp1
from tests.proofs.crowd import Crowd, Json
from tests.proofs.replicas import WORKERS, Scene, replicas
from tests.support.startable import Startable
from tests.support.waiting import eventually

SESSIONS = 100
SECONDS = 20.0

# Room for most of the streams at one worker: who accepts them is the kernel's choice.
_THREADS = "128"

# That a client has left is noticed at the next one.
_KEEPALIVE = "1"

_PATIENCE = 60.0
_LOOK = 0.1

_PYTHON = HERE / "sse_client.py"
_TYPESCRIPT = HERE / "sse_client.mjs"


class Call(NamedTuple):
    """One call. `id` is that of JSON-RPC, `owner` the worker with the stream and the server,
    `worker` the one that the call was posted to.
    """

    client: int
    id: int
    started: float
    ended: float
    kind: str
    owner: int | None
    worker: int | None
    error: str
    wrong: str

    @property
    def is_relayed(self) -> bool:
        """Whether it was posted to another worker than the owner."""
        return self.owner is not None and self.worker != self.owner


class Sessions(Startable):
    """Sessions of both SDKs, half of them each, that call until they are told to finish."""

    def __init__(self, scene: Scene, count: int) -> None:
        self.count = count
        self.halves = {"Python": range(count // 2), "TypeScript": range(count // 2, count)}
        node_modules()
        programs: dict[str, tuple[str, Path]] = {
            "Python": (python_with_mcp1(), _PYTHON),
            "TypeScript": (node(), _TYPESCRIPT),
        }
        self._stack = ExitStack()
        self._crowds = [
            self._stack.enter_context(_Half(interpreter, program, scene, self.halves[name]))
            for name, (interpreter, program) in programs.items()
        ]

    def close(self) -> None:
        self._stack.close()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something that shows in the lines so far."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            for crowd in self._crowds:
                crowd.require_running()
            assert time.monotonic() < deadline, f"{what}: {len(self.lines('call'))} calls"
            time.sleep(_LOOK)

    def finish(self) -> None:
        """Has every session end."""
        for crowd in self._crowds:
            crowd.finish(_PATIENCE)

    def lines(self, key: str) -> list[Json]:
        """The lines so far that have this member."""
        return [line for crowd in self._crowds for line in crowd.lines() if key in line]

    def calls(self) -> list[Call]:
        """Every call so far."""
        return [_call(line) for line in self.lines("call")]


class _Half(Crowd):
    """The sessions of one SDK."""

    def __init__(self, interpreter: str, program: Path, scene: Scene, numbers: range) -> None:
        first = ["--clients", f"{numbers.start}-{numbers.stop}"]
        super().__init__([interpreter], [scene.proxy.port], len(numbers), first, program)


def _call(line: Json) -> Call:
    return Call(
        client=line["client"],
        id=line["id"],
        started=line["started"],
        ended=line["ended"],
        kind=line["kind"],
        owner=line.get("owner"),
        worker=line.get("worker"),
        error=line.get("error", ""),
        wrong=line.get("wrong", ""),
    )


def load(sessions: int = SESSIONS, workers: int = WORKERS, seconds: float = SECONDS) -> None:
    """A hundred sessions at once, equal ids everywhere: no call fails, no answer is another's."""
    with (
        replicas(
            workers=workers, threads=_THREADS, keepalive_interval=_KEEPALIVE, passing="off"
        ) as scene,
        Sessions(scene, sessions) as crowd,
    ):
        begun = time.monotonic()
        crowd.wait_for(lambda: len(crowd.lines("open")) == sessions, "not all are open")
        opened = time.monotonic()
        print(f"{sessions} sessions were open after {opened - begun:.1f} s", flush=True)
        assert len(scene.proxy.server_pids()) == sessions
        crowd.wait_for(lambda: time.monotonic() > opened + seconds, "time does not pass")
        crowd.wait_for(lambda: _least(crowd.calls(), sessions) >= 2, "not everybody has called")
        crowd.finish()
        report(crowd, scene, [call for call in crowd.calls() if call.started > opened])
        judge(crowd, scene)


def _least(calls: Sequence[Call], sessions: int) -> int:
    """How many calls the session with the fewest has had answered."""
    answered = Counter(call.client for call in calls if call.owner is not None)
    return min(answered.values()) if len(answered) == sessions else 0


def report(crowd: Sessions, scene: Scene, calls: Sequence[Call]) -> None:
    """Prints the figures of calls that were made while all sessions were open."""
    seconds = max(call.ended for call in calls) - min(call.started for call in calls)
    print(f"{len(calls)} calls in {seconds:.1f} s ({len(calls) / seconds:.0f}/s)")
    for sdk, numbers in crowd.halves.items():
        mine = [call for call in calls if call.client in numbers]
        relayed = sum(call.is_relayed for call in mine) / len(mine)
        print(f"  {sdk:<11}{len(mine)} calls, posted to another worker: {relayed:.0%}")
    owners = {call.client: call.owner for call in calls}
    streams = Counter(owners.values())
    posts = Counter(call.worker for call in calls)
    print(f"  streams of each worker: {sorted(streams.values())}")
    print(f"  calls posted to each worker: {sorted(posts.values())}")
    for is_relayed in (False, True):
        chosen = [call for call in calls if call.is_relayed == is_relayed]
        print(f"  {'relayed' if is_relayed else 'owned':<8}{_quantiles(chosen)}")
    shared = Counter(call.id for call in calls)
    print(f"  JSON-RPC ids: {len(shared)} for {len(calls)} calls")
    failed = sum(bool(call.error) for call in crowd.calls())
    crossed = sum(bool(call.wrong) for call in crowd.calls())
    print(f"  {failed} failed, {crossed} crossed", flush=True)


def _quantiles(calls: Sequence[Call]) -> str:
    times = sorted(1000 * (call.ended - call.started) for call in calls)
    if not times:
        return "none"
    return f"p50 {times[len(times) // 2]:.1f} ms, p99 {times[len(times) * 99 // 100]:.1f} ms"


def judge(crowd: Sessions, scene: Scene) -> None:
    """What must hold, from the first handshake to the last goodbye."""
    calls, ends = crowd.calls(), crowd.lines("end")
    bad = [call for call in calls if call.error or call.wrong]
    assert bad == [], bad[:3]
    assert any(call.is_relayed for call in calls)
    strange = [end for end in ends if end["strange"]]
    assert strange == [], strange[:3]
    assert len(ends) == len({end["session"] for end in ends}) == crowd.count
    executed = Counter((done.token, done.number) for done in scene.executions())
    assert len(executed) == len(calls)
    assert set(executed.values()) == {1}, "executed twice"
    eventually(lambda: scene.proxy.server_pids() == [], 20, "servers are left")
    eventually(lambda: _records(scene) == [], 5, "records are left")
    print("  servers and records left after every stream has ended: 0", flush=True)


def _records(scene: Scene) -> list[bytes]:
    with scene.redis.client() as client:
        return list(client.scan_iter("mcp-proxy:*session:*"))
