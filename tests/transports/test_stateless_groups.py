"""Several servers at one endpoint, for clients of revision 2026-07-28: each as it is alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.era_servers import EraServerProcess
from tests.support.groups import SERVERS, House, Json, entry, said
from tests.support.modern_client import SUBSCRIPTION, ModernClient, Trace, answering, asked_in
from tests.support.waiting import eventually

SAME = ["--resource", "note://same", "--template", "note://{id}"]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Where a group is served from."""
    made = House(tmp_path)
    yield made
    made.close()


def served(house: House, servers: Json, **settings: object) -> ModernClient:
    """A client of a group of these servers."""
    house.write(servers)
    house.made(**settings)
    return house.modern()


def of_era(era: str, *options: str) -> Json:
    """A server of one era."""
    return {"command": sys.executable, "args": ["-I", "-S", str(SERVERS / f"{era}.py"), *options]}


def result(client: ModernClient, method: str, **params: object) -> Json:
    """The result of a request."""
    message = client.call(method, dict(params)).message()
    assert "result" in message, message
    found: Json = message["result"]
    return found


def names(client: ModernClient) -> list[str]:
    """The names of all tools."""
    return [tool["name"] for tool in result(client, "tools/list")["tools"]]


def test_servers_of_both_eras_are_discovered_listed_and_called(house: House) -> None:
    client = served(house, {"old": of_era("legacy"), "new": of_era("modern"), "a": entry("A")})
    found = result(client, "server/discover")
    assert found["supportedVersions"] == ["2026-07-28"]
    assert (found["resultType"], found["ttlMs"], found["cacheScope"]) == ("complete", 0, "private")
    assert "# a\n\nThis is A." in found["instructions"]
    assert found["capabilities"]["tools"] == {"listChanged": True}
    assert "tasks" not in found["capabilities"]
    listed = names(client)
    for name in ("old__pid", "new__pid", "a__who"):
        assert name in listed
    pids = {client.told("old__pid")["pid"], client.told("new__pid")["pid"]}
    assert len(pids) == 2
    assert said(result(client, "tools/call", name="a__who", arguments={}))["name"] == "A"
    assert client.told("new__pid")["pid"] in pids


def test_what_is_nobodys_is_refused_as_a_server_would(house: House) -> None:
    client = served(
        house,
        {"a": entry("A", "--resource", "a://1"), "b": entry("B", "--resource", "note://1")},
    )
    for name in ("c__who", "who", "__who", ""):
        answer = client.tool(name)
        assert (answer.status, answer.error()["code"]) == (200, -32602), name
    error = client.call("resources/read", {"uri": "mail://x"}).error()
    assert (error["code"], error["data"]) == (-32602, {"uri": "mail://x"})
    assert client.call("prompts/get", {"name": "c__greet"}).error()["code"] == -32602
    for method in ("tasks/get", "nonsense", "ping", "initialize"):
        params = {"taskId": "1"} if method == "tasks/get" else {}
        answer = client.call(method, params, **({"Mcp_Name": "1"} if params else {}))
        assert (answer.status, answer.error()["code"]) == (404, -32601), method
    answer = client.post(client.request("tools/call", {"name": "a__who"}), Mcp_Name="b__who")
    assert (answer.status, answer.error()["code"]) == (400, -32020)
    assert client.call("tools/list", {"cursor": "2"}).error()["code"] == -32602


def test_the_same_uri_of_two_servers_is_read_from_each(house: House) -> None:
    client = served(house, {"one": entry("A", *SAME), "two": entry("B", *SAME)})
    listed = [each["uri"] for each in result(client, "resources/list")["resources"]]
    assert listed == ["note://same", "two+note://same"]
    texts = []
    for uri in listed:
        (content,) = result(client, "resources/read", uri=uri)["contents"]
        assert content["uri"] == uri
        texts.append(content["text"])
    assert texts == ["A has note://same", "B has note://same"]
    templates = result(client, "resources/templates/list")["resourceTemplates"]
    assert [each["uriTemplate"] for each in templates] == ["note://{id}", "two+note://{id}"]
    link = result(client, "tools/call", name="two__link", arguments={})["content"][0]
    assert link["uri"] == "two+note://same"


def test_a_resource_is_found_by_who_has_listed_nothing_before(house: House) -> None:
    client = served(house, {"one": entry("A", *SAME), "two": entry("B", *SAME)})
    (content,) = result(client, "resources/read", uri="two+note://same")["contents"]
    assert content["text"] == "B has note://same"


