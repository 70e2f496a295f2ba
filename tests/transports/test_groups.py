"""Several servers at one endpoint: each behaves as it does alone, and is told from the others."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.backends.catalogue import Catalogue
from mcp_proxy.errors import ConfigError
from tests.support.front import WsgiFront
from tests.support.groups import House, Json, call, entry, said, tools
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

HOSTILE = str(Path(__file__).parents[1] / "servers" / "hostile_member.py")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Where a group is served from."""
    made = House(tmp_path)
    yield made
    made.close()


# --- names ---------------------------------------------------------------------------------------


def test_each_tool_has_the_prefix_of_its_server_and_is_called_by_it(house: House) -> None:
    client = house.serve(
        {"one": entry("A"), "two.x": entry("B", "--tool", "a.b", "--tool", "t" * 60)}
    )
    names = tools(client)
    assert names[:5] == ["one__who", "one__exit", "one__ask", "one__grow", "one__link"]
    assert "two-x__who" in names
    assert len(names) == len(set(names)) == 12
    assert call(client, "one__who")["name"] == "A"
    for name in names[-2:]:
        told = call(client, name)
        assert told["name"] == "B"
        assert told["tool"] in ("a.b", "t" * 60)


def test_a_prefix_of_its_own_and_tools_that_are_hidden(house: House) -> None:
    members = ["one", {"server": "two", "prefix": "b", "tools": {"deny": ["e*", "ask"]}}]
    servers = {"one": {**entry("A"), "tools": ["who"]}, "two": entry("B")}
    client = house.serve(servers, members)
    assert tools(client) == ["one__who", "b__who", "b__grow", "b__link"]
    for hidden in ("one__ask", "b__exit", "two__who", "who", "b__", "__who", ""):
        answer = client.call("tools/call", {"name": hidden, "arguments": {}})
        assert answer.error()["code"] in (-32602, -32601), hidden
    assert call(client, "b__who")["name"] == "B"


