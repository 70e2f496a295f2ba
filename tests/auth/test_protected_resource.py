"""What the proxy says of itself to clients that need a token: metadata and challenges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from mcp_proxy import ProxyConfig, StreamableProxy, create_app
from mcp_proxy.app import Application
from mcp_proxy.auth.keys import digest_of, new_key
from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import StdioServer, UnservedServer
from mcp_proxy.servers_file import read_servers
from tests.servers.authorization import KEYS, AuthorizationServer
from tests.servers.http_backend import HttpBackend
from tests.support.front import INITIALIZE, SCRIPTED
from tests.support.waiting import eventually

PUBLIC = "https://mcp.example"
WELL_KNOWN = "/.well-known/oauth-protected-resource"
PAGE = "http://localhost:5173"

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}

Made = Callable[..., Client]


@pytest.fixture
def client_of(issuer: AuthorizationServer) -> Iterator[Made]:
    """Makes a client of an application that takes the tokens of `issuer`."""
    with ExitStack() as made:

        def make(**settings: Any) -> Client:
            needed = {"jwt_issuer": issuer.issuer, "public_url": PUBLIC, **settings}
            return Client(made.enter_context(create_app(ProxyConfig(**needed))))

        yield make


@pytest.fixture
def several(tmp_path: Path) -> str:
    """A file with a stdio server and an HTTP server."""
    servers = {"one": {"command": "/bin/cat"}, "web": {"url": "http://127.0.0.1:1/api/mcp"}}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    return str(file)


def config_file(tmp_path: Path, servers: dict[str, Any]) -> str:
    """A file with these servers, the same one again and again."""
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    return str(file)


def initialize(client: Client, token: str | None, path: str = "/mcp", **more: str) -> Any:
    """The answer to an initialize."""
    headers = {"Accept": "application/json, text/event-stream", **more}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return client.post(path, json=INITIALIZE, headers=headers)


def parameters(answer: Any) -> dict[str, str]:
    """What a challenge says."""
    scheme, _, rest = answer.headers["WWW-Authenticate"].partition(" ")
    assert scheme == "Bearer"
    return dict(re.findall(r'(\w+)="([^"]*)"', rest))


# --- metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["", "/mcp", "/sse"])
def test_each_endpoint_has_its_document(
    client_of: Made, issuer: AuthorizationServer, endpoint: str
) -> None:
    client = client_of(jwt_scopes=("a", "b"))
    answer = client.get(f"{WELL_KNOWN}{endpoint}", headers={"Host": "evil.example"})
    assert answer.status_code == 200
    assert answer.mimetype == "application/json"
    assert answer.json == {
        "resource": f"{PUBLIC}{endpoint}",
        "authorization_servers": [issuer.issuer],
        "bearer_methods_supported": ["header"],
        "scopes_supported": ["a", "b"],
    }


def test_each_of_several_servers_has_its_documents(client_of: Made, several: str) -> None:
    client = client_of(config=several)
    paths = ["/servers/one/mcp", "/servers/one/sse", "/servers/web/mcp", "/servers/web/api/mcp"]
    for path in paths:
        answer = client.get(f"{WELL_KNOWN}{path}")
        assert (answer.status_code, answer.json["resource"]) == (200, f"{PUBLIC}{path}")
        assert "scopes_supported" not in answer.json
    for path in ("", "/mcp", "/servers/two/mcp", "/servers/one/other", "/servers/oneself/mcp"):
        assert client.get(f"{WELL_KNOWN}{path}").status_code == 404


def test_a_server_that_is_not_served_has_its_documents(client_of: Made, tmp_path: Path) -> None:
    servers = {"good": {"command": "/bin/cat"}, "bad": {"command": "/bin/cat", "timeout": "long"}}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    answer = client_of(config=str(file)).get(f"{WELL_KNOWN}/servers/bad/mcp")
    assert answer.json["resource"] == f"{PUBLIC}/servers/bad/mcp"


def test_only_transports_that_are_served_have_documents(client_of: Made) -> None:
    client = client_of(stdio_transports=("streamable",))
    assert client.get(f"{WELL_KNOWN}/mcp").status_code == 200
    assert client.get(f"{WELL_KNOWN}/sse").status_code == 404


def test_a_page_of_an_allowed_origin_may_read_the_document(client_of: Made) -> None:
    client = client_of()
    asked = {"Access-Control-Request-Headers": "mcp-protocol-version", "Origin": PAGE}
    asked["Access-Control-Request-Method"] = "GET"
    preflight = client.options(f"{WELL_KNOWN}/mcp", headers=asked)
    assert preflight.status_code == 204
    assert "mcp-protocol-version" in preflight.headers["Access-Control-Allow-Headers"].lower()
    answer = client.get(f"{WELL_KNOWN}/mcp", headers={"Origin": PAGE})
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    strange = client.get(f"{WELL_KNOWN}/mcp", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in strange.headers


def test_a_document_is_only_read(client_of: Made) -> None:
    assert client_of().post(f"{WELL_KNOWN}/mcp").status_code == 405


def test_a_mount_and_a_path_of_the_public_url_are_in_the_names(client_of: Made) -> None:
    client = client_of(public_url=f"{PUBLIC}/tools")
    above = client.get(f"{WELL_KNOWN}/tools/mcp")
    below = client.get(f"{WELL_KNOWN}/mcp")
    assert above.json["resource"] == below.json["resource"] == f"{PUBLIC}/tools/mcp"
    mounted = client.get(f"{WELL_KNOWN}/mcp", environ_overrides={"SCRIPT_NAME": "/here"})
    assert mounted.json["resource"] == f"{PUBLIC}/tools/here/mcp"
    refused = client.post("/mcp", environ_overrides={"SCRIPT_NAME": "/here"})
    named = parameters(refused)["resource_metadata"]
    assert named == f"{PUBLIC}/tools/here{WELL_KNOWN}/mcp"


def test_nothing_of_an_http_servers_own_is_shown(client_of: Made) -> None:
    with HttpBackend() as server:
        for path in (f"{WELL_KNOWN}/mcp", "/.well-known/oauth-authorization-server"):
            server.on("GET", path, lambda turn: turn.reply(200, b'{"resource": "mine"}'))
        client = client_of(target_url=(server.url,))
        assert client.get(f"{WELL_KNOWN}/mcp").json["resource"] == f"{PUBLIC}/mcp"
        for document in ("oauth-authorization-server", "openid-configuration"):
            assert client.get(f"/.well-known/{document}").status_code == 404


# --- challenges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/mcp", "/sse"])
def test_a_request_without_a_token_is_told_where_to_get_one(client_of: Made, path: str) -> None:
    answer = client_of(jwt_scopes=("a", "b")).get(path, headers={"Host": "localhost"})
    assert answer.status_code == 401
    assert parameters(answer) == {
        "resource_metadata": f"{PUBLIC}{WELL_KNOWN}{path}",
        "scope": "a b",
    }


def test_a_wrong_token_is_told_to_be_wrong(client_of: Made, issuer: AuthorizationServer) -> None:
    client = client_of()
    token = issuer.token(aud=f"{PUBLIC}/other")
    answer = initialize(client, token)
    assert answer.status_code == 401
    assert parameters(answer) == {
        "error": "invalid_token",
        "error_description": "The token was issued for another audience",
        "resource_metadata": f"{PUBLIC}{WELL_KNOWN}/mcp",
    }
    assert token not in answer.text


def test_a_token_that_lacks_a_scope_is_told_which_are_needed(
    client_of: Made, issuer: AuthorizationServer
) -> None:
    client = client_of(jwt_scopes=("a", "b"))
    answer = initialize(client, issuer.token(aud=f"{PUBLIC}/mcp", scope="a c"))
    assert answer.status_code == 403
    assert parameters(answer) == {
        "error": "insufficient_scope",
        "error_description": "The token lacks the scope b",
        "resource_metadata": f"{PUBLIC}{WELL_KNOWN}/mcp",
        "scope": "a b",
    }
    assert initialize(client, issuer.token(aud=f"{PUBLIC}/mcp", scope="b a")).status_code == 200


def test_a_server_of_the_file_has_scopes_of_its_own(
    client_of: Made, issuer: AuthorizationServer, tmp_path: Path
) -> None:
    """A token for all of them calls those whose scopes it has."""
    with HttpBackend() as backend:
        servers: dict[str, Any] = {
            "open": {"url": backend.url},
            "mail": {"url": backend.url, "jwt_scopes": ["mail:read", "all"]},
            "shell": {"command": SCRIPTED[0], "args": SCRIPTED[1:], "jwt_scopes": ["shell"]},
        }
        client = client_of(
            config=config_file(tmp_path, servers), jwt_audience=("mine",), jwt_scopes=("all",)
        )

        def statuses(scope: str) -> list[int]:
            token = issuer.token(aud="mine", scope=scope)
            paths = [f"/servers/{name}/mcp" for name in servers]
            return [initialize(client, token, path).status_code for path in paths]

        assert statuses("all") == [200, 403, 403]
        assert statuses("all mail:read") == [200, 200, 403]
        assert statuses("all shell") == [200, 403, 200]
        assert statuses("mail:read shell") == [403, 403, 403]

        refused = initialize(client, issuer.token(aud="mine", scope="all"), "/servers/mail/mcp")
        assert parameters(refused) == {
            "error": "insufficient_scope",
            "error_description": "The token lacks the scope mail:read",
            "resource_metadata": f"{PUBLIC}{WELL_KNOWN}/servers/mail/mcp",
            "scope": "all mail:read",
        }
        assert parameters(initialize(client, None, "/servers/shell/sse"))["scope"] == "all shell"
        for path, scopes in (("open/mcp", ["all"]), ("mail/mcp", ["all", "mail:read"])):
            document = client.get(f"{WELL_KNOWN}/servers/{path}").json
            assert document["scopes_supported"] == scopes


@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_scopes_that_are_changed_hold_from_the_next_request_on(
    client_of: Made, issuer: AuthorizationServer, tmp_path: Path, kind: str
) -> None:
    with HttpBackend() as backend:
        stdio: dict[str, Any] = {"command": SCRIPTED[0], "args": SCRIPTED[1:]}
        entry: dict[str, Any] = stdio if kind == "stdio" else {"url": backend.url}
        client = client_of(config=config_file(tmp_path, {"one": entry}), jwt_audience=("mine",))
        app = client.application
        assert isinstance(app, Application)
        token = issuer.token(aud="mine", scope="a")
        began = initialize(client, token, "/servers/one/mcp")
        assert began.status_code == 200

        def listed() -> int:
            headers = {"Authorization": f"Bearer {token}"}
            if "Mcp-Session-Id" in began.headers:
                headers["Mcp-Session-Id"] = began.headers["Mcp-Session-Id"]
            return client.post("/servers/one/mcp", json=PING, headers=headers).status_code

        assert listed() == 200
        config_file(tmp_path, {"one": {**entry, "jwt_scopes": ["b"]}})
        app.reload()
        assert listed() == 403
        config_file(tmp_path, {"one": {**entry, "jwt_scopes": ["a"]}})
        app.reload()
        assert listed() == 200


def test_a_key_needs_no_scope_of_a_server(client_of: Made, tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{digest_of(key)}\n")
    with HttpBackend() as backend:
        servers = {"one": {"url": backend.url, "jwt_scopes": ["a"]}}
        client = client_of(config=config_file(tmp_path, servers), api_keys=str(keys))
        assert initialize(client, key, "/servers/one/mcp").status_code == 200


def test_a_page_may_read_a_challenge_and_asks_before_it_has_a_token(client_of: Made) -> None:
    client = client_of()
    asked = {"Access-Control-Request-Headers": "authorization", "Origin": PAGE}
    assert client.options("/mcp", headers=asked).status_code == 204
    refused = initialize(client, None, Origin=PAGE)
    assert refused.status_code == 401
    assert "WWW-Authenticate" in refused.headers["Access-Control-Expose-Headers"]


# --- which tokens are for an endpoint ------------------------------------------------------------


@pytest.mark.parametrize("audience", [PUBLIC, f"{PUBLIC}/", f"{PUBLIC}/mcp", f"{PUBLIC}/sse"])
def test_a_token_is_for_the_server_or_one_of_its_endpoints(
    client_of: Made, issuer: AuthorizationServer, audience: str
) -> None:
    token = issuer.token(aud=audience)
    assert initialize(client_of(), token, Host="localhost").status_code == 200


def test_a_token_for_one_server_is_not_for_another(
    client_of: Made, issuer: AuthorizationServer, tmp_path: Path
) -> None:
    with HttpBackend() as one, HttpBackend() as two:
        file = tmp_path / "servers.json"
        urls = {"one": {"url": one.url}, "two": {"url": two.url}}
        file.write_text(json.dumps({"mcpServers": urls}))
        client = client_of(config=str(file))
        token = issuer.token(aud=f"{PUBLIC}/servers/one/mcp")
        assert initialize(client, token, "/servers/one/mcp").status_code == 200
        assert initialize(client, token, "/servers/two/mcp").status_code == 401
        for audience in (PUBLIC, f"{PUBLIC}/mcp"):
            whole = issuer.token(aud=audience)
            assert initialize(client, whole, "/servers/one/mcp").status_code == 401
        both = client_of(config=str(file), jwt_audience=("mine", PUBLIC))
        for name, audience in (("one", "mine"), ("two", PUBLIC)):
            token = issuer.token(aud=audience)
            assert initialize(both, token, f"/servers/{name}/mcp").status_code == 200
        token = issuer.token(aud=f"{PUBLIC}/servers/one/mcp")
        assert initialize(both, token, "/servers/one/mcp").status_code == 401


def test_the_token_stays_here(client_of: Made, issuer: AuthorizationServer) -> None:
    with HttpBackend() as server:
        client = client_of(target_url=(server.url,))
        token = issuer.token(aud=f"{PUBLIC}/mcp")
        assert initialize(client, token).status_code == 200
        assert server.seen
        for seen in server.seen:
            assert seen.header("Authorization") is None
            assert token not in repr(seen)


def test_a_key_is_taken_beside_tokens(
    client_of: Made, issuer: AuthorizationServer, tmp_path: Path
) -> None:
    key = new_key()
    file = tmp_path / "keys"
    file.write_text(f"alice sha256:{digest_of(key)}\n")
    client = client_of(api_keys=str(file), jwt_scopes=("a",))
    assert initialize(client, key).status_code == 200
    assert initialize(client, None, **{"X-API-Key": key}).status_code == 200
    assert initialize(client, issuer.token(aud=f"{PUBLIC}/mcp", scope="a")).status_code == 200
    refused = initialize(client, new_key())
    assert refused.status_code == 401
    assert parameters(refused)["error"] == "invalid_token"


def test_a_session_is_of_the_subject_whatever_the_token(
    client_of: Made, issuer: AuthorizationServer
) -> None:
    client = client_of()
    began = initialize(client, issuer.token(aud=f"{PUBLIC}/mcp"))
    session = {"Mcp-Session-Id": began.headers["Mcp-Session-Id"]}

    def ended_by(**claims: str) -> int:
        token = issuer.token(aud=f"{PUBLIC}/mcp", **claims)
        headers = {**session, "Authorization": f"Bearer {token}"}
        return client.delete("/mcp", headers=headers).status_code

    assert ended_by(sub="bob") == 404
    assert ended_by(jti="another") == 204


def test_without_keys_a_call_is_refused_for_now(client_of: Made) -> None:
    with AuthorizationServer() as gone:
        pass
    client = client_of(jwt_issuer=gone.issuer)
    answer = initialize(client, gone.token(aud=f"{PUBLIC}/mcp"))
    assert answer.status_code == 503
    assert answer.headers["X-MCP-Proxy-Error"] == "keys-unavailable"
    assert answer.headers["Retry-After"]
    ready = client.get("/readyz", headers={"Host": "localhost"})
    assert ready.status_code == 503
    assert gone.issuer in ready.json["checks"]["token keys"]["reason"]


def test_readiness_has_the_keys_fetched_ahead(client_of: Made, issuer: AuthorizationServer) -> None:
    client = client_of()
    eventually(lambda: client.get("/readyz").status_code == 200)
    assert issuer.asked[KEYS] == 1


# --- settings ------------------------------------------------------------------------------------


def test_scopes_where_no_token_is_taken_are_a_mistake_of_the_entry(tmp_path: Path) -> None:
    """The server would be open to all."""
    servers = {"one": {"url": "http://a/mcp", "jwt_scopes": ["a"]}, "two": {"command": "/bin/cat"}}
    with create_app(ProxyConfig(config=config_file(tmp_path, servers))) as app:
        answer = initialize(Client(app), None, "/servers/one/mcp")
        assert answer.headers["X-MCP-Proxy-Error"] == "misconfigured"
        said = "jwt_scopes needs jwt_issuer: without it nobody has to show a token"
        assert said in answer.json["error"]["message"]
        with pytest.raises(ConfigError, match=f"two: {said}"):
            app.reload([StdioServer("two", ("/bin/cat",), jwt_scopes=("a",))])
    with pytest.raises(ConfigError, match="jwt_scopes"):
        StreamableProxy(StdioServer("two", ("/bin/cat",), jwt_scopes=("a",)))


def test_the_scopes_of_an_entry_are_a_list_of_scopes(tmp_path: Path) -> None:
    servers = {
        "text": {"command": "x", "jwt_scopes": "a b"},
        "blank": {"command": "x", "jwt_scopes": ["a b"]},
        "number": {"url": "http://a/mcp", "jwt_scopes": [5]},
        "slip": {"url": "http://a/mcp", "jwt_scope": ["a"]},
    }
    read = read_servers(Path(config_file(tmp_path, servers)), {})
    reasons = [one.reason for one in read if isinstance(one, UnservedServer)]
    assert len(reasons) == 4
    assert reasons[0].startswith("jwt_scopes: expected a list of texts, got a text")
    assert reasons[1].startswith("jwt_scopes: a scope has no blanks, quotes and backslashes")
    assert reasons[2].startswith("jwt_scopes: expected a list of texts, got one with a number")
    assert reasons[3].startswith("'jwt_scope' is not known; 'jwt_scopes' is meant, it seems")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"jwt_issuer": "https://id.example"}, "needs public_url"),
        ({"jwt_scopes": ("a",)}, "belong to jwt_issuer"),
        ({"jwt_audience": ("a",)}, "belong to jwt_issuer"),
        ({"jwt_jwks_url": "https://id.example/keys"}, "belong to jwt_issuer"),
        ({"jwt_issuer": "id.example", "public_url": PUBLIC}, "https:// URL"),
        ({"jwt_issuer": "http://id.example", "public_url": PUBLIC}, "must be https"),
        (
            {"jwt_issuer": "https://a", "jwt_jwks_url": "file:///keys", "public_url": PUBLIC},
            "https:// URL",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        create_app(ProxyConfig(**settings))


def test_an_issuer_in_the_own_network_may_have_its_keys_at_an_http_url() -> None:
    config = ProxyConfig(
        jwt_issuer="http://id:8080/realms/a", jwt_jwks_url="http://id:8080/k", public_url=PUBLIC
    )
    with create_app(config) as app:
        assert app.config.jwt_issuer == "http://id:8080/realms/a"
