"""Authentication in front of everything: what strangers learn, cost and leave."""

from __future__ import annotations

import gc
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from mcp_proxy import (
    Application,
    ConfigError,
    NotPermitted,
    Principal,
    ProxyOptions,
    SSEProxy,
    StreamableProxy,
    TransparentProxy,
    create_app,
)
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.edge import logs
from tests.support.callers import KeyFile, Knowing, told
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.proxies import configured
from tests.support.waiting import eventually

PING = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"})


class Untouched(io.RawIOBase):
    """A body that nobody may read."""

    def readable(self) -> bool:
        raise AssertionError("the body was read")

    def read(self, size: int = -1) -> bytes:
        raise AssertionError("the body was read")


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys")


@pytest.fixture
def app(keys: KeyFile) -> Iterator[Application]:
    with create_app(configured(SCRIPTED, api_keys=keys.text)) as app:
        yield app


@pytest.fixture
def client(app: Application) -> Client:
    return Client(app)


def ping(client: Client, **headers: str) -> TestResponse:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/mcp", data=PING, content_type="application/json", headers=given)


# --- who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_a_key_is_taken_from_either_header(app: Application, keys: KeyFile, header: str) -> None:
    key = keys.add("alice")
    app.edge.authenticator.look()  # type: ignore[union-attr]
    session = McpClient(Knowing(WsgiFront(app), key, header)).open()
    assert session.result("echo", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic d2hvOndobw=="},
        {"X_API_Key": ""},
        {"X_API_Key": "\u00e4"},
        {"Cookie": "session=1"},
    ],
)
def test_everybody_else_gets_a_plain_challenge(client: Client, shown: dict[str, str]) -> None:
    answer = ping(client, **shown)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.json == {
        "jsonrpc": "2.0",
        "error": {"code": -32600, "message": "A valid API key or token is required"},
    }


@pytest.mark.parametrize("path", ["/mcp", "/sse", "/messages?session_id=1", "/nothing", "/"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "PUT"])
def test_nothing_is_served_to_strangers_wherever_they_ask(
    client: Client, method: str, path: str
) -> None:
    assert client.open(path, method=method).status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health"])
def test_probes_stay_open(client: Client, path: str) -> None:
    assert client.get(path).status_code == 200


def test_a_preflight_comes_before_authentication(client: Client) -> None:
    headers = {"Origin": "http://localhost:5173", "Access-Control-Request-Method": "POST"}
    answer = client.options("/mcp", headers=headers)
    assert answer.status_code == 204
    assert "X-API-Key" in answer.headers["Access-Control-Allow-Headers"]


def test_a_page_may_read_the_challenge(client: Client) -> None:
    answer = ping(client, Origin="http://localhost:5173")
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    assert "WWW-Authenticate" in answer.headers["Access-Control-Expose-Headers"]


def test_origin_and_host_are_looked_at_first(client: Client, keys: KeyFile) -> None:
    key = keys.add("alice")
    for header in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert ping(client, Authorization=f"Bearer {key}", **header).status_code == 403
        assert ping(client, **header).status_code == 403


def test_the_body_of_a_stranger_is_not_read(app: Application) -> None:
    environ = {"wsgi.input": Untouched(), "CONTENT_LENGTH": "1000000"}
    answer = Client(app).post("/mcp", environ_overrides=environ)
    assert answer.status_code == 401
    answer = Client(app.overloaded).post("/mcp", environ_overrides=environ)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "path", ["/.well-known/oauth-protected-resource", "/.well-known/openid-configuration/mcp"]
)
def test_no_metadata_of_a_server_is_shown(client: Client, keys: KeyFile, path: str) -> None:
    assert client.get(path).status_code == 404
    key = keys.add("alice")
    assert client.get(path, headers={"X-API-Key": key}).status_code == 404


