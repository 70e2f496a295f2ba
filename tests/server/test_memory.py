"""The heaps of a worker: one for all of its threads."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.support.proxy_process import ProxyProcess

# glibc's arenas but the first begin at multiples of this.
_HEAP = 64 * 2**20


def arenas(pid: int) -> int:
    """How many heaps of threads a process has."""
    lines = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    places = [fields[0].split("-") for fields in lines if len(fields) == 5 and "w" in fields[1]]
    return sum(int(start, 16) % _HEAP == 0 for start, _ in places)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of glibc's")
@pytest.mark.parametrize(("told", "expected"), [({}, 0), ({"MALLOC_ARENA_MAX": "4"}, 3)])
def test_the_threads_of_a_worker_share_a_heap(told: dict[str, str], expected: int) -> None:
    with ProxyProcess(options=["--threads", "16"], environment=told) as process:
        (worker,) = process.worker_pids()
        assert arenas(worker) == expected
