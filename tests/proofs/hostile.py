"""Hundreds of clients that mean no good, and ten that only call: those notice nothing.

The hostile ones are a process of their own (`hostile_clients`); so is the HTTP server. One worker
serves a stdio server and that one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.programs import ROOT
from tests.proofs.hostile_clients import CROWD, HTTP, STDIO
from tests.proofs.server_process import ServerProcess
from tests.proofs.sessions import MEMORY_LEFT
from tests.proofs.worker import Footprint, footprint
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.startable import Startable
from tests.support.waiting import eventually

#: How much longer than in a quiet run a call may take, at the 99th percentile.
SLOWER = 2.0

#: Seconds within which a probe is answered.
PROBE = 0.5

#: What a client of the hostile kind may take, in seconds, so that a short run sees its end.
CLIENT_TIMEOUT = 10

_CALLERS = 10
_PAUSE = 0.02  # between two calls of one client
_LOOK = 0.1  # between two probes
_QUIET = 0.5  # the part of the time for the quiet run before, and the one after

# Threads that start with their first use, by the crowd perhaps. One a client would be hundreds.
_LATER_THREADS = 2

_BEGIN_TIME = 120.0
_SETTLE_TIME = 60.0

Json = dict[str, Any]


class Timed(NamedTuple):
    """Seconds that an answer took, and what was wrong with it, empty if nothing was."""

    seconds: float
    wrong: str


class Repeated(Startable):
    """Does something again and again, in a thread, and notes how it went."""

    def __init__(self, pause: float) -> None:
        self.done: list[Timed] = []
        self._pause = pause
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def act(self) -> str:
        """Does it once; what was wrong with it."""
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._pause):
            began = time.monotonic()
            try:
                wrong = self.act()
            except (OSError, http.client.HTTPException) as error:
                wrong = type(error).__name__
            self.done.append(Timed(time.monotonic() - began, wrong))


class Caller(Repeated):
    """A session whose client calls, over a connection that it keeps."""

    def __init__(self, port: int, path: str, params: Json, method: str = "tools/call") -> None:
        super().__init__(_PAUSE)
        client = McpClient(HttpFront(f"http://127.0.0.1:{port}"), path).open()
        assert client.session is not None
        self._headers = {
            "Mcp-Session-Id": client.session,
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
        }
        self._client = client
        self._path = path
        self._message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def act(self) -> str:
        try:
            self._connection.request("POST", self._path, json.dumps(self._message), self._headers)
            answer = self._connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()  # the next call has a new one
            raise
        is_right = answer.status == 200 and b'"result"' in body
        return "" if is_right else f"{answer.status} {body[:200]!r}"

    @property
    def session(self) -> str:
        """The id of its session."""
        return self._headers["Mcp-Session-Id"]

    def begin_anew(self) -> None:
        """Opens another session for the calls to come."""
        session = self._client.open().session
        assert session is not None
        self._headers = {**self._headers, "Mcp-Session-Id": session}

    def stop(self) -> None:
        """No more calls; the session stays."""
        super().close()
        self._connection.close()

    def close(self) -> None:
        self.stop()
        self._client.delete().body()


class Prober(Repeated):
    """Asks a probe, each time over another connection."""

    def __init__(self, port: int, path: str) -> None:
        super().__init__(_LOOK)
        self.path = path
        self._port = port

    def act(self) -> str:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)) as connection:
            connection.request("GET", self.path, headers={"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read()
        return "" if answer.status == 200 else f"{answer.status} {body[:200]!r}"


class HostileCrowd(Startable):
    """The process of the hostile clients; `share` is the part of the whole crowd."""

    def __init__(self, port: int, share: float) -> None:
        command = [sys.executable, "-m", "tests.proofs.hostile_clients", str(port), str(share)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )

    def start(self) -> None:
        """Waits until all have begun."""
        timer = threading.Timer(_BEGIN_TIME, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        timer.cancel()
        assert line == b"ready\n", f"the hostile clients could not all begin: {line!r}"

    def finish(self) -> dict[str, dict[str, int]]:
        """Ends them; what each kind has seen."""
        said, _ = self._process.communicate(timeout=_SETTLE_TIME)
        seen: dict[str, dict[str, int]] = json.loads(said)
        return seen

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


@contextmanager
def scene(threads: int) -> Iterator[ProxyProcess]:
    """One worker in front of a stdio server and an HTTP server."""
    with (
        tempfile.TemporaryDirectory(prefix="proof-") as folder,
        ServerProcess("tests.proofs.raw_backend") as backend,
    ):
        servers = {
            "stdio": {"command": SCRIPTED[0], "args": SCRIPTED[1:]},
            "http": {"url": backend.url},
        }
        file = Path(folder) / "servers.json"
        file.write_text(json.dumps({"mcpServers": servers}))
        options = ["--config", str(file), "--threads", str(threads), "--log-level", "error"]
        options += ["--client-timeout", str(CLIENT_TIMEOUT)]
        with ProxyProcess(options=options) as process:
            try:
                yield process
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{process.log()[-4000:]}")
                raise


# --- 64 threads ----------------------------------------------------------------------------------


def hostile(seconds: float = 60.0, share: float = 1.0) -> None:
    """The calls of ten sessions are as fast as in a quiet run, and in the end nothing is left."""
    with scene(threads=64) as process, ExitStack() as stack:
        callers = [
            stack.enter_context(Caller(process.port, path, {"name": "echo"}))
            for path in (STDIO, HTTP) * (_CALLERS // 2)
        ]
        probes = [
            stack.enter_context(Prober(process.port, path)) for path in ("/healthz", "/readyz")
        ]
        everything = [*callers, *probes]
        _start_what_starts_once(process)
        quiet = during(everything, _QUIET * seconds)
        (worker,) = process.worker_pids()
        before = footprint(worker)
        with HostileCrowd(process.port, share) as crowd:
            among = during(everything, seconds)
            most = footprint(worker)
            seen = crowd.finish()
        after, is_settled = _settled(worker, before)
        later = during(everything, _QUIET * seconds)
        places = _free_places(process)
        _show(seen, share)
        print(f"  before {before}\n  among  {most}\n  after  {after}")
        _judge_calls(callers, quiet, among, later)
        _judge_probes(probes, among)
        print(f"  standing streams that could be opened afterwards: {places} of 48", flush=True)
        assert places == 48, "places of standing streams were not given back"
        assert is_settled, "threads, descriptors or children are left"
        grown = after.memory - before.memory
        assert grown < MEMORY_LEFT, f"the worker has grown by {grown:.1f} MB"


# --- 8 threads -----------------------------------------------------------------------------------


def hostile_probes(seconds: float = 30.0, share: float = 1.0) -> None:
    """Eight slow calls on eight threads, and the crowd: the probes are answered all the same."""
    with scene(threads=8) as process, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(Caller(process.port, STDIO, {"seconds": 5}, "sleep"))
        probes = [
            stack.enter_context(Prober(process.port, path)) for path in ("/healthz", "/readyz")
        ]
        time.sleep(2)
        alone = during(probes, seconds / 2)
        print("  eight slow calls, nobody else")
        _show_probes(probes, alone)
        crowd = stack.enter_context(HostileProbesCrowd(process.port, share))
        among = during(probes, seconds)
        crowd.close()
        print("  and the crowd")
        _judge_probes(probes, among)
        _require_probes(probes, alone)


class HostileProbesCrowd(HostileCrowd):
    """The crowd where not everybody gets as far as to begin."""

    def start(self) -> None:
        """Does not wait: with eight threads that are taken nobody's session begins soon."""


