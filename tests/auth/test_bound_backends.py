"""What is one caller's is nobody else's in front of HTTP servers, and what those get of callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from mcp_proxy import Principal, ProxyOptions, TransparentProxy
from tests.auth.deployments import EVERYWHERE, Deployment, all_told, deployed
from tests.auth.test_bound_sessions import WAYS
from tests.servers.http_backend import HttpBackend, reply
from tests.servers.old_server import OldServer
from tests.support.callers import ended
from tests.support.front import Answer, Front, HttpFront, McpClient, WsgiFront
from tests.support.modern_client import ModernClient
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

FOREIGN = "nobodys-0-123456"


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend(name="b") as backend:
        yield backend


@pytest.fixture
def old() -> Iterator[OldServer]:
    with OldServer("old") as server:
        yield server


@pytest.fixture(scope="module")
def target() -> Iterator[HttpBackend]:
    with HttpBackend(name="t") as backend:
        yield backend


@pytest.fixture(scope="module")
def four(
    target: HttpBackend,
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
) -> Iterator[Deployment]:
    """Four workers in front of a server."""
    path = tmp_path_factory.mktemp("keys")
    with deployed(path, (), 4, redis_server.url, target_url=target.url) as deployment:
        yield deployment


def by_name(environ: dict[str, Any]) -> Principal | None:
    name = environ.get("HTTP_X_USER")
    return None if name is None else Principal(f"user:{name}")


class User:
    """A way in of somebody whom `by_name` knows."""

    def __init__(self, front: Front, name: str) -> None:
        self.front = front
        self.name = name

    def request(self, method: str, path: str, headers: Any, body: bytes | None) -> Answer:
        return self.front.request(method, path, {**headers, "X-User": self.name}, body)


@pytest.fixture
def local(backend: HttpBackend) -> Iterator[LocalFront]:
    """A proxy in this process."""
    with TransparentProxy(backend.url, authenticate=by_name) as app:
        front = LocalFront(app)
        yield front
        front.close()


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_somebody_elses_session_is_as_unknown(
    four: Deployment, target: HttpBackend, way: Callable[[McpClient], Answer]
) -> None:
    alice = McpClient(four.front("alice")).open()
    mallory, stranger = McpClient(four.front("mallory")), McpClient(four.front("mallory"))
    mallory.session, stranger.session = alice.session, FOREIGN
    before = len(target.seen)
    found = all_told(way(mallory) for _ in range(EVERYWHERE))
    assert found == all_told(way(stranger) for _ in range(EVERYWHERE))
    (told,) = found
    assert told.startswith("(400, ")
    assert len(target.seen) == before
    again = alice.at(four.front("alice again"))
    assert {again.call("ping").status for _ in range(EVERYWHERE)} == {200}
    assert again.delete().status == 200


def test_a_session_from_before_keys_were_turned_on_is_nobodys(
    target: HttpBackend, tmp_path: Path, redis_server: RedisServer, redis_prefix: str
) -> None:
    options = {
        "target_url": target.url,
        "redis_url": redis_server.url,
        "redis_prefix": redis_prefix,
    }
    with ProxyProcess(options=as_options(options)) as process:
        before = McpClient(HttpFront(process.base)).open()
    with deployed(
        tmp_path, (), 1, redis_server.url, redis_prefix, target_url=target.url
    ) as deployment:
        alice = before.at(deployment.front("alice"))
        stranger = McpClient(deployment.front("alice"))
        stranger.session = FOREIGN
        assert all_told(way(alice) for way in WAYS) == all_told(way(stranger) for way in WAYS)
        own = McpClient(deployment.front("alice")).open()
    with ProxyProcess(options=as_options(options)) as process:
        assert before.at(HttpFront(process.base)).call("ping").status == 200
        assert own.at(HttpFront(process.base)).call("ping").status == 400


def test_a_streams_uri_is_its_callers_alone(old: OldServer) -> None:
    with TransparentProxy(old.url, authenticate=by_name) as app:
        front = LocalFront(app)
        alice = SseClient(User(front, "alice")).open()
        mallory = User(front, "mallory")
        message = {"jsonrpc": "2.0", "id": 7, "method": "echo", "params": {}}
        modern = ModernClient(mallory).request("tools/call", {"name": "x", "arguments": {}})
        unknown = alice.uri.replace("old-1", "old-9")
        for sent in (message, modern, b"no JSON"):
            outcomes = all_told(SseClient(mallory).post(sent, uri) for uri in (alice.uri, unknown))
            assert len(outcomes) == 1
            assert outcomes.pop().startswith("(400, ")
        own = McpClient(mallory, alice.uri.replace("messages", "mcp"))
        assert own.call("echo").status == 400
        posted = [each["method"] for each in old.only.posted]
        assert posted == ["initialize", "notifications/initialized"]
        assert alice.result("echo", {"a": 1})["params"] == {"a": 1}
        front.close()


def test_a_path_may_name_a_session_too(old: OldServer) -> None:
    old.uri = "/messages/{id}"
    with TransparentProxy(old.url, authenticate=by_name) as app:
        front = LocalFront(app)
        alice = SseClient(User(front, "alice")).open()
        message = {"jsonrpc": "2.0", "id": 7, "method": "echo", "params": {}}
        mallory = SseClient(User(front, "mallory"))
        for uri in ("/messages/old-1", alice.uri):
            assert mallory.post(message, uri).status in (400, 404)
        assert len(old.only.posted) == 2
        assert alice.result("echo", {"a": 1})["params"] == {"a": 1}
        front.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE"])
def test_a_body_of_another_method_is_no_message(old: OldServer, method: str) -> None:
    """A server may read it all the same, whoever's stream the URI names."""
    with TransparentProxy(old.url, authenticate=by_name) as app:
        front = LocalFront(app)
        alice = SseClient(User(front, "alice")).open()
        before = len(old.only.posted)
        body = b'{"jsonrpc":"2.0","id":1,"method":"echo"}'
        headers = {"Content-Type": "application/json"}
        answer = User(front, "mallory").request(method, alice.uri, headers, body)
        assert answer.status == 405
        assert len(old.only.posted) == before
        front.close()


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"tasks/get","params":{"taskId":"x"},"result":{}}',
        b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}',
        b"no JSON",
    ],
)
@pytest.mark.parametrize("media_type", ["application/json", "text/plain"])
def test_what_we_cannot_read_no_server_gets_where_callers_are_known(
    local: LocalFront, backend: HttpBackend, body: bytes, media_type: str
) -> None:
    headers = {"Content-Type": media_type, "Accept": "application/json"}
    answer = User(local, "alice").request("POST", "/mcp", headers, body)
    assert answer.status == 400
    assert backend.seen == []


