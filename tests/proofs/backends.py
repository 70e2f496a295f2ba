"""HTTP servers that misbehave in every way that bytes allow: no hang, no 500, nothing is kept.

All of them are one server (`hell`), in a process of its own; it serves a decent session meanwhile.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.proofs.hell import ALIVE, BROKEN, HELLS
from tests.proofs.hostile import Caller
from tests.proofs.server_process import ServerProcess
from tests.proofs.sessions import MEMORY_LEFT
from tests.proofs.worker import Footprint, footprint
from tests.support.front import Answer, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess

#: The limits that the proxy is given, in seconds.
REQUEST_TIMEOUT = 3
CONNECT_TIMEOUT = 1

#: Seconds within which every answer must have come to its end: those limits, one second for the
#: cancellation of a call that took too long, and what a loaded machine takes.
LIMIT = REQUEST_TIMEOUT + CONNECT_TIMEOUT + 1 + 2

_PATIENCE = 10.0
_ENOUGH = 32 * 2**20  # bytes, after which a client leaves
_AT_ONCE = 12
_THREADS = 32
_LISTEN = 1.0  # seconds for which a client reads a standing stream
_SETTLING = 3.0

# --- those who ask -------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a client saw: 0 for no status; how its answer ended."""

    way: str
    stage: str
    status: int
    failure: str
    seconds: float
    size: int
    end: str
    body: bytes

    def __str__(self) -> str:
        status = f"{self.status} {self.failure}".strip() if self.status else "no answer"
        return (
            f"{self.stage:<10} {self.way:<28} {status:<26} {self.end:<9} "
            f"{self.seconds:5.1f} s {self.size:9} bytes"
        )


# Not asked to misbehave.
_OPENING = "opening"

STAGES = ("initialize", "tools/call", "GET", "DELETE")


def met(process: ProxyProcess, way: str, stage: str) -> Outcome:
    """One request that the server answers in this way."""
    client = McpClient(HttpFront(process.base))
    if stage != "initialize":
        began = time.monotonic()
        answer = client.initialize()
        if not answer.has_succeeded:
            seconds = time.monotonic() - began
            failure = answer.failure or ""
            return Outcome(way, _OPENING, answer.status, failure, seconds, 0, "", answer.body())
    try:
        return _asked(process.port, _request(way, stage, client.session), way, stage)
    finally:
        if client.session is not None:
            client.delete().body()


def _request(way: str, stage: str, session: str | None) -> bytes:
    message = {"jsonrpc": "2.0", "id": 1, "method": stage, "params": {"name": "echo"}}
    if stage == "initialize":
        about = {"name": "victim", "version": "1"}
        message["params"] = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": about,
        }
    is_post = stage in ("initialize", "tools/call")
    body = json.dumps(message).encode() if is_post else b""
    accept = "text/event-stream" if stage == "GET" else "application/json, text/event-stream"
    lines = [f"{'POST' if is_post else stage} /mcp HTTP/1.1", "Host: localhost", f"X-Hell: {way}"]
    lines += [f"Accept: {accept}", "Connection: close"]
    if session is not None:
        lines.append(f"Mcp-Session-Id: {session}")
    if is_post:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _asked(port: int, request: bytes, way: str, stage: str) -> Outcome:
    """Reads to the end of the answer, of a standing stream for a moment only."""
    began = time.monotonic()
    got = b""
    size = 0
    head_came = 0.0
    end = "left"
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as sock:
        sock.sendall(request)
        while size < _ENOUGH:
            is_standing = b"\r\n\r\n" in got and stage == "GET"
            left = began + _PATIENCE - time.monotonic()
            sock.settimeout(max(0.01, _LISTEN if is_standing else left))
            try:
                piece = sock.recv(65536)
            except TimeoutError:
                end = "left" if is_standing else "hangs"
                break
            except ConnectionError:
                end = "reset"
                break
            if not piece:
                end = "complete" if _is_complete(got, size) else "aborted"
                break
            size += len(piece)
            head_came = head_came or time.monotonic() - began
            got = (got + piece)[: 256 * 1024]
            if (is_standing or way in ALIVE) and time.monotonic() > began + LIMIT:
                end = "left"
                break
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    head, _, body = got.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0
    seconds = head_came if end == "left" else time.monotonic() - began
    return Outcome(way, stage, status, _failure(head), seconds, size, end, body[:2000])


def _failure(head: bytes) -> str:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"x-mcp-proxy-error":
            return value.decode().strip()
    return ""


def _is_complete(got: bytes, size: int) -> bool:
    """Whether an answer, of which the beginning is known, came to its proper end."""
    head, _, body = got.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return size - len(head) - 4 == int(line.partition(b":")[2])
        if line.startswith(b"transfer-encoding: chunked"):
            return size > len(got) or body.endswith(b"0\r\n\r\n")
    return bool(head)


# --- the proof -----------------------------------------------------------------------------------