def test_a_key_is_for_the_servers_that_it_names(keys: KeyFile, tmp_path: Path) -> None:
    key = keys.add("alice", servers=frozenset({"b"}))
    command, *args = SCRIPTED
    file = tmp_path / "servers.json"
    server = {"command": command, "args": args}
    file.write_text(json.dumps({"mcpServers": {"a": server, "b": server}}))
    with create_app(configured((), config=str(file), api_keys=keys.text)) as app:
        front = Knowing(WsgiFront(app), key)
        assert McpClient(front, "/servers/b/mcp").open().result("echo", {}) == {}
        refused = McpClient(front, "/servers/a/mcp").initialize()
        assert (refused.status, refused.error()["message"]) == (
            403,
            "The API key is not for this server",
        )
        assert McpClient(WsgiFront(app), "/servers/a/mcp").initialize().status == 401


# --- an embedder's own authentication ------------------------------------------------------------


def by_name(environ: dict[str, Any]) -> Principal | None:
    """Whoever says who they are."""
    name = environ.get("HTTP_X_USER")
    return None if name is None else Principal(f"user:{name}")


@pytest.mark.parametrize("kind", [StreamableProxy, SSEProxy])
def test_a_hook_decides_for_a_transport(kind: type[StreamableProxy] | type[SSEProxy]) -> None:
    with kind(SCRIPTED, authenticate=by_name) as app:
        path = "/sse" if kind is SSEProxy else "/mcp"
        headers = {"Accept": "text/event-stream"}
        assert Client(app).get(path, headers=headers).status_code == 401
        known = Client(app).get(path, headers={**headers, "X-User": "a"})
        assert known.status_code in (200, 405)
        known.close()


def test_a_hook_decides_for_an_application_and_a_transparent_proxy() -> None:
    with create_app(configured(SCRIPTED), authenticate=by_name) as app:
        assert ping(Client(app)).status_code == 401
        assert ping(Client(app), X_User="a").status_code == 400
    with TransparentProxy("http://127.0.0.1:9/mcp", authenticate=by_name) as proxy:
        assert ping(Client(proxy)).status_code == 401


def test_a_hook_says_which_servers_a_caller_may_use(tmp_path: Path) -> None:
    def authenticate(environ: dict[str, Any]) -> Principal | None:
        return Principal("user:a", servers=frozenset({"b"}))

    command, *args = SCRIPTED
    file = tmp_path / "servers.json"
    server = {"command": command, "args": args}
    file.write_text(json.dumps({"mcpServers": {"a": server, "b": server}}))
    with create_app(configured((), config=str(file)), authenticate=authenticate) as app:
        assert McpClient(WsgiFront(app), "/servers/b/mcp").open().result("echo", {}) == {}
        assert McpClient(WsgiFront(app), "/servers/a/mcp").initialize().status == 403


def test_a_hook_that_fails_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    def fails(environ: dict[str, Any]) -> Principal | None:
        raise LookupError("no database")

    def confused(environ: dict[str, Any]) -> Principal | None:
        return "alice"  # type: ignore[return-value]

    for hook in (fails, confused):
        with StreamableProxy(SCRIPTED, authenticate=hook) as app:
            assert ping(Client(app)).status_code == 500
    assert "not a Principal" in caplog.text


def test_a_hook_may_refuse_by_an_error_of_ours() -> None:
    def refuses(environ: dict[str, Any]) -> Principal | None:
        raise NotPermitted("Not on Sundays")

    with StreamableProxy(SCRIPTED, authenticate=refuses) as app:
        assert ping(Client(app)).status_code == 403


def test_keys_have_their_turn_after_a_hook(keys: KeyFile) -> None:
    key = keys.add("alice")
    options = ProxyOptions(api_keys=keys.text)
    with StreamableProxy(SCRIPTED, options=options, authenticate=by_name) as app:
        assert ping(Client(app)).status_code == 401
        assert ping(Client(app), X_User="a").status_code == 400
        assert ping(Client(app), X_API_Key=key).status_code == 400
        user = McpClient(WsgiFront(app, {"HTTP_X_USER": "key:bob"})).open()
        assert user.at(Knowing(WsgiFront(app), key)).call("ping").status == 404


