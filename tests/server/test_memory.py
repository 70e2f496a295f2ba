"""The heap of a worker: one for all of its threads, without large blocks."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.proxy_process import ProxyProcess

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of glibc's")

# glibc's arenas but the first begin at multiples of this, and reserve as much: what they have not
# used yet nobody may read. Any other mapping may begin there, too.
_HEAP = 64 * 2**20


def arenas(pid: int) -> int:
    """How many heaps of threads a process has."""
    lines = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    places = [(*map(_address, fields[0].split("-")), fields[1]) for fields in lines]
    reserved = {start: end for start, end, may in places if may.startswith("---")}
    used = [(start, end) for start, end, may in places if "w" in may and start % _HEAP == 0]
    return sum(reserved.get(end) == start + _HEAP for start, end in used)


def _address(text: str) -> int:
    return int(text, 16)


#: Prints whether a large block comes from the heap, after a larger one has been freed.
ALLOCATE = """
from pathlib import Path
from mcp_proxy.server.machine import keep_heap_small
keep_heap_small()
larger = bytes(8 * 2**20)
del larger
block = bytes(2**20)
lines = Path("/proc/self/maps").read_text().splitlines()
(heap,) = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
print(int(heap[0], 16) <= id(block) < int(heap[1], 16))
"""


FOUR = pytest.param({"MALLOC_ARENA_MAX": "4"}, 3, marks=needs.THREADS)


@pytest.mark.parametrize(("told", "expected"), [({}, 0), FOUR])
def test_the_threads_of_a_worker_share_a_heap(told: dict[str, str], expected: int) -> None:
    with ProxyProcess(options=["--threads", "16"], environment=told) as process:
        (worker,) = process.worker_pids()
        assert arenas(worker) == expected


@pytest.mark.parametrize(
    ("told", "expected"), [({}, "False"), ({"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, "True")]
)
def test_large_blocks_go_back_to_the_system(told: dict[str, str], expected: str) -> None:
    command = [sys.executable, "-c", ALLOCATE]
    ran = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == expected