# --- figures and judgements ----------------------------------------------------------------------

Span = tuple[float, list[list[Timed]]]


def during(acting: list[Any], seconds: float) -> list[list[Timed]]:
    """What each did within that many seconds from now on, the last one to its end."""
    at = [len(one.done) for one in acting]
    time.sleep(seconds)
    eventually(
        lambda: all(len(one.done) > n for one, n in zip(acting, at, strict=True)),
        _SETTLE_TIME,
        "somebody was never answered",
    )
    return [one.done[n:] for one, n in zip(acting, at, strict=True)]


def quantile(times: list[float], part: float) -> float:
    return sorted(times)[int(len(times) * part)]


def _judge_calls(
    callers: list[Caller],
    quiet: list[list[Timed]],
    among: list[list[Timed]],
    later: list[list[Timed]],
) -> None:
    figures: dict[str, float] = {}
    counts: dict[str, int] = {}
    wrong: Counter[str] = Counter()
    for name, run in (("quiet", quiet), ("hostile", among), ("quiet again", later)):
        calls = [timed for done in run[: len(callers)] for timed in done]
        counts[name] = len(calls)
        times = [timed.seconds for timed in calls]
        figures[name] = quantile(times, 0.99)
        wrong += Counter(timed.wrong for timed in calls if timed.wrong)
        print(
            f"  {name:<12} {len(calls):6} calls: p50 {1000 * quantile(times, 0.5):.1f} ms, "
            f"p99 {1000 * figures[name]:.1f} ms, longest {1000 * max(times):.0f} ms"
        )
    usual = max(figures["quiet"], figures["quiet again"])
    print(f"  p99 is {figures['hostile'] / usual:.2f} times that of a quiet run", flush=True)
    assert not wrong, f"calls of sessions that did nothing wrong failed: {wrong}"
    assert figures["hostile"] <= SLOWER * usual, "who calls among hostile clients waits too long"
    # Who waits long calls seldom, which a quantile does not show.
    fewest = min(counts["quiet"], counts["quiet again"]) / _QUIET / SLOWER
    assert counts["hostile"] >= fewest, "who calls among hostile clients gets to call too seldom"