def test_a_server_gets_what_was_checked(local: LocalFront, backend: HttpBackend) -> None:
    body = b'{"jsonrpc":"2.0","id":1,"method":"tasks/get","method":"initialize","params":'
    body += b'{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"x"}}}'
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    User(local, "alice").request("POST", "/mcp", headers, body)
    assert backend.last.body.count(b'"method"') == 1


# --- what a server gets of its caller ------------------------------------------------------------


def given(app: Any, **headers: str) -> int:
    """The status of an initialize with these headers, a Cookie among them."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client = Client(app, use_cookies=False)
    params = {"protocolVersion": "2025-06-18", "capabilities": {}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    return client.post("/mcp", json=message, headers=named).status_code


def test_no_credential_goes_to_a_server(local: LocalFront, backend: HttpBackend) -> None:
    mine = {"Authorization": "Bearer mine", "X_API_Key": "mine"}
    assert given(local.app, X_User="alice", Cookie="login=mine", **mine) == 200
    client = McpClient(User(local, "alice")).open()
    assert client.call("ping", **mine).status == 200
    client.listen(**mine).close()
    client.delete()
    for seen in backend.seen:
        assert not {"authorization", "x-api-key", "cookie"} & seen.names
        assert "mine" not in str(seen.headers)


def test_a_credential_goes_on_where_that_is_wanted(backend: HttpBackend) -> None:
    options = ProxyOptions(forward_headers=("Authorization: *", "X-API-Key: the-proxys-own"))
    with TransparentProxy(backend.url, authenticate=by_name, options=options) as app:
        client = McpClient(User(WsgiFront(app), "alice"))
        client.initialize(Authorization="Bearer mine", X_API_Key="mine").body()
    assert backend.last.header("Authorization") == "Bearer mine"
    assert backend.last.header("X-API-Key") == "the-proxys-own"


def test_without_authentication_credentials_pass_as_ever(backend: HttpBackend) -> None:
    with TransparentProxy(backend.url) as app:
        assert given(app, Authorization="Bearer mine", Cookie="a=1") == 200
    assert backend.last.header("Authorization") == "Bearer mine"
    assert backend.last.header("Cookie") == "a=1"


def test_a_servers_own_challenge_and_metadata_are_not_shown(
    local: LocalFront, backend: HttpBackend
) -> None:
    challenge = 'WWW-Authenticate: Bearer resource_metadata="http://x/.well-known/x"'
    backend.rpc["initialize"] = reply(401, b"", challenge)
    answer = McpClient(User(local, "alice")).initialize()
    assert answer.status == 401
    assert "WWW-Authenticate" not in answer.headers
    seen = len(backend.seen)
    for path in (
        "/.well-known/oauth-protected-resource",
        "/.well-known/oauth-authorization-server/mcp",
    ):
        assert User(local, "alice").request("GET", path, {}, None).status == 404
    assert len(backend.seen) == seen


# --- streams -------------------------------------------------------------------------------------


def test_a_stream_ends_within_two_seconds_of_the_removal_of_its_key(
    four: Deployment, target: HttpBackend
) -> None:
    bob = McpClient(four.front("bob")).open()
    alice = McpClient(four.front("alice")).open()
    kept, left = alice.listen(), bob.listen()
    assert (kept.status, left.status) == (200, 200)
    four.keys.remove("bob")
    began = time.monotonic()
    assert ended(left) - began < 2
    eventually(lambda: bob.call("ping").status == 401, 2)
    assert next(kept.pieces)
    kept.close()


def test_a_stream_ends_within_two_seconds_of_the_expiry_of_its_key(
    backend: HttpBackend, tmp_path: Path
) -> None:
    def soon(environ: dict[str, Any]) -> Principal | None:
        return Principal("user:alice", expires=expires)

    with TransparentProxy(backend.url, authenticate=soon) as app:
        expires = time.time() + 60
        front = LocalFront(app)
        client = McpClient(front).open()
        expires = time.time() + 1
        answer = client.listen()
        ended(answer)
        assert expires < time.time() < expires + 2
        front.close()