def test_prompts_and_completions_lead_to_their_server(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    prompts = client.result("prompts/list")["prompts"]
    assert [each["name"] for each in prompts] == ["one__greet", "two__greet"]
    found = client.result("prompts/get", {"name": "two__greet"})
    assert found["description"] == "B greet"
    argument = {"name": "x", "value": ""}
    reference = {"type": "ref/prompt", "name": "two__greet"}
    asked = {"ref": reference, "argument": argument}
    assert client.result("completion/complete", asked) == {"completion": {"values": ["B"]}}
    asked["ref"] = {"type": "ref/prompt", "name": "nobody__greet"}
    assert client.result("completion/complete", asked) == {"completion": {"values": []}}


def test_a_call_is_handed_on_by_its_name_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = house.serve({name: entry(name) for name in ("one", "two", "three")})
    call(client, "two__who")
    asked: list[str] = []

    def listed(catalogue: Catalogue, key: str) -> None:
        asked.append(key)

    monkeypatch.setattr(Catalogue, "listed", listed)
    assert call(client, "two__who")["name"] == "two"
    assert asked == []


# --- resources -----------------------------------------------------------------------------------


def test_the_same_uri_of_two_servers_is_read_from_each(house: House) -> None:
    uri = ["--resource", "note://same", "--template", "note://{id}"]
    client = house.serve({"one": entry("A", *uri), "two": entry("B", *uri)})
    listed = [each["uri"] for each in client.result("resources/list")["resources"]]
    assert listed == ["note://same", "two+note://same"]
    texts = []
    for shown in listed:
        (content,) = client.result("resources/read", {"uri": shown})["contents"]
        assert content["uri"] == shown
        texts.append(content["text"])
    assert texts == ["A has note://same", "B has note://same"]
    templates = client.result("resources/templates/list")["resourceTemplates"]
    assert [each["uriTemplate"] for each in templates] == ["note://{id}", "two+note://{id}"]
    link = client.result("tools/call", {"name": "two__link", "arguments": {}})["content"][0]
    assert link["uri"] == "two+note://same"
    reference = {"type": "ref/resource", "uri": "two+note://{id}"}
    asked = {"ref": reference, "argument": {"name": "id", "value": ""}}
    assert client.result("completion/complete", asked) == {"completion": {"values": ["B"]}}


def test_what_only_one_server_has_stays_as_it_is(house: House) -> None:
    client = house.serve({"one": entry("A", "--resource", "note://1"), "two": entry("B")})
    (listed,) = client.result("resources/list")["resources"]
    assert listed["uri"] == "note://1"
    (content,) = client.result("resources/read", {"uri": "note://2"})["contents"]
    assert content["text"] == "A has note://2"


def test_a_uri_of_nobody_is_not_found(house: House) -> None:
    one, two = (entry(name, "--resource", f"{name}://1") for name in ("a", "b"))
    client = house.serve({"one": one, "two": two})
    client.result("resources/list")
    error = client.call("resources/read", {"uri": "mail://x"}).error()
    assert error["code"] == -32002
    assert error["data"] == {"uri": "mail://x"}


# --- starting ------------------------------------------------------------------------------------


def test_a_server_starts_when_it_is_used_once_its_lists_are_known(house: House) -> None:
    first = house.serve({"one": entry("A"), "two": entry("B")})
    assert len(tools(first)) == 10
    assert house.children() == 2
    second = house.client().open()
    assert len(tools(second)) == 10
    assert house.children() == 2
    assert call(second, "two__who")["calls"] == 1
    assert house.children() == 3
    assert call(first, "two__who")["pid"] != call(second, "two__who")["pid"]


def test_a_slow_server_is_in_the_first_list_and_holds_initialize_up_for_three_seconds(
    house: House,
) -> None:
    began = time.monotonic()
    client = house.serve({"one": entry("A"), "slow": entry("S", "--delay", "5")})
    assert time.monotonic() - began < 5.5
    assert {"one__who", "slow__who"} <= set(tools(client))


def test_a_broken_server_is_named_and_the_others_serve(house: House) -> None:
    servers = {"one": entry("A"), "gone": {"command": "/nonexistent/server"}}
    client = house.serve(servers)
    result = client.result("tools/list")
    assert result["tools"][0]["name"] == "one__who"
    assert "No such file" in result["_meta"]["mcp-wsgi-proxy/missing"]["gone"]
    error = client.call("tools/call", {"name": "gone__who", "arguments": {}}).error()
    assert error["message"].startswith("gone: ")


def test_a_broken_server_is_told_of_when_it_comes(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it any more; it is asked again when a list is wanted."""
    program = tmp_path / "late"
    servers = {"one": entry("A"), "late": {"command": str(program)}}
    client = house.serve(servers)
    assert {name.partition("__")[0] for name in tools(client)} == {"one"}
    arguments = " ".join(entry("L")["args"])
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {arguments}\n")
    program.chmod(0o755)
    monkeypatch.setattr("mcp_proxy.backends.catalogue.ASK_AGAIN", 0.0)  # before, it makes a pause
    stream = client.listen().stream()
    tools(client)
    assert next(stream)["method"] == "notifications/tools/list_changed"
    assert {name.partition("__")[0] for name in tools(client)} == {"one", "late"}


def test_a_list_of_nobody_is_an_error(house: House) -> None:
    client = house.serve({"gone": {"command": "/nonexistent/server"}})
    error = client.call("tools/list").error()
    assert error["code"] == -32000
    assert "gone: " in error["message"]


def test_instructions_say_whose_they_are(house: House) -> None:
    house.serve({"one": entry("A"), "two": entry("B")})
    result = house.client().initialize().message()["result"]
    assert result["instructions"] == "# one\n\nThis is A.\n\n# two\n\nThis is B."
    assert result["capabilities"]["tools"] == {"listChanged": True}
    assert "resources" not in result["capabilities"]


# --- what servers ask and tell -------------------------------------------------------------------


def test_a_session_that_ends_while_its_servers_are_asked_takes_nothing_from_others(
    house: House,
) -> None:
    slow = ["-I", "-S", HOSTILE, "--name", "slow", "--page-delay", "1"]
    client = house.serve({"one": {"command": sys.executable, "args": slow}})
    assert client.delete().status in (200, 204)
    assert "one__slow" in tools(house.client().open())


def test_lists_that_change_all_the_time_are_looked_at_once_a_second(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"command": sys.executable, "args": ["-I", "-S", HOSTILE, "--name", "one"]}
    client = house.serve({"false": hostile})
    tools(client)
    looks: list[float] = []
    look = Catalogue.look

    def counted(*arguments: Any) -> None:
        looks.append(time.monotonic())
        look(*arguments)

    monkeypatch.setattr(Catalogue, "look", counted)
    arguments = {"a_second": 200, "seconds": 2.5}
    client.result("tools/call", {"name": "false__flood", "arguments": arguments})
    eventually(lambda: len(looks) > 2, 20, "it was not looked at again")
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(looks))
    before = tools(client)[:-1]

    def has_changed_again() -> bool:
        """Whether the list has the name that it got by a later change than the first one."""
        *others, last = tools(client)
        number = last.removeprefix("false__changed")
        return others == before and number.isdecimal() and int(number) > 1

    eventually(has_changed_again, 20, "nothing has changed")


def test_progress_is_told_of_calls_of_its_server_alone(house: House) -> None:
    hostile = {"command": sys.executable, "args": ["-I", "-S", HOSTILE, "--name", "one"]}
    client = house.serve({"one": entry("A"), "false": hostile})
    params = {"name": "false__link", "arguments": {}, "_meta": {"progressToken": 19}}
    told = client.call("tools/call", params).messages()
    progress = [each["params"] for each in told if each.get("method") == "notifications/progress"]
    assert [each["progressToken"] for each in progress] == [19]


def test_questions_with_one_id_are_told_apart_and_say_whose_they_are(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    asking = [
        client.call("tools/call", {"name": f"{name}__ask", "arguments": {}}).stream()
        for name in ("one", "two")
    ]
    questions = [next(stream) for stream in asking]
    assert [each["params"]["message"] for each in questions] == ["one: Is it A?", "two: Is it B?"]
    assert questions[0]["id"] != questions[1]["id"]
    for number, question in reversed(list(enumerate(questions))):
        result = {"action": "accept", "content": {"number": number}}
        answer = {"jsonrpc": "2.0", "id": question["id"], "result": result}
        assert client.post(answer).status == 202
    for number, stream in enumerate(asking):
        assert said(next(stream)["result"])["content"] == {"number": number}


def test_the_client_is_asked_for_its_roots_once_for_all_servers(house: House) -> None:
    client = house.serve({name: entry(name) for name in ("a", "b", "c")})
    tools(client)

    def asking(name: str) -> Iterator[Json]:
        """A call that asks for the roots of the client."""
        return client.call("tools/call", {"name": f"{name}__roots", "arguments": {}}).stream()

    first = asking("a")
    question = next(first)
    assert question["method"] == "roots/list"
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(call, client, "b__roots")
        roots = {"roots": [{"uri": "file:///here"}]}
        answer = {"jsonrpc": "2.0", "id": question["id"], "result": roots}
        assert client.post(answer).status == 202
        assert said(next(first)["result"]) == roots
        assert others.result(20) == roots
    assert call(client, "c__roots") == roots
    client.notify("notifications/roots/list_changed")
    later = asking("c")
    question = next(later)
    assert question["method"] == "roots/list"
    assert client.post({**answer, "id": question["id"]}).status == 202
    assert said(next(later)["result"]) == roots


def test_a_list_that_has_changed_is_told_of_and_is_the_sessions_own(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    other = house.client().open()
    before = tools(client)
    assert tools(other) == before
    stream = client.listen().stream()
    call(client, "two__grow")
    assert next(stream)["method"] == "notifications/tools/list_changed"
    assert tools(client) == [*before, "two__grown1"]
    assert tools(other) == before


def test_the_log_level_and_subscriptions_reach_servers_that_start_later(house: House) -> None:
    uri = ("--resource", "note://1")
    client = house.serve({"one": entry("A", *uri), "two": entry("B", *uri)})
    tools(client)
    second = house.client().open()
    second.result("logging/setLevel", {"level": "error"})
    second.result("resources/subscribe", {"uri": "two+note://1"})
    for name, wanted in (
        ("one", ["initialize", "notifications/initialized", "logging/setLevel"]),
        ("two", ["initialize", "notifications/initialized", "logging/setLevel"]),
    ):
        seen = [each["method"] for each in call(second, f"{name}__who")["seen"]]
        assert seen[:3] == wanted
        assert ("resources/subscribe" in seen) == (name == "two")


# --- failures, and reload ------------------------------------------------------------------------


def test_a_server_that_dies_fails_its_own_call_and_the_next_one_starts_it(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    pids = [call(client, f"{name}__who")["pid"] for name in ("one", "two")]
    error = client.call("tools/call", {"name": "two__exit", "arguments": {}}).error()
    assert error["message"].startswith("two: ")
    assert call(client, "one__who")["pid"] == pids[0]
    assert call(client, "two__who")["pid"] != pids[1]


def test_a_reload_changes_the_list_and_keeps_the_session(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    tools(client)
    pid = call(client, "one__who")["pid"]
    stream = client.listen().stream()
    house.write({"one": entry("A"), "three": entry("C")})
    house.app.reload()
    assert next(stream)["method"] == "notifications/tools/list_changed"
    assert {name.partition("__")[0] for name in tools(client)} == {"one", "three"}
    assert call(client, "one__who")["pid"] == pid
    assert call(client, "three__who")["name"] == "C"


def test_a_changed_server_is_another_process_for_the_next_call(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    before = [call(client, f"{name}__who") for name in ("one", "two")]
    house.write({"one": entry("A"), "two": entry("B", "--tool", "more")})
    house.app.reload()
    assert call(client, "one__who")["pid"] == before[0]["pid"]
    assert call(client, "two__more")["pid"] != before[1]["pid"]


def test_the_end_of_the_session_ends_its_servers(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")})
    assert call(client, "one__who")["calls"] == 1
    assert client.delete().status == 204
    eventually(lambda: house.children() == 0, 20, "children are left")


# --- everything else -----------------------------------------------------------------------------


def test_a_batch_is_split_and_joined(house: House) -> None:
    house.serve({"one": entry("A"), "two": entry("B")})
    client = house.client().open("2025-03-26")
    batch: list[Json] = [
        {
            "jsonrpc": "2.0",
            "id": name,
            "method": "tools/call",
            "params": {"name": f"{name}__who", "arguments": {}},
        }
        for name in ("one", "two", "none")
    ]
    batch.append({"jsonrpc": "2.0", "id": "ping", "method": "ping"})
    answers = {each["id"]: each for each in client.post(batch).messages()}
    assert said(answers["one"]["result"])["name"] == "A"
    assert said(answers["two"]["result"])["name"] == "B"
    assert answers["none"]["error"]["code"] == -32602
    assert answers["ping"]["result"] == {}


def test_clients_are_told_the_scopes_of_all_servers_of_a_group(house: House) -> None:
    scoped = {**entry("A"), "jwt_scopes": ["read"]}
    house.write({"one": scoped, "two": {**entry("B"), "jwt_scopes": ["write", "read"]}})
    house.made(jwt_issuer="https://issuer.example", public_url="https://proxy.example")
    (transport, *others) = house.app.mounts.current.transports["@g"].values()
    assert transport.scopes == ("read", "write")
    assert all(each.scopes == transport.scopes for each in others)


def test_what_a_group_does_not_know_is_said(house: House) -> None:
    client = house.serve({"one": entry("A")})
    assert client.call("nonsense/do").error()["code"] == -32601
    assert client.call("tools/list", {"cursor": "x"}).error()["code"] == -32602
    assert client.result("ping") == {}


def test_all_servers_together_are_served_at_the_root(house: House) -> None:
    house.serve({"one": entry("A"), "two": entry("B")}, aggregate=True)
    client = house.client("/mcp").open()
    assert len(tools(client)) == 10
    alone = house.client("/servers/two/mcp").open()
    assert tools(alone)[0] == "who"


def test_a_server_is_in_a_group_once_under_one_prefix(house: House) -> None:
    house.write({"one": entry("A")}, ["one", "one"])
    house.made()
    assert "same prefix" in house.client().initialize().error()["message"]


def test_a_mistake_in_a_group_is_that_groups(house: House) -> None:
    house.serve({"one": entry("A")}, ["one"])
    house.write({"one": entry("A")}, ["one", "nobody"])
    house.app.reload()
    reasons = str(house.app.not_ready_reason())
    assert reasons == "None"  # the last good form is served on
    assert tools(house.client().open()) == tools(house.client().open())


def test_the_older_wire_carries_a_group_too(house: House) -> None:
    house.serve({"one": entry("A"), "two": entry("B", "--delay", "1")})
    client = SseClient(WsgiFront(house.app), path="/groups/g/sse").open()
    names = [tool["name"] for tool in client.result("tools/list")["tools"]]
    assert len(names) == 10
    for name in ("one", "two"):
        params = {"name": f"{name}__who", "arguments": {}}
        assert said(client.result("tools/call", params))["calls"] == 1


# --- what nobody may do to the others ------------------------------------------------------------


def test_a_servers_challenge_is_no_answer_of_the_endpoint(house: House) -> None:
    client = house.serve({"one": entry("A", "--tool", "challenge"), "two": entry("B")})
    for path, name in (("/groups/g/mcp", "one__challenge"), ("/servers/one/mcp", "challenge")):
        answer = house.client(path).open().call("tools/call", {"name": name, "arguments": {}})
        assert answer.status == 200
        assert "Set-Cookie" not in answer.headers
        assert answer.error()["message"] == "refused"
    assert call(client, "two__who")["name"] == "B"


def test_a_call_of_a_hidden_tool_in_other_capitals_is_none(house: House) -> None:
    members = [{"server": "one", "prefix": "a", "tools": {"deny": ["grow"]}}]
    client = house.serve({"one": entry("A")}, members)
    params = {"name": "a__who", "Name": "grow", "arguments": {}}
    said_of_it = said(client.result("tools/call", params))
    assert said_of_it["tool"] == "who"
    assert tools(client) == ["a__who", "a__exit", "a__ask", "a__link"]


def test_no_question_has_an_id_that_one_of_another_group_could_have(house: House) -> None:
    client = house.serve({"one": entry("A")})
    other = house.client().open()
    ids = []
    for each in (client, other):
        stream = each.call("tools/call", {"name": "one__ask", "arguments": {}}).stream()
        ids.append(next(stream)["id"])
    assert len(set(ids)) == 2


def test_a_question_that_waited_for_a_stream_is_answered(house: House) -> None:
    client = house.serve({"one": entry("A", "--tool", "ask-later")})
    with_json = {"Accept": "application/json"}
    params = {"name": "one__ask-later", "arguments": {}}
    assert client.call("tools/call", params, **with_json).status == 200
    first = client.listen()
    question = next(first.stream())
    assert question["params"]["message"] == "one: Is it A?"
    answer = {"jsonrpc": "2.0", "id": question["id"], "result": {"action": "decline"}}
    assert client.post(answer).status == 202
    first.close()


def test_large_answers_over_the_older_wire_all_come(house: House) -> None:
    house.serve({"one": entry("A", "--tool", "large")})
    client = SseClient(WsgiFront(house.app), path="/groups/g/sse").open()
    for _ in range(3):
        params = {"name": "one__large", "arguments": {}}
        assert len(client.result("tools/call", params)["content"][0]["text"]) == 5_000_000


def test_a_group_is_idle_although_one_of_its_servers_has_gone(house: House) -> None:
    client = house.serve({"one": entry("A"), "two": entry("B")}, idle_timeout=1.0)
    assert call(client, "one__who")["calls"] == 1
    client.call("tools/call", {"name": "two__exit", "arguments": {}})
    eventually(lambda: house.children() == 0, 20, "children are left")
    assert call(client, "one__who")["calls"] == 1


def test_a_group_has_no_processes_of_its_own_to_restart(house: House) -> None:
    house.serve({"one": entry("A"), "two": entry("B")})
    with pytest.raises(ConfigError, match="is no stdio server"):
        house.app.mounts.restart("@g")


def test_a_session_goes_on_with_level_and_subscriptions_after_it_was_idle(house: House) -> None:
    uri = ("--resource", "note://1")
    client = house.serve({"one": entry("A", *uri), "two": entry("B", *uri)}, idle_timeout=1.0)
    client.result("logging/setLevel", {"level": "error"})
    client.result("resources/subscribe", {"uri": "two+note://1"})
    call(client, "one__who")
    client.result("resources/unsubscribe", {"uri": "two+note://1"})
    eventually(lambda: house.children() == 0, 20, "children are left")
    seen = [each["method"] for each in call(client, "one__who")["seen"]]
    assert seen[-1] == "logging/setLevel"
