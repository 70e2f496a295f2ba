"""`rate_limit`: which requests count, whose they are, and how one is refused, on every wire."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import ProxyConfig, ProxyOptions, SSEProxy, StreamableProxy, create_app, rate_buckets
from mcp_proxy.config import from_values
from mcp_proxy.edge.forwarded import client_address
from mcp_proxy.errors import ConfigError
from mcp_proxy.servers import HttpServer, StdioServer, UnservedServer
from mcp_proxy.servers_file import read_servers
from tests.servers.http_backend import HttpBackend
from tests.servers.old_server import OldServer
from tests.support.callers import KeyFile, Knowing
from tests.support.era_servers import EraServerProcess
from tests.support.front import SCRIPTED, Answer, Json, McpClient, WsgiFront
from tests.support.modern_client import ModernClient, server_of
from tests.support.proxies import configured, replicas
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront, transparent
from tests.support.waiting import eventually

#: Nothing comes back while a test lasts.
FOUR = "1/minute:4"

PING: Json = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


@pytest.fixture(autouse=True)
def _fresh_buckets() -> None:
    rate_buckets.share()


@contextlib.contextmanager
def local(command: Any = SCRIPTED, **settings: Any) -> Iterator[LocalFront]:
    """An application in this process in front of a stdio server."""
    with create_app(configured(command, **settings)) as app:
        front = LocalFront(app)
        try:
            yield front
        finally:
            front.close()


def require_refused(answer: Answer, key: Any = None) -> None:
    """Fails unless a request was refused as clients stand it."""
    assert (answer.status, answer.failure) == (200, "rate-limited")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    message = answer.message()
    assert message["error"]["code"] == -32000
    assert message["error"]["message"].startswith("Too many requests: 1/minute are allowed; try")
    assert key is None or message["id"] == key


# --- what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_request_beyond_the_limit_is_refused_and_the_session_goes_on(accept: str) -> None:
    with local(rate_limit="1/second:3") as front:
        client = McpClient(front).open()
        answers = [client.call("ping", Accept=accept) for _ in range(10)]
        served = [answer for answer in answers if answer.failure is None]
        refused = [answer for answer in answers if answer.failure == "rate-limited"]
        assert len(served) + len(refused) == 10
        for answer in refused:
            assert (answer.status, answer.headers["Retry-After"]) == (200, "1")
            assert answer.is_stream is (accept == "text/event-stream")
            assert answer.error()["message"].endswith("try again in 1 second")
        seen = [each for each in _until_served(client) if each.get("method") == "ping"]
        assert len(seen) == len(served) < 10


def _until_served(client: McpClient) -> list[Json]:
    """What has reached the server."""
    while True:
        answer = client.call("seen")
        if answer.failure is None:
            messages: list[Json] = answer.message()["result"]["messages"]
            return messages


def test_notifications_and_responses_and_the_end_of_a_session_are_free() -> None:
    with local(rate_limit="1/minute:1") as front:
        client = McpClient(front).open()
        for _ in range(5):
            assert client.notify("notifications/roots/list_changed").status == 202
            assert client.post({"jsonrpc": "2.0", "id": 5, "result": {}}).status == 202
        require_refused(client.call("ping", key="x"), "x")
        listening = client.listen()
        assert listening.status == 200
        listening.close()
        assert client.delete().status in (200, 204)


def test_a_refused_request_starts_nothing() -> None:
    with create_app(configured(rate_limit="1/minute:1")) as app:
        front = LocalFront(app)
        assert McpClient(front).initialize().status == 200
        for _ in range(3):
            require_refused(McpClient(front).initialize(), 0)
        assert app.session_count() == 1
        unknown = McpClient(front)
        unknown.session = "no-such-session"
        require_refused(unknown.call("ping"))  # nothing was looked up
        front.close()


def test_each_request_of_a_batch_counts() -> None:
    with local(rate_limit=FOUR) as front:
        client = McpClient(front).open("2025-03-26")
        note: Json = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
        batch = [{**PING, "id": 1}, note, {**PING, "id": 2}]
        assert [each["id"] for each in client.post(batch).messages()] == [1, 2]
        refused = client.post(batch)
        assert (refused.status, refused.failure) == (200, "rate-limited")
        assert [each["error"]["code"] for each in refused.messages()] == [-32000, -32000]
        assert client.call("ping").failure is None  # the batch took nothing
        require_refused(client.call("ping"))
        assert client.post([note, note]).status == 202


def test_a_batch_that_never_fits_says_so() -> None:
    with local(rate_limit=FOUR) as front:
        client = McpClient(front).open("2025-03-26")
        refused = client.post([{**PING, "id": number} for number in range(5)])
        assert (refused.status, refused.failure) == (200, "rate-limited")
        assert "Retry-After" not in refused.headers
        told = refused.messages()[0]["error"]["message"]
        assert told == "A batch of 5 requests is too large: 4 may come at once"


def test_failure_status_http_has_429() -> None:
    with local(rate_limit="1/minute:1", failure_status="http") as front:
        client = McpClient(front).open()
        refused = client.call("ping")
        assert (refused.status, refused.failure) == (429, "rate-limited")
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.error()["code"] == -32000


def test_modern_requests_count_and_discover_gets_429() -> None:
    """A client takes who answers its server/discover with 200 for a legacy server, for good."""
    with local(server_of("modern"), rate_limit=FOUR) as front:
        client = ModernClient(front)
        answers = [client.tool("echo", text="x") for _ in range(5)]
        assert [answer.failure for answer in answers] == [None] * 4 + ["rate-limited"]
        require_refused(answers[-1])
        discover = client.call("server/discover")
        assert (discover.status, discover.failure) == (429, "rate-limited")
        assert int(discover.headers["Retry-After"]) >= 1


def test_off_is_no_limit() -> None:
    with local(rate_limit="off") as front:
        client = McpClient(front).open()
        assert all(client.call("ping").failure is None for _ in range(20))


# --- HTTP+SSE ------------------------------------------------------------------------------------


def test_on_the_older_wire_the_refusal_leaves_on_the_stream() -> None:
    """Nobody reads the answer to a POST there, and a status that is no success ends the client."""
    with local(rate_limit="1/minute:2") as front:
        client = SseClient(front).open()
        assert client.result("ping") == {}
        key = client.call("ping")
        error = client.answer(key)["error"]
        assert error["code"] == -32000
        assert error["message"].startswith("Too many requests: 1/minute are allowed")
        assert client.notify("notifications/roots/list_changed").status == 202
        client.close()


def test_on_the_older_wire_another_replica_counts_once_and_says_429() -> None:
    with replicas(2, kind=SSEProxy, rate_limit="1/minute:3") as several:
        client = SseClient(several[0].front, several[1].front).open()
        assert client.result("ping") == {}
        assert client.result("ping") == {}
        refused = client.post(PING)
        assert (refused.status, refused.failure) == (429, "rate-limited")
        assert int(refused.headers["Retry-After"]) >= 1
        client.close()


def test_both_wires_of_a_server_have_one_limit() -> None:
    with local(rate_limit="1/minute:3") as front:
        older = SseClient(front).open()
        client = McpClient(front).open()
        assert older.result("ping") == {}
        require_refused(client.call("ping"))
        older.close()


# --- HTTP servers --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["wsgi", "gunicorn"])
def test_in_front_of_an_http_server_what_is_refused_does_not_reach_it(
    way: str, redis_url: str
) -> None:
    with (
        HttpBackend() as backend,
        transparent(way, f"{backend.url}/mcp", redis_url, rate_limit=FOUR) as proxy,
    ):
        client = proxy.client().open()
        answers = [client.call("ping") for _ in range(4)]
        assert [answer.failure for answer in answers] == [None, None, None, "rate-limited"]
        require_refused(answers[-1], 4)
        assert len(backend.calls("ping")) == 3
        assert client.notify("notifications/roots/list_changed").status == 202
        odd = client.post(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}', Content_Type="text/x")
        assert (odd.status, odd.failure) == (429, "rate-limited")  # a server may read it
        refused = client.call("server/discover")
        assert (refused.status, refused.failure) == (429, "rate-limited")
        assert client.delete().status < 300


def test_in_front_of_a_server_of_the_older_wire_a_refusal_is_429(redis_url: str) -> None:
    with (
        OldServer("a") as server,
        transparent("wsgi", server.url + "/sse", redis_url, rate_limit="1/minute:1") as proxy,
    ):
        client = SseClient(proxy.front)
        assert client.connect().status == 200
        client.call("ping")
        refused = client.post(PING)
        assert (refused.status, refused.failure) == (429, "rate-limited")
        client.close()


def test_what_goes_over_a_bridge_is_counted_once(redis_url: str) -> None:
    with (
        EraServerProcess("modern") as server,
        transparent("wsgi", server.url, redis_url, rate_limit="1/minute:3") as proxy,
    ):
        client = proxy.client().open()
        assert client.result("tools/list")["tools"]
        assert client.result("tools/list")["tools"]
        require_refused(client.call("tools/list"))


# --- whose requests they are ---------------------------------------------------------------------


def test_a_principal_has_one_limit_by_all_its_keys(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys")
    alice, other_key, bob = keys.add("alice"), keys.add("alice"), keys.add("bob")
    with local(rate_limit="1/minute:2", api_keys=keys.text) as front:
        client = McpClient(Knowing(front, alice)).open()
        assert client.at(Knowing(front, other_key)).call("ping").failure is None
        require_refused(client.call("ping"))
        require_refused(client.at(Knowing(front, other_key)).call("ping"))
        assert McpClient(Knowing(front, bob)).open().call("ping").failure is None


def at(app: Any, address: str, **headers: str) -> McpClient:
    """A client at an address."""
    return McpClient(WsgiFront(app, {"REMOTE_ADDR": address, **headers}))


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("", "", True),
    ],
)
def test_strangers_are_told_apart_by_their_networks(first: str, second: str, is_same: bool) -> None:
    with create_app(configured(rate_limit="1/minute:1")) as app:
        assert at(app, first).initialize().failure is None
        assert at(app, second).initialize().failure == ("rate-limited" if is_same else None)


def test_behind_a_trusted_proxy_its_clients_are_told_apart() -> None:
    settings = {"rate_limit": "1/minute:1", "trusted_proxies": ("10.0.0.0/8",)}
    with create_app(configured(**settings)) as app:
        for chain in ("192.0.2.1", "192.0.2.2", "192.0.2.1, 192.0.2.3"):
            client = at(app, "10.0.0.1", HTTP_X_FORWARDED_FOR=chain)
            assert client.initialize().failure is None
        forged = at(app, "10.0.0.1", HTTP_X_FORWARDED_FOR="192.0.2.9, 192.0.2.1")
        assert forged.initialize().failure == "rate-limited"
        stranger = at(app, "192.0.2.1", HTTP_X_FORWARDED_FOR="192.0.2.77")
        assert stranger.initialize().failure == "rate-limited"


@pytest.mark.parametrize(
    ("trusted", "chain", "found"),
    [
        ((), "192.0.2.1", "10.0.0.1"),
        (("10.0.0.9",), "192.0.2.1", "10.0.0.1"),
        (("10.0.0.0/8",), "", "10.0.0.1"),
        (("10.0.0.0/8",), "192.0.2.1", "192.0.2.1"),
        (("10.0.0.0/8",), "192.0.2.7, 192.0.2.1, 10.0.0.5", "192.0.2.1"),
        (("10.0.0.0/8",), "192.0.2.1:4711", "192.0.2.1"),
        (("10.0.0.0/8",), "[2001:db8::1]:4711", "2001:db8::1"),
        (("10.0.0.0/8",), "2001:db8::1", "2001:db8::1"),
        (("10.0.0.0/8",), "192.0.2.1, unknown", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        (("*",), "192.0.2.7, 192.0.2.1", "192.0.2.1"),
    ],
)
def test_the_client_is_the_last_that_no_trusted_proxy_is(
    trusted: tuple[str, ...], chain: str, found: str
) -> None:
    environ = {"REMOTE_ADDR": "10.0.0.1", "HTTP_X_FORWARDED_FOR": chain}
    assert client_address(environ, trusted) == found


# --- each server of its own ----------------------------------------------------------------------


def test_an_entry_of_the_file_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    program, *arguments = SCRIPTED
    entry: Json = {"command": program, "args": arguments}
    file = tmp_path / "servers.json"
    entries: Json = {
        "own": {**entry, "rate_limit": "1/minute:1"},
        "free": {**entry, "rate_limit": "off"},
        "same": entry,
        "other": entry,
    }
    file.write_text(json.dumps({"mcpServers": entries}))
    with create_app(ProxyConfig(config=str(file), rate_limit="1/minute:2")) as app:
        front = LocalFront(app)
        allowed = {}
        for name in entries:
            client = McpClient(front, f"/servers/{name}/mcp").open()
            failures = [client.call("ping").failure for _ in range(3)]
            allowed[name] = failures.count(None)
        assert allowed == {"own": 0, "free": 3, "same": 1, "other": 1}
        front.close()


@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_a_limit_that_is_changed_holds_from_the_next_request_on(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    program, *arguments = SCRIPTED
    with HttpBackend() as backend:
        stdio: Json = {"command": program, "args": arguments}
        entry: Json = stdio if kind == "stdio" else {"url": f"{backend.url}/mcp"}

        def write(limit: str) -> None:
            entries = {"one": {**entry, "rate_limit": limit}}
            file.write_text(json.dumps({"mcpServers": entries}))

        write("1/minute:1")
        with create_app(ProxyConfig(config=str(file))) as app:
            front = LocalFront(app)
            client = McpClient(front, "/servers/one/mcp").open()
            require_refused(client.call("ping"))
            write("off")
            app.reload()
            assert [client.call("ping").failure for _ in range(3)] == [None] * 3
            write("2/second:1")
            app.reload()  # nobody waits for what the first limit would have let through
            eventually(lambda: client.call("ping").failure is None, 5)
            eventually(lambda: client.call("ping").failure == "rate-limited", 5)
            front.close()


def test_a_limit_in_the_file_may_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    entries = {
        "stdio": {"command": "x", "rate_limit": "${LIMIT}"},
        "http": {"url": "http://a/mcp", "rate_limit": "5/second"},
        "wrong": {"command": "x", "rate_limit": "5/hour"},
        "number": {"command": "x", "rate_limit": 5},
    }
    file.write_text(json.dumps({"mcpServers": entries}, indent=1))
    stdio, http, wrong, number = read_servers(file, {"LIMIT": "7/minute:2"})
    assert isinstance(stdio, StdioServer)
    assert isinstance(http, HttpServer)
    assert (stdio.rate_limit, http.rate_limit) == ("7/minute:2", "5/second")
    assert isinstance(wrong, UnservedServer)
    assert isinstance(number, UnservedServer)
    said = "rate_limit: expected N/second or N/minute, also with :BURST, or off, got '5/hour'"
    assert wrong.reason.startswith(said)
    assert number.reason.startswith("rate_limit: expected a text, got a number")


def test_wrong_limits_are_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="rate_limit: only limits such as 20/second, 600/minute"):
        from_values({"rate_limit": "5/hour"})
    with pytest.raises(ConfigError, match="a: rate_limit: expected N/second or N/minute"):
        StdioServer("a", ("x",), rate_limit="often")


def test_transports_on_their_own_have_limits_of_their_own() -> None:
    options = ProxyOptions(rate_limit="1/minute:1")
    other = (*SCRIPTED, "--other")
    first, second = (StreamableProxy(command, options=options) for command in (SCRIPTED, other))
    with first, second:
        assert McpClient(LocalFront(first), "/").initialize().failure is None
        assert McpClient(LocalFront(first), "/").initialize().failure == "rate-limited"
        assert McpClient(LocalFront(second), "/").initialize().failure != "rate-limited"


def test_a_server_that_is_given_to_a_transport_brings_its_limit() -> None:
    server = StdioServer("own", SCRIPTED, rate_limit="1/minute:1")
    with StreamableProxy(server, options=ProxyOptions(rate_limit="off")) as app:
        assert McpClient(LocalFront(app), "/").initialize().failure is None
        assert McpClient(LocalFront(app), "/").initialize().failure == "rate-limited"
