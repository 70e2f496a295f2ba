"""Servers that are changed, added and removed under load, and what the sessions meet meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

ENTRY: dict[str, Any] = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}

#: Seconds for a reload to be seen by every worker, and for children to end or begin.
PATIENCE = 30.0


def client_of(process: ProxyProcess, name: str) -> McpClient:
    """A client without a session of one of the servers."""
    return McpClient(HttpFront(process.base), f"/servers/{name}/mcp")


def write(file: Path, **entries: Any) -> None:
    """Writes the file of servers in one step."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"mcpServers": entries}))
    new.replace(file)


def hang_up(process: ProxyProcess) -> None:
    """Tells the master to reload."""
    os.kill(process.master_pid, signal.SIGHUP)


class Caller(threading.Thread):
    """One session that calls all the time, each time over another connection."""

    def __init__(self, process: ProxyProcess, name: str, stop: threading.Event) -> None:
        super().__init__(name=f"caller-{name}", daemon=True)
        self.server = name
        #: The answers so far, the processes that gave them in their order, and what went wrong.
        self.answered = 0
        self.pids: list[int] = []
        self.failed: list[str] = []
        self._client = client_of(process, name).open()
        self._stop_calling = stop

    def run(self) -> None:
        while not self._stop_calling.is_set():
            try:
                answer = self._client.call("count")
                message = answer.message()
            except (requests.RequestException, ValueError, AssertionError) as error:
                self.failed.append(repr(error))
                continue
            if not answer.has_succeeded or "result" not in message:
                self.failed.append(f"{answer.status} {message}")
                continue
            self.answered += 1
            pid = message["result"]["pid"]
            if self.pids[-1:] != [pid]:
                self.pids.append(pid)


@contextlib.contextmanager
def calling(process: ProxyProcess, names: Sequence[str]) -> Iterator[list[Caller]]:
    """A caller for each name, until the block ends."""
    stop = threading.Event()
    callers = [Caller(process, name, stop) for name in names]
    for caller in callers:
        caller.start()
    try:
        yield callers
    finally:
        stop.set()
        for caller in callers:
            caller.join(PATIENCE)


def play(process: ProxyProcess, file: Path, rounds: int, sessions: int) -> list[Caller]:
    """Reloads so often under load, and returns the callers of `kept` and `changed`, at their end.

    In each round `changed` gets another environment, one server is new, and the new one of the
    round before is removed; every third round begins with a file that cannot be read. What each
    round should bring is waited for. No worker is replaced.
    """
    workers = process.worker_pids()
    with calling(process, ["kept", "changed"] * sessions) as callers:
        changed = [caller for caller in callers if caller.server == "changed"]
        for number in range(1, rounds + 1):
            if number % 3 == 1:
                _break(process, file)
            before = [caller.pids[-1:] for caller in changed]
            old = client_of(process, f"extra{number - 1}").open()
            entries = {
                "kept": ENTRY,
                "changed": {**ENTRY, "env": {"ROUND": str(number)}},
                f"extra{number}": ENTRY,
            }
            write(file, **entries)
            hang_up(process)
            _wait_for_round(process, number, old, changed, before)
        assert process.worker_pids() == workers
    return callers


def _break(process: ProxyProcess, file: Path) -> None:
    """A reload that changes nothing."""
    refused = process.log().count("nothing is reloaded")
    file.write_text('{"mcpServers": {"kept": {"comm')
    hang_up(process)
    eventually(lambda: process.log().count("nothing is reloaded") > refused, PATIENCE)


def _wait_for_round(
    process: ProxyProcess,
    number: int,
    old: McpClient,
    changed: Sequence[Caller],
    before: Sequence[list[int]],
) -> None:
    def is_new_everywhere() -> bool:
        return all(caller.pids[-1:] != pid for caller, pid in zip(changed, before, strict=True))

    def is_removed() -> bool:
        answer = old.call("count")
        return answer.status == 404 and "has been removed" in answer.message()["error"]["message"]

    eventually(is_new_everywhere, PATIENCE, "a changed server has an old process")
    eventually(is_removed, PATIENCE, "a removed server is served")
    new = client_of(process, f"extra{number}")
    eventually(lambda: new.initialize().status == 200, PATIENCE, "a new server is not served")
    assert new.result("count")["calls"] == 1


def require_undisturbed(callers: Sequence[Caller], rounds: int) -> None:
    """No call has failed; `kept` had one process in each session, `changed` one a round."""
    for caller in callers:
        assert caller.failed == [], caller.failed[:3]
        assert caller.answered > rounds
        assert len(caller.pids) == len(set(caller.pids))
        if caller.server == "kept":
            assert len(caller.pids) == 1
        else:
            assert len(caller.pids) == rounds + 1
