"""`include("mcp_proxy.django")`: the proxy in a Django project, whose settings it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests

from mcp_proxy import ProxyConfig
from mcp_proxy.config import settings
from tests.clients.programs import HERE, run_client
from tests.examples.serving import SERVERS, command_for, require, served
from tests.examples.test_examples import assert_sees_the_demo
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess, is_alive
from tests.support.sse_client import SseClient
from tests.support.startable import ServerThread
from tests.support.waiting import eventually

_GUNICORN = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn")

_SETTINGS = {"command": list(SCRIPTED), "threads": 16, "keepalive_interval": "0.3"}

_INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}


def project(given: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the project."""
    return {"MCP_PROXY_OF_DJANGO": json.dumps(given)}


@pytest.fixture(scope="module")
def site() -> Iterator[ProxyProcess]:
    """The project under gunicorn, in front of a stdio server."""
    require("django")
    way = (*_GUNICORN, "tests.examples.django_project:application")
    with ProxyProcess(way=way, environment=project(_SETTINGS)) as process:
        yield process


@pytest.fixture
def client(site: ProxyProcess) -> Iterator[McpClient]:
    """A session below the mount."""
    client = McpClient(HttpFront(site.base), "/tools/mcp").open()
    yield client
    client.delete().close()


# --- the five lines ------------------------------------------------------------------------------


@pytest.mark.parametrize("program", SERVERS)
def test_the_lines_of_the_page_are_enough_for_an_official_client(program: str) -> None:
    require("mcp")
    with served(command_for(program, "examples.django_five:application")) as process:
        client = str(HERE / "python_client.py")
        assert_sees_the_demo(run_client(sys.executable, client, process.url, "auto"))


def test_the_lines_for_flask_are_enough_for_an_official_client() -> None:
    require("mcp")
    with served(command_for("gunicorn", "examples.flask_five:app")) as process:
        client = str(HERE / "python_client.py")
        assert_sees_the_demo(run_client(sys.executable, client, process.url, "auto"))


# --- under a mount, behind middleware ------------------------------------------------------------


def test_a_call_is_answered_as_a_whole_and_the_project_too(
    site: ProxyProcess, client: McpClient
) -> None:
    answer = client.call("echo", {"text": "x" * 100_000})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.message()["result"] == {"text": "x" * 100_000}
    assert requests.get(f"{site.base}/", timeout=10).json() == {"of": "Django"}
    assert requests.get(f"{site.base}/tools/x", timeout=10).status_code == 404


def test_an_event_arrives_before_the_next_is_made(client: McpClient) -> None:
    client.require_streaming()


def test_the_older_wire_names_its_messages_below_the_mount(site: ProxyProcess) -> None:
    client = SseClient(HttpFront(site.base), path="/tools/sse").open()
    assert client.uri.startswith("/tools/messages?session_id=mcp-")
    server = client.result("count")["pid"]
    client.close()
    eventually(lambda: not is_alive(server))


def test_what_wants_no_answer_gets_no_content_type(client: McpClient) -> None:
    answer = client.notify("notifications/initialized")
    assert (answer.status, answer.headers.get("Content-Type")) == (202, None)


def test_a_body_that_middleware_has_read_is_there_for_the_proxy(client: McpClient) -> None:
    answer = client.call("echo", {"text": "x"}, X_Read="yes")
    assert answer.message()["result"] == {"text": "x"}


def test_no_transaction_is_open_while_a_call_runs(site: ProxyProcess, client: McpClient) -> None:
    """The project has ATOMIC_REQUESTS."""
    assert int(requests.get(f"{site.base}/", timeout=10).headers["X-Statements"]) > 0
    assert client.call("echo", {"text": "x"}).headers["X-Statements"] == "0"


def test_a_path_below_an_endpoint_is_told_where_the_endpoints_are(site: ProxyProcess) -> None:
    answer = requests.post(f"{site.base}/tools/mcp/x", json={}, timeout=10)
    assert answer.status_code == 404
    assert "/tools/mcp, /tools/sse" in answer.json()["error"]["message"]


class _Cookies(BaseHTTPRequestHandler):
    """An HTTP server that sets two cookies."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Set-Cookie", "a=1; Path=/; HttpOnly")
        self.send_header("Set-Cookie", "b=2; Secure")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_several_cookies_of_an_http_server_arrive() -> None:
    with ServerThread(_Cookies) as backend:
        given = {"target_url": [f"http://127.0.0.1:{backend.port}/mcp"], "threads": 16}
        way = (*_GUNICORN, "tests.examples.django_project:application")
        with ProxyProcess(way=way, environment=project(given)) as process:
            answer = requests.get(f"{process.base}/tools/mcp", timeout=10)
            assert answer.raw.headers.getlist("Set-Cookie") == [
                "a=1; HttpOnly; Path=/",
                "b=2; Secure",
            ]


# --- who is let in -------------------------------------------------------------------------------


def initialized(site: ProxyProcess, **headers: str) -> int:
    answer = requests.post(f"{site.base}/tools/mcp", json=_INITIALIZE, headers=headers, timeout=10)
    if "Mcp-Session-Id" in answer.headers:
        session = {"Mcp-Session-Id": answer.headers["Mcp-Session-Id"]}
        requests.delete(f"{site.base}/tools/mcp", headers={**headers, **session}, timeout=10)
    return answer.status_code


def test_the_hosts_are_those_of_django(site: ProxyProcess) -> None:
    assert initialized(site, Host="www.example.com") == 200
    assert initialized(site, Host="evil.example") == 400  # Django's own answer


def test_pages_of_these_hosts_may_call_and_others_not(site: ProxyProcess) -> None:
    assert initialized(site, Origin="http://www.example.com") == 200
    assert initialized(site, Origin="http://evil.example") == 403


# --- the settings --------------------------------------------------------------------------------


def imported(given: str, shown: str = "mcp_proxy.django.application.config") -> str:
    """What the import of the module says of `MCP_PROXY`, as manage.py would print it."""
    code = (
        "from django.conf import settings\n"
        f"settings.configure(ALLOWED_HOSTS=['*'], {given})\n"
        "import mcp_proxy.django\n"
        f"print({shown})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    return (done.stdout + done.stderr).splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "MCP_PROXY must be a dict in the settings"),
        ("MCP_PROXY='python -m x'", "MCP_PROXY must be a dict in the settings"),
        ("MCP_PROXY={'commando': 'x'}", "MCP_PROXY: Unknown setting commando"),
        ("MCP_PROXY={'threads': 1}", "MCP_PROXY: threads: expected a whole number of at least 4"),
        ("MCP_PROXY={'command': 'x', 'target_url': 'http://a/'}", "MCP_PROXY: Give only one of"),
        ("MCP_PROXY={'workers': 2}", "MCP_PROXY: workers has no effect in Django: set it where"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(given: str, sentence: str) -> None:
    assert f"ImproperlyConfigured: {sentence}" in imported(given)


def test_settings_are_values_or_texts_as_in_the_environment() -> None:
    said = imported("MCP_PROXY={'command': 'x -y', 'threads': '8', 'session_ttl': 5}")
    assert said == repr(ProxyConfig(command=("x", "-y"), threads=8, session_ttl=5))


def test_what_is_refused_in_django_is_a_setting_of_the_server() -> None:
    names = {setting.name for setting in settings()}
    for name in ("bind", "workers", "log_format", "session_dir"):
        assert name in names
        assert f"{name} has no effect" in imported(f"MCP_PROXY={{'{name}': '1'}}")
