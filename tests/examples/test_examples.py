"""An official client through each example, as its README says to run it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import requests

from examples.test_flask_app import test_a_tool_answers_beside_the_page  # noqa: F401  # runs here
from tests.clients.programs import HERE, run_client
from tests.clients.sdk_session import connected, plain
from tests.examples import serving
from tests.examples.serving import FRAMEWORKS, SERVERS, command_for, served
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

_CLIENT = str(HERE / "python_client.py")

#: An HTTP server stands behind one example for each WSGI server.
_WITH_TARGET = {
    "gunicorn": "examples.django_app:application",
    "waitress-serve": "examples.pyramid_app:app",
}

_NOTICED_WITHIN = 5.0
_STOPPED_WITHIN = 15.0  # far below gunicorn's graceful_timeout


def seen_by_the_sdk(url: str) -> dict[str, Any]:
    """What a client of the official SDK sees of the demo server."""
    serving.require("mcp")
    return run_client(sys.executable, _CLIENT, url, "auto")


def assert_sees_the_demo(document: dict[str, Any]) -> None:
    """The tools are there, a call is answered, and progress comes before the answer."""
    assert document["tools"] == ["echo", "add", "count", "log", "ask"]
    assert document["echo"] == [{"type": "text", "text": "Grüße, 世界 \N{WAVING HAND SIGN}"}]
    assert document["count"] == [{"type": "text", "text": "counted to 3"}]
    assert document["progress"] == [[1, 3], [2, 3], [3, 3]]


@pytest.fixture(
    scope="module",
    params=[(server, application) for server in SERVERS for application in FRAMEWORKS],
    ids=lambda pair: f"{pair[0]}-{FRAMEWORKS[pair[1]]}",
)
def example(request: pytest.FixtureRequest) -> Iterator[ProxyProcess]:
    """One example under one server, in front of the demo server."""
    with served(command_for(*request.param)) as process:
        yield process


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    """A WSGI server, by its command."""
    program: str = request.param
    return program


def test_the_readme_has_a_command_for_every_example_and_server() -> None:
    assert [(line.split(" ")[0], line.split(" ")[-1]) for line in serving.commands()] == [
        (server, application) for server in SERVERS for application in FRAMEWORKS
    ]


# --- as written ----------------------------------------------------------------------------------


def test_sdk_client_lists_tools_and_calls_them(example: ProxyProcess) -> None:
    assert_sees_the_demo(seen_by_the_sdk(example.url))


def test_trailing_slash_is_the_same_endpoint(example: ProxyProcess) -> None:
    client = McpClient(HttpFront(example.base), "/mcp/").open()
    assert client.result("tools/call", {"name": "echo", "arguments": {"text": "Hello"}})
    assert client.delete().status == 204


def test_progress_is_not_held_back(example: ProxyProcess) -> None:
    """The first number arrives while the server still counts."""
    client = McpClient(HttpFront(example.base)).open()
    params = {"name": "count", "arguments": {"to": 4, "pause": 0.5}, "_meta": {"progressToken": 1}}
    answer = client.call("tools/call", params)
    arrivals = [time.monotonic() for _ in answer.stream()]
    answer.close()
    assert arrivals[-1] - arrivals[0] > 1
    assert client.delete().status == 204


def test_page_of_the_application_still_works(example: ProxyProcess) -> None:
    answer = requests.get(f"{example.base}/", timeout=10)
    assert answer.status_code == 200
    assert "with an MCP server at <code>/mcp</code>" in answer.text


def test_application_answers_for_everything_else(example: ProxyProcess) -> None:
    assert requests.get(f"{example.base}/mcpx", timeout=10).status_code == 404


@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_strange_host_or_origin_is_refused(example: ProxyProcess, header: str) -> None:
    value = {"Host": "evil.example", "Origin": "http://evil.example"}[header]
    answer = requests.post(example.url, json={}, headers={header: value}, timeout=10)
    assert answer.status_code == 403


# --- other servers behind it ---------------------------------------------------------------------


def test_http_server_behind_the_endpoint(server: str, tmp_path: Path) -> None:
    async def play(url: str) -> list[list[float | None]]:
        progress: list[list[float | None]] = []

        async def progressed(done: float, total: float | None, _: str | None) -> None:
            progress.append([done, total])

        async with connected(url, "legacy") as (client, _):
            listed = plain(await client.list_tools())
            assert "test_tool_with_progress" in [tool["name"] for tool in listed["tools"]]
            said = plain(await client.call_tool("test_simple_text"))
            assert said["content"][0]["type"] == "text"
            await client.call_tool("test_tool_with_progress", progress_callback=progressed)
        return progress

    command = command_for(server, _WITH_TARGET[server])
    with (
        serving.http_server(tmp_path / "log") as target,
        served(command, {"EXAMPLE_TARGET_URL": target}) as process,
    ):
        assert anyio.run(play, process.url) == [[0, 100], [50, 100], [100, 100]]


def test_command_behind_the_endpoint(server: str) -> None:
    environment = {"EXAMPLE_COMMAND": f"{sys.executable} -m mcp_server_time"}
    serving.require("mcp_server_time")
    with served(command_for(server, "examples.flask_app:app"), environment) as process:
        tools = McpClient(HttpFront(process.base)).open().result("tools/list")["tools"]
        assert "get_current_time" in [tool["name"] for tool in tools]


# --- where it is mounted, how it is started ------------------------------------------------------


@pytest.mark.parametrize("application", FRAMEWORKS, ids=FRAMEWORKS.get)
def test_below_a_prefix(server: str, application: str) -> None:
    command = command_for(server, "tests.examples.prefixed:app")
    with served(command, {"PREFIXED": application}) as process:
        assert_sees_the_demo(seen_by_the_sdk(f"{process.base}/tools/mcp"))
        assert requests.get(f"{process.base}/tools/", timeout=10).status_code == 200
        assert requests.get(process.url, timeout=10).status_code == 404


def test_http_server_below_a_prefix(server: str, tmp_path: Path) -> None:
    command = command_for(server, "tests.examples.prefixed:app")
    with (
        serving.http_server(tmp_path / "log") as target,
        served(
            command, {"PREFIXED": _WITH_TARGET[server], "EXAMPLE_TARGET_URL": target}
        ) as process,
    ):
        client = McpClient(HttpFront(process.base), "/tools/mcp").open()
        assert client.result("tools/list")["tools"]


@pytest.mark.parametrize("application", FRAMEWORKS, ids=FRAMEWORKS.get)
def test_imported_before_the_fork(application: str) -> None:
    command = command_for("gunicorn", application).replace("gunicorn ", "gunicorn --preload ", 1)
    with served(command) as process:
        assert_sees_the_demo(seen_by_the_sdk(process.url))


def test_nothing_starts_before_the_first_mcp_request(example: ProxyProcess) -> None:
    """The page of an application costs no server process, whatever other tests left open."""
    before = set(example.all_pids())
    assert requests.get(f"{example.base}/", timeout=10).status_code == 200
    assert set(example.all_pids()) <= before


# --- the end -------------------------------------------------------------------------------------


def open_stream(process: ProxyProcess) -> Any:
    """A standing stream of a new session, its first bytes read."""
    stream = McpClient(HttpFront(process.base)).open().listen()
    assert stream.status == 200
    assert next(stream.pieces)
    return stream


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda it: it.name)
@pytest.mark.parametrize("application", FRAMEWORKS, ids=FRAMEWORKS.get)
def test_stop_is_quick_and_leaves_nothing(
    server: str, application: str, number: signal.Signals
) -> None:
    """Also while a client holds a stream. `served` fails if a process is left."""
    with served(command_for(server, application)) as process:
        stream = open_stream(process)
        os.kill(process.master_pid, number)
        process.wait(_STOPPED_WITHIN)
        stream.close()


def test_running_call_is_answered_while_gunicorn_stops() -> None:
    with served(command_for("gunicorn", "examples.flask_app:app")) as process:
        client = McpClient(HttpFront(process.base)).open()
        stream = client.listen()
        stopping = threading.Timer(0.5, os.kill, (process.master_pid, signal.SIGTERM))
        stopping.start()
        counting = {"name": "count", "arguments": {"to": 4, "pause": 0.5}}
        result = client.result("tools/call", counting)
        assert result["content"] == [{"type": "text", "text": "counted to 4"}]
        process.wait(_STOPPED_WITHIN)
        stream.close()
        stopping.join()


# --- clients that leave --------------------------------------------------------------------------


def test_client_that_leaves_its_stream_is_noticed(server: str) -> None:
    """There is one place for a stream; the next client gets it soon after."""
    with served(command_for(server, "tests.examples.impatient:app")) as process:
        stream = open_stream(process)
        other = McpClient(HttpFront(process.base)).open()
        assert other.listen().status == 503
        stream.close()

        def has_a_place() -> bool:
            answer = other.listen()
            answer.close()
            return answer.status == 200

        eventually(has_a_place, _NOTICED_WITHIN, "the stream of a client that left holds its place")
