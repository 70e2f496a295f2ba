"""What holds for a server alone holds in a group: who may use it, what it gets of its callers, its
limits. For clients of both eras.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.auth.keys import ApiKeys
from tests.servers.authorization import AuthorizationServer
from tests.support.callers import KeyFile, Knowing
from tests.support.era_servers import EraServerProcess
from tests.support.front import McpClient, WsgiFront
from tests.support.groups import House, Json, entry, said
from tests.support.modern_client import ModernClient

Client = McpClient | ModernClient
PATH = "/groups/g/mcp"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Where a group is served from."""
    made = House(tmp_path)
    yield made
    made.close()


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    """Who has which key."""
    return KeyFile(tmp_path / "keys")


@pytest.fixture(params=["sessions", "2026-07-28"])
def client(request: pytest.FixtureRequest, house: House) -> Callable[..., Client]:
    """Makes a client of the group, of either era, perhaps with a key."""

    def make(key: str = "") -> Client:
        front = Knowing(WsgiFront(house.app), key) if key else WsgiFront(house.app)
        if request.param == "sessions":
            return McpClient(front, PATH).open()
        return ModernClient(front, path=PATH)

    return make


def result(client: Client, method: str, **params: Any) -> Json:
    """The result of a request."""
    message = client.call(method, params).message()
    assert "result" in message, message
    found: Json = message["result"]
    return found


def prefixes(client: Client) -> list[str]:
    """Of which servers tools are listed."""
    listed = result(client, "tools/list")["tools"]
    return list(dict.fromkeys(each["name"].partition("__")[0] for each in listed))


def who(client: Client, prefix: str, **headers: str) -> Json:
    """What a server says of itself."""
    params = {"name": f"{prefix}__who", "arguments": {}}
    message = client.call("tools/call", params, **headers).message()
    assert "result" in message, message
    found: Json = said(message["result"])
    return found


# --- who may use it ------------------------------------------------------------------------------


def test_a_key_sees_nothing_of_a_server_that_it_is_not_for(
    house: House, keys: KeyFile, client: Callable[..., Client]
) -> None:
    resource = ["--resource", "note://1"]
    house.write({"a": entry("A", *resource), "b": entry("B", *resource)})
    both, one = keys.add("both"), keys.add("one", servers=frozenset({"b"}))
    whole = keys.add("whole", servers=frozenset({"@g"}))
    other = keys.add("other", servers=frozenset({"x"}))
    house.made(api_keys=keys.text)
    assert prefixes(client(both)) == prefixes(client(whole)) == ["a", "b"]
    mine = client(one)
    assert prefixes(mine) == ["b"]
    assert [each["uri"] for each in result(mine, "resources/list")["resources"]] == ["note://1"]
    (content,) = result(mine, "resources/read", uri="note://1")["contents"]
    assert content["text"] == "B has note://1"
    assert who(mine, "b")["name"] == "B"
    for method, params in (
        ("tools/call", {"name": "a__who", "arguments": {}}),
        ("prompts/get", {"name": "a__greet"}),
    ):
        assert mine.call(method, params).error()["code"] == -32602
    refused = McpClient(Knowing(WsgiFront(house.app), other), PATH).initialize()
    assert refused.status == 403


def test_the_instructions_name_no_server_that_a_key_is_not_for(house: House, keys: KeyFile) -> None:
    house.write({"a": entry("A"), "gone": {"command": "/nonexistent/server"}})
    key = keys.add("one", servers=frozenset({"a"}))
    house.made(api_keys=keys.text)
    front = Knowing(WsgiFront(house.app), key)
    told = McpClient(front, PATH).initialize().message()["result"]["instructions"]
    assert told == "# a\n\nThis is A."
    found = result(ModernClient(front, path=PATH), "server/discover")
    assert found["instructions"] == told


def test_a_session_is_no_longer_known_once_its_key_is_for_others(
    house: House, keys: KeyFile
) -> None:
    house.write({"a": entry("A"), "b": entry("B")})
    key = keys.add("me")
    house.made(api_keys=keys.text)
    session = McpClient(Knowing(WsgiFront(house.app), key), PATH).open()
    assert prefixes(session) == ["a", "b"]
    line = keys.path.read_text()
    keys.write(line.rstrip() + " server=b\n")
    house.app.edge.authenticator.look()
    assert session.call("tools/list").status == 404
    assert prefixes(McpClient(session.front, PATH).open()) == ["b"]


