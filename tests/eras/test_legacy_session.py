"""What a legacy client sees of a modern server: each translation, each way in which one fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.backends.switchboard import MAX_WAITING
from mcp_proxy.eras import legacy_session
from mcp_proxy.eras.legacy_session import MAX_ROUNDS, MAX_SUBSCRIPTIONS
from mcp_proxy.wire import jsonrpc
from tests.eras.scripted import (
    EVERYTHING,
    PREFIX,
    SERVER,
    Child,
    Json,
    call,
    discovered,
    got,
    initialize,
    listening,
    opened,
)

FORM = {
    "method": "elicitation/create",
    "params": {"mode": "form", "message": "?", "requestedSchema": {"type": "object"}},
}
VISIT = {
    "method": "elicitation/create",
    "params": {"mode": "url", "message": "?", "url": "https://example.com"},
}
SAMPLE = {"method": "sampling/createMessage", "params": {"messages": [], "maxTokens": 1}}
ROOTS = {"method": "roots/list"}
DONE = {"resultType": "complete", "content": []}
YES = {"action": "accept", "content": {"a": 1}}


def error_of(exchange: Exchange) -> Json:
    """The JSON-RPC error that ended an exchange."""
    error: Json = got(exchange)[-1]["error"]
    return error


# --- how a session begins ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [-32022, -32601, -32602, -32020, -32600, -32603, -32000])
def test_a_refused_initialize_is_answered_from_what_the_server_discovers(code: int) -> None:
    child = Child()
    exchange = child.send("initialize", initialize("2025-06-18"), "first")
    asked = child.next()
    assert (asked["method"], asked["params"]["protocolVersion"]) == ("initialize", "2025-06-18")
    child.refuse(asked, code)
    discover = child.next()
    assert got(exchange) == []
    assert discover["method"] == "server/discover"
    assert discover["params"]["_meta"][f"{PREFIX}protocolVersion"] == "2026-07-28"
    child.answer(discover, discovered(tools={}, tasks={}))
    assert got(exchange) == [
        {
            "jsonrpc": "2.0",
            "id": "first",
            "result": {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "server", "version": "9"},
                "instructions": "Be nice.",
            },
        }
    ]
    assert exchange.is_over


@pytest.mark.parametrize("version", ["2026-07-28", "1999-01-01", "1.0"])
def test_a_client_of_an_unknown_revision_gets_the_newest_legacy_one(version: str) -> None:
    child = Child()
    exchange = child.send("initialize", initialize(version))
    child.refuse(child.next(), -32601)
    child.answer(child.next(), discovered())
    assert got(exchange)[0]["result"]["protocolVersion"] == "2025-11-25"


def test_a_server_that_accepts_initialize_is_not_asked_for_more() -> None:
    child = Child()
    exchange = child.send("initialize", initialize())
    child.answer(child.next(), {"protocolVersion": "2025-11-25"})
    assert got(exchange)[0]["result"] == {"protocolVersion": "2025-11-25"}
    assert child.told == []
    child.send("logging/setLevel", {"level": "info"})
    assert child.next()["params"] == {"level": "info"}


REFUSAL: Json = {"code": -32602, "message": "bad", "data": {"why": "so"}}


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": -32601, "message": "what?"}},
        {"error": {"code": -32022, "message": "", "data": {"supported": ["2025-11-25"]}}},
        {"result": {}},
        {"result": {"supportedVersions": ["2025-11-25"]}},
    ],
)
def test_the_server_s_own_refusal_passes_where_it_is_not_modern(answer: Json) -> None:
    child = Child()
    exchange = child.send("initialize", initialize(), 5)
    child.refuse(child.next(), **REFUSAL)
    child.say({"id": child.next()["id"], **answer})
    assert got(exchange) == [{"jsonrpc": "2.0", "id": 5, "error": REFUSAL}]
    again = child.send("initialize", initialize(), 6)
    child.refuse(child.next(), **REFUSAL)
    child.answer(child.next(), discovered())
    assert "result" in got(again)[0]


def test_a_refusal_that_names_legacy_revisions_alone_passes_at_once() -> None:
    child = Child()
    exchange = child.send("initialize", initialize())
    data = {"supported": ["2024-11-05", "2025-03-26"], "requested": "2025-11-25"}
    child.refuse(child.next(), -32022, data=data)
    assert error_of(exchange)["data"] == data
    assert child.told == []


def test_a_refusal_that_names_both_eras_leads_to_a_question() -> None:
    child = Child()
    child.send("initialize", initialize())
    child.refuse(child.next(), -32022, data={"supported": ["2025-03-26", "2026-07-28"]})
    assert child.next()["method"] == "server/discover"


def test_a_server_that_says_no_more_has_said_no() -> None:
    child = Child()
    exchange = child.send("initialize", initialize())
    child.refuse(child.next(), **REFUSAL)
    assert exchange.deadline is not None
    assert child.board.pop_overdue(exchange, exchange.deadline) == []
    assert error_of(exchange) == REFUSAL


def test_a_server_that_exits_when_it_is_asked_has_said_no() -> None:
    child = Child()
    exchange = child.send("initialize", initialize())
    child.refuse(child.next(), **REFUSAL)
    assert child.board.clear() == ([], None)
    assert error_of(exchange) == REFUSAL


def test_a_standing_stream_and_calls_in_flight_outlive_the_discovery() -> None:
    child = Child()
    stream = child.listen()
    other = child.send("ping", key="early")
    exchange = child.send("initialize", initialize())
    ping, refused = child.next(), child.next()
    child.refuse(refused, -32601)
    child.answer(child.next(), discovered(**SERVER))
    child.answer(ping, {})
    assert "result" in got(other)[0]
    assert "result" in got(exchange)[0]
    listen = listening(child)
    child.change(listen, "notifications/tools/list_changed")
    assert [it["method"] for it in got(stream)] == ["notifications/tools/list_changed"]


# --- requests ------------------------------------------------------------------------------------


def test_a_request_says_what_its_session_has_said() -> None:
    child = opened(capabilities={**EVERYTHING, "roots": {"listChanged": True}, "tasks": {}})
    meta = {"progressToken": "p", "traceparent": "t"}
    child.send("tools/list", {"cursor": "c", "_meta": meta})
    params = child.next()["params"]
    assert params["cursor"] == "c"
    assert params["_meta"] == {
        **meta,
        f"{PREFIX}protocolVersion": "2026-07-28",
        f"{PREFIX}clientCapabilities": EVERYTHING,
        f"{PREFIX}clientInfo": {"name": "client", "version": "7"},
    }


@pytest.mark.parametrize(
    ("version", "declared"),
    [
        ("2024-11-05", {"sampling": {}, "roots": {}}),
        ("2025-03-26", {"sampling": {}, "roots": {}}),
        ("2025-06-18", {"sampling": {}, "roots": {}, "elicitation": {}}),
        ("2025-11-25", EVERYTHING),
    ],
)
def test_a_client_declares_what_its_revision_knows(version: str, declared: Json) -> None:
    child = opened(version)
    child.send("tools/list")
    assert child.next()["params"]["_meta"][f"{PREFIX}clientCapabilities"] == declared


def test_a_client_that_says_nothing_of_itself_is_served() -> None:
    child = Child()
    child.send("initialize", {"protocolVersion": "2025-06-18", "clientInfo": "me"})
    child.refuse(child.next(), -32601)
    child.answer(child.next(), discovered())
    child.send("tools/list")
    meta = child.next()["params"]["_meta"]
    assert meta == {
        f"{PREFIX}protocolVersion": "2026-07-28",
        f"{PREFIX}clientCapabilities": {},
    }


def test_what_a_modern_server_does_not_know_never_reaches_it() -> None:
    child = opened(server={})
    assert got(child.send("ping", key=0))[0]["result"] == {}
    for method in ("notifications/roots/list_changed", "notifications/progress"):
        child.notify(method)
    child.notify("notifications/initialized")  # and there is nothing to listen to
    assert error_of(child.send("server/discover"))["code"] == -32601
    assert error_of(child.send("subscriptions/listen", {"notifications": {}}))["code"] == -32601
    assert error_of(child.send("initialize", initialize()))["code"] == -32600
    assert child.told == []
    child.notify("notifications/of/an/extension")
    assert child.next()["method"] == "notifications/of/an/extension"


def test_results_and_errors_are_those_of_a_legacy_server() -> None:
    child = opened()
    exchange = child.send("tools/list")
    meta = {f"{PREFIX}serverInfo": {"name": "s"}, "mine": 1}
    result = {"resultType": "complete", "ttlMs": 5, "cacheScope": "public", "_meta": meta}
    child.answer(child.next(), {**result, "tools": []})
    assert got(exchange)[0]["result"] == {"tools": [], "_meta": {"mine": 1}}
    for code, seen in ((-32021, -32603), (-32020, -32603), (-32602, -32602), (-5, -5)):
        exchange = call(child)
        child.refuse(child.next(), code, "why", data=[1])
        assert error_of(exchange) == {"code": seen, "message": "why", "data": [1]}


def test_structured_output_is_an_object_whatever_the_server_returns() -> None:
    child = opened()
    listed = child.send("tools/list")
    tool = {"name": "tool", "outputSchema": {"type": "array"}}
    child.answer(child.next(), {"resultType": "complete", "tools": [tool]})
    properties = {"result": {"type": "array"}}
    schema = {"type": "object", "properties": properties, "required": ["result"]}
    assert got(listed)[0]["result"] == {"tools": [{"name": "tool", "outputSchema": schema}]}
    called = call(child)
    child.answer(child.next(), {"resultType": "complete", "structuredContent": [1]})
    assert got(called)[0]["result"] == {"structuredContent": {"result": [1]}}


def test_a_result_of_an_unknown_type_is_none() -> None:
    child = opened()
    exchange = call(child)
    child.answer(child.next(), {"resultType": "task", "taskId": "t"})
    assert error_of(exchange)["code"] == -32603


def test_progress_comes_under_the_client_s_token() -> None:
    child = opened()
    params = {"name": "tool", "_meta": {"progressToken": 7}}
    first = child.send("tools/call", params, 1)
    second = child.send("tools/call", params, 2)
    tokens = [child.next()["params"]["_meta"]["progressToken"] for _ in range(2)]
    assert len(set(tokens)) == 2
    told = {"method": "notifications/progress"}
    child.say({**told, "params": {"progressToken": tokens[1], "progress": 1}})
    assert got(second)[0]["params"] == {"progressToken": 7, "progress": 1}
    assert got(first) == []


# --- log messages --------------------------------------------------------------------------------


def log_line(text: str) -> Json:
    return {"method": "notifications/message", "params": {"level": "error", "data": text}}


def test_a_log_level_goes_with_every_later_request() -> None:
    child = opened()
    assert got(child.send("logging/setLevel", {"level": "warning"}))[0]["result"] == {}
    assert child.told == []
    exchange = call(child)
    assert child.next()["params"]["_meta"][f"{PREFIX}logLevel"] == "warning"
    child.say(log_line("on its stream"))
    assert [it["params"]["data"] for it in got(exchange)] == ["on its stream"]


@pytest.mark.parametrize("params", [None, {}, {"level": "loud"}, {"level": 3}])
def test_a_level_that_is_none_is_refused(params: Json | None) -> None:
    child = opened()
    assert error_of(child.send("logging/setLevel", params))["code"] == -32602
    call(child)
    assert f"{PREFIX}logLevel" not in child.next()["params"]["_meta"]


def test_a_server_without_logging_has_no_level() -> None:
    child = opened(server={"tools": {}})
    assert error_of(child.send("logging/setLevel", {"level": "info"}))["code"] == -32601


def test_log_messages_that_nobody_asked_for_are_dropped() -> None:
    child = opened()
    exchange = call(child)
    child.say(log_line("unasked"))
    assert got(exchange) == []


def test_log_messages_of_overlapping_calls_reach_their_one_client() -> None:
    child = opened()
    child.send("logging/setLevel", {"level": "debug"})
    first, second = call(child, key=1), call(child, key=2)
    child.say(log_line("of either"))
    assert got(first) + got(second) != []
    stream = child.listen()
    child.say(log_line("again"))
    assert got(stream)[0]["params"]["data"] == "again"


# --- changes -------------------------------------------------------------------------------------


def test_changes_are_listened_to_as_far_as_the_server_tells_of_them() -> None:
    child = opened(server={"tools": {"listChanged": True}, "prompts": {}})
    child.notify("notifications/initialized")
    listen = child.next()
    assert listen["method"] == "subscriptions/listen"
    assert listen["params"]["notifications"] == {"toolsListChanged": True}
    assert listen["params"]["_meta"][f"{PREFIX}clientCapabilities"] == EVERYTHING
    child.notify("notifications/initialized")
    child.listen()
    assert child.told == []


def test_a_standing_stream_is_enough_to_listen() -> None:
    child = opened()
    child.listen()
    assert child.next()["method"] == "subscriptions/listen"


def test_changes_go_to_the_standing_stream_without_a_subscription() -> None:
    child = opened()
    listen, stream, post = listening(child), child.listen(), call(child)
    child.change(listen, "notifications/tools/list_changed")
    child.change(listen, "notifications/resources/updated", uri="a:1")
    assert [(it["method"], it.get("params")) for it in got(stream)] == [
        ("notifications/tools/list_changed", {}),
        ("notifications/resources/updated", {"uri": "a:1"}),
    ]
    assert got(post) == []


def test_changes_go_to_a_call_or_wait_where_there_is_no_standing_stream() -> None:
    child = opened()
    listen = listening(child)
    for number in range(MAX_WAITING + 5):
        child.change(listen, "notifications/resources/updated", uri=f"a:{number}")
    assert len(child.board.overflow()) == 5
    post = call(child)
    child.change(listen, "notifications/tools/list_changed")
    assert len(got(post)) == 1
    waited = got(child.listen())
    assert [it["params"]["uri"] for it in waited] == [f"a:{n + 5}" for n in range(MAX_WAITING)]


def test_a_subscription_is_answered_when_the_next_stream_is_acknowledged() -> None:
    child = opened()
    first, stream = listening(child), child.listen()
    exchange = child.send("resources/subscribe", {"uri": "a:1"})
    second = child.next()
    assert second["params"]["notifications"]["resourceSubscriptions"] == ["a:1"]
    assert got(exchange) == []
    child.change(first, "notifications/tools/list_changed")
    assert child.told == []  # the first is still open
    child.acknowledge(second)
    assert got(exchange)[0]["result"] == {}
    assert child.next()["params"]["requestId"] == first["id"]
    for listen in (first, second):
        child.change(listen, "notifications/prompts/list_changed")
    assert len(got(stream)) == 2
    again = child.send("resources/subscribe", {"uri": "a:1"})
    assert got(again)[0]["result"] == {}
    assert child.told == []


def test_the_last_subscription_closes_the_stream() -> None:
    child = opened(server={"resources": {"subscribe": True}})
    child.notify("notifications/initialized")
    child.send("resources/subscribe", {"uri": "a:1"})
    first = child.next()
    child.acknowledge(first)
    ended = child.send("resources/unsubscribe", {"uri": "a:1"})
    assert got(ended)[0]["result"] == {}
    closed = child.next()
    assert closed["method"] == "notifications/cancelled"
    assert closed["params"]["requestId"] == first["id"]
    assert got(child.send("resources/unsubscribe", {"uri": "a:1"}))[0]["result"] == {}
    assert child.told == []


def test_an_unsubscription_overtakes_a_subscription() -> None:
    child = opened(server={"resources": {"subscribe": True}})
    begun = child.send("resources/subscribe", {"uri": "a:1"}, 1)
    ended = child.send("resources/unsubscribe", {"uri": "a:1"}, 2)
    assert "result" in got(begun)[0]
    assert "result" in got(ended)[0]


@pytest.mark.parametrize(
    ("server", "params", "code"),
    [
        ({"resources": {}}, {"uri": "a:1"}, -32601),
        (SERVER, {"uri": 1}, -32602),
        (SERVER, None, -32602),
    ],
)
def test_a_subscription_that_cannot_be_is_refused(
    server: Json, params: Json | None, code: int
) -> None:
    child = opened(server=server)
    assert error_of(child.send("resources/subscribe", params))["code"] == code


def test_a_subscription_that_the_server_refuses_is_none() -> None:
    child = opened()
    first = listening(child)
    exchange = child.send("resources/subscribe", {"uri": "a:1"})
    child.refuse(child.next(), -32021, "not this one")
    assert error_of(exchange) == {"code": -32603, "message": "not this one"}
    other = child.send("resources/subscribe", {"uri": "a:2"})
    second = child.next()
    assert second["params"]["notifications"]["resourceSubscriptions"] == ["a:2"]
    child.acknowledge(second, toolsListChanged=True)
    assert error_of(other)["code"] == -32603
    assert child.next()["params"]["requestId"] == first["id"]


def test_a_session_has_so_many_subscriptions() -> None:
    child = opened()
    for number in range(MAX_SUBSCRIPTIONS):
        child.send("resources/subscribe", {"uri": f"a:{number}"}, number)
    assert error_of(child.send("resources/subscribe", {"uri": "b:1"}))["code"] == -32602


@pytest.mark.parametrize("how", ["result", "cancelled"])
def test_a_stream_that_the_server_ends_is_opened_again(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(listen: Json) -> None:
        if how == "result":
            child.answer(listen, {"resultType": "complete"})
        else:
            told = {"method": "notifications/cancelled"}
            child.say({**told, "params": {"requestId": listen["id"]}})

    child = opened()
    end(listening(child))
    assert child.told == []  # it lasted for a moment only
    child.board.do_overdue()
    child.say(log_line("any"))
    again = child.next()
    assert again["method"] == "subscriptions/listen"
    child.board.do_overdue()
    child.acknowledge(again)
    assert child.told == []
    monkeypatch.setattr(legacy_session, "MIN_LISTENING", 0.0)
    end(again)
    assert child.next()["method"] == "subscriptions/listen"


def test_a_stream_on_which_nothing_is_honoured_is_not_opened_again() -> None:
    child = opened()
    child.notify("notifications/initialized")
    listen = child.next()
    child.change(listen, "notifications/subscriptions/acknowledged", notifications={})
    child.answer(listen, {"resultType": "complete"})
    child.board.do_overdue()
    child.say(log_line("any"))
    assert child.told == []


# --- questions -----------------------------------------------------------------------------------


def test_questions_become_requests_and_their_answers_a_retry() -> None:
    child = opened()
    exchange = call(child, "asker", key="c")
    first = child.next()
    child.ask(first, {"f": FORM, "s": SAMPLE, "r": ROOTS}, "sealed")
    asked = got(exchange)
    assert [it["method"] for it in asked] == [
        "elicitation/create",
        "sampling/createMessage",
        "roots/list",
    ]
    assert asked[0]["params"] == FORM["params"]
    assert len({it["id"] for it in asked}) == 3
    for question, answer in zip(reversed(asked), ({"roots": []}, {"model": "m"}, YES), strict=True):
        assert child.told == []
        assert child.respond(question["id"], answer)
    retry = child.next()
    assert retry["id"] != first["id"]
    assert retry["method"] == "tools/call"
    answers = {"f": YES, "s": {"model": "m"}, "r": {"roots": []}}
    assert retry["params"] == {
        **first["params"],
        "inputResponses": answers,
        "requestState": "sealed",
    }
    assert not child.respond(asked[0]["id"], YES)
    child.answer(retry, DONE)
    assert got(exchange) == [{"jsonrpc": "2.0", "id": "c", "result": {"content": []}}]


def test_each_round_has_the_state_of_the_one_before_and_no_other_answers() -> None:
    child = opened()
    exchange = call(child)
    for state in ("one", None, "three"):
        request = child.next()
        child.ask(request, {"f": FORM}, state)
        (question,) = got(exchange)
        child.respond(question["id"], YES)
        assert child.told[0]["params"].get("requestState") == state
        assert child.told[0]["params"]["inputResponses"] == {"f": YES}
    child.answer(child.next(), DONE)
    assert "result" in got(exchange)[0]


@pytest.mark.parametrize("method", ["prompts/get", "resources/read"])
def test_prompts_and_resources_may_ask(method: str) -> None:
    child = opened()
    exchange = child.send(method, {"name": "n", "uri": "a:1"})
    child.ask(child.next(), {"f": FORM})
    child.respond(got(exchange)[0]["id"], YES)
    assert child.next()["params"]["inputResponses"] == {"f": YES}


def test_progress_goes_on_after_a_question() -> None:
    child = opened()
    params = {"name": "tool", "_meta": {"progressToken": "p"}}
    exchange = child.send("tools/call", params)
    child.ask(child.next(), {"f": FORM})
    child.respond(got(exchange)[0]["id"], YES)
    token = child.next()["params"]["_meta"]["progressToken"]
    told = {"progressToken": token, "progress": 2}
    child.say({"method": "notifications/progress", "params": told})
    assert got(exchange)[0]["params"] == {"progressToken": "p", "progress": 2}


def test_a_form_has_no_mode_before_there_were_others() -> None:
    child = opened("2025-06-18")
    exchange = call(child)
    child.ask(child.next(), {"f": FORM})
    assert "mode" not in got(exchange)[0]["params"]


@pytest.mark.parametrize(("action", "told"), [("accept", 1), ("decline", 0)])
def test_a_page_has_an_id_and_its_end_is_told(action: str, told: int) -> None:
    child = opened()
    exchange = call(child)
    child.ask(child.next(), {"u": VISIT}, "s")
    (question,) = got(exchange)
    visit = question["params"].pop("elicitationId")
    assert question["params"] == VISIT["params"]
    child.respond(question["id"], {"action": action})
    assert got(exchange) == []
    child.answer(child.next(), DONE)
    *notices, answer = got(exchange)
    assert (
        notices
        == [
            {
                "jsonrpc": "2.0",
                "method": "notifications/elicitation/complete",
                "params": {"elicitationId": visit},
            }
        ]
        * told
    )
    assert "result" in answer


def test_a_page_that_is_asked_for_again_is_not_complete() -> None:
    child = opened()
    exchange = call(child)
    child.ask(child.next(), {"u": VISIT})
    child.respond(got(exchange)[0]["id"], {"action": "accept"})
    child.ask(child.next(), {"u": VISIT})
    assert [it["method"] for it in got(exchange)] == ["elicitation/create"]


def test_an_elicitation_that_the_client_refuses_is_cancelled() -> None:
    child = opened()
    exchange = call(child)
    child.ask(child.next(), {"f": FORM})
    child.respond(got(exchange)[0]["id"], error={"code": -32603, "message": "no"})
    assert child.next()["params"]["inputResponses"] == {"f": {"action": "cancel"}}


def test_another_question_that_the_client_refuses_fails_the_call() -> None:
    child = opened()
    exchange = call(child, key=4)
    child.ask(child.next(), {"s": SAMPLE, "f": FORM})
    first, second = got(exchange)
    child.respond(first["id"], error={"code": -1, "message": "not for you"})
    withdrawn, answer = got(exchange)
    assert withdrawn["method"] == "notifications/cancelled"
    assert withdrawn["params"]["requestId"] == second["id"]
    assert answer == {"jsonrpc": "2.0", "id": 4, "error": {"code": -1, "message": "not for you"}}
    assert not child.respond(second["id"], YES)
    assert child.told == []


@pytest.mark.parametrize("answer", [None, [], "yes"])
def test_an_answer_that_is_no_object_fails_the_call(answer: Any) -> None:
    child = opened()
    exchange = call(child)
    child.ask(child.next(), {"f": FORM})
    child.respond(got(exchange)[0]["id"], answer)
    assert "no object" in error_of(exchange)["message"]
    assert child.told == []


@pytest.mark.parametrize(
    ("version", "capabilities", "question"),
    [
        ("2025-11-25", {}, FORM),
        ("2025-11-25", {"elicitation": {"form": {}}}, VISIT),
        ("2025-11-25", {"elicitation": {"url": {}}}, FORM),
        ("2025-06-18", EVERYTHING, VISIT),
        ("2025-03-26", EVERYTHING, FORM),
        ("2025-11-25", {"sampling": {}}, ROOTS),
        ("2025-11-25", {"roots": {}}, SAMPLE),
        ("2025-11-25", EVERYTHING, {"method": "unheard/of"}),
    ],
)
def test_nobody_is_asked_what_he_has_not_declared(
    version: str, capabilities: Json, question: Json
) -> None:
    child = opened(version, capabilities)
    exchange = call(child)
    child.ask(child.next(), {"q": question})
    (answer,) = got(exchange)
    assert "has not declared" in answer["error"]["message"]
    assert answer["error"]["code"] == -32603
    assert child.told == []


def test_who_takes_json_alone_cannot_be_asked() -> None:
    child = opened()
    exchange = call(child, stream=False)
    child.ask(child.next(), {"f": FORM})
    assert "event stream" in error_of(exchange)["message"]


@pytest.mark.parametrize("has_left", [True, False])
def test_the_standing_stream_asks_where_the_call_s_own_cannot(has_left: bool) -> None:
    child = opened()
    listening(child)
    exchange, stream = call(child, stream=has_left), child.listen()
    if has_left:
        child.leave(exchange)
    child.ask(child.next(), {"f": FORM})
    (question,) = got(stream)
    child.respond(question["id"], YES)
    assert child.next()["params"]["inputResponses"] == {"f": YES}
    assert child.board.has_posts is not has_left


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"inputRequests": []},
        {"inputRequests": {"q": {"params": {}}}},
        {"inputRequests": {"q": FORM}, "requestState": 5},
    ],
)
def test_questions_that_cannot_be_understood_fail_the_call(result: Json) -> None:
    child = opened()
    exchange = call(child)
    child.answer(child.next(), {"resultType": "input_required", **result})
    assert "cannot be understood" in error_of(exchange)["message"]


def test_a_state_alone_has_the_call_sent_again_at_once() -> None:
    child = opened()
    exchange = call(child)
    first = child.next()
    child.ask(first, None, "later")
    again = child.next()
    assert again["params"] == {**first["params"], "requestState": "later"}
    child.answer(again, DONE)
    assert "result" in got(exchange)[0]


def test_the_reader_pauses_before_a_call_is_sent_again() -> None:
    child = opened()
    call(child)
    pauses = []
    for _ in range(3):
        request = child.next()
        result = {"resultType": "input_required", "requestState": "s"}
        parsed = json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result})
        response: Any = jsonrpc.parse_message(parsed.encode())
        pending = child.board.pop(response.id)
        assert pending is not None
        assert child.board.encoded(response, pending) is None
        pauses.append(child.board.pause)
        child.told += [json.loads(line) for line in child.board.take_lines()]
    assert 0 < pauses[0] < pauses[1] < pauses[2]
    assert child.board.pause == 0


@pytest.mark.parametrize("questions", [{"f": FORM}, None])
def test_a_server_that_asks_for_ever_is_stopped(questions: Json | None) -> None:
    child = opened()
    exchange = call(child)
    for _ in range(MAX_ROUNDS):
        child.ask(child.next(), questions, "s")
        if questions is not None:
            child.respond(got(exchange)[0]["id"], YES)
    child.ask(child.next(), questions, "s")
    assert str(MAX_ROUNDS) in error_of(exchange)["message"]
    assert child.told == []


def test_a_call_that_ends_withdraws_its_questions() -> None:
    child = opened()
    exchange = call(child, key="x")
    child.ask(child.next(), {"f": FORM})
    (question,) = got(exchange)
    pending = child.board.newest("x")
    assert pending is not None
    assert not pending.is_at_child
    assert child.board.pop_overdue(exchange, 0.0) == [pending]
    assert got(exchange)[0]["params"]["requestId"] == question["id"]
    assert not child.respond(question["id"], YES)
    assert not child.board.is_awaited


def test_a_lost_child_takes_its_questions_along() -> None:
    child = opened()
    exchange = call(child)
    child.ask(child.next(), {"f": FORM})
    (question,) = got(exchange)
    calls, _ = child.board.clear()
    assert [each.id for each in calls] == [1]
    assert [it["method"] for it in got(exchange)] == ["notifications/cancelled"]
    assert not child.respond(question["id"], YES)


def test_a_question_that_waits_for_a_stream_ends_with_its_call() -> None:
    child = opened()
    listening(child)
    exchange = call(child, key=3)
    child.ask(child.next(), {"f": FORM})
    child.leave(exchange)
    pending = child.board.newest(3)
    assert pending is not None
    child.board.pop(pending.wire_id)
    assert got(child.listen()) == []


def test_a_question_that_finds_no_room_fails_its_call() -> None:
    child = opened()
    listen = listening(child)
    exchange = call(child, key=3)
    child.ask(child.next(), {"f": FORM})
    child.leave(exchange)  # before it has read the question, which waits for another stream
    for number in range(MAX_WAITING):
        child.change(listen, "notifications/resources/updated", uri=f"a:{number}")
    assert child.board.overflow() == []
    assert child.board.newest(3) is None
    assert error_of(exchange)["code"] == -32603


# --- properties ----------------------------------------------------------------------------------


@given(st.data())
def test_whatever_the_order_each_call_gets_its_own_answers(data: st.DataObject) -> None:
    child = opened()
    names = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    exchanges = [call(child, f"tool {n}", key=n) for n in range(len(names))]
    waiting = [child.next() for _ in names]
    for number, count in enumerate(names):
        child.ask(waiting[number], {f"k{n}": FORM for n in range(count)}, f"state {number}")
    questions = [
        (number, f"k{n}", question["id"])
        for number, exchange in enumerate(exchanges)
        for n, question in enumerate(got(exchange))
    ]
    for number, key, question_id in data.draw(st.permutations(questions)):
        child.respond(question_id, {"action": "accept", "content": {"of": [number, key]}})
    assert len(child.told) == len(names)
    for retry in child.told:
        number = int(retry["params"]["requestState"].removeprefix("state "))
        assert retry["params"]["name"] == f"tool {number}"
        assert retry["params"]["inputResponses"] == {
            f"k{n}": {"action": "accept", "content": {"of": [number, f"k{n}"]}}
            for n in range(names[number])
        }
        child.answer(retry, {**DONE, "number": number})
    for number, exchange in enumerate(exchanges):
        (answer,) = got(exchange)
        assert (answer["id"], answer["result"]["number"]) == (number, number)
    assert not child.board.is_awaited


class ListeningServer:
    """A model of a modern server: what it listens to, and which changes it has told."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.open: dict[int, Json] = {}  # acknowledged, in order
        self.unread: list[Json] = []

    def read(self) -> None:
        """Takes what it was told."""
        self.unread += self.child.told
        self.child.told.clear()

    def work(self) -> None:
        """Acts on the oldest message."""
        self.read()
        if not self.unread:
            return
        message = self.unread.pop(0)
        if message["method"] == "subscriptions/listen":
            self.open[message["id"]] = message
            self.child.acknowledge(message)
        else:
            assert message["method"] == "notifications/cancelled"
            self.open.pop(message["params"]["requestId"], None)

    def change(self, uri: str) -> None:
        """Tells everybody who listens that a resource has changed."""
        for listen in list(self.open.values()):
            if uri in listen["params"]["notifications"].get("resourceSubscriptions", []):
                self.child.change(listen, "notifications/resources/updated", uri=uri)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["subscribe", "unsubscribe"]), st.sampled_from("abc")),
            st.just(("work", "")),
            st.tuples(st.just("change"), st.sampled_from("abc")),
        ),
        max_size=30,
    ),
    st.sampled_from([SERVER, {"resources": {"subscribe": True}}]),
)
def test_whatever_the_order_a_change_comes_once_to_who_has_subscribed(
    steps: list[tuple[str, str]], capabilities: Json
) -> None:
    child = opened(server=capabilities)
    server = ListeningServer(child)
    child.notify("notifications/initialized")
    stream = child.listen()
    calls: list[Exchange] = []
    wanted: set[str] = set()
    for what, uri in steps:
        if what == "work":
            server.work()
        elif what == "change":
            server.change(uri)
            assert len(got(stream)) <= 1
        else:
            calls.append(child.send(f"resources/{what}", {"uri": uri}, len(calls)))
            (wanted.add if what == "subscribe" else wanted.discard)(uri)
    while server.unread or child.told:
        server.work()
    assert len(server.open) == (1 if wanted or capabilities is SERVER else 0)
    for number, exchange in enumerate(calls):
        assert [(it["id"], it["result"]) for it in got(exchange)] == [(number, {})]
    for uri in "abc":
        server.change(uri)
        assert len(got(stream)) == (uri in wanted)