def _show_probes(probes: list[Prober], run: list[list[Timed]]) -> None:
    for probe, done in zip(probes, run[-len(probes) :], strict=True):
        times = [timed.seconds for timed in done]
        wrong = Counter(timed.wrong for timed in done if timed.wrong)
        print(
            f"  {probe.path:<12} {len(done):6} times: p50 {1000 * quantile(times, 0.5):.1f} ms, "
            f"longest {1000 * max(times):.0f} ms; wrong: {dict(wrong) or 'never'}",
            flush=True,
        )


def _judge_probes(probes: list[Prober], run: list[list[Timed]]) -> None:
    _show_probes(probes, run)
    _require_probes(probes, run)


def _require_probes(probes: list[Prober], run: list[list[Timed]]) -> None:
    for probe, done in zip(probes, run[-len(probes) :], strict=True):
        longest = max(timed.seconds for timed in done)
        assert longest <= PROBE, f"{probe.path} was answered after {longest:.1f} s"
        assert not any(timed.wrong for timed in done), f"{probe.path} was not answered 200"


def _show(seen: dict[str, dict[str, int]], share: float) -> None:
    for kind, count in CROWD.items():
        what = ", ".join(f"{n} x {outcome}" for outcome, n in sorted(seen.get(kind, {}).items()))
        print(f"  {max(1, round(count * share)):4} {kind:<16} {what}")


def _settled(worker: int, before: Footprint) -> tuple[Footprint, bool]:
    """The footprint once threads, descriptors and children are as they were, if that comes."""
    spare = 64 + 2  # a connection to the HTTP server may be kept for each thread

    def is_back() -> bool:
        now = footprint(worker)
        return (
            now.threads <= before.threads + _LATER_THREADS
            and now.descriptors <= before.descriptors + spare
            and now.children <= before.children
        )

    deadline = time.monotonic() + _SETTLE_TIME
    while not (is_settled := is_back()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return footprint(worker), is_settled


def _start_what_starts_once(process: ProxyProcess) -> None:
    """The first calls and the first standing streams start threads that stay."""
    for path in (STDIO, HTTP):
        client = McpClient(HttpFront(process.base), path).open()
        client.listen().close()
        client.delete().body()
    time.sleep(2)


def _free_places(process: ProxyProcess) -> int:
    """How many standing streams can be opened."""
    with ExitStack() as stack:
        for count in range(100):
            client = McpClient(HttpFront(process.base), HTTP).open()
            stack.callback(client.delete)
            stream = client.listen()
            stack.callback(stream.close)
            if not stream.is_stream:
                return count
    return 100
