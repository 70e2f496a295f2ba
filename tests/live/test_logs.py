"""The log of the real command: whoever reads it may stall, and gunicorn's own lines are in it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import pytest

from tests.live.connections import Connection
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ROOT, ProxyProcess, children_of
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

_LISTENING = re.compile(rb"http://127\.0\.0\.1:(\d+)/(?:healthz|mcp)")


class Stalling:
    """A proxy whose output nobody reads unless told to."""

    def __init__(self, *options: str) -> None:
        readable, writable = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mcp_proxy", "--bind", "127.0.0.1:0", *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=writable,
            stderr=writable,
        )
        os.close(writable)
        os.set_blocking(readable, False)
        self._readable = readable
        self.output = b""
        listening = eventually(lambda: _LISTENING.search(self.read_on()), 20)
        self.base = f"http://127.0.0.1:{int(listening[1])}"

    def read_on(self) -> bytes:
        """Everything that was written until now."""
        try:
            while data := os.read(self._readable, 65536):
                self.output += data
        except BlockingIOError:
            pass
        return self.output

    def reload(self) -> None:
        """Sends SIGHUP; returns when a new worker serves and the one before has ended."""
        before = children_of(self._process.pid)
        self._process.send_signal(signal.SIGHUP)
        eventually(lambda: self.read_on() and is_replaced(self._process.pid, before), 30)

    def get(self, path: str) -> None:
        """Asks for a path that is not served."""
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{self.base}{path}", timeout=30).read()

    def terminate(self) -> float:
        """Ends the proxy by SIGTERM; the seconds that it takes."""
        before = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        return time.monotonic() - before

    def close(self) -> None:
        """Ends it in any case."""
        self._process.kill()
        self._process.wait()
        os.close(self._readable)


def is_replaced(master: int, before: list[int]) -> bool:
    """Whether a master has other children than those, and none of them."""
    now = children_of(master)
    return bool(now) and set(now).isdisjoint(before)


@contextmanager
def stalling(*options: str) -> Iterator[Stalling]:
    made = Stalling(*options)
    try:
        yield made
    finally:
        made.close()


def ask_much(proxy: Stalling, requests: int) -> None:
    """Asks in a few threads at once; each request makes an access line of more than 200 bytes."""

    def ask() -> None:
        for _ in range(requests // 8):
            proxy.get("/" + "x" * 180)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request is not answered"


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_a_reader_that_stalls_stops_no_request_and_no_end(kind: str) -> None:
    with stalling("--worker-class", kind) as proxy:
        ask_much(proxy, 400)
        assert proxy.terminate() < 30


def test_a_reader_that_stalls_stops_nothing_after_a_reload() -> None:
    """Each bad request is a line of gunicorn's; a head that is too long is one of the main loop."""
    with stalling() as proxy:
        for _ in range(2):
            proxy.reload()
        eventually(lambda: proxy.read_on().count(b"Booting worker") == 3, 20)
        for request in (b"get /x HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000):
            for _ in range(400):
                with closing(Connection(int(proxy.base.rpartition(":")[2]))) as connection:
                    connection.send_raw(request)
                    assert connection.read().status in (400, 431)
        assert proxy.terminate() < 30


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_each_line_of_gunicorns_stands_once_after_a_reload(log_format: str) -> None:
    options = ["--log-format", log_format]
    with ProxyProcess(options=options) as process:
        for number in range(1, 3):
            before = process.worker_pids()
            os.kill(process.master_pid, signal.SIGHUP)
            eventually(partial(is_replaced, process.master_pid, before), 30)
            eventually(lambda: process.log().count("Booting worker") == number + 1)  # noqa: B023
    lines = process.log().splitlines()
    assert sum("Booting worker" in line for line in lines) == 3
    assert sum("Shutting down: Master" in line for line in lines) == 1
    if log_format == "json":
        assert {json.loads(line)["level"] for line in lines} >= {"info"}


def test_the_log_goes_on_and_its_last_line_comes_out() -> None:
    with stalling() as proxy:
        ask_much(proxy, 400)
        eventually(lambda: proxy.read_on().count(b"x" * 180) == 400, 30)
        proxy.get("/last-of-all")
        proxy.terminate()
        assert b"/last-of-all" in proxy.read_on()
        assert b"Worker exiting" in proxy.output


def test_after_a_flood_one_line_says_how_many_were_left_out() -> None:
    with stalling("--log-format", "json") as proxy:
        ask_much(proxy, 2400)  # more than the pipe and what waits for it take
        eventually(lambda: b'"left_out":' in proxy.read_on(), 30)
        proxy.terminate()
        said = [json.loads(line) for line in proxy.read_on().splitlines()]
    (left_out,) = [line["left_out"] for line in said if "left_out" in line]
    assert sum(line.get("path", "").startswith("/xxx") for line in said) + left_out == 2400


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_every_line_of_a_json_log_is_json(kind: str) -> None:
    options = ["--log-format", "json", "--worker-class", kind]
    with ProxyProcess(options=options) as process:
        base = process.base
    said = [json.loads(line) for line in process.log().splitlines()]
    assert {"gunicorn.error", "mcp_proxy.server.gunicorn"} <= {line["logger"] for line in said}
    (serving,) = [line["servers"] for line in said if "servers" in line]
    assert serving == {"demo": f"{base}/mcp"}
    assert all(line["time"].endswith("+00:00") for line in said)


def test_gunicorns_lines_keep_their_form_in_a_text_log() -> None:
    with ProxyProcess() as process:
        assert re.search(r"^\[[^]]+\] \[\d+\] \[INFO\] Listening at: ", process.log(), re.MULTILINE)


@pytest.mark.parametrize("path", ["/mcp", "/sse"])
def test_a_call_is_logged_with_its_tool_and_an_initialize_with_its_client(path: str) -> None:
    info = {"clientInfo": {"name": "n\n1", "version": "2"}, "protocolVersion": "2024-11-05"}
    with ProxyProcess(SCRIPTED, options=["--log-format", "json"]) as process:
        front = HttpFront(process.base)
        if path == "/sse":
            older = SseClient(front)
            older.connect()
            older.call("initialize", info)
            older.result("tools/call", {"arguments": {"name": "no"}, "name": "a b"})
            older.close()
        else:
            client = McpClient(front, path).open()
            assert client.call("initialize", info).status
            client.result("tools/call", {"arguments": {"name": "no"}, "name": "a b"})
        eventually(lambda: '"tool":"a b"' in process.log())
        lines = [json.loads(line) for line in process.log().splitlines()]
        clients = [line["client_name"] for line in lines if line.get("rpc") == "initialize"]
        assert clients[-1] == "n\\n1 2"
        assert [line["tool"] for line in lines if line.get("rpc") == "tools/call"] == ["a b"]


def test_a_text_line_quotes_what_the_client_says() -> None:
    with ProxyProcess(SCRIPTED) as process:
        client = McpClient(HttpFront(process.base), "/mcp").open()
        client.result("tools/call", {"name": 'a" reason="b'})
        eventually(lambda: 'tool="a\\" reason=\\"b"' in process.log())
        assert re.search(r'initialize -> 200 in .* client_name="\S+', process.log())


def test_lines_of_a_child_name_its_process_and_its_session() -> None:
    with ProxyProcess(SCRIPTED) as process:
        client = McpClient(HttpFront(process.base), "/mcp").open()
        (pid,) = process.server_pids()
        client.call("die")
        label = f"[default pid={pid} session={client.session[-8:]}] the server exited by itself"
        eventually(lambda: label in process.log())
