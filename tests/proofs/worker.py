"""What a worker uses, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tests.support.proxy_process import children_of, is_guardian


class Footprint(NamedTuple):
    """Memory in MB, threads, file descriptors and child processes of a worker."""

    memory: float
    threads: int
    descriptors: int
    children: int

    def __str__(self) -> str:
        return (
            f"{self.memory:6.1f} MB, {self.threads:3} threads, "
            f"{self.descriptors:3} descriptors, {self.children:3} children"
        )


def footprint(pid: int) -> Footprint:
    """What the process uses now; its guardian does not count as a child."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Footprint(
        memory=int(fields["VmRSS"].split()[0]) / 1024,
        threads=int(fields["Threads"]),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        children=len([child for child in children_of(pid) if not is_guardian(child)]),
    )
