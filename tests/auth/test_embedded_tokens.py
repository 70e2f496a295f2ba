"""Access tokens at a transport that stands in somebody else's WSGI stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from mcp_proxy import ProxyOptions, SSEProxy, StreamableProxy, TransparentProxy
from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import StdioServer
from mcp_proxy.transports.base import Transport
from tests.auth.test_protected_resource import (
    PAGE,
    PUBLIC,
    WELL_KNOWN,
    initialize,
    parameters,
)
from tests.servers.authorization import AuthorizationServer
from tests.servers.http_backend import HttpBackend
from tests.support.front import SCRIPTED
from tests.support.waiting import eventually

Made = Callable[..., Client]


@pytest.fixture
def mounted(issuer: AuthorizationServer) -> Iterator[Made]:
    """Mounts a transport at /tools, for the tokens of `issuer`."""
    with ExitStack() as made:

        def mount(kind: Callable[..., Transport], served: object, **settings: Any) -> Client:
            needed = {"jwt_issuer": issuer.issuer, "public_url": PUBLIC, **settings}
            transport = made.enter_context(kind(served, options=ProxyOptions(**needed)))
            return Client(DispatcherMiddleware(NotFound(), {"/tools": transport}))

        yield mount


def test_a_client_finds_its_way_from_the_refusal_to_the_session(
    mounted: Made, issuer: AuthorizationServer
) -> None:
    client = mounted(StreamableProxy, SCRIPTED, jwt_scopes=("a",))
    refused = initialize(client, None, "/tools")
    assert refused.status_code == 401
    assert parameters(refused) == {
        "resource_metadata": f"{PUBLIC}/tools{WELL_KNOWN}",
        "scope": "a",
    }
    document = client.get(f"/tools{WELL_KNOWN}", headers={"Origin": PAGE})
    assert document.headers["Access-Control-Allow-Origin"] == PAGE
    assert document.json == {
        "resource": f"{PUBLIC}/tools",
        "authorization_servers": [issuer.issuer],
        "bearer_methods_supported": ["header"],
        "scopes_supported": ["a"],
    }
    token = issuer.token(aud=document.json["resource"], scope="a")
    began = initialize(client, token, "/tools")
    assert began.status_code == 200
    session = {"Mcp-Session-Id": began.headers["Mcp-Session-Id"]}

    def ended_by(**claims: str) -> int:
        other = issuer.token(aud=f"{PUBLIC}/tools", scope="a", **claims)
        headers = {**session, "Authorization": f"Bearer {other}"}
        return client.delete("/tools", headers=headers).status_code

    assert (ended_by(sub="bob"), ended_by()) == (404, 204)


def test_a_token_for_another_mount_or_without_a_scope_is_refused(
    mounted: Made, issuer: AuthorizationServer
) -> None:
    server = StdioServer("one", SCRIPTED, jwt_scopes=("a",))
    client = mounted(StreamableProxy, server)
    for audience in (PUBLIC, f"{PUBLIC}/other"):
        assert (
            initialize(client, issuer.token(aud=audience, scope="a"), "/tools").status_code == 401
        )
    lacking = initialize(client, issuer.token(aud=f"{PUBLIC}/tools"), "/tools")
    assert lacking.status_code == 403
    assert parameters(lacking)["scope"] == "a"


@pytest.mark.parametrize(
    ("kind", "known", "unknown"),
    [(StreamableProxy, ["", "/mcp"], "/sse"), (SSEProxy, ["", "/sse"], "/mcp")],
)
def test_each_endpoint_below_the_mount_has_its_document(
    mounted: Made, kind: Callable[..., Transport], known: list[str], unknown: str
) -> None:
    client = mounted(kind, SCRIPTED)
    for path in known:
        document = client.get(f"/tools{WELL_KNOWN}{path}")
        assert document.json["resource"] == f"{PUBLIC}/tools{path}"
    assert client.get(f"/tools{WELL_KNOWN}{unknown}").status_code == 404
    assert client.get(f"/tools{known[1]}").status_code == 401


def test_an_http_server_gets_no_token_and_says_nothing_of_its_own(
    mounted: Made, issuer: AuthorizationServer
) -> None:
    with HttpBackend() as server:
        client = mounted(TransparentProxy, server.url)
        assert client.get(f"/tools{WELL_KNOWN}/any").json["resource"] == f"{PUBLIC}/tools/any"
        token = issuer.token(aud=f"{PUBLIC}/tools")
        assert initialize(client, token, "/tools/mcp").status_code == 200
        assert all(seen.header("Authorization") is None for seen in server.seen)


def test_it_is_ready_once_there_are_keys(issuer: AuthorizationServer) -> None:
    options = ProxyOptions(jwt_issuer=issuer.issuer, public_url=PUBLIC)
    with StreamableProxy(SCRIPTED, options=options) as transport:
        eventually(lambda: transport.not_ready_reason() is None)
    with AuthorizationServer() as gone:
        pass
    options = ProxyOptions(jwt_issuer=gone.issuer, public_url=PUBLIC)
    with StreamableProxy(SCRIPTED, options=options) as transport:
        assert gone.issuer in (transport.not_ready_reason() or "")


@pytest.mark.parametrize("kind", [StreamableProxy, SSEProxy, TransparentProxy])
def test_settings_that_do_not_go_together_are_refused(kind: Callable[..., Transport]) -> None:
    options = ProxyOptions(jwt_issuer="https://id.example")
    with pytest.raises(ConfigError, match="needs public_url"):
        kind("http://a/", options=options)
