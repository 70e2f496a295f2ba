"""What an entry of the file of servers says is what its server is served with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mcp_proxy import ProxyConfig, create_app
from mcp_proxy.server.banner import server_urls
from mcp_proxy.server.check import check
from mcp_proxy.servers import path_name
from tests.servers.http_backend import HttpBackend, reply
from tests.support.front import SCRIPTED, McpClient
from tests.support.transparent import LocalFront


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as made:
        yield made


@pytest.fixture
def config(backend: HttpBackend, tmp_path: Path) -> ProxyConfig:
    """An HTTP server with headers, and a stdio server whose calls may take half a second."""
    headers = {"Authorization": "Bearer of-the-file", "X-Mine": "yes"}
    entries = {
        "http": {"url": f"{backend.url}/mcp", "headers": headers},
        "stdio": {"command": SCRIPTED[0], "args": list(SCRIPTED[1:]), "timeout": 2},
    }
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": entries}))
    return ProxyConfig(config=str(file))


def test_headers_are_set_on_every_request(backend: HttpBackend, config: ProxyConfig) -> None:
    with closing(create_app(config)) as app, closing(LocalFront(app)) as front:
        client = McpClient(front, "/servers/http/mcp").open()
        client.call("tools/call", Authorization="Bearer of-the-client").close()
    assert {seen.header("Authorization") for seen in backend.seen} == {"Bearer of-the-file"}
    assert {seen.header("X-Mine") for seen in backend.seen} == {"yes"}


def test_a_time_limit_is_that_of_its_server(config: ProxyConfig) -> None:
    with closing(create_app(config)) as app, closing(LocalFront(app)) as front:
        client = McpClient(front, "/servers/stdio/mcp").open()
        answer = client.call("sleep", {"seconds": 60})
        assert answer.failure == "server-timeout"


def test_check_sends_the_headers_and_prints_none(
    backend: HttpBackend, config: ProxyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(config) == 0
    assert backend.seen[0].header("Authorization") == "Bearer of-the-file"
    assert "of-the-file" not in capsys.readouterr().out


@pytest.mark.parametrize("document", ["oauth-protected-resource", "ai-catalog.json"])
@pytest.mark.parametrize("rest", ["/mcp", "/a/b", "/", ""])
def test_a_document_about_a_server_is_that_servers(
    backend: HttpBackend, config: ProxyConfig, document: str, rest: str
) -> None:
    """Its well-known name stands before the path that it is about."""
    path = f"/.well-known/{document}{rest}"
    backend.on("GET", path, reply(200, b"{}", "Content-Type: application/json"))
    with closing(create_app(config)) as app, closing(LocalFront(app)) as front:
        answer = front.request("GET", f"/.well-known/{document}/servers/http{rest}?a=1", {}, None)
        assert (answer.status, answer.body()) == (200, b"{}")
        assert backend.last.target == f"{path}?a=1"
        for other in ("stdio", "none"):
            answer = front.request("GET", f"/.well-known/{document}/servers/{other}", {}, None)
            assert answer.status == 404
        refused = LocalFront(app.overloaded)
        answer = refused.request("GET", f"/.well-known/{document}/servers/http{rest}", {}, None)
        assert answer.status == 503


@pytest.mark.parametrize("name", ["my server", "@scope/x", "日本"])
def test_any_name_is_served_at_the_url_of_the_banner(tmp_path: Path, name: str) -> None:
    file = tmp_path / "servers.json"
    entry = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
    file.write_text(json.dumps({"servers": {name: entry}}), encoding="utf-8")
    config = ProxyConfig(config=str(file))
    (path,) = server_urls(config, "").values()
    assert path == f"/servers/{path_name(name)}/mcp"
    with closing(create_app(config)) as app, closing(LocalFront(app)) as front:
        assert McpClient(front, path).open().result("echo", {"text": "é"}) == {"text": "é"}
