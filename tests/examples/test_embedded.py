"""The program that embeds all three transports: its types, and what it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mcp_proxy import LocalStorage
from tests.examples import embedded as program
from tests.servers.http_backend import HttpBackend
from tests.support.front import McpClient
from tests.support.proxy_process import ROOT
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront

_MISUSED = """
from mcp_proxy import ProxyOptions, StreamableProxy

StreamableProxy(1)
ProxyOptions(threads="many")
"""


@pytest.fixture(scope="module")
def type_check(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    """Runs `mypy --strict` where only the installed package can be found: its py.typed counts."""
    folder = tmp_path_factory.mktemp("typed")

    def check(file: Path) -> subprocess.CompletedProcess[str]:
        copy = shutil.copy(file, folder)
        options = ("--strict", "--config-file=", f"--cache-dir={folder / 'cache'}")
        return subprocess.run(
            [sys.executable, "-m", "mypy", *options, copy],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    return check


def test_the_program_is_typed_to_the_last(
    type_check: Callable[[Path], subprocess.CompletedProcess[str]],
) -> None:
    done = type_check(Path(program.__file__))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_argument_is_found(
    type_check: Callable[[Path], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "misused.py"
    file.write_text(_MISUSED, encoding="utf-8")
    done = type_check(file)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Argument 1 to "StreamableProxy" has incompatible type "int"' in done.stdout
    assert 'Argument "threads" to "ProxyOptions" has incompatible type "str"' in done.stdout


class Running:
    """The program's application, in front of an HTTP server of the test's."""

    def __init__(self, stack: ExitStack) -> None:
        self.backend = stack.enter_context(HttpBackend())
        self.storage = LocalStorage()
        self._stack = stack.enter_context(ExitStack())
        application = program.embedded(f"{self.backend.url}/mcp", self.storage)
        self.front = LocalFront(self._stack.enter_context(application))

    def close(self) -> None:
        """Leaves the program's `with`."""
        self._stack.close()


@pytest.fixture
def running() -> Iterator[Running]:
    """The program runs until the test, or this, closes it."""
    with ExitStack() as stack:
        made = Running(stack)
        yield made
        made.front.close()  # a call whose answer was not read would be waited for


def test_each_transport_serves_its_clients(running: Running) -> None:
    streamable = McpClient(running.front, "/mcp").open()
    called = streamable.result("tools/call", {"name": "add", "arguments": {"a": 2, "b": 3}})
    assert called["content"][0]["text"] == "5"

    sse = SseClient(running.front, path="/old/sse").open()
    called = sse.result("tools/call", {"name": "echo", "arguments": {"text": "old"}})
    assert called["content"][0]["text"] == "old"

    http = McpClient(running.front, "/http").open()
    assert http.result("tools/list")["backend"] == "backend"
    assert {seen.target for seen in running.backend.seen} == {"/mcp"}

    def revision(name: str, session: str | None) -> str:
        return program.revision_of(running.storage, name, session or "")

    assert revision("demo", streamable.session) == "2025-06-18"
    assert revision("http", http.session) == "2025-06-18"
    assert revision("demo", http.session).startswith("400 ")
    assert running.storage.scoped("demo-sse").exists(sse.session)
    assert running.front.request("GET", "/elsewhere", {}, None).status == 404
    sse.close()


def test_transports_over_one_store_do_not_meet(running: Running) -> None:
    streamable = McpClient(running.front, "/mcp").open()
    http = McpClient(running.front, "/http").open()
    for client in (streamable, http):
        other = McpClient(running.front, "/http" if client is streamable else "/mcp")
        other.session = client.session
        assert other.call("tools/list").status in (400, 404)
    assert [seen.rpc for seen in running.backend.seen].count("tools/list") == 0


def test_the_end_of_the_block_ends_everything(running: Running) -> None:
    client = McpClient(running.front, "/mcp").open()
    stream = SseClient(running.front, path="/old/sse").open()
    front = running.front
    running.close()
    assert list(stream.events()) == []
    assert client.call("ping").failure == "draining"
    for path in ("/mcp", "/http"):
        assert McpClient(front, path).initialize().failure == "draining"
    assert SseClient(front, path="/old/sse").connect().status == 503
    running.storage.check()


def test_what_cannot_be_served_is_an_error_of_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: ")
