"""Servers of the official SDKs that know one era, behind clients of the other."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import requests

from tests.clients.programs import ROOT, go_program, python_with_mcp1
from tests.support.front import HttpFront, McpClient
from tests.support.modern_client import ModernClient, answering, called
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

_SERVERS = ROOT / "tests" / "servers"


@contextlib.contextmanager
def proxied(command: Sequence[str], port: int) -> Iterator[HttpFront]:
    """The real command in front of a server that was started."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            url = f"http://127.0.0.1:{port}/mcp"
            eventually(lambda: is_there(url), 30, "the server did not start")
            with ProxyProcess(options=["--target-url", url]) as proxy:
                yield HttpFront(proxy.base)
            assert "Traceback" not in proxy.log(), proxy.log()
            assert "WARNING" not in proxy.log(), proxy.log()
        finally:
            process.kill()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def is_there(url: str) -> bool:
    """Whether a server listens."""
    try:
        requests.get(url, timeout=5).close()
    except requests.ConnectionError:
        return False
    return True


@pytest.fixture(scope="module")
def modern_client() -> Iterator[ModernClient]:
    """A client of 2026-07-28 in front of SDK 1.x."""
    port = free_port()
    with proxied([python_with_mcp1(), str(_SERVERS / "sdk1_http.py"), str(port)], port) as front:
        yield ModernClient(front, {"elicitation": {"form": {}}})


@pytest.fixture(scope="module")
def legacy_client() -> Iterator[McpClient]:
    """A session in front of SDK 2.x, without its legacy half."""
    port = free_port()
    script = str(_SERVERS / "conformance.py")
    command = [sys.executable, script, "--http", str(port), "--modern-only"]
    with proxied(command, port) as front:
        client = McpClient(front)
        capabilities = {"elicitation": {"form": {}}, "sampling": {}}
        params = {
            "protocolVersion": "2025-11-25",
            "capabilities": capabilities,
            "clientInfo": {"name": "test", "version": "1"},
        }
        answer = client.call("initialize", params)
        client.session = answer.headers["Mcp-Session-Id"]
        assert answer.message()["result"]["protocolVersion"] == "2025-11-25"
        client.notify("notifications/initialized")
        yield client


@pytest.fixture(scope="module", params=["http", "stdio"])
def client_of_go(request: pytest.FixtureRequest) -> Iterator[ModernClient]:
    """A client of 2026-07-28 in front of the Go SDK, whose refusals repeat what was asked for."""
    server = go_program("servers/go")
    port = free_port()
    with contextlib.ExitStack() as stack:
        if request.param == "http":
            front = stack.enter_context(proxied([server, str(port), "2025-11-25"], port))
        else:
            proxy = stack.enter_context(ProxyProcess([server, "stdio", "2025-11-25"]))
            front = HttpFront(proxy.base)
        yield ModernClient(front, {"elicitation": {"form": {}}})


def test_a_modern_client_calls_tools_of_sdk_1(modern_client: ModernClient) -> None:
    answer = modern_client.call("tools/call", called("echo", text="Grüße")).message()
    assert answer["result"]["content"][0]["text"] == "Grüße"
    assert answer["result"]["resultType"] == "complete"


def test_a_modern_client_hears_progress_of_sdk_1(modern_client: ModernClient) -> None:
    messages = modern_client.call("tools/call", called("count", to=3), token="t").messages()
    progress = [it["params"]["progress"] for it in messages if "method" in it]
    assert progress == [1, 2, 3]
    assert "result" in messages[-1]


def test_a_modern_client_answers_questions_of_sdk_1(modern_client: ModernClient) -> None:
    asked = modern_client.asked("ask", question="How much?")
    answer = modern_client.tool("ask", question="How much?", retry=answering(asked)).message()
    assert answer["result"]["content"][0]["text"] == "ten"


def test_a_legacy_client_calls_tools_of_sdk_2(legacy_client: McpClient) -> None:
    result = legacy_client.result("tools/call", called("test_simple_text"))
    assert result["content"][0]["type"] == "text"
    assert "resultType" not in result


def test_a_legacy_client_hears_progress_of_sdk_2(legacy_client: McpClient) -> None:
    params = {**called("test_tool_with_progress"), "_meta": {"progressToken": "t"}}
    messages = legacy_client.call("tools/call", params).messages()
    assert [it["method"] for it in messages[:-1]] == ["notifications/progress"] * 3


def test_a_legacy_client_answers_questions_of_sdk_2(legacy_client: McpClient) -> None:
    """The state of the question is sealed by the SDK."""
    call = legacy_client.call("tools/call", called("test_input_required_result_elicitation"))
    messages = call.stream()
    asked = next(messages)
    assert asked["method"] == "elicitation/create"
    accepted = {"action": "accept", "content": {"name": "Eve"}}
    legacy_client.post({"jsonrpc": "2.0", "id": asked["id"], "result": accepted})
    assert "result" in next(messages)
    call.close()


def test_a_modern_client_calls_tools_of_go(client_of_go: ModernClient) -> None:
    answer = client_of_go.call("tools/call", called("echo", message="Grüße")).message()
    assert answer["result"]["content"][0]["text"] == "Echo: Grüße"
    assert answer["result"]["resultType"] == "complete"


def test_a_modern_client_hears_progress_of_go(client_of_go: ModernClient) -> None:
    messages = client_of_go.call("tools/call", called("count", to=3), token="t").messages()
    assert [it["params"]["progress"] for it in messages if "method" in it] == [1, 2, 3]
    assert "result" in messages[-1]


def test_a_modern_client_answers_questions_of_go(client_of_go: ModernClient) -> None:
    asked = client_of_go.asked("ask", message="How much?")
    answer = client_of_go.tool("ask", message="How much?", retry=answering(asked)).message()
    assert answer["result"]["content"][0]["text"] == "ten"