def test_completions_lead_to_their_server(house: House) -> None:
    client = served(house, {"one": entry("A"), "two": entry("B")})
    argument = {"name": "x", "value": ""}
    found = result(
        client,
        "completion/complete",
        ref={"type": "ref/prompt", "name": "two__greet"},
        argument=argument,
    )
    assert found["completion"] == {"values": ["B"]}
    found = result(
        client,
        "completion/complete",
        ref={"type": "ref/prompt", "name": "three__greet"},
        argument=argument,
    )
    assert found["completion"] == {"values": []}
    assert found["resultType"] == "complete"


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_question_says_whose_it_is_and_the_retry_finds_its_server(house: House, era: str) -> None:
    client = served(house, {"a": of_era(era), "b": of_era(era)}).declaring(elicitation={})
    asked = asked_in(client.tool("b__ask"))
    (question,) = asked["inputRequests"].values()
    assert question["params"]["message"].startswith("b: ")
    answer = client.tool("b__ask", retry=answering(asked))
    assert answer.message()["result"]["resultType"] == "complete"
    again = client.tool("a__ask", retry=answering(asked)).error()
    assert again["code"] == -32602


def test_progress_and_log_messages_of_a_call_come_with_it(house: House) -> None:
    client = served(house, {"a": of_era("modern"), "b": of_era("legacy")})
    for prefix in ("a", "b"):
        answer = client.call(
            "tools/call",
            {"name": f"{prefix}__count", "arguments": {"to": 2}},
            token="mine",
        )
        messages = answer.messages()
        told = [each for each in messages if each.get("method") == "notifications/progress"]
        assert told
        assert {each["params"]["progressToken"] for each in told} == {"mine"}
        answer = client.call(
            "tools/call", {"name": f"{prefix}__log", "arguments": {}}, log_level="debug"
        )
        logs = [each for each in answer.messages() if each.get("method") == "notifications/message"]
        assert logs
        assert all(each["params"]["logger"].startswith(prefix) for each in logs)


def test_a_broken_server_is_named_and_the_others_serve(house: House) -> None:
    client = served(house, {"a": entry("A"), "gone": {"command": "/nonexistent/server"}})
    found = result(client, "tools/list")
    assert found["tools"][0]["name"] == "a__who"
    assert list(found["_meta"]["mcp-wsgi-proxy/missing"]) == ["gone"]
    error = client.tool("gone__x").error()
    assert error["code"] == -32000
    assert error["message"].startswith("gone: ")


def test_a_list_of_nobody_is_an_error(house: House) -> None:
    client = served(house, {"gone": {"command": "/nonexistent/server"}})
    error = client.call("tools/list").error()
    assert error["code"] == -32000
    assert "(gone: " in error["message"]


def test_a_slow_server_is_in_the_first_list_and_discover_does_not_wait_for_it(
    house: House,
) -> None:
    client = served(house, {"a": entry("A"), "slow": entry("S", "--delay", "6")})
    told = result(client, "server/discover")["instructions"]
    assert "# slow\n\nThis server is missing" in told
    assert {"a__who", "slow__who"} <= set(names(client))


