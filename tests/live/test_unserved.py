"""Servers that are named in the file and not served: disabled, or with a mistake in their entry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import ProxyConfig, UnservedServer, create_app
from mcp_proxy.app import Application
from mcp_proxy.server.banner import server_urls
from mcp_proxy.server.check import check, check_offline
from mcp_proxy.server.cli import main
from mcp_proxy.wire import modern
from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient, WsgiFront
from tests.support.proxy_process import COMMAND, GUNICORN, ProxyProcess
from tests.support.waiting import eventually

GOOD = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
ENTRIES: dict[str, Any] = {
    "good": GOOD,
    "off": {**GOOD, "disabled": True},
    "my broken": {"command": "x", "env": {"TOKEN": "${NO_SUCH_VARIABLE}"}},
}

WRONG = "the environment variable NO_SUCH_VARIABLE is not set (line 1)"
SENTENCES = {
    "off": ("disabled", "The server 'off' is disabled"),
    "my-broken": ("misconfigured", f"The server 'my-broken' is misconfigured: {WRONG}"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "servers.json"
    made.write_text(json.dumps({"mcpServers": ENTRIES}))
    return made


@pytest.fixture
def app(file: Path) -> Iterator[Application]:
    with create_app(ProxyConfig(config=str(file))) as made:
        yield made


def client_of(app: Any, name: str, path: str = "/mcp") -> McpClient:
    return McpClient(WsgiFront(app), f"/servers/{name}{path}")


@pytest.mark.parametrize("path", ["/mcp", "/sse", "/messages", ""])
@pytest.mark.parametrize("name", SENTENCES)
def test_a_request_for_it_is_answered_with_the_reason(
    app: Application, name: str, path: str
) -> None:
    kind, sentence = SENTENCES[name]
    client = client_of(app, name, path)
    for method in ("initialize", "tools/list", "tools/call"):
        answer = client.call(method, {}, 7)
        error = {"code": -32000, "message": sentence}
        assert answer.message() == {"jsonrpc": "2.0", "id": 7, "error": error}
        assert (answer.status, answer.failure) == (200, kind)
    calls = [{"jsonrpc": "2.0", "id": key, "method": "ping"} for key in (1, 2)]
    answer = client.post(calls)
    assert (answer.status, answer.failure) == (200, kind)
    assert [message["error"]["message"] for message in answer.messages()] == [sentence] * 2


@pytest.mark.parametrize("name", SENTENCES)
def test_anything_else_is_503_with_the_reason(app: Application, name: str) -> None:
    kind, sentence = SENTENCES[name]
    client = client_of(app, name)
    client.session = "any"
    answers = [
        *(client.listen(), client.delete(), client.notify("notifications/initialized")),
        *(client_of(app, name, path).listen() for path in ("/sse", "/other")),
        client.call(modern.DISCOVER),
    ]
    for answer in answers:
        assert (answer.status, answer.failure) == (503, kind)
        assert answer.error()["message"] == sentence
        assert ("Retry-After" in answer.headers) is (name != "off")


def test_with_http_statuses_a_request_is_503_too(file: Path) -> None:
    with create_app(ProxyConfig(config=str(file), failure_status="http")) as app:
        assert client_of(app, "off").initialize().status == 503


@pytest.mark.parametrize("name", SENTENCES)
def test_a_page_of_another_site_gets_nothing(app: Application, name: str) -> None:
    assert client_of(app, name).initialize(Sec_Fetch_Site="cross-site").status == 403


def test_the_others_serve_and_readyz_tells_of_the_broken_one(app: Application) -> None:
    client = client_of(app, "good").open()
    assert client.result("count")["calls"] == 1
    answer = client.front.request("GET", "/readyz", {"Host": "127.0.0.1"}, None)
    document = answer.message()
    assert (answer.status, document["status"]) == (200, "degraded")
    assert document["checks"]["server good"] == {"state": "ok"}
    assert document["checks"]["server my-broken"] == {"state": "failed", "reason": WRONG}
    assert "server off" not in document["checks"]
    assert app.is_shared is False  # as that of the stdio server in memory
    client.delete()


def test_a_disabled_server_degrades_nothing(file: Path) -> None:
    file.write_text(json.dumps({"mcpServers": {"good": GOOD, "off": ENTRIES["off"]}}))
    with create_app(ProxyConfig(config=str(file))) as app:
        answer = WsgiFront(app).request("GET", "/readyz", {"Host": "127.0.0.1"}, None)
        assert answer.message()["status"] == "ready"


def test_an_embedder_may_look_which_are_not_served(app: Application) -> None:
    _, off, broken = app.config.servers()
    assert off == UnservedServer("off", "it is disabled", is_disabled=True)
    assert broken == UnservedServer("my-broken", WRONG)
    assert app.config.broken() == [broken]
    assert list(server_urls(app.config, "")) == ["good"]


def test_an_application_of_its_own_logs_what_is_broken_when_it_is_made(file: Path) -> None:
    code = (
        "import logging, sys; logging.basicConfig(); from mcp_proxy import *; "
        "create_app(ProxyConfig(config=sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines() == [f"ERROR:mcp_proxy.app:{file}: my-broken: {WRONG}"]


@pytest.mark.parametrize("way", [COMMAND, GUNICORN], ids=["command", "gunicorn"])
def test_at_the_start_a_broken_entry_is_one_line_and_the_others_serve(
    file: Path, way: tuple[str, ...], redis_url: str, redis_prefix: str
) -> None:
    environment = {"MCP_PROXY_CONFIG": str(file), "MCP_PROXY_WORKERS": "2"}
    environment |= needs.store_of_several(redis_url, redis_prefix)
    with ProxyProcess(way=way, environment=environment) as process:
        front = HttpFront(process.base)
        assert McpClient(front, "/servers/good/mcp").open().result("count")["calls"] == 1
        assert McpClient(front, "/servers/my-broken/mcp").initialize().failure == "misconfigured"
    errors = [line for line in process.log().splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert f"{file}: my-broken: {WRONG}" in errors[0]


@needs.MEMORY
def test_an_http_server_is_broken_where_gunicorn_is_told_of_several_workers(file: Path) -> None:
    entries = {"good": GOOD, "far": {"url": "http://127.0.0.1:1/mcp"}}
    file.write_text(json.dumps({"mcpServers": entries}))
    environment = {"MCP_PROXY_CONFIG": str(file)}
    with ProxyProcess(way=GUNICORN, options=["-w", "2"], environment=environment) as process:
        eventually(lambda: len(process.worker_pids()) == 2)
        front = HttpFront(process.base)
        assert McpClient(front, "/servers/good/mcp").open().result("count")["calls"] == 1
        answer = McpClient(front, "/servers/far/mcp").initialize()
        assert "needs redis_url where there are 2 workers" in answer.error()["message"]


def test_the_start_is_refused_where_none_can_be_served(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unserved = {name: entry for name, entry in ENTRIES.items() if name != "good"}
    file.write_text(json.dumps({"mcpServers": unserved}))
    assert main(["--config", str(file)]) == 2
    said = f"mcp-wsgi-proxy: {file}: no server can be served: my-broken: {WRONG}\n"
    assert capsys.readouterr().err == said


# --- check ---------------------------------------------------------------------------------------


def rows(printed: str) -> dict[str, list[str]]:
    """By the name of a server: verdict, kind and what was found."""
    lines = [line.split(maxsplit=4) for line in printed.splitlines()]
    return {line[2]: [line[0], *line[3:]] for line in lines if line[1] == "server"}


def test_check_prints_each_server_with_its_kind_or_why_not(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(ProxyConfig(config=str(file))) == 1
    found = rows(capsys.readouterr().out)
    assert found["good"][:2] == ["ok", "stdio"]
    assert found["off"] == ["off", "-", "it is disabled"]
    assert found["my-broken"] == ["FAIL", "-", WRONG]


def test_a_disabled_server_is_in_order(file: Path) -> None:
    file.write_text(json.dumps({"mcpServers": {"good": GOOD, "off": ENTRIES["off"]}}))
    assert check(ProxyConfig(config=str(file))) == 0


def test_check_prints_the_table_where_no_server_can_be_served(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(json.dumps({"mcpServers": {"my broken": ENTRIES["my broken"]}}))
    assert main(["check", "--config", str(file)]) == 1
    assert rows(capsys.readouterr().out) == {"my-broken": ["FAIL", "-", WRONG]}


def test_offline_check_starts_and_connects_to_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "started"
    (tmp_path / "secret").write_text("swordfish")
    secret = f"${{file:{tmp_path}/secret}}"
    entries = {
        "starts": {"command": sys.executable, "args": ["-c", f"open({str(trace)!r}, 'w')", secret]},
        "far": {"url": f"http://127.0.0.1:1/{secret}/mcp"},
    }
    file.write_text(json.dumps({"mcpServers": entries}))
    arguments = ["check", "--offline", "--redis-url", "redis://127.0.0.1:1", "--config", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = rows(printed)
    assert found["starts"][:2] == ["ok", "stdio"]
    assert found["far"] == ["ok", "http", "http://127.0.0.1:1/***/mcp"]
    assert "swordfish" not in printed
    assert not trace.exists()


def test_offline_check_finds_what_is_wrong_in_the_files(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_offline(ProxyConfig(config=str(file))) == 1
    assert rows(capsys.readouterr().out)["my-broken"] == ["FAIL", "-", WRONG]
    file.write_text("{")
    assert main(["check", "--offline", "--config", str(file)]) == 2
    assert f"{file}, line 1, column 2" in capsys.readouterr().err