def backends(rounds: int = 1) -> None:
    """Every way at every stage: each answer ends in time, and nothing is kept.

    A first round shows what one costs at its height; `rounds` more must not cost more than that.
    """
    options = ["--request-timeout", str(REQUEST_TIMEOUT), "--threads", str(_THREADS)]
    options += ["--connect-timeout", str(CONNECT_TIMEOUT), "--log-level", "error"]
    with (
        ServerProcess("tests.proofs.hell") as backend,
        ProxyProcess(options=[*options, "--target-url", backend.url]) as process,
    ):
        with Caller(process.port, "/mcp", {"name": "decent"}) as decent:
            outcomes = _round(process)
            (worker,) = process.worker_pids()
            before = _settled(worker)
            for _ in range(rounds):
                outcomes += _round(process)
            after = _settled(worker, before)
            places = _free_places(process)
        _show(outcomes, decent, before, after, places)
        _judge(outcomes, decent)
        log = process.log()
        for word in ("Traceback", "unexpectedly", "not foreseen"):
            assert word not in log, f"{word} in the log:\n{log[-3000:]}"
        assert places == _THREADS * 3 // 4, "places of standing streams were not given back"
        assert _is_as(before, after), "something was kept"
        grown = after.memory - before.memory
        assert grown < MEMORY_LEFT, f"the worker has grown by {grown:.1f} MB"


def _round(process: ProxyProcess) -> list[Outcome]:
    """Every way at every stage, in another order each time."""
    cases = [(way, stage) for way in HELLS for stage in STAGES]
    random.shuffle(cases)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda case: met(process, *case), cases))


def _wrong(outcome: Outcome) -> str:
    """What must not be, empty if all is well."""
    if outcome.stage == _OPENING:
        return f"nothing was wrong: {outcome.body!r}"
    if outcome.status == 0:
        return "no answer"
    if outcome.status == 500 and outcome.way not in ("500",):
        return "500"
    if outcome.seconds > LIMIT or outcome.end == "hangs":
        return "too long"
    is_cut = outcome.way in BROKEN and outcome.stage != "GET"
    if is_cut and outcome.end == "complete" and outcome.status == 200 and not outcome.failure:
        return "ended as if complete"
    return ""


def _show(
    outcomes: list[Outcome], decent: Caller, before: Footprint, after: Footprint, places: int
) -> None:
    longest = max(outcomes, key=lambda outcome: outcome.seconds)
    spent = sorted(timed.seconds for timed in decent.done)
    kinds = Counter(f"{o.status} {o.failure}".strip() for o in outcomes)
    ends = Counter(outcome.end for outcome in outcomes)
    print(
        f"{len(HELLS)} ways at {len(STAGES)} stages: {len(outcomes)} answers\n"
        f"  {dict(kinds.most_common())}\n"
        f"  {dict(ends.most_common())}\n"
        f"  the longest: {longest}\n"
        f"  a decent session meanwhile: {len(spent)} calls, p50 {1000 * spent[len(spent) // 2]:.0f}"
        f" ms, p99 {1000 * spent[len(spent) * 99 // 100]:.0f} ms\n"
        f"  before {before}\n  after  {after}\n  standing streams free afterwards: {places}"
    )
    for outcome in sorted(outcomes, key=lambda o: (o.way, o.stage)):
        if wrong := _wrong(outcome):
            print(f"  {wrong:<20} {outcome}")
    print(end="", flush=True)


def _judge(outcomes: list[Outcome], decent: Caller) -> None:
    wrong = Counter(found for outcome in outcomes if (found := _wrong(outcome)))
    assert not wrong, f"answers that are not as they should be: {dict(wrong)}"
    failed = Counter(timed.wrong for timed in decent.done if timed.wrong)
    assert not failed, f"calls of a decent session failed: {failed}"


def _settled(worker: int, before: Footprint | None = None) -> Footprint:
    """The footprint when the last client has left, and all is as `before`, if that comes."""
    time.sleep(_SETTLING)
    if before is None:
        return footprint(worker)
    deadline = time.monotonic() + 30
    while not _is_as(before, now := footprint(worker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def _is_as(before: Footprint, now: Footprint) -> bool:
    """Whether nothing runs or is open that was not before, but connections that are kept."""
    is_still = now.threads <= before.threads and now.children == 0
    return is_still and now.descriptors <= before.descriptors + _THREADS


def _free_places(process: ProxyProcess) -> int:
    """How many standing streams can be opened; they are closed again."""
    opened: list[tuple[McpClient, Answer]] = []
    try:
        while len(opened) < 2 * _THREADS:
            client = McpClient(HttpFront(process.base)).open()
            answer = client.listen()
            opened.append((client, answer))
            if not answer.is_stream:
                return len(opened) - 1
        return len(opened)
    finally:
        for client, answer in opened:
            answer.close()
            client.delete().body()
