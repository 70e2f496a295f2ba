"""One CPU for each gthread worker.

A CPython process can use one core at a time; threads that the kernel spreads over two pay for
handing the interpreter lock across at every system call. Pinned to one CPU a gthread worker answers
about twice as many small calls (`bench/throughput` measures it). Children get all CPUs back.

On one CPU a thread that wakes another up is often interrupted by it at once, only for the other to
wait for the interpreter lock. The kernel's batch policy (sched(7)) has a thread that was woken wait
its turn instead: little more than half as many switches. Children get the normal policy back, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from mcp_proxy.config import ProxyConfig

_QUOTA_FILE = "/sys/fs/cgroup/cpu.max"


def cpus_to_share(config: ProxyConfig, workers: int) -> tuple[int, ...]:
    """The CPUs among which workers are spread, none where they are better left alone.

    `auto` pins when each worker can have a CPU of its own and no quota cuts the machine smaller
    than it looks: then the kernel's freedom to move a worker is worth more.
    """
    if config.cpu_affinity == "off" or config.worker_class != "gthread":
        return ()
    if not hasattr(os, "sched_setaffinity"):
        return ()
    if config.cpu_affinity != "auto":
        return config.cpus()
    available = tuple(sorted(os.sched_getaffinity(0)))
    return available if workers <= len(available) and not _has_quota(len(available)) else ()


def least_used(cpus: tuple[int, ...], taken: Iterable[int], offset: int) -> int:
    """The CPU that the fewest workers have; among equals the first one after `offset`.

    A random offset keeps several small deployments on one machine from all choosing the first CPU.
    """
    used = list(taken)
    turned = cpus[offset % len(cpus) :] + cpus[: offset % len(cpus)]
    return min(turned, key=used.count)


def pin(cpu: int) -> None:
    """Binds this thread, and those that it starts from now on, to one CPU they share in turns."""
    os.sched_setaffinity(0, {cpu})
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it; that only costs speed
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _has_quota(cpus: int) -> bool:
    """Whether this control group may use less time than `cpus` CPUs have."""
    try:
        with open(_QUOTA_FILE, encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return False
    return quota != "max" and int(quota) < cpus * int(period)
