"""Reloads of the file of servers under load: nobody whose server stays the same notices one."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.proxy_process import GUNICORN, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.reloads import ENTRY, client_of, hang_up, play, require_undisturbed, write
from tests.support.waiting import eventually

_WORKERS = 3
_SESSIONS = 8  # of each of the two servers that are called all the time
_ROUNDS = 20


def reload() -> None:
    """Three workers, with their sessions in memory and in Redis; then one is killed meanwhile."""
    for store in ("memory", "redis"):
        with tempfile.TemporaryDirectory(prefix="proof-") as folder, ExitStack() as stack:
            file = Path(folder) / "servers.json"
            write(file, kept=ENTRY, changed=ENTRY, extra0=ENTRY)
            environment = {
                "MCP_PROXY_CONFIG": str(file),
                "MCP_PROXY_WORKERS": str(_WORKERS),
                "MCP_PROXY_LOG_LEVEL": "warning",
            }
            if store == "redis":
                environment["MCP_PROXY_REDIS_URL"] = stack.enter_context(RedisServer()).url
            proxy = ProxyProcess(way=GUNICORN, environment=environment)
            stack.enter_context(proxy)
            _under_load(store, proxy, file)
            _with_a_killed_worker(proxy, file)


def _under_load(store: str, proxy: ProxyProcess, file: Path) -> None:
    began = time.monotonic()
    callers = play(proxy, file, _ROUNDS, _SESSIONS)
    seconds = time.monotonic() - began
    answered = sum(caller.answered for caller in callers)
    failed = sum(len(caller.failed) for caller in callers)
    print(
        f"{store}: {_ROUNDS} reloads and {(_ROUNDS + 2) // 3} broken ones in {seconds:.0f} s, "
        f"{_WORKERS} workers, {answered} calls, {failed} failed"
    )
    require_undisturbed(callers, _ROUNDS)


def _with_a_killed_worker(proxy: ProxyProcess, file: Path) -> None:
    """It comes back with the last good table, while the file is broken."""
    file.write_text("{")
    hang_up(proxy)
    before = proxy.worker_pids()
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: len(set(proxy.worker_pids()) - set(before)) == 1, 30)
    for _ in range(4 * _WORKERS):  # each connection may be another worker's
        client = client_of(proxy, f"extra{_ROUNDS}").open()
        assert client.result("count")["calls"] == 1
        client.delete()