def test_a_server_that_comes_later_is_for_those_that_may_use_it(
    house: House, keys: KeyFile, client: Callable[..., Client]
) -> None:
    house.write({"a": entry("A")})
    key = keys.add("one", servers=frozenset({"a"}))
    house.made(api_keys=keys.text)
    made = client(key)
    assert prefixes(made) == ["a"]
    house.write({"a": entry("A"), "b": entry("B")})
    house.app.reload()
    error = made.call("tools/call", {"name": "b__who", "arguments": {}}).error()
    assert error["code"] == -32602
    assert prefixes(made) == ["a"]


def test_a_stream_ends_when_its_key_is_for_fewer_servers(house: House, keys: KeyFile) -> None:
    key = keys.add("me", servers=frozenset({"a", "b"}))
    known = ApiKeys(keys.text)
    caller = known.caller(key, "@g", ("a", "b"))
    assert caller is not None
    keys.write(keys.path.read_text().replace("a,b", "a"))
    known.look()
    assert known.caller(key, "@g", ("a", "b")) is not None
    assert not caller.is_known()


def test_strangers_begin_sessions_although_another_server_knows_them(house: House) -> None:
    mine = {**entry("A"), "env_from": {"TOKEN": "header:X-Token?"}}
    house.write({"mine": mine, "old": entry("B")})
    house.made(public_url="https://example.org")
    answer = ModernClient(WsgiFront(house.app), path=PATH).call("tools/list", X_Token="t")
    assert (answer.status, answer.error()["code"]) == (400, -32600)


def test_a_token_is_for_the_servers_whose_scopes_it_has(
    house: House, issuer: AuthorizationServer, tmp_path: Path
) -> None:
    servers = {
        "a": {**entry("A"), "jwt_scopes": ["read"]},
        "b": {**entry("B"), "jwt_scopes": ["read", "write"]},
    }
    house.write(servers)
    public = "https://proxy.example"
    house.made(jwt_issuer=issuer.issuer, public_url=public)

    def client(scope: str) -> ModernClient:
        token = issuer.token(aud=f"{public}/groups/g", scope=scope)
        return ModernClient(Knowing(WsgiFront(house.app), token), path=PATH)

    assert prefixes(client("read write")) == ["a", "b"]
    assert prefixes(client("read")) == ["a"]
    assert client("read").tool("b__who").error()["code"] == -32602
    refused = client("other").call("tools/list")
    assert refused.status == 403
    assert 'error="insufficient_scope"' in refused.headers["WWW-Authenticate"]


# --- what it gets of its callers -----------------------------------------------------------------


def test_a_server_gets_the_variables_of_its_caller(
    house: House, client: Callable[..., Client]
) -> None:
    mine = {**entry("A"), "env_from": {"TOKEN": "header:X-Token"}}
    house.write({"mine": mine, "b": entry("B")})
    house.made()
    without = client()
    assert prefixes(without) == ["b"]
    missing = result(without, "tools/list")["_meta"]["mcp-wsgi-proxy/missing"]
    assert "X-Token" in missing["mine"]
    error = without.call("tools/call", {"name": "mine__who", "arguments": {}}).error()
    assert "X-Token" in error["message"]
    for token in ("one", "two"):
        front = WsgiFront(house.app, {"HTTP_X_TOKEN": token})
        with_it = without.at(front)
        if isinstance(with_it, McpClient):
            with_it = McpClient(front, PATH).open()
        assert set(prefixes(with_it)) == {"mine", "b"}
        assert who(with_it, "mine")["token"] == token
        assert who(with_it, "b")["token"] is None


def test_an_http_server_gets_the_headers_that_it_gets_alone(
    house: House, client: Callable[..., Client]
) -> None:
    with EraServerProcess("legacy") as server:
        mine = {"url": server.url, "headers": {"X-Own": "ours"}}
        house.write({"mine": mine, "b": entry("B")})
        house.made()
        front = WsgiFront(house.app, {"HTTP_X_GIVEN": "theirs"})
        made = client()
        made = McpClient(front, PATH).open() if isinstance(made, McpClient) else made.at(front)
        assert made.call("tools/call", {"name": "mine__pid", "arguments": {}}).message()["result"]
        seen = server.requests("tools/call")[-1]
        assert (seen["x-own"], seen["x-given"]) == ("ours", "theirs")