def test_nobody_waits_twice_for_a_server_that_never_answers(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_proxy.group_mounts.GATHER_TIMEOUT", 12.0)
    client = served(house, {"a": entry("A"), "mute": entry("M", "--mute")})
    assert "a__who" in names(client)
    began = time.monotonic()
    for _ in range(3):
        assert "a__who" in names(client)
    assert time.monotonic() - began < 12.0


def test_clients_that_nobody_knows_begin_sessions_with_legacy_servers(house: House) -> None:
    house.write({"old": entry("A"), "new": of_era("modern")})
    house.made(public_url="https://example.org")
    client = house.modern()
    answer = client.call("server/discover")
    assert (answer.status, answer.error()["code"]) == (400, -32600)
    assert client.tool("new__pid").status == 400
    known = client.known_as("Bearer me")
    assert "old__who" in names(known)


def test_a_server_that_wants_something_of_its_caller_is_missing_without_it(house: House) -> None:
    mine = {**entry("A"), "env_from": {"TOKEN": "header:X-Token"}}
    client = served(house, {"mine": mine, "b": entry("B")})
    found = result(client, "tools/list")
    assert list(found["_meta"]["mcp-wsgi-proxy/missing"]) == ["mine"]
    answer = client.call("tools/list", X_Token="t")
    assert "mine__who" in [each["name"] for each in answer.message()["result"]["tools"]]
    named = {"name": "mine__who", "arguments": {}}
    assert client.call("tools/call", named).error()["message"].startswith("This server needs")
    assert said(client.call("tools/call", named, X_Token="t").message()["result"])["name"] == "A"


# --- subscriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_one_subscription_tells_of_all_servers(house: House, era: str) -> None:
    client = served(house, {"a": of_era(era), "b": of_era(era)})
    result(client, "resources/list")
    uris = ["demo://watched", "b+demo://watched", "mail://nobody"]
    answer = client.listen("l", toolsListChanged=True, resourceSubscriptions=uris)
    messages = answer.stream()
    first = next(messages)
    honoured = {"toolsListChanged": True, "resourceSubscriptions": uris[:2]}
    assert first["params"] == {"notifications": honoured, "_meta": {SUBSCRIPTION: "l"}}
    for prefix, uri in zip("ab", uris[:2], strict=True):

        def updated(prefix: str = prefix) -> str:
            """The URI of the next resource that is said to have changed."""
            client.done(f"{prefix}__notify", kinds=["updated"])
            found: str = next(messages)["params"]["uri"]
            return found

        assert updated() == uri
    client.done("b__notify", kinds=["prompts", "tools"])
    changed = next(messages)
    assert changed["method"] == "notifications/tools/list_changed"
    assert changed["params"]["_meta"] == {SUBSCRIPTION: "l"}
    answer.close()


def test_a_subscription_to_nothing_ends(house: House) -> None:
    client = served(house, {"a": of_era("modern"), "b": entry("B")})
    first, last = client.listen("none").messages()
    assert first["params"]["notifications"] == {}
    assert (last["id"], last["result"]["resultType"]) == ("none", "complete")
    answer = client.call("subscriptions/listen", {"notifications": "all"}, "f")
    assert (answer.status, answer.error()["code"]) == (200, -32602)


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_subscription_outlives_its_servers(house: House, era: str) -> None:
    client = served(house, {"a": of_era(era), "b": of_era("modern")})
    answer = client.listen("l", toolsListChanged=True)
    messages = answer.stream()
    next(messages)
    before = client.told("a__pid")["pid"]
    client.tool("a__crash").body()
    assert next(messages)["method"] == "notifications/tools/list_changed"
    assert eventually(lambda: client.told("a__pid")["pid"]) != before
    answer.close()


def test_a_subscription_goes_on_at_a_server_whose_entry_has_changed(house: House) -> None:
    with EraServerProcess("modern") as server:
        web = {"url": server.url}
        client = served(house, {"a": entry("A"), "web": web})
        answer = client.listen("l", toolsListChanged=True)
        messages = answer.stream()
        next(messages)
        house.write({"a": entry("A"), "web": {**web, "headers": {"X-Own": "other"}}})
        house.app.reload()
        assert next(messages)["method"] == "notifications/tools/list_changed"
        eventually(lambda: server.requests("subscriptions/listen")[-1].get("x-own") == "other")
        client.done("web__notify", kinds=["tools"])
        assert next(messages)["method"] == "notifications/tools/list_changed"
        answer.close()


def test_a_server_that_refuses_a_subscription_is_asked_once(house: House) -> None:
    refusing = ["-I", "-S", str(SERVERS / "modern.py"), "--honour", "refuse"]
    server = {"command": sys.executable, "args": refusing}
    client = served(house, {"a": of_era("modern"), "b": server})
    answer = client.listen("l", toolsListChanged=True)
    next(answer.stream())
    time.sleep(3)
    told = client.told("b__seen")["messages"]
    assert len([each for each in told if each.get("method") == "subscriptions/listen"]) == 1
    answer.close()


def test_a_reload_is_told_of(house: House) -> None:
    client = served(house, {"a": entry("A"), "b": entry("B")})
    answer = client.listen("l", toolsListChanged=True)
    messages = answer.stream()
    next(messages)
    house.write({"a": entry("A"), "c": entry("C")})
    house.app.reload()
    assert next(messages)["method"] == "notifications/tools/list_changed"
    assert "c__who" in names(client)
    assert "b__who" not in names(client)
    answer.close()


def test_the_subscriptions_at_the_servers_end_with_that_of_the_client(
    house: House, tmp_path: Path
) -> None:
    trace = Trace(tmp_path / "trace")
    client = served(house, {"a": of_era("modern", "--trace", str(trace.path))})
    answer = client.listen("l", toolsListChanged=True)
    next(answer.stream())
    trace.wait("listening")
    answer.close()
    trace.wait("cancelled")
    assert client.told("a__pid")


def test_there_are_as_many_subscriptions_as_places(house: House) -> None:
    client = served(house, {"a": of_era("modern")}, max_streams=1)
    first = client.listen("l", toolsListChanged=True)
    next(first.stream())
    refused = client.listen("m", toolsListChanged=True)
    assert refused.error()["code"] == -32000
    assert "Retry-After" in refused.headers
    first.close()
    again = eventually(
        lambda: (found := client.listen("n", toolsListChanged=True)).is_stream and found
    )
    again.close()
