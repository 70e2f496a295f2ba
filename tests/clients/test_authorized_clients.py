"""The official Python SDKs get their tokens by what the proxy says of itself, through gunicorn."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import HERE, ROOT, python_with_mcp1, run_client
from tests.servers.authorization import AuthorizationServer
from tests.support.proxy_process import ProxyProcess

CLIENT = str(HERE / "authorized_client.py")
DEMO = [sys.executable, "-I", "-S", str(ROOT / "mcp_proxy" / "demo" / "server.py")]

CLIENTS = {
    "python 1": (python_with_mcp1, "legacy", "2025-11-25"),
    "python 1, sse": (python_with_mcp1, "sse", None),
    "python 2": (lambda: sys.executable, "legacy", "2025-11-25"),
    "python 2, modern": (lambda: sys.executable, "auto", "2026-07-28"),
}


class Protected:
    """A proxy whose callers need tokens, and who issues them."""

    def __init__(self, proxy: ProxyProcess, issuer: AuthorizationServer) -> None:
        self.proxy = proxy
        self.issuer = issuer

    def run(self, client: str, path: str = "", *tokens: str) -> dict[str, Any]:
        """What a client has to tell that knows a URL alone, or has a token from earlier."""
        interpreter, mode, revision = CLIENTS[client]
        path = path or ("/sse" if mode == "sse" else "/mcp")
        told = run_client(interpreter(), CLIENT, f"{self.proxy.base}{path}", mode, *tokens)
        assert told["answer"] == "hello"
        assert revision in (None, told["revision"])
        return told


@pytest.fixture
def issuer() -> Iterator[AuthorizationServer]:
    """An authorization server of this test alone."""
    with AuthorizationServer() as server:
        yield server


def protected(issuer: AuthorizationServer, *options: str, command: list[str]) -> ProxyProcess:
    """The proxy, with one issuer for all that it serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    public = f"http://127.0.0.1:{port}"
    needed = ["--jwt-issuer", issuer.issuer, "--public-url", public, *options]
    return ProxyProcess(command, options=needed, port=port)


@pytest.fixture
def demo(issuer: AuthorizationServer) -> Iterator[Protected]:
    """The bundled demo server, for tokens with a scope."""
    with protected(issuer, "--jwt-scopes", "mcp:use", command=DEMO) as proxy:
        yield Protected(proxy, issuer)
    assert "Traceback" not in proxy.log(), proxy.log()


@pytest.mark.parametrize("client", CLIENTS)
def test_the_sdks_find_their_way_by_the_metadata_alone(demo: Protected, client: str) -> None:
    told = demo.run(client)
    (visit,) = told["visits"]
    assert visit["resource"] == f"{demo.proxy.base}/{'sse' if 'sse' in client else 'mcp'}"
    assert visit["scope"] == "mcp:use"
    assert demo.issuer.asked["/token"] == 1
    if "sse" not in client:
        assert told["refusals"] == [401]
    assert "eyJ" not in demo.proxy.log(), "a token is in the log"


@pytest.mark.parametrize("client", ["python 1", "python 2", "python 2, modern"])
def test_the_sdks_get_another_token_where_theirs_lacks_a_scope(
    demo: Protected, client: str
) -> None:
    old = demo.issuer.token(aud=demo.proxy.url, scope="other")
    told = demo.run(client, "/mcp", old)
    assert told["refusals"] == [403]
    (visit,) = told["visits"]
    assert "mcp:use" in visit["scope"].split()


@pytest.mark.parametrize("client", ["python 1", "python 2"])
def test_each_of_several_servers_has_tokens_of_its_own(
    issuer: AuthorizationServer, tmp_path: Path, client: str
) -> None:
    demo = {"command": DEMO[0], "args": DEMO[1:]}
    servers = {"one": demo, "two": {**demo, "jwt_scopes": ["mcp:two"]}}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    with protected(issuer, "--config", str(file), command=[]) as proxy:
        told = Protected(proxy, issuer).run(client, "/servers/two/mcp")
        (visit,) = told["visits"]
        assert visit["resource"] == f"{proxy.base}/servers/two/mcp"
        assert visit["scope"] == "mcp:two"
    assert "Traceback" not in proxy.log(), proxy.log()
