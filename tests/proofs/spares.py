"""What a session's begin costs with servers that are started ahead, and without."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.clients.programs import everything_server
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

_ROUNDS = 10
_AT_ONCE = 50

#: What a session may wait for a server that was started ahead (seconds).
_AHEAD = 0.02

# Seconds in which a server that has started uses no processor.
_QUIET = 0.5


def spares() -> None:
    """Initialize of npm server-everything, the first and later ones, and many at once."""
    seen = {count: figures(count) for count in (0, 1)}
    for count, (cold, warm, many) in seen.items():
        print(f"{count} started ahead: the first initialize {shown(cold)},", flush=True)
        print(f"  a later one {shown(warm)}, {_AT_ONCE} at once {shown(many)}", flush=True)
    for before, after in zip(seen[0][:2], seen[1][:2], strict=True):
        assert median(after) < median(before) / 2, "a server that was started ahead saves the start"
    assert median(seen[1][1]) <= _AHEAD, f"{median(seen[1][1]):.3f} s with a server started ahead"


def figures(count: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of an initialize: the first of a worker, later ones, and many at once."""
    cold: list[float] = []
    for _ in range(_ROUNDS):
        with proxy(count) as process:
            cold.append(initialized(process))
    with proxy(count) as process:
        used = set(process.server_pids())
        initialized(process)
        warm = []
        for _ in range(_ROUNDS):
            used = started(process, count, used)
            warm.append(initialized(process))
        started(process, count, used)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            many = list(pool.map(initialized, [process] * _AT_ONCE))
    return cold, warm, many


@contextmanager
def proxy(count: int) -> Iterator[ProxyProcess]:
    """A proxy of one worker with so many servers started ahead, which have started."""
    options = ["--spare-children", str(count), "--log-level", "warning"]
    with ProxyProcess(everything_server(), options=options) as process:
        started(process, count)
        yield process


def initialized(process: ProxyProcess) -> float:
    """Seconds until a session has begun; it ends again."""
    client = McpClient(HttpFront(process.base))
    began = time.monotonic()
    answer = client.initialize()
    took = time.monotonic() - began
    assert answer.has_succeeded, answer.body()
    assert client.delete().status == 204
    return took


def started(process: ProxyProcess, count: int, used: Collection[int] = ()) -> set[int]:
    """Waits until so many servers run besides the `used` ones, and have nothing more to do."""

    def are_there() -> bool:
        servers = process.server_pids()
        return len(servers) == count and not set(servers) & set(used)

    eventually(are_there, timeout=30)
    busy, since = -1, time.monotonic()
    while time.monotonic() - since < _QUIET:
        now = sum(map(ticks, process.server_pids()))
        if now != busy:
            busy, since = now, time.monotonic()
        time.sleep(_QUIET / 10)
    return set(process.server_pids())


def ticks(pid: int) -> int:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def shown(seconds: list[float]) -> str:
    """Median and extremes in words."""
    return f"{median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
