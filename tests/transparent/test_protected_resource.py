"""What an HTTP server says of itself for OAuth names the proxy, where that has a public URL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from mcp_proxy import ProxyOptions, TransparentProxy
from tests.servers.http_backend import HttpBackend, reply
from tests.support.front import Answer, Json
from tests.support.modern_client import ModernClient
from tests.support.transparent import LocalFront

PUBLIC = "https://public.example/in"

CHALLENGED = [
    ("Bearer", "Bearer"),
    (
        'Bearer error="insufficient_scope", resource_metadata="{server}/a/b.json?c", scope="x y"',
        f'Bearer error="insufficient_scope", resource_metadata="{PUBLIC}/a/b.json?c", scope="x y"',
    ),
    (
        "Bearer Resource_Metadata = {server}/x, scope=x",
        f"Bearer Resource_Metadata = {PUBLIC}/x, scope=x",
    ),
    ('Bearer resource_metadata="{server}"', f'Bearer resource_metadata="{PUBLIC}"'),
    (
        'Basic realm="x", DPoP resource_metadata="{server}/"',
        f'Basic realm="x", DPoP resource_metadata="{PUBLIC}/"',
    ),
    *(
        (said, said)
        for said in (
            'Bearer resource_metadata="https://other.example/.well-known/x"',
            'Bearer resource_metadata="/relative"',
            'Bearer resource_metadata=""',
            r'Bearer error_description="\"resource_metadata={server}/x\""',
            'Bearer my_resource_metadata="{server}/x"',
        )
    ),
]


@contextmanager
def proxied(url: str, environ: Json | None = None, **settings: Any) -> Iterator[LocalFront]:
    """A proxy in front of a server, which knows its public URL unless it is told otherwise."""
    options = ProxyOptions(**{"public_url": PUBLIC, "allowed_hosts": ("*",), **settings})
    with TransparentProxy(url, options=options) as app:
        front = LocalFront(app)
        front.environ = {**front.environ, **(environ or {})}
        with closing(front):
            yield front


@pytest.fixture
def server(target: HttpBackend) -> HttpBackend:
    """A server that has forgotten the test before."""
    target.reset()
    return target


def document(resource: Any, **others: Any) -> bytes:
    """Metadata of a resource."""
    return json.dumps(
        {"resource": resource, "authorization_servers": ["https://as"], **others}
    ).encode()


def get(
    front: LocalFront, path: str = "/.well-known/oauth-protected-resource/mcp", **headers: str
) -> Answer:
    """The answer to a GET."""
    return front.request("GET", path, headers, None)


# --- challenges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "expected"), CHALLENGED)
@pytest.mark.parametrize("status", [401, 403])
def test_a_challenge_leads_to_the_metadata_through_the_proxy(
    server: HttpBackend, status: int, said: str, expected: str
) -> None:
    said, expected = (each.replace("{server}", server.url) for each in (said, expected))
    server.on("POST", "/mcp", reply(status, b"{}", f"WWW-Authenticate: {said}"))
    with proxied(server.url) as front:
        answer = ModernClient(front).call("tools/list")
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (status, expected)


def test_without_a_public_url_a_challenge_passes_as_it_is(server: HttpBackend) -> None:
    said = f'Bearer resource_metadata="{server.url}/x"'
    server.on("POST", "/mcp", reply(401, b"{}", f"WWW-Authenticate: {said}"))
    with proxied(server.url, public_url=None) as front:
        assert ModernClient(front).call("tools/list").headers["WWW-Authenticate"] == said


def test_a_challenge_that_comes_over_a_bridge_leads_there_too(server: HttpBackend) -> None:
    def act(turn: Any) -> None:
        if turn.seen.json["method"] == "initialize":
            turn.result({"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {}})
        elif "_meta" in (turn.seen.json.get("params") or {}):
            turn.error(400, -32600, "what?")
        elif turn.seen.json["method"] == "tools/list":
            turn.reply(401, b"{}", f'WWW-Authenticate: Bearer resource_metadata="{server.url}/x"')
        else:
            turn.reply(202)

    server.on("POST", "/mcp", act)
    with proxied(server.url, stateless_children="shared") as front:
        answer = ModernClient(front).call("tools/list")
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{PUBLIC}/x"'


# --- metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/", "/mcp", "/other/mcp"])
@pytest.mark.parametrize("where", ["/.well-known/oauth-protected-resource/mcp", "/any/where.json"])
def test_metadata_names_the_proxy(server: HttpBackend, path: str, where: str) -> None:
    said = document(server.url + path, scopes_supported=["a"], resource_name="é")
    server.on("GET", where, reply(200, said, "Content-Type: application/json; x=y", "ETag: 1"))
    with proxied(server.url) as front:
        answer = get(front, where)
        assert answer.headers["ETag"] == "1"
        assert answer.message() == {**json.loads(said), "resource": PUBLIC + path}


def test_metadata_that_is_compressed_names_the_proxy(server: HttpBackend) -> None:
    said = gzip.compress(document(server.url))
    fields = ["Content-Type: application/json", "Content-Encoding: gzip"]
    server.on("GET", "/.well-known/oauth-protected-resource/mcp", reply(200, said, *fields))
    with proxied(server.url) as front:
        answer = get(front)
        assert "Content-Encoding" not in answer.headers
        assert answer.message()["resource"] == PUBLIC


def test_the_path_of_a_targets_endpoint_is_that_of_the_proxys(server: HttpBackend) -> None:
    """Clients look for it by the path that they know."""
    where = "/.well-known/oauth-protected-resource/v2/mcp"
    said = document(f"{server.url}/v2/mcp")
    server.on("GET", where, reply(200, said, "Content-Type: application/json"))
    with proxied(f"{server.url}/v2/mcp?t=1") as front:
        assert get(front).message()["resource"] == f"{PUBLIC}/mcp"
        assert server.last.target == f"{where}?t=1"
        assert get(front, where).message()["resource"] == f"{PUBLIC}/mcp"


def test_the_mount_follows_the_public_url(server: HttpBackend) -> None:
    where = "/.well-known/oauth-protected-resource"
    server.on("GET", where, reply(200, document(server.url), "Content-Type: application/json"))
    environ = {"SCRIPT_NAME": "/a b", "HTTP_X_FORWARDED_PREFIX": "/no"}
    with proxied(server.url, environ, trusted_proxies=("*",)) as front:
        assert get(front, where).message()["resource"] == f"{PUBLIC}/a%20b"


def test_a_server_that_is_told_the_clients_host_is_known_by_it(server: HttpBackend) -> None:
    def act(turn: Any) -> None:
        said = document(f"http://{turn.seen.header('Host')}/mcp")
        turn.reply(200, said, "Content-Type: application/json")

    server.on("GET", "/.well-known/oauth-protected-resource/mcp", act)
    with proxied(server.url, preserve_host=True) as front:
        assert get(front, Host="inner.example:8").message()["resource"] == f"{PUBLIC}/mcp"


AS_IT_IS = [
    document("https://evil.example/mcp"),
    document(["{server}"]),
    document(None),
    b'{"resource": "{server}",   "other": 1}',
    b'["authorization_servers"]',
    b'{"authorization_servers": ',
    b"",
]


@pytest.mark.parametrize("said", AS_IT_IS)
@pytest.mark.parametrize("public_url", [PUBLIC, None])
def test_what_does_not_name_the_server_passes_as_it_is(
    server: HttpBackend, said: bytes, public_url: str | None
) -> None:
    """A client has to see it where its server is called otherwise."""
    said = said.replace(b"{server}", server.url.encode())
    where = "/.well-known/oauth-protected-resource/mcp"
    server.on("GET", where, reply(200, said, "Content-Type: application/json"))
    with proxied(server.url, public_url=public_url) as front:
        assert get(front).body() == said


@pytest.mark.parametrize(
    "answer",
    [
        (404, "application/json"),
        (200, "text/plain"),
    ],
)
def test_what_is_no_metadata_passes_as_it_is(server: HttpBackend, answer: tuple[int, str]) -> None:
    status, media_type = answer
    said = document(server.url)
    where = "/.well-known/oauth-protected-resource/mcp"
    server.on("GET", where, reply(status, said, f"Content-Type: {media_type}"))
    with proxied(server.url) as front:
        assert get(front).body() == said


def test_without_a_public_url_metadata_passes_as_it_is(server: HttpBackend) -> None:
    where, said = "/.well-known/oauth-protected-resource/mcp", document(server.url)
    server.on("GET", where, reply(200, said, "Content-Type: application/json"))
    with proxied(server.url, public_url=None) as front:
        assert get(front).body() == said


def test_metadata_that_is_too_long_passes_as_it_is(server: HttpBackend) -> None:
    where, said = "/.well-known/oauth-protected-resource/mcp", document(server.url, x="a" * 300_000)
    server.on("GET", where, reply(200, said, "Content-Type: application/json"))
    with proxied(server.url) as front:
        assert get(front).body() == said
