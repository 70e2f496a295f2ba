"""HTTP+SSE servers behind the transparent proxy: every answer reaches the session that asked."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from tests.clients.programs import HERE, node, node_modules, python_with_mcp1
from tests.proofs.crowd import Crowd
from tests.support import sse_servers
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_servers import SseServer

SESSIONS = 100
WORKERS = 4
CALLS = 20  # of each session, at least, while all are open

_PATIENCE = 60.0
_LOOK = 0.1

Json = dict[str, Any]


class Crowds:
    """The clients of three SDKs."""

    def __init__(self, stack: ExitStack, port: int) -> None:
        node_modules()
        python, typescript = HERE / "sse_crowd.py", HERE / "sse_crowd.mjs"
        pythons = [sys.executable, python_with_mcp1()]
        shares: list[tuple[list[str], int, Path]] = [
            (pythons, SESSIONS * 2 // 3, python),
            ([node()], SESSIONS - SESSIONS * 2 // 3, typescript),
        ]
        options = ["--calls", str(CALLS), "--pause", "0.05"]
        self.each = [
            stack.enter_context(Crowd(interpreters, [port], clients, options, program))
            for interpreters, clients, program in shares
        ]

    def lines(self) -> list[Json]:
        """Every call so far."""
        return [line for crowd in self.each for line in crowd.lines()]

    def wait_for_calls(self, count: int, since: float) -> None:
        """Waits until each client has had so many answers to calls that it made after `since`."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            for crowd in self.each:
                crowd.require_running()
            made = Counter(line["mine"] for line in self.lines() if line["started"] > since)
            if len(made) == SESSIONS and min(made.values()) >= count:
                return
            assert time.monotonic() < deadline, f"{len(made)} clients, {sum(made.values())} calls"
            time.sleep(_LOOK)

    def finish(self) -> None:
        """Has all of them end."""
        for crowd in self.each:
            crowd.finish(_PATIENCE)


def records_in(redis: RedisServer) -> int:
    """How many sessions Redis knows."""
    with redis.client() as client:
        return len(list(client.scan_iter("mcp-proxy:*session:*")))


def is_crossed(line: Json) -> bool:
    """Whether an answer is another session's, or another call's."""
    is_own = (line["marker"], line["said"]) == (line["mine"], line["expected"])
    return not is_own or line["counter"] != line["call"]


def load() -> None:
    """A hundred sessions at once over four workers and three servers, each made with an SDK."""
    made = [sse_servers.python_1, sse_servers.python_2, sse_servers.typescript]
    with ExitStack() as stack:
        servers = [stack.enter_context(SseServer(command, command.__name__)) for command in made]
        redis = stack.enter_context(RedisServer())
        options = ["--redis-url", redis.url, "--workers", str(WORKERS), "--threads", "160"]
        for server in servers:
            options += ["--target-url", server.url]
        proxy = stack.enter_context(ProxyProcess(options=[*options, "--log-level", "warning"]))
        crowds = Crowds(stack, proxy.port)
        begun = time.monotonic()
        crowds.wait_for_calls(1, begun)
        all_open = time.monotonic()
        at_once = records_in(redis)
        crowds.wait_for_calls(CALLS, all_open)
        seconds = time.monotonic() - all_open
        crowds.finish()
        left = wait_for_no_record(redis)
        judge(crowds.lines(), all_open, seconds, at_once, left)
        assert "Traceback" not in proxy.log(), proxy.log()[-4000:]


def wait_for_no_record(redis: RedisServer) -> int:
    """How many records are left when their clients have gone; none, if all goes well."""
    deadline = time.monotonic() + 5
    while (left := records_in(redis)) and time.monotonic() < deadline:
        time.sleep(_LOOK)
    return left


def judge(lines: list[Json], all_open: float, seconds: float, at_once: int, left: int) -> None:
    """Prints the figures, and fails if anything failed or crossed."""
    failed = [line for line in lines if "error" in line]
    answered = [line for line in lines if "error" not in line]
    crossed = [line for line in answered if is_crossed(line)]
    sessions: dict[str, set[tuple[str, str]]] = defaultdict(set)
    ids: dict[int, set[str]] = defaultdict(set)
    for line in answered:
        sessions[line["mine"]].add((line["name"], line["session"]))
        ids[int(line["id"])].add(line["mine"])
    spread = Counter(name for places in sessions.values() for name, _ in places)
    together = [line for line in answered if line["started"] > all_open]
    times = sorted(line["ended"] - line["started"] for line in together)
    shared = sorted(key for key, users in ids.items() if len(users) == SESSIONS)
    print(
        f"{len(sessions)} sessions, {at_once} records while all were open, {left} at the end\n"
        f"  {len(lines)} calls, {len(failed)} failed, {len(crossed)} crossed; "
        f"{len(together)} of them in {seconds:.1f} s with all open\n"
        f"  sessions at each server: {dict(sorted(spread.items()))}\n"
        f"  JSON-RPC ids that every session used: {len(shared)}, {shared[:1]} to {shared[-1:]}\n"
        f"  seconds per call: median {median(times):.3f}, "
        f"99 % {times[len(times) * 99 // 100]:.3f}, longest {times[-1]:.3f}",
        flush=True,
    )
    assert (failed, crossed) == ([], [])
    assert (at_once, left) == (SESSIONS, 0)
    assert all(len(places) == 1 for places in sessions.values())
    assert len({place for places in sessions.values() for place in places}) == SESSIONS
    assert len(spread) == len({line["pid"] for line in answered}) == 3
    assert len(shared) >= CALLS
