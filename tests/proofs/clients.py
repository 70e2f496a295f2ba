"""Nine clients, each in a session of its own, whose servers die, take too long, and lose Redis.

What fails is the call that was under way, with a sentence; the next one works. The environments of
FastMCP and langchain-mcp-adapters are made by the proof, in `.venv-fastmcp` and `.venv-langchain`,
and so is the client of the Go SDK, where Go is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.clients.programs import (
    HERE,
    ROOT,
    environment_of,
    go_program,
    node,
    node_modules,
    python_with_mcp1,
)
from tests.proofs.replica_failures import ask
from tests.servers.http_backend import HttpBackend, Leave, Turn
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.startable import Startable
from tests.support.waiting import eventually

#: Seconds within which a call fails whose server has gone.
SOON = 1.5

#: The time limit that a tool outlasts, in seconds.
REQUEST_TIMEOUT = 2

#: Seconds for which Redis is away.
AWAY = 2.0

# Seconds for which the owner of a session does without the store, with some to spare.
_KNOWN = 1.2

# Seconds before a server that has ended twice is started again, with some to spare.
_PAUSE = 1.5

_PATIENCE = 12.0
_SERVER = [sys.executable, "-I", "-S", str(ROOT / "tests" / "servers" / "mortal.py")]
_PYTHON = str(HERE / "driven_client.py")
_TYPESCRIPT = str(HERE / "driven_client.mjs")

Json = dict[str, Any]


class Outcome(NamedTuple):
    """What came of a command, and the seconds that took."""

    text: str
    seconds: float


class DrivenClient(Startable):
    """A client program that does what it is told; its `command` ends with the URL."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        self._lines: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        self._reader.start()
        ready = self._next()
        assert ready == "ready", f"{ready}\n{self.log()}"

    def close(self) -> None:
        # The group: a node that came with pip is the child of a process of Python's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        self._errors.close()

    def log(self) -> str:
        """What it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-3000:]

    def call(self, tool: str, **arguments: Any) -> Outcome:
        """A tool's text, or `failed:` and the error."""
        return self._done({"tool": tool, "arguments": arguments})

    def notify(self) -> Outcome:
        """`sent`, or the error."""
        return self._done({"notify": True})

    def _done(self, command: Json) -> Outcome:
        began = time.monotonic()
        assert self._process.stdin is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except OSError:
            return Outcome("the client is gone", 0.0)
        text = self._next()
        return Outcome(text, time.monotonic() - began)

    def _next(self) -> str:
        try:
            return self._lines.get(timeout=_PATIENCE)
        except queue.Empty:
            return "hangs"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._lines.put(str(json.loads(line)["outcome"]))
        self._lines.put("the client is gone")


# --- the clients ---------------------------------------------------------------------------------


def commands() -> dict[str, Callable[[str], list[str]]]:
    """What starts each client, by its name, for a URL."""
    fastmcp, langchain = (
        str(environment_of(name) / "bin" / "python") for name in ("fastmcp", "langchain")
    )
    node_modules()
    found: dict[str, Callable[[str], list[str]]] = {
        "python 1": lambda url: [python_with_mcp1(), _PYTHON, url, "sdk"],
        "python 2": lambda url: [sys.executable, _PYTHON, url, "sdk"],
        "python 2 auto": lambda url: [sys.executable, _PYTHON, url, "sdk-auto"],
        "typescript 1": lambda url: [node(), _TYPESCRIPT, url, "1", "default"],
        "typescript 2": lambda url: [node(), _TYPESCRIPT, url, "2", "default"],
        "typescript 2 auto": lambda url: [node(), _TYPESCRIPT, url, "2", "auto"],
        "fastmcp": lambda url: [fastmcp, _PYTHON, url, "fastmcp"],
        "langchain": lambda url: [langchain, _PYTHON, url, "langchain"],
    }
    go_client = go_program("clients/go/driven_client")
    found["go"] = lambda url: [go_client, url]
    return found


# --- what happens to their sessions --------------------------------------------------------------

Story = Callable[[DrivenClient], Iterator[str]]


def _wrong(
    step: str, outcome: Outcome, expected: str, within: float | None = None
) -> Iterator[str]:
    """What is wrong with an outcome, which must begin with or have in it what was expected."""
    if expected not in outcome.text:
        yield f"{step}: {outcome.text[:160]!r} instead of {expected!r}"
    elif within is not None and outcome.seconds > within:
        yield f"{step}: after {outcome.seconds:.1f} s"


def _is_failure(step: str, outcome: Outcome, sentence: str, within: float) -> Iterator[str]:
    if not outcome.text.startswith("failed: "):
        yield f"{step}: {outcome.text[:160]!r} instead of an error"
    elif outcome.seconds > within:
        yield f"{step}: after {outcome.seconds:.1f} s"
    else:
        yield from _wrong(step, outcome, sentence)


def killed(client: DrivenClient) -> Iterator[str]:
    """A tool kills the server."""
    first = client.call("ok")
    yield from _wrong("before", first, f"call {max(1, _count(first))}")
    died = client.call("die", code=7)
    yield from _is_failure("a tool that kills", died, "exited (exit code 7)", SOON)
    yield from _wrong("a notification", client.notify(), "sent")
    after = client.call("ok")
    if "keeps ending" in after.text:  # another client of the modern era has killed the same server
        time.sleep(_PAUSE)
        after = client.call("ok")
    yield from _wrong("afterwards", after, "call 1")


