"""What a worker may have of its machine: files, memory, a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import tempfile
from collections.abc import Iterable

import msgspec

from mcp_proxy.config import GEVENT_CONNECTIONS, ProxyConfig, is_malloc_told
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.crowd import OTHER_FILES

# Files that a worker may have open, if the system allows it.
_FILES = 16_384

# Files of a stdio session: three pipes, and one for what is being done with it.
_FILES_OF_A_SESSION = 4

# Connections that a worker may have, if there are files for them.
_CONNECTIONS = 4_096

_STDOUT, _STDERR = 1, 2

# Memory that is a file system: writable in most containers whose file system is not.
_SHARED_MEMORY = "/dev/shm"

# As mallopt of glibc calls them.
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3

# Bytes from which on a block of memory goes back to the system as soon as it is free.
_LARGE_BLOCK = 256 * 1024

# --- files and memory ----------------------------------------------------------------------------


def heartbeat_directory() -> str | None:
    """Where gunicorn's workers have the files of their heartbeat; None: where temporary files are.

    Raises ConfigError where nothing can be written.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        if os.access(_SHARED_MEMORY, os.W_OK):
            return _SHARED_MEMORY
        raise ConfigError(
            "No directory for temporary files can be written to: set TMPDIR to one that can"
        ) from error
    return None


def files_to_have() -> int:
    """The files that a worker may have open, once the limit is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    return wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)


def connections(config: ProxyConfig) -> int:
    """The connections of a worker: with threads half of the files, and more than it has threads.

    With gevent, whose streams are connections, all that its sessions leave.
    """
    if config.worker_class == "gevent":
        sessions = 0 if config.target_url else within_files(config).max_sessions
        left = files_to_have() - OTHER_FILES - sessions * _FILES_OF_A_SESSION
        return max(1, min(GEVENT_CONNECTIONS, left))
    return max(config.threads + 1, min(_CONNECTIONS, (files_to_have() - OTHER_FILES) // 2))


def within_files(config: ProxyConfig) -> ProxyConfig:
    """The configuration with as many sessions as half of the files are enough for."""
    fit = max(1, (files_to_have() - OTHER_FILES) // 2 // _FILES_OF_A_SESSION)
    if config.target_url or config.max_sessions <= fit:
        return config
    return msgspec.structs.replace(config, max_sessions=fit)


def keep_heap_small() -> None:
    """Has this process keep little memory that is free, unless the environment says otherwise.

    glibc gives threads up to eight heaps for each CPU, and each keeps what its largest messages
    have taken. One is enough, as the interpreter runs one thread at a time. And large blocks come
    from it once a larger one has been freed, with small ones that stay between them: a worker that
    had carried large messages stayed at twice its size. Without glibc nothing happens.
    """
    if not is_malloc_told():
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_ARENA_MAX, 1)
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def open_standard_streams() -> None:
    """Has nothing else take the numbers of the standard streams, where they were closed.

    A connection to a client could get that of stderr, and with it the lines of the log.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(_STDOUT, "w", closefd=False)  # noqa: SIM115  # never closed
    sys.stderr = sys.stderr or open(_STDERR, "w", closefd=False)  # noqa: SIM115


def allow_many_files() -> None:
    """Raises the limit of open files: a stdio session takes four, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files_to_have():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_to_have(), hard))


# --- one CPU for each gthread worker -------------------------------------------------------------

# A CPython process uses one core at a time; if the kernel spreads its threads over two, the
# interpreter lock moves between cores at every system call. Pinned to one CPU a gthread worker
# answers about twice as many small calls (`bench/throughput` measures it).
#
# On one CPU a thread that wakes another is often preempted by it at once, and the other then waits
# for the interpreter lock. Under the kernel's batch policy (sched(7)) a woken thread waits for its
# turn, which almost halves the switches. Children get all CPUs and the normal policy.

_QUOTA_FILE = "/sys/fs/cgroup/cpu.max"


def cpus_to_share(config: ProxyConfig, workers: int) -> tuple[int, ...]:
    """The CPUs among which workers are spread; empty where workers are not pinned.

    `auto` pins when each worker can have a CPU of its own and no CPU quota applies; otherwise the
    kernel's freedom to move a worker is worth more.
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
    """The CPU with the fewest workers; among equals the first one from `offset` on.

    A random offset keeps several small deployments on one machine from all choosing the first CPU.
    """
    used = list(taken)
    turned = cpus[offset % len(cpus) :] + cpus[: offset % len(cpus)]
    return min(turned, key=used.count)


def pin(cpu: int) -> None:
    """Binds this thread, and threads that it starts later, to one CPU under the batch policy."""
    os.sched_setaffinity(0, {cpu})
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it; that only costs speed
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _has_quota(cpus: int) -> bool:
    """Whether this control group has a quota of less than `cpus` CPUs."""
    try:
        with open(_QUOTA_FILE, encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return False
    return quota != "max" and int(quota) < cpus * int(period)
