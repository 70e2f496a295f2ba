"""What /proc says of processes and of the machine: CPU time, memory, how busy it is."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")

# Where in /proc/<pid>/stat, behind the name, the parent and the times stand (proc_pid_stat(5)).
_PARENT, _USER, _SYSTEM = 1, 11, 12


def processes_under(root: int, without: Collection[str] = ()) -> list[int]:
    """A process and all that come from it, but for those that run a script of these names.

    Proxies name the stdio server in their own arguments: a script is what an interpreter runs.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[_PARENT])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return [one for one in found if not _runs(one, without)]


def cpu_seconds(processes: Iterable[int]) -> float:
    """The CPU time that these processes have used; one that has ended used none."""
    ticks = 0
    for process in processes:
        if fields := _stat(process):
            ticks += int(fields[_USER]) + int(fields[_SYSTEM])
    return ticks * _TICK


def resident_bytes(processes: Iterable[int]) -> int:
    """The memory that these processes have now."""
    return sum(_status(process, "VmRSS") for process in processes)


def peak_bytes(process: int) -> int:
    """The most memory that a process has had since `forget_peak`."""
    return _status(process, "VmHWM")


def forget_peak(process: int) -> None:
    """Has the kernel count anew what a process has at the most (proc_pid_clear_refs(5))."""
    Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")


def usage(seconds: float) -> float:
    """The share of the machine's CPUs that is used for so long."""
    before = _machine_times()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(_machine_times(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _machine_times() -> tuple[int, int]:
    """All the time of the CPUs and the idle part of it, in ticks (proc_stat(5))."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, idle, waiting, *rest = map(int, file.readline().split()[1:9])
    return user + nice + system + idle + waiting + sum(rest), idle + waiting


def _stat(process: int) -> list[str]:
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _status(process: int, name: str) -> int:
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _runs(process: int, scripts: Collection[str]) -> bool:
    """Whether its first argument that is no option is one of these scripts."""
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")[1:]
    except OSError:
        return False
    script = next((one for one in arguments if not one.startswith("-")), "")
    return Path(script).name in scripts