def outlasted(client: DrivenClient) -> Iterator[str]:
    """A tool takes longer than the limit."""
    first = client.call("ok")
    before = _count(first)
    yield from _wrong("before", first, f"call {max(1, before)}")
    outcome = client.call("wait", seconds=REQUEST_TIMEOUT + 2)
    limit = REQUEST_TIMEOUT + SOON
    yield from _is_failure("a tool that takes too long", outcome, "did not answer within", limit)
    yield from _wrong("afterwards", client.call("ok"), f"call {before + 2}")


def _count(outcome: Outcome) -> int:
    """How often the server has been called, by its own account; 0 where that was no answer.

    Clients of the modern era share a server, and its count.
    """
    said, _, number = outcome.text.partition(" ")
    return int(number) if said == "call" and number.isdecimal() else 0


def without_redis(redis: RedisServer, proxy: ProxyProcess) -> Story:
    """Redis is away for two seconds."""

    def story(client: DrivenClient) -> Iterator[str]:
        first = client.call("ok")
        before = _count(first)
        yield from _wrong("before", first, f"call {max(1, before)}")
        redis.stop()
        away = time.monotonic()
        time.sleep(_KNOWN)
        try:
            sentence = "session store cannot be reached"
            yield from _is_failure("a call without Redis", client.call("ok"), sentence, 3.0)
            yield from _wrong("a notification without Redis", client.notify(), "sent")
            time.sleep(max(0.0, away + AWAY - time.monotonic()))
        finally:
            redis.start()
        eventually(lambda: _is_ready(proxy), _PATIENCE, "never ready again")
        yield from _wrong("afterwards", client.call("ok"), f"call {before + 1}")

    return story


def _is_ready(proxy: ProxyProcess) -> bool:
    return ask(proxy.port, "GET", "/readyz")[0].status == 200


def broken_streams(backend: HttpBackend) -> Story:
    """An HTTP server's event streams break off, and the server dies in the middle of one."""

    def story(client: DrivenClient) -> Iterator[str]:
        yield from _wrong("before", client.call("ok"), "fine")
        cut = client.call("cut")
        yield from _is_failure("a stream without ids that breaks off", cut, "", SOON)
        yield from _wrong("afterwards", client.call("ok"), "fine")
        died = client.call("die")
        yield from _is_failure("a server that dies in a stream with ids", died, "", SOON)
        backend.start()
        yield from _wrong("when it is back", client.call("ok"), "fine")

    return story


class Mortal(HttpBackend):
    """An HTTP server with the tools `ok`, `cut` and `die`, which end their event streams early."""

    def reset(self) -> None:
        super().reset()
        self.rpc["tools/list"] = self._list
        self.rpc["tools/call"] = self._call

    def _list(self, turn: Turn) -> None:
        schema = {"type": "object", "properties": {}}
        names = ("ok", "cut", "die")
        turn.result({"tools": [{"name": name, "inputSchema": schema} for name in names]})

    def _call(self, turn: Turn) -> None:
        tool = turn.seen.json["params"]["name"]
        if tool == "ok":
            turn.result({"content": [{"type": "text", "text": "fine"}]})
            return
        event_id = b"id: 1\n" if tool == "die" else b""
        told = {"level": "info", "data": "soon"}
        note = {"jsonrpc": "2.0", "method": "notifications/message", "params": told}
        event = event_id + b"data: " + json.dumps(note).encode() + b"\n\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked"
        turn.send(head + b"\r\n\r\n%x\r\n%b\r\n" % (len(event), event))
        time.sleep(0.1)
        if tool == "die":
            self.stop()
        raise Leave


@contextmanager
def scenes() -> Iterator[dict[str, tuple[str, Story]]]:
    """The URL and the story of each scene, by what happens in it."""
    limit = ["--request-timeout", str(REQUEST_TIMEOUT)]
    with (
        RedisServer() as redis,
        Mortal() as backend,
        ProxyProcess(_SERVER, options=limit) as proxy,
        ProxyProcess(_SERVER, options=["--redis-url", redis.url]) as shared,
        ProxyProcess(options=["--target-url", f"{backend.url}/mcp"]) as transparent,
    ):
        yield {
            "killed": (proxy.url, killed),
            "outlasted": (proxy.url, outlasted),
            "without Redis": (shared.url, without_redis(redis, shared)),
            "broken streams": (transparent.url, broken_streams(backend)),
        }
        for process in (proxy, shared):  # the third logs where an abort came from
            assert "Traceback" not in process.log(), process.log()[-4000:]


def clients() -> None:
    """Every client lives through every story."""
    wrong: list[str] = []
    started = commands()
    with scenes() as stories:
        for name, command in started.items():
            for what, (url, story) in stories.items():
                began = time.monotonic()
                with DrivenClient(command(url)) as client:
                    found = list(story(client))
                seconds = time.monotonic() - began
                print(f"  {name:<18} {what:<15} {seconds:5.1f} s  {'; '.join(found) or 'as said'}")
                sys.stdout.flush()
                wrong += [f"{name}, {what}: {one}" for one in found]
    assert wrong == [], f"{len(wrong)} outcomes are not as said"