def test_credentials_for_the_proxy_reach_no_server(
    house: House, keys: KeyFile, client: Callable[..., Client]
) -> None:
    with EraServerProcess("legacy") as server:
        house.write({"mine": {"url": server.url}, "b": entry("B")})
        key = keys.add("me")
        house.made(api_keys=keys.text)
        made = client(key)
        assert made.call("tools/call", {"name": "mine__pid", "arguments": {}}).message()["result"]
        assert "authorization" not in server.requests("tools/call")[-1]


def test_no_server_gets_what_another_one_gets_of_a_caller(
    house: House, keys: KeyFile, client: Callable[..., Client]
) -> None:
    """Nor without the headers of its own entry, whatever it is asked."""
    with EraServerProcess("legacy") as mine, EraServerProcess("legacy") as other:
        own = {"url": mine.url, "headers": {"X-Own": "ours"}}
        passed_on = {"url": other.url, "headers": {"Authorization": "*"}}
        house.write({"mine": own, "other": passed_on})
        key = keys.add("me")
        house.made(api_keys=keys.text)
        made = client(key)
        assert prefixes(made) == ["mine", "other"]
        assert made.call("tools/call", {"name": "mine__pid", "arguments": {}}).message()["result"]
        seen = mine.requests()
        assert {"tools/list", "tools/call"} <= {each["rpc"] for each in seen}
        assert [each for each in seen if "authorization" in each] == []
        assert [each for each in seen if each["rpc"] and each.get("x-own") != "ours"] == []
        assert other.requests("tools/list")[-1]["authorization"] == f"Bearer {key}"


def test_nobody_gets_lists_that_were_made_for_another(
    house: House, client: Callable[..., Client]
) -> None:
    with EraServerProcess("legacy") as server:
        house.write({"mine": {"url": server.url}})
        house.made()
        for name in ("alice", "bob"):
            front = Knowing(WsgiFront(house.app), name)
            made = client()
            made = McpClient(front, PATH).open() if isinstance(made, McpClient) else made.at(front)
            assert prefixes(made) == ["mine"]
            told = {each.get("authorization") for each in server.requests("tools/list")}
            assert f"Bearer {name}" in told


def test_a_challenge_of_a_server_is_no_answer_of_the_group(
    house: House, client: Callable[..., Client]
) -> None:
    with EraServerProcess("legacy", "--deny", "401") as server:
        house.write({"web": {"url": server.url}, "b": entry("B")})
        house.made()
        made = client()
        answer = made.call("tools/call", {"name": "web__pid", "arguments": {}})
        error = answer.error()
        assert (answer.status, error["code"]) == (200, -32000)
        assert error["message"].startswith("web: ")
        assert "WWW-Authenticate" not in answer.headers
        assert prefixes(made) == ["b"]


# --- its limits ----------------------------------------------------------------------------------


def test_a_call_has_the_time_of_its_server(house: House, client: Callable[..., Client]) -> None:
    house.write({"a": {**entry("A"), "timeout": 1}, "b": {**entry("B"), "timeout": 600}})
    house.made(request_timeout=20)
    made = client()
    prefixes(made)
    error = made.call("tools/call", {"name": "a__slow", "arguments": {}}).error()
    assert error["message"] == "a: The server did not answer within 1 second"
    assert who(made, "b")["name"] == "B"


def test_a_call_counts_for_its_server_alone(
    house: House, client: Callable[..., Client], tmp_path: Path
) -> None:
    own = entry("A", "--tool", str(tmp_path))  # what other tests have called is another one
    house.write({"a": {**own, "rate_limit": "1/minute"}, "b": entry("B")})
    house.made()
    made = client()
    assert prefixes(made) == ["a", "b"]
    assert who(made, "a")["name"] == "A"
    error = made.call("tools/call", {"name": "a__who", "arguments": {}}).error()
    assert error["message"].startswith("Too many requests")
    for _ in range(3):
        assert who(made, "b")["name"] == "B"
    assert prefixes(made) == ["a", "b"]


def test_a_home_is_the_same_in_a_group_and_alone(house: House) -> None:
    """Beside a server that gets headers of clients, too, which say who calls there."""
    with EraServerProcess("modern") as server:
        house.write({"a": entry("A"), "web": {"url": server.url}})
        house.made()
        front = WsgiFront(house.app, {"HTTP_COOKIE": "me=1"})
        there, here = ModernClient(front, path="/servers/a/mcp"), ModernClient(front, path=PATH)
        alone = said(result(there, "tools/call", name="who", arguments={}))
        assert who(here, "a")["pid"] == alone["pid"]
