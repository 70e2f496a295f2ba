"""What a request through the transparent proxy costs: commands in Redis, and memory."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.proofs.raw_backend import BLOCK, RawBackend
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

#: What a worker may grow by while a large response passes, in MB.
MEMORY_GROWN = 16.0

_LARGE_BLOCKS = 1600  # of 64 KiB: 100 MiB
_WARM_UP = 50
_TTL = 3.0
_STREAM_TIME = 12.0
_TIMEOUT = 60.0

Json = dict[str, Any]

_MODERN = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "proof", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Wire:
    """One connection to the proxy; in a session once `open` was called."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        self.session: str | None = None

    def close(self) -> None:
        """Ends the connection."""
        self.connection.close()

    def request(
        self, method: str, message: Json | None, **headers: str
    ) -> http.client.HTTPResponse:
        """The response as far as its headers. Headers are given with _ for -."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        given["Accept"] = "application/json, text/event-stream"
        if message is not None:
            given["Content-Type"] = "application/json"
        if self.session is not None:
            given["Mcp-Session-Id"] = self.session
        body = None if message is None else json.dumps(message)
        self.connection.request(method, "/mcp", body, given)
        return self.connection.getresponse()

    def open(self) -> Wire:
        """Begins a session, and returns itself."""
        params = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {}}
        answer = self.request("POST", _message("initialize", params))
        assert answer.status == 200, answer.read()
        answer.read()
        self.session = answer.headers["Mcp-Session-Id"]
        return self

    def call(self, **params: Any) -> int:
        """A call; its status."""
        answer = self.request("POST", _message("tools/call", params))
        answer.read()
        assert answer.headers["X-MCP-Proxy-Error"] is None
        return answer.status

    def call_modern(self) -> int:
        """A call of revision 2026-07-28; its status."""
        message = _message("tools/call", {"name": "any", "arguments": {}, "_meta": _MODERN})
        headers = {"Mcp_Method": "tools/call", "Mcp_Name": "any"}
        answer = self.request("POST", message, MCP_Protocol_Version="2026-07-28", **headers)
        answer.read()
        assert answer.headers["X-MCP-Proxy-Error"] is None
        return answer.status


def _message(method: str, params: Json) -> Json:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


@contextmanager
def proxy_before(backend: RawBackend, *options: str) -> Iterator[tuple[ProxyProcess, RedisServer]]:
    """A proxy of one worker in front of a backend, its sessions in Redis."""
    with RedisServer() as server:
        given = ["--target-url", backend.url, "--redis-url", server.url, *options]
        with ProxyProcess(options=["--log-level", "warning", *given]) as process:
            yield process, server


# --- commands ------------------------------------------------------------------------------------


def routing_commands(count: int = 1000) -> None:
    """A call in a session costs one GETEX, a modern one costs nothing."""
    with (
        RawBackend() as backend,
        proxy_before(backend) as (process, server),
        server.client() as client,
        closing(Wire(process.port)) as legacy,
        closing(Wire(process.port)) as modern,
    ):
        legacy.open()
        for _ in range(_WARM_UP):
            assert legacy.call() == modern.call_modern() == 200
        in_session = commands_of(client, lambda: legacy.call(), count)
        print(f"{count} calls in a session: {in_session}", flush=True)
        without = commands_of(client, lambda: modern.call_modern(), count)
        print(f"{count} modern calls: {without}", flush=True)
        assert in_session == {"getex": count}
        assert without == {}


def commands_of(client: redis.Redis, call: Any, count: int) -> dict[str, int]:
    """What Redis was asked, by `INFO commandstats`, while `call` was made `count` times."""
    client.config_resetstat()
    started = time.monotonic()
    for _ in range(count):
        assert call() == 200
    print(f"  {count / (time.monotonic() - started):.0f} calls per second over one connection")
    stats: Any = client.info("commandstats")
    ours = {"cmdstat_info", "cmdstat_config|resetstat", "cmdstat_config"}
    return {
        name.removeprefix("cmdstat_"): found["calls"]
        for name, found in stats.items()
        if name not in ours
    }


# --- memory --------------------------------------------------------------------------------------


def large_response() -> None:
    """A worker passes 100 MiB on without growing, and a stream keeps its session."""
    with RawBackend() as backend, proxy_before(backend) as (process, _):
        (worker,) = process.worker_pids()
        with closing(Wire(process.port)) as wire:
            wire.open()
            receive_large(wire, _LARGE_BLOCKS // 20, chunked=False)  # has the buffers allocated
            for chunked in (False, True):
                grown, seconds = watched_large(wire, worker, chunked)
                size = _LARGE_BLOCKS * len(BLOCK) / 2**20
                print(
                    f"{size:.0f} MiB {'in chunks' if chunked else 'with Content-Length'}: "
                    f"{size / seconds:.0f} MiB/s, the worker's peak grew by {grown:.1f} MB",
                    flush=True,
                )
                assert grown < MEMORY_GROWN
    outliving_stream()


def watched_large(wire: Wire, worker: int, chunked: bool) -> tuple[float, float]:
    """By how many MB the worker's peak memory exceeds what it was, and the seconds it took."""
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # the peak starts anew
    before = _memory(worker, "VmRSS")
    started = time.monotonic()
    receive_large(wire, _LARGE_BLOCKS, chunked)
    seconds = time.monotonic() - started
    return _memory(worker, "VmHWM") - before, seconds


def receive_large(wire: Wire, blocks: int, chunked: bool) -> None:
    """Receives a large response; fails if it is not what was sent."""
    answer = wire.request("POST", _message("large", {"blocks": blocks, "chunked": chunked}))
    assert answer.status == 200
    assert ("Content-Length" in answer.headers) is not chunked
    received = hashlib.blake2b()
    while piece := answer.read(1 << 18):
        received.update(piece)
    expected = hashlib.blake2b()
    for _ in range(blocks):
        expected.update(BLOCK)
    assert received.digest() == expected.digest()


def _memory(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields[field].split()[0]) / 1024


def outliving_stream() -> None:
    """A silent stream keeps its session over several times its time to live."""
    with (
        RawBackend() as backend,
        proxy_before(backend, "--session-ttl", str(_TTL)) as (process, _),
        closing(Wire(process.port)) as listening,
        closing(Wire(process.port)) as calling,
        closing(Wire(process.port)) as idle,
    ):
        calling.session = listening.open().session
        idle.open()
        stream = listening.request("GET", None)
        assert stream.status == 200
        time.sleep(_STREAM_TIME)  # what is shown takes this time
        kept, forgotten = calling.call(), idle.call()
        print(
            f"sessions of {_TTL:g} s, unused for {_STREAM_TIME:g} s: a call is answered "
            f"{kept} with a stream open, {forgotten} without"
        )
        assert kept == 200
        assert forgotten in (400, 404)
        stream.close()
        listening.close()
        require_end(calling)


def require_end(calling: Wire) -> None:
    """Fails if a session without its stream outlives its time to live."""
    assert calling.call() == 200
    time.sleep(_TTL + 1)
    status = calling.call()
    print(f"{_TTL + 1:g} s after its last use, the stream closed: {status}", flush=True)
    assert status in (400, 404)