def test_a_principal_that_has_expired_is_nobody() -> None:
    def late(environ: dict[str, Any]) -> Principal | None:
        return Principal("user:a", expires=1.0)

    with StreamableProxy(SCRIPTED, authenticate=late) as app:
        assert ping(Client(app)).status_code == 401


def test_a_file_of_keys_with_a_mistake_is_in_readyz(client: Client, keys: KeyFile) -> None:
    reason = "their file cannot be read; those from before count"
    assert ping(client).status_code == 401  # which has the file looked at
    assert reason not in client.get("/readyz").text
    keys.write("alice hunter2")
    eventually(lambda: reason in client.get("/readyz").text)
    assert client.get("/readyz").json["status"] == "degraded"  # type: ignore[index]
    keys.write("")
    eventually(lambda: reason not in client.get("/readyz").text)


def test_what_contradicts_itself_is_refused(keys: KeyFile) -> None:
    with pytest.raises(ConfigError, match="is a function"):
        StreamableProxy(SCRIPTED, authenticate="alice")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nobody can say"):
        TransparentProxy(
            "http://127.0.0.1:9/mcp",
            options=ProxyOptions(unknown_session_status="ask"),
            authenticate=by_name,
        )
    with pytest.raises(ConfigError, match="No such file"):
        create_app(configured(SCRIPTED, api_keys=f"{keys.text}-missing"))


def test_the_example_of_the_page_lets_in_whom_it_knows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    made: dict[str, Any] = {}
    exec(example, made)
    with made["mcp"] as mcp:
        assert ping(Client(mcp)).status_code == 401
        assert ping(Client(mcp), REMOTE_USER="alice").status_code == 401
        known = Client(mcp).post(
            "/mcp",
            data=PING,
            content_type="application/json",
            environ_overrides={"REMOTE_USER": "alice"},
        )
        assert known.status_code == 400


# --- what strangers cost and leave ---------------------------------------------------------------


def test_ten_thousand_guesses_leave_nothing(
    app: Application,
    keys: KeyFile,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs.access, "disabled", True)  # its lines are many, and are kept here
    client = Client(app)
    for _ in range(100):
        ping(client, X_API_Key="x")
    gc.collect()
    before = len(gc.get_objects())
    for number in range(10_000):
        name = ("X_API_Key", "Authorization")[number % 2]
        answer = ping(client, **{name: f"Bearer guess-{number}", "Mcp_Session_Id": f"{number}"})
        assert answer.status_code == 401
    gc.collect()
    assert len(gc.get_objects()) - before < 500
    assert app.memory is not None
    assert app.memory.session_count == app.session_count() == 0
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1


def test_no_line_of_the_log_has_a_key(
    app: Application, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.add("alice")
    with caplog.at_level(logging.DEBUG):
        app.edge.authenticator.look()  # type: ignore[union-attr]
        for header in ("Authorization", "X-API-Key"):
            McpClient(Knowing(WsgiFront(app), key, header)).open().result("echo", {})
            told(McpClient(Knowing(WsgiFront(app), f"{key}x", header)).call("ping"))
    said = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert "key:alice" in said
    assert key not in said


def test_the_access_line_says_who_calls(
    app: Application, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.add("alice")
    app.edge.authenticator.look()  # type: ignore[union-attr]
    with caplog.at_level(logging.INFO, logs.access.name):
        McpClient(Knowing(WsgiFront(app), key)).initialize().body()
        ping(Client(app))
    lines = [record for record in caplog.records if record.name == logs.access.name]
    known, unknown = (vars(record)["fields"] for record in lines)
    assert (known["principal"], known["status"]) == ("key:alice", 200)
    assert (unknown["principal"], unknown["status"]) == ("", 401)
    assert 'principal="key:alice"' in caplog.records[0].getMessage()


def test_credentials_that_stop_here_are_those_that_somebody_may_go_by() -> None:
    assert Authenticator(by_name).credentials == {"Authorization", "X-Api-Key", "Cookie"}
