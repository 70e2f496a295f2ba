"""Legacy clients in front of a server that speaks 2026-07-28 alone, over both of their wires."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import SSEProxy
from mcp_proxy.server.check import check
from tests.support.front import Answer, Json, McpClient
from tests.support.proxies import Replicas, WsgiProxy, configured, replicas, running
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually
from tests.transports.calls import judging

MODERN = (sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "servers" / "modern.py"))

ASKABLE: Json = {"elicitation": {"form": {}, "url": {}}, "sampling": {}, "roots": {}}


def open_session(
    client: McpClient, version: str = "2025-11-25", capabilities: Json = ASKABLE
) -> McpClient:
    """A session of a client that can be asked."""
    info = {"name": "test", "version": "1"}
    params = {"protocolVersion": version, "capabilities": capabilities, "clientInfo": info}
    answer = client.call("initialize", params)
    client.session = answer.headers.get("Mcp-Session-Id")
    assert answer.message()["result"]["protocolVersion"] == version
    assert client.notify("notifications/initialized").status == 202
    return client


def tool(client: McpClient, name: str, **arguments: Any) -> Any:
    """The structured result of a tool."""
    result = client.result("tools/call", {"name": name, "arguments": arguments})
    return result.get("structuredContent")


def begin(client: McpClient, name: str, key: Any = None, **arguments: Any) -> Answer:
    """A call as it comes."""
    return client.call("tools/call", {"name": name, "arguments": arguments}, key)


def answer(client: McpClient, question: Json, result: Json) -> None:
    """What a client says to a question."""
    posted = client.post({"jsonrpc": "2.0", "id": question["id"], "result": result})
    assert posted.status == 202


def seen(client: McpClient) -> list[Json]:
    """What has reached the server."""
    messages: list[Json] = tool(client, "seen")["messages"]
    return messages


@pytest.fixture
def client() -> Iterator[McpClient]:
    """A session in front of the modern server."""
    with running("wsgi", MODERN, sse_after=0.3) as proxy:
        yield open_session(proxy.client())


@pytest.fixture(params=["local", "redis"])
def several(
    request: pytest.FixtureRequest, redis_server: RedisServer, redis_prefix: str
) -> Iterator[Replicas]:
    """Two replicas in front of it."""
    store: Json = {}
    if request.param == "redis":
        store = {"redis_url": redis_server.url, "redis_prefix": redis_prefix}
    with replicas(2, **store, command=MODERN, lease=1.0, sse_after=0.3) as both:
        yield both


# --- streamable HTTP -----------------------------------------------------------------------------


def test_the_server_hears_of_no_session(client: McpClient) -> None:
    assert client.result("ping") == {}
    assert client.result("logging/setLevel", {"level": "info"}) == {}
    client.notify("notifications/roots/list_changed")
    methods = [message["method"] for message in seen(client)]
    assert methods == ["initialize", "server/discover", "subscriptions/listen", "tools/call"]


@pytest.mark.parametrize("code", [-32022, -32601, -32602, -32600, -32603, -32020, -32000])
def test_whatever_the_refusal_is(code: int) -> None:
    with running("wsgi", [*MODERN, "--refuse-code", str(code)]) as proxy:
        assert tool(open_session(proxy.client()), "echo", text="hello") == {"text": "hello"}


def test_a_question_crosses_and_its_answer_goes_back(client: McpClient) -> None:
    call = begin(client, "ask", kind="form", message="really?")
    messages = call.stream()
    question = next(messages)
    assert (question["method"], question["params"]["message"]) == ("elicitation/create", "really?")
    answer(client, question, {"action": "decline"})
    result = next(messages)["result"]
    assert result["structuredContent"] == {"answers": {"form": {"action": "decline"}}}
    assert "resultType" not in result
    call.close()


def test_who_takes_json_alone_hears_why_it_cannot_be_asked(client: McpClient) -> None:
    params = {"name": "ask", "arguments": {"kind": "form"}}
    refused = client.call("tools/call", params, Accept="application/json")
    assert "event stream" in refused.error()["message"]
    assert tool(client, "echo", text="still there") == {"text": "still there"}


def test_a_client_that_leaves_cancels_nothing_and_a_cancellation_does(client: McpClient) -> None:
    left = begin(client, "slow", "left", seconds=0.5, label="left")
    left.close()
    held = begin(client, "slow", "held", seconds=60, label="held")
    client.notify("notifications/cancelled", {"requestId": "held"})
    assert held.error()["code"] == -32000
    cancelled = [it for it in seen(client) if it["method"] == "notifications/cancelled"]
    calls = [it for it in seen(client) if it.get("params", {}).get("name") == "slow"]
    assert [it["params"]["requestId"] for it in cancelled] == [calls[1]["id"]]


def test_a_call_that_asks_can_be_cancelled(client: McpClient) -> None:
    call = begin(client, "ask", "q", kind="sampling")
    messages = call.stream()
    question = next(messages)
    client.notify("notifications/cancelled", {"requestId": "q"})
    assert next(messages)["params"]["requestId"] == question["id"]
    assert "cancelled" in next(messages)["error"]["message"]
    answer(client, question, {"model": "late"})
    calls = [it for it in seen(client) if it.get("params", {}).get("name") == "ask"]
    assert len(calls) == 1
    assert not [it for it in seen(client) if it["method"] == "notifications/cancelled"]


def test_a_question_that_nobody_answers_has_the_call_s_time_limit() -> None:
    with running("wsgi", MODERN, request_timeout=1.0) as proxy:
        client = open_session(proxy.client())
        *others, ended = begin(client, "ask", kind="form").messages()
        assert [it["method"] for it in others] == ["elicitation/create", "notifications/cancelled"]
        assert "did not answer" in ended["error"]["message"]


def test_changes_and_updates_reach_the_standing_stream(client: McpClient) -> None:
    stream = client.listen()
    messages = stream.stream()
    client.result("resources/subscribe", {"uri": "demo://watched"})
    tool(client, "notify", kinds=["tools", "updated"])
    told = [next(messages) for _ in range(2)]
    assert [it["method"] for it in told] == [
        "notifications/tools/list_changed",
        "notifications/resources/updated",
    ]
    assert not any("_meta" in it.get("params", {}) for it in told)
    client.result("resources/unsubscribe", {"uri": "demo://watched"})
    tool(client, "notify", kinds=["updated", "prompts"])
    assert next(messages)["method"] == "notifications/prompts/list_changed"
    stream.close()


def test_a_batch_is_answered_as_one(client: McpClient) -> None:
    other = open_session(McpClient(client.front), "2025-03-26")
    parts: list[Json] = [
        {"jsonrpc": "2.0", "id": "p", "method": "ping"},
        {"jsonrpc": "2.0", "id": "s", "method": "resources/subscribe", "params": {"uri": "a:1"}},
        {
            "jsonrpc": "2.0",
            "id": "e",
            "method": "tools/call",
            "params": {"name": "echo", "arguments": {"text": "x"}},
        },
    ]
    answers = other.post(parts, Accept="application/json").messages()
    assert sorted(it["id"] for it in answers) == ["e", "p", "s"]
    assert all("result" in it for it in answers)


def test_a_question_is_resumed_by_its_event_id(client: McpClient) -> None:
    call = begin(client, "ask", kind="form")
    events = call.events()
    first = next(events)
    call.close()  # before it has seen the question
    resumed = client.listen(Last_Event_ID=(first.id or b"").decode())
    messages = resumed.stream()
    question = next(messages)
    assert question["method"] == "elicitation/create"
    answer(client, question, {"action": "cancel"})
    result = next(messages)["result"]["structuredContent"]
    assert result == {"answers": {"form": {"action": "cancel"}}}
    resumed.close()


def test_two_sessions_have_a_server_each(client: McpClient) -> None:
    other = open_session(McpClient(client.front))
    assert tool(client, "pid") != tool(other, "pid")


def test_an_idle_session_gives_way_although_it_listens_to_the_server(client: McpClient) -> None:
    other = McpClient(client.front)
    with running("wsgi", MODERN, max_sessions=1, evict_after=0.1) as proxy:
        first, other = proxy.client(), proxy.client()
        before = tool(open_session(first), "pid")
        time.sleep(0.2)
        tool(open_session(other), "pid")
        time.sleep(0.2)
        assert tool(first, "pid") != before


def test_a_crash_fails_the_call_and_the_next_one_finds_another_server(client: McpClient) -> None:
    client.result("logging/setLevel", {"level": "error"})
    client.result("resources/subscribe", {"uri": "demo://watched"})
    asking = begin(client, "ask", kind="form")
    messages = asking.stream()
    assert next(messages)["method"] == "elicitation/create"
    assert "exited" in begin(client, "crash").error()["message"]
    assert [it["method"] for it in (next(messages),)] == ["notifications/cancelled"]
    assert "exited" in next(messages)["error"]["message"]
    requests = seen(client)
    assert requests[-1]["params"]["_meta"]["io.modelcontextprotocol/logLevel"] == "error"
    listens = [it for it in requests if it["method"] == "subscriptions/listen"]
    wanted = listens[-1]["params"]["notifications"]
    assert wanted["resourceSubscriptions"] == ["demo://watched"]


@pytest.mark.parametrize("accepts", ["application/json, text/event-stream", "application/json"])
def test_a_refusal_of_a_legacy_server_is_what_it_was(accepts: str) -> None:
    script = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    it = json.loads(line)\n"
        "    error = {'code': -32000, 'message': 'not ' + it['method']}\n"
        "    print(json.dumps({'jsonrpc': '2.0', 'id': it['id'], 'error': error}), flush=True)\n"
    )
    with running("wsgi", (sys.executable, "-c", script)) as proxy:
        refused = proxy.client().initialize(Accept=accepts)
        assert refused.status == 200
        assert "Mcp-Session-Id" not in refused.headers
        assert refused.error() == {"code": -32000, "message": "not initialize"}
        assert isinstance(proxy, WsgiProxy)
        eventually(lambda: not proxy.app.proxies["default"].has_sessions)


# --- several replicas ----------------------------------------------------------------------------


def test_an_answer_by_another_replica_reaches_the_call(several: Replicas) -> None:
    first = open_session(several.client_at(0))
    second = first.at(several[1].front)
    for caller, other in ((first, second), (second, first)):
        call = begin(caller, "chain", rounds=3)
        messages = call.stream()
        for number in range(3):
            question = next(messages)
            assert question["params"]["message"] == f"round {number + 1}"
            answer(other, question, {"action": "accept", "content": {"n": number}})
        rounds = next(messages)["result"]["structuredContent"]["answers"]
        assert [it["form"]["content"]["n"] for it in rounds] == [0, 1, 2]
        call.close()
    assert several[1].children == 0


def test_changes_are_told_by_another_replica(several: Replicas) -> None:
    first = open_session(several.client_at(0))
    second = first.at(several[1].front)
    stream = second.listen()
    messages = stream.stream()
    assert second.result("resources/subscribe", {"uri": "demo://watched"}) == {}
    tool(first, "notify", kinds=["updated"])
    assert next(messages)["params"] == {"uri": "demo://watched"}
    stream.close()


def test_another_replica_takes_the_session_over(several: Replicas) -> None:
    first = open_session(several.client_at(0), "2025-06-18", {"elicitation": {}})
    second = first.at(several[1].front)
    first.result("logging/setLevel", {"level": "error"})
    first.result("resources/subscribe", {"uri": "a:1"})
    second.result("resources/subscribe", {"uri": "demo://watched"})
    second.result("resources/unsubscribe", {"uri": "a:1"})
    before = tool(second, "pid")
    judging(several)
    several[0].app.close(0)
    assert tool(second, "pid") != before
    assert several[1].children == 1
    requests = seen(second)
    meta = requests[-1]["params"]["_meta"]
    assert meta["io.modelcontextprotocol/clientCapabilities"] == {"elicitation": {}}
    assert meta["io.modelcontextprotocol/clientInfo"] == {"name": "test", "version": "1"}
    assert meta["io.modelcontextprotocol/logLevel"] == "error"
    stream = second.listen()
    messages = stream.stream()
    tool(second, "notify", kinds=["updated"])
    assert next(messages)["params"] == {"uri": "demo://watched"}
    stream.close()
    call = begin(second, "ask", kind="form")
    asked = call.stream()
    answer(second, next(asked), {"action": "cancel"})
    assert "result" in next(asked)
    call.close()


# --- HTTP+SSE ------------------------------------------------------------------------------------


@contextlib.contextmanager
def sse_session(*options: str, posts_elsewhere: bool = False) -> Iterator[SseClient]:
    """A session over HTTP+SSE, whose messages go to another replica if so wanted."""
    with replicas(2, command=[*MODERN, *options], kind=SSEProxy, keepalive_interval=0.2) as both:
        posts = both[1].front if posts_elsewhere else None
        client = SseClient(both[0].front, posts)
        assert client.connect().status == 200
        info = {"name": "test", "version": "1"}
        params = {"protocolVersion": "2025-11-25", "capabilities": ASKABLE, "clientInfo": info}
        result = client.result("initialize", params)
        assert result["protocolVersion"] == "2025-11-25"
        assert result["serverInfo"]["name"] == "modern"
        assert client.notify("notifications/initialized").status == 202
        yield client
        client.close()


def sse_tool(client: SseClient, name: str, **arguments: Any) -> Any:
    """The structured result of a tool."""
    result = client.result("tools/call", {"name": name, "arguments": arguments})
    return result.get("structuredContent")


@pytest.mark.parametrize("posts_elsewhere", [False, True])
def test_everything_crosses_over_sse(posts_elsewhere: bool) -> None:
    with sse_session(posts_elsewhere=posts_elsewhere) as client:
        assert client.result("ping") == {}
        assert client.result("logging/setLevel", {"level": "error"}) == {}
        sse_tool(client, "log")
        assert client.heard.pop()["params"]["data"] == "a error"
        assert client.result("resources/subscribe", {"uri": "demo://watched"}) == {}
        sse_tool(client, "notify", kinds=["updated", "tools"])
        assert [it["method"] for it in client.heard[-2:]] == [
            "notifications/resources/updated",
            "notifications/tools/list_changed",
        ]
        key = client.call("tools/call", {"name": "ask", "arguments": {"kind": "both"}})
        asked = [client.next(), client.next()]
        for question in reversed(asked):
            client.post({"jsonrpc": "2.0", "id": question["id"], "result": {"of": "it"}})
        answers = client.answer(key)["result"]["structuredContent"]["answers"]
        assert answers == {"form": {"of": "it"}, "sampling": {"of": "it"}}


def test_a_cancelled_question_over_sse_needs_no_answer() -> None:
    with sse_session() as client:
        key = client.call("tools/call", {"name": "ask", "arguments": {"kind": "form"}})
        question = client.next()
        client.notify("notifications/cancelled", {"requestId": key})
        assert client.next()["params"]["requestId"] == question["id"]
        assert sse_tool(client, "echo", text="on") == {"text": "on"}


def test_a_refusal_over_sse_is_what_it_was() -> None:
    script = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    it = json.loads(line)\n"
        "    error = {'code': -32601, 'message': 'not ' + it['method']}\n"
        "    print(json.dumps({'jsonrpc': '2.0', 'id': it['id'], 'error': error}), flush=True)\n"
    )
    with replicas(1, command=(sys.executable, "-c", script), kind=SSEProxy) as one:
        client = SseClient(one[0].front)
        client.connect()
        key = client.call("initialize", {"protocolVersion": "2024-11-05"})
        assert client.answer(key)["error"]["message"] == "not initialize"
        client.close()


# --- others --------------------------------------------------------------------------------------


def test_the_check_of_a_modern_server_finds_it_in_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(configured(MODERN))
    assert "modern 1, revision 2025-11-25" in capsys.readouterr().out


def test_both_eras_are_served_at_once(client: McpClient) -> None:
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    modern = McpClient(client.front)
    headers = {"MCP_Protocol_Version": "2026-07-28", "Mcp_Method": "tools/call", "Mcp_Name": "pid"}
    found: list[Json] = []

    def ask() -> None:
        params = {"name": "pid", "_meta": meta}
        found.append(modern.call("tools/call", params, **headers).message()["result"])

    thread = threading.Thread(target=ask)
    thread.start()
    mine = tool(client, "pid")
    thread.join(30)
    assert found[0]["resultType"] == "complete"
    assert found[0]["structuredContent"] != mine
    assert json.dumps(mine)
