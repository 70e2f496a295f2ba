"""A path at which nothing is served is answered with the endpoints that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from mcp_proxy import ProxyConfig, ProxyOptions, SSEProxy, StreamableProxy, create_app
from tests.support.front import SCRIPTED

_NOTHING = "Nothing is served at this path; MCP is served at "


def written(directory: Path, names: Sequence[str]) -> str:
    """A file of servers."""
    path = directory / "servers.json"
    servers = {name: {"command": SCRIPTED[0], "args": SCRIPTED[1:]} for name in names}
    path.write_text(json.dumps({"mcpServers": servers}))
    return str(path)


def sentence(app: Any, path: str, mount: str = "", **headers: str) -> str:
    """What a POST to a path that is none is answered, in JSON-RPC."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    environ = {"REMOTE_ADDR": "127.0.0.1"}
    served = DispatcherMiddleware(NotFound(), {mount: app}) if mount else app
    answer = Client(served).post(
        mount + path, json={"jsonrpc": "2.0", "id": 1}, headers=named, environ_overrides=environ
    )
    assert answer.status_code == 404
    message: str = answer.json["error"]["message"]
    assert message.startswith("Nothing is served at this path")
    return message


@pytest.mark.parametrize("path", ["/", "/MCP", "/mcp/x", "/servers/time/mcp", "/sse/x"])
def test_one_server_has_two_endpoints(path: str) -> None:
    with create_app(ProxyConfig(command=SCRIPTED)) as app:
        assert sentence(app, path) == f"{_NOTHING}/mcp, /sse"


def test_a_wire_that_is_not_served_is_not_named() -> None:
    with create_app(ProxyConfig(command=SCRIPTED, stdio_transports=("sse",))) as app:
        assert sentence(app, "/mcp") == f"{_NOTHING}/sse"


@pytest.mark.parametrize("path", ["/", "/mcp", "/servers/nosuch/mcp", "/servers/a/mcp/x"])
def test_every_server_of_a_file_has_its_own(tmp_path: Path, path: str) -> None:
    config = ProxyConfig(config=written(tmp_path, "ab"), stdio_transports=("streamable",))
    with create_app(config) as app:
        assert sentence(app, path) == f"{_NOTHING}/servers/a/mcp, /servers/b/mcp"


def test_many_servers_are_counted(tmp_path: Path) -> None:
    names = [f"s{number:02}" for number in range(12)]
    config = ProxyConfig(config=written(tmp_path, names), stdio_transports=("streamable",))
    with create_app(config) as app:
        named = ", ".join(f"/servers/{name}/mcp" for name in names[:10])
        assert sentence(app, "/") == f"{_NOTHING}{named}, 2 more"


@pytest.mark.parametrize("mount", ["/tools", "/mcp", "/a/mcp/b"])
@pytest.mark.parametrize("path", ["/", "/mcp/x"])
def test_they_are_named_as_clients_see_them(path: str, mount: str) -> None:
    with create_app(ProxyConfig(command=SCRIPTED, trusted_proxies=("127.0.0.1",))) as app:
        assert sentence(app, path, mount) == f"{_NOTHING}{mount}/mcp, {mount}/sse"
        seen = sentence(app, path, mount, X_Forwarded_Prefix="/public")
        assert seen == f"{_NOTHING}/public{mount}/mcp, /public{mount}/sse"


def test_those_of_a_file_are_named_as_clients_see_them(tmp_path: Path) -> None:
    with create_app(ProxyConfig(config=written(tmp_path, "a"))) as app:
        for path in ("/", "/servers/a/x"):
            assert sentence(app, path, "/tools") == (
                f"{_NOTHING}/tools/servers/a/mcp, /tools/servers/a/sse"
            )


def test_a_transport_by_itself_names_its_own() -> None:
    with StreamableProxy(SCRIPTED) as streamable, SSEProxy(SCRIPTED) as sse:
        assert sentence(streamable, "/x") == f"{_NOTHING}/"
        assert sentence(streamable, "/x", "/tools") == f"{_NOTHING}/tools"
        assert sentence(sse, "/x", "/old") == f"{_NOTHING}/old/sse"


def test_strangers_by_another_name_are_told_nothing(tmp_path: Path) -> None:
    config = ProxyConfig(config=written(tmp_path, ["secret"]), allowed_hosts=("mcp.example.com",))
    with (
        create_app(config) as app,
        StreamableProxy(
            SCRIPTED, options=ProxyOptions(allowed_hosts=("mcp.example.com",))
        ) as alone,
    ):
        for served, path in ((app, "/"), (app, "/servers/secret/x"), (alone, "/x")):
            answer = Client(served).get(path, headers={"Host": "evil.example"})
            assert answer.status_code == 403
            assert "MCP is served" not in answer.text
            assert "secret" not in answer.text
