"""Modern clients in front of stdio servers of both eras: every request stands for itself.

T numbers are those of docs/protocol.md.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.front import Answer, Json, WsgiFront
from tests.support.modern_client import (
    PREFIX,
    REVISION,
    SUBSCRIPTION,
    ModernClient,
    Trace,
    called,
    server_of,
)
from tests.support.proxies import GunicornProxy, WsgiProxy, running
from tests.support.threads import run_together
from tests.support.waiting import eventually

ERAS = ["modern", "legacy"]

_VERSION, _CAPABILITIES = f"{PREFIX}protocolVersion", f"{PREFIX}clientCapabilities"


class Scene:
    """A proxy in front of a server of one era, and what the server traces."""

    def __init__(self, era: str, app: Any, trace: Trace) -> None:
        self.era = era
        self.app = app
        self.trace = trace
        self.client = ModernClient(WsgiFront(app))


@pytest.fixture(scope="module", params=ERAS)
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """One that all tests of this module share, for each era."""
    trace = Trace(tmp_path_factory.mktemp(request.param) / "trace")
    command = server_of(request.param, "--trace", str(trace.path))
    quick = {"sse_after": 3, "keepalive_interval": 0.2}
    with running("wsgi", command, **quick) as proxy:
        assert isinstance(proxy, WsgiProxy)
        yield Scene(request.param, proxy.app, trace)


@pytest.fixture
def client(scene: Scene) -> ModernClient:
    return scene.client


def refused(answer: Answer, status: int, code: int, key: Any) -> Json:
    """The error of an answer, which has this status, code and id, and is JSON."""
    assert answer.headers["Content-Type"] == "application/json"
    message = answer.message()
    assert (answer.status, message["error"]["code"]) == (status, code), message
    assert (message["id"], type(message["id"])) == (key, type(key))
    error: Json = message["error"]
    return error


def methods_seen(client: ModernClient) -> list[str]:
    """The methods of everything that has reached the server."""
    messages = client.told("seen")["messages"]
    return [message["method"] for message in messages if "method" in message]


# --- what a request says of itself ---------------------------------------------------------------


def test_discover_says_what_is_served(scene: Scene) -> None:
    """T54."""
    answer = scene.client.call("server/discover", key="d")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    message = answer.message()
    result = message["result"]
    assert message["id"] == "d"
    assert result["resultType"] == "complete"
    assert REVISION in result["supportedVersions"]
    assert result["capabilities"]["tools"] == {"listChanged": True}
    assert "tasks" not in result["capabilities"]
    assert (result["ttlMs"], result["cacheScope"]) == (0, "private")
    assert result["instructions"] == "Ask me anything."
    assert result["_meta"][f"{PREFIX}serverInfo"] == {"name": scene.era, "version": "1"}


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {_CAPABILITIES: {}},
        {_VERSION: REVISION},
        {_VERSION: REVISION, _CAPABILITIES: None},
        {_VERSION: REVISION, _CAPABILITIES: []},
        {_VERSION: REVISION, _CAPABILITIES: {}, f"{PREFIX}logLevel": "loud"},
        {_VERSION: REVISION, _CAPABILITIES: {}, f"{PREFIX}clientInfo": "me"},
    ],
)
@pytest.mark.parametrize("key", ["k", 7])
def test_metadata_that_is_missing_or_wrong_is_refused(
    client: ModernClient, meta: Json | None, key: Any
) -> None:
    """T55."""
    params = {} if meta is None else {"_meta": meta}
    message = {"jsonrpc": "2.0", "id": key, "method": "tools/list", "params": params}
    refused(client.post(message), 400, -32602, key)


@pytest.mark.parametrize(
    "wrong", [{_VERSION: 20260728}, {"progressToken": 1.5}, {"progressToken": {}}]
)
def test_metadata_of_another_type_is_refused(client: ModernClient, wrong: Json) -> None:
    """T55."""
    meta = {**client.meta(), **wrong}
    refused(client.call("tools/list", {"_meta": meta}, "k"), 400, -32602, "k")


def test_a_request_without_params_lacks_its_metadata(client: ModernClient) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    refused(client.post(message), 400, -32602, 1)


def test_nobody_needs_to_say_its_name(client: ModernClient) -> None:
    """T56."""
    meta = {_VERSION: REVISION, _CAPABILITIES: {}}
    assert client.call("tools/list", {"_meta": meta}).status == 200


NAMED = [
    ("tools/call", called("pid")),
    ("prompts/get", {"name": "greet", "arguments": {"name": "you"}}),
    ("resources/read", {"uri": "demo://static"}),
]


@pytest.mark.parametrize(("method", "params"), NAMED)
@pytest.mark.parametrize("missing", ["Mcp_Protocol_Version", "Mcp_Method", "Mcp_Name"])
def test_a_header_that_is_missing_is_refused(
    client: ModernClient, method: str, params: Json, missing: str
) -> None:
    """T57."""
    refused(client.call(method, params, "h", **{missing: ""}), 400, -32020, "h")
    assert client.call(method, params).status == 200


@pytest.mark.parametrize("missing", ["Mcp_Protocol_Version", "Mcp_Method"])
def test_every_request_has_two_headers(client: ModernClient, missing: str) -> None:
    """T57."""
    refused(client.call("tools/list", key="h", **{missing: ""}), 400, -32020, "h")


@pytest.mark.parametrize(
    "wrong",
    [
        {"Mcp_Method": "TOOLS/CALL"},
        {"Mcp_Method": "tools/list"},
        {"Mcp_Name": "PID"},
        {"Mcp_Name": "echo"},
        {"Mcp_Name": "pid pid"},
        {"Mcp_Protocol_Version": "2025-11-25"},
    ],
)
def test_a_header_that_differs_from_the_body_is_refused(
    client: ModernClient, wrong: dict[str, str]
) -> None:
    """T58."""
    refused(client.call("tools/call", called("pid"), "h", **wrong), 400, -32020, "h")


def test_a_body_that_differs_from_the_header_is_refused(client: ModernClient) -> None:
    """T58."""
    meta = {**client.meta(), _VERSION: "2025-11-25"}
    refused(client.call("tools/list", {"_meta": meta}, "h"), 400, -32020, "h")


@pytest.mark.parametrize("name", ["pid", " pid", "pid\t", " \tpid "])
def test_spaces_around_a_header_do_not_matter(client: ModernClient, name: str) -> None:
    """T59."""
    headers = {"Mcp_Name": name, "Mcp_Method": " tools/call ", "Mcp_Protocol_Version": REVISION}
    assert client.call("tools/call", called("pid"), **headers).status == 200


def test_a_name_may_be_encoded(client: ModernClient) -> None:
    """T60."""
    answer = client.call("tools/call", called("echo", text="x"), Mcp_Name="=?base64?ZWNobw==?=")
    assert answer.message()["result"]["structuredContent"] == {"text": "x"}
    read = client.call("resources/read", {"uri": "demo://item/é ü"})
    assert read.message()["result"]["contents"][0]["text"] == "item é ü"


@pytest.mark.parametrize(
    "name",
    [
        "=?base64?ZWNobw?=",  # padding
        "=?base64?ZWNobw=?=",
        "=?base64?ZW*obw==?=",  # characters
        "=?base64?ZWNo bw==?=",
        "=?base64?/w==?=",  # no UTF-8
        "=?base64??=",
        "=?BASE64?ZWNobw==?=",  # these are names themselves
        "=?base64?ZWNobw==",
        "?base64?ZWNobw==?=",
    ],
)
def test_a_name_that_cannot_be_decoded_or_is_another_one_is_refused(
    client: ModernClient, name: str
) -> None:
    """T60."""
    params = called("echo", text="x")
    refused(client.call("tools/call", params, "h", Mcp_Name=name), 400, -32020, "h")


@pytest.mark.parametrize("uri", ["=?BASE64?eA==?=", "=?base64?eA==", "?base64?eA==?="])
def test_what_only_looks_encoded_is_literal(client: ModernClient, uri: str) -> None:
    """T60."""
    answer = client.call("resources/read", {"uri": uri}, "u", Mcp_Name=uri)
    assert refused(answer, 200, -32602, "u")["message"] == "Resource not found"


def test_what_looks_encoded_and_is_not_has_to_be_encoded(client: ModernClient) -> None:
    """T60."""
    uri = "=?base64?eA==?="
    assert client.call("resources/read", {"uri": uri}, "u").status == 200
    refused(client.call("resources/read", {"uri": uri}, "u", Mcp_Name=uri), 400, -32020, "u")


@pytest.mark.parametrize("version", ["2099-01-01", "2026-07-27", "new"])
def test_an_unknown_revision_is_refused_by_naming_those_that_are_served(
    client: ModernClient, version: str
) -> None:
    """T61."""
    meta = {**client.meta(), _VERSION: version}
    answer = client.call("tools/list", {"_meta": meta}, "v", Mcp_Protocol_Version=version)
    data = refused(answer, 400, -32022, "v")["data"]
    served = client.call("server/discover").message()["result"]["supportedVersions"]
    assert data["requested"] == version
    assert data["supported"]
    assert set(data["supported"]) <= set(served)


@pytest.mark.parametrize("method", ["no/such", "tools/List", "events/none"])
def test_an_unknown_method_is_not_found(client: ModernClient, method: str) -> None:
    """T62."""
    refused(client.call(method, key="m"), 404, -32601, "m")


@pytest.mark.parametrize(
    "method",
    [
        "initialize",
        "ping",
        "logging/setLevel",
        "resources/subscribe",
        "resources/unsubscribe",
    ],
)
def test_a_removed_method_is_not_found_and_reaches_no_server(
    client: ModernClient, method: str
) -> None:
    """T62."""
    before = methods_seen(client).count(method)
    refused(client.call(method, {"uri": "demo://watched", "level": "info"}, "m"), 404, -32601, "m")
    assert methods_seen(client).count(method) == before


def test_a_capability_that_is_missing_is_named(scene: Scene) -> None:
    """T63."""
    answer = scene.client.call("tools/call", called("ask"), "c")
    if scene.era == "modern":
        data = refused(answer, 400, -32021, "c")["data"]
        assert data == {"requiredCapabilities": {"elicitation": {"form": {}}}}
    else:  # a legacy server has no code for it
        refused(answer, 200, -32602, "c")


@pytest.mark.parametrize("session", ["mcp-unknown", "x" * 2000, "a b"])
def test_session_ids_and_event_ids_do_not_matter(client: ModernClient, session: str) -> None:
    """T64."""
    headers = {"Mcp_Session_Id": session, "Last_Event_ID": "e-1"}
    answer = client.call("tools/call", called("pid"), **headers)
    assert answer.status == 200
    assert answer.message()["result"]["structuredContent"]["pid"] == client.pid()
    assert "Mcp-Session-Id" not in answer.headers
    discovered = client.call("server/discover", **headers)
    assert discovered.status == 200
    assert "Mcp-Session-Id" not in discovered.headers


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_nothing_but_posts_is_modern(client: ModernClient, method: str) -> None:
    """T65."""
    answer = client.send(method, None, {"Accept": "text/event-stream"})
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert "id" not in answer.message()


def test_a_response_is_refused_and_a_notification_accepted(client: ModernClient) -> None:
    """T66."""
    response = client.post({"jsonrpc": "2.0", "id": 1, "result": {}})
    assert 400 <= response.status < 500
    for extra in ({}, {"params": {"_meta": client.meta()}}):
        note = {"jsonrpc": "2.0", "method": "notifications/cancelled", **extra}
        answer = client.post(note)
        assert (answer.status, answer.body()) == (202, b"")
    bare = {"jsonrpc": "2.0", "method": "notifications/x", "params": {"_meta": client.meta()}}
    assert client.post(bare, Mcp_Protocol_Version="").status == 202


def test_a_notification_takes_nothing_back(scene: Scene) -> None:
    """Ids are those of one client; who takes back leaves."""
    with ThreadPoolExecutor(1) as pool:
        params = called("slow", seconds=0.5, label="kept")
        call = pool.submit(lambda: scene.client.call("tools/call", params, "mine").message())
        scene.trace.wait("started", end=" kept")
        params = {"requestId": "mine", "_meta": scene.client.meta()}
        note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
        assert scene.client.post(note).status == 202
        assert call.result(10)["result"]["structuredContent"] == {"label": "kept"}


def test_bodies_that_are_no_request_are_refused(client: ModernClient) -> None:
    request = client.request("tools/list")
    assert client.post(json.dumps([request]).encode()).status == 400
    assert client.post(b"{").status == 400


# --- answers -------------------------------------------------------------------------------------


def test_results_say_what_they_are(scene: Scene) -> None:
    """T88."""
    for method, params in [
        ("tools/list", {}),
        ("prompts/list", {}),
        ("resources/list", {}),
        ("resources/templates/list", {}),
        ("resources/read", {"uri": "demo://static"}),
    ]:
        result = scene.client.call(method, params).message()["result"]
        assert result["resultType"] == "complete"
        assert (result["ttlMs"], result["cacheScope"]) == (0, "private")
        assert result["_meta"][f"{PREFIX}serverInfo"]["name"] == scene.era
    for method, params in NAMED[:2]:
        result = scene.client.call(method, params).message()["result"]
        assert result["resultType"] == "complete"
        assert "ttlMs" not in result


def test_a_resource_that_is_not_there_is_an_invalid_param(client: ModernClient) -> None:
    """T88."""
    error = refused(client.call("resources/read", {"uri": "demo://no"}, "r"), 200, -32602, "r")
    assert error["data"] == {"uri": "demo://no"}


@pytest.mark.parametrize("key", [1, "1", 0, -5, "", 2**53])
def test_the_answer_has_the_id_of_its_request(client: ModernClient, key: Any) -> None:
    message = client.call("tools/call", called("echo", text="x"), key).message()
    assert (message["id"], type(message["id"])) == (key, type(key))


def test_progress_makes_a_stream(client: ModernClient) -> None:
    answer = client.call("tools/call", called("count", to=3), "p", token="t")
    assert answer.is_stream
    *progress, last = answer.messages()
    assert [note["params"]["progress"] for note in progress] == [1, 2, 3]
    assert {note["params"]["progressToken"] for note in progress} == {"t"}
    assert {note["method"] for note in progress} == {"notifications/progress"}
    assert (last["id"], last["result"]["structuredContent"]) == ("p", {"counted": 3})


def test_without_a_token_there_is_no_progress(client: ModernClient) -> None:
    answer = client.call("tools/call", called("count", to=3), "p")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.message()["id"] == "p"


def test_a_client_that_takes_json_alone_gets_nothing_else(client: ModernClient) -> None:
    answer = client.call(
        "tools/call",
        called("slow", seconds=0.6),
        token="t",
        log_level="debug",
        Accept="application/json",
    )
    assert answer.headers["Content-Type"] == "application/json"
    assert "result" in json.loads(answer.body())


def test_a_client_that_takes_streams_alone_gets_one(client: ModernClient) -> None:
    answer = client.call("tools/call", called("pid"), Accept="text/event-stream")
    assert answer.is_stream
    (message,) = answer.messages()
    assert "pid" in message["result"]["structuredContent"]
    missing = client.call("no/such", key="m", Accept="text/event-stream")
    assert missing.message()["error"]["code"] == -32601


def test_a_client_that_takes_neither_is_refused(client: ModernClient) -> None:
    assert client.call("tools/list", Accept="text/html").status == 406


def test_a_stream_has_what_a_stream_needs_and_nothing_else(client: ModernClient) -> None:
    """T67, T68."""
    answer = client.call("tools/call", called("slow", seconds=0.8), token="t", log_level="debug")
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "Mcp-Session-Id" not in answer.headers
    raw = answer.body()
    assert b"\n:" in raw  # while the server is silent
    lines = raw.decode().splitlines()
    assert not [line for line in lines if line.startswith(("id:", "retry:"))]
    messages = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    assert not [message for message in messages if "method" in message and "id" in message]
    assert "result" in messages[-1]
    assert sum("result" in message for message in messages) == 1
    assert [line for line in lines if line][-1].startswith("data:")  # nothing follows


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        *((code, -32603) for code in (-32022, -32021, -32020, -32023, -32050, -32099, -32042)),
        (-32002, -32602),
        (-32000, -32000),
        (-32603, -32603),
        (-32100, -32100),
        (5, 5),
    ],
)
def test_no_reserved_code_of_a_legacy_server_passes(scene: Scene, code: int, expected: int) -> None:
    """T84."""
    error = {"code": code, "message": "so", "data": [1]}
    answer = scene.client.call("tools/call", called("fail", error=error), "f")
    if scene.era == "legacy":
        assert refused(answer, 200, expected, "f") == {**error, "code": expected}
    else:  # what a modern server says is its own affair
        assert answer.message()["error"] == error


def test_an_error_of_a_tool_is_a_result(client: ModernClient) -> None:
    result = client.call("tools/call", called("fail")).message()["result"]
    assert (result["isError"], result["resultType"]) == (True, "complete")


# --- one server, many clients --------------------------------------------------------------------


def test_equal_ids_and_tokens_do_not_cross(client: ModernClient) -> None:
    """T75."""

    def count(to: int) -> Any:
        params = called("count", to=to, pause=0.02)
        return client.call("tools/call", params, 1, token="x").messages()

    for to, (*progress, last) in zip(
        range(3, 9), run_together([lambda n=n: count(n) for n in range(3, 9)]), strict=True
    ):
        assert [note["params"]["progress"] for note in progress] == list(range(1, to + 1))
        assert {note["params"]["total"] for note in progress} == {to}
        assert {note["params"]["progressToken"] for note in progress} == {"x"}
        assert (last["id"], last["result"]["structuredContent"]) == (1, {"counted": to})


def test_many_clients_at_once_each_get_their_answer(client: ModernClient) -> None:
    def echo(number: int) -> bool:
        answer = client.call("tools/call", called("echo", text=f"{number}"), number % 3)
        message = answer.message()
        content = message["result"]["structuredContent"]
        return bool((message["id"], content) == (number % 3, {"text": f"{number}"}))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(echo, range(120)))


def test_a_session_and_modern_calls_do_not_meet(tmp_path: Path) -> None:
    """T85."""
    with running("wsgi", server_of("legacy")) as proxy:
        modern, old = ModernClient(proxy.client().front), proxy.client().open("2025-11-25")
        listed = [tool["name"] for tool in old.result("tools/list")["tools"]]
        result = modern.call("tools/list").message()["result"]
        assert [tool["name"] for tool in result["tools"]] == listed

        def own_pid() -> int:
            pid: int = old.result("tools/call", called("pid"))["structuredContent"]["pid"]
            return pid

        pids = own_pid(), modern.pid()
        assert len(set(pids)) == 2
        assert (own_pid(), modern.pid()) == pids
        in_session = modern.call("tools/call", called("pid"), Mcp_Session_Id=old.session or "")
        assert in_session.message()["result"]["structuredContent"]["pid"] == pids[1]
        assert old.delete().status == 204
        assert modern.pid() == pids[1]
        assert old.call("tools/list").status == 404


# --- logs ----------------------------------------------------------------------------------------


def logs_in(messages: list[Json]) -> list[str]:
    """What the log messages say."""
    logs = [it for it in messages if it.get("method") == "notifications/message"]
    return [it["params"]["data"] for it in logs]


def test_logs_come_only_to_who_asks_for_them(client: ModernClient) -> None:
    """T74."""
    asked = client.call("tools/call", called("log", label="one"), log_level="info")
    assert logs_in(asked.messages()) == ["one info", "one warning", "one error"]
    silent = client.call("tools/call", called("log", label="two"))
    assert silent.headers["Content-Type"] == "application/json"
    silent.close()
    streamed = client.call("tools/call", called("log"), token="t", Accept="text/event-stream")
    assert logs_in(streamed.messages()) == []


@pytest.mark.parametrize("level", ["debug", "error"])
def test_the_level_is_that_of_the_request(client: ModernClient, level: str) -> None:
    """T74."""
    answer = client.call("tools/call", called("log", label="l"), log_level=level)
    levels = ["debug", "info", "warning", "error"]
    wanted = levels[levels.index(level) :]
    assert logs_in(answer.messages()) == [f"l {each}" for each in wanted]


def test_logs_of_calls_at_once_reach_no_other(scene: Scene) -> None:
    """T74: a legacy server logs in a process of each call, a modern one to one call at most."""

    def log(label: str) -> list[str]:
        params = called("log", label=label)
        answer = scene.client.call("tools/call", params, log_level="debug")
        return logs_in(answer.messages())

    for label, logs in zip("abcd", run_together([lambda c=c: log(c) for c in "abcd"]), strict=True):
        assert {line[0] for line in logs} <= {label}
        if scene.era == "legacy":
            assert len(logs) == 4


# --- who leaves takes back -----------------------------------------------------------------------


def test_closing_a_stream_cancels_the_call(scene: Scene) -> None:
    """T69."""
    answer = scene.client.call("tools/call", called("slow", label="left"), "mine", token="t")
    assert next(answer.stream())["method"] == "notifications/progress"
    (started,) = scene.trace.wait("started", end=" left")
    answer.close()
    wire_id = started.split()[1]
    (cancelled,) = scene.trace.wait("cancelled", end=" left")
    assert cancelled == f"cancelled {wire_id} left"
    assert wire_id != "mine"
    assert scene.client.pid()
    assert not [line for line in scene.trace.lines("done") if line.endswith(" left")]


def test_closing_a_silent_stream_cancels_the_call(scene: Scene) -> None:
    """T69."""
    answer = scene.client.call("tools/call", called("slow", label="silent"))
    assert answer.is_stream
    scene.trace.wait("started", end=" silent")
    answer.close()
    scene.trace.wait("cancelled", end=" silent")


def leaving(client: ModernClient, has_left: threading.Event) -> ModernClient:
    """The same client, whose server says when it has left."""
    assert isinstance(client.front, WsgiFront)
    told = {"waitress.client_disconnected": has_left.is_set}
    return client.at(WsgiFront(client.front.app, told))


def test_leaving_while_json_is_waited_for_cancels_the_call(scene: Scene) -> None:
    """T69."""
    has_left = threading.Event()
    client = leaving(scene.client, has_left)
    with ThreadPoolExecutor(1) as pool:
        params = called("slow", label="json")
        call = pool.submit(lambda: client.call("tools/call", params, Accept="application/json"))
        scene.trace.wait("started", end=" json")
        has_left.set()
        scene.trace.wait("cancelled", end=" json")
        assert call.result(10).status == 499


def test_an_answer_that_was_read_cancels_nothing(scene: Scene) -> None:
    cancelled = scene.trace.lines("cancelled")
    params = called("slow", seconds=0, label="whole")
    answer = scene.client.call("tools/call", params, token="t")
    assert len(answer.messages()) == 2
    answer.close()
    assert scene.client.pid()
    assert scene.trace.lines("cancelled") == cancelled


# --- listening -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [9, "nine"])
def test_a_subscription_begins_with_what_is_honoured(client: ModernClient, key: Any) -> None:
    """T71."""
    wanted = {"toolsListChanged": True, "resourceSubscriptions": ["demo://watched"]}
    answer = client.listen(key, **wanted)
    assert (answer.status, answer.headers["X-Accel-Buffering"]) == (200, "no")
    first = next(answer.stream())
    assert first["method"] == "notifications/subscriptions/acknowledged"
    assert first["params"] == {"notifications": wanted, "_meta": {SUBSCRIPTION: key}}
    answer.close()


def test_a_subscription_tells_of_nothing_else(client: ModernClient) -> None:
    """T72."""
    answer = client.listen("l", toolsListChanged=True, resourceSubscriptions=["demo://watched"])
    messages = answer.stream()
    next(messages)
    kinds = ["prompts", "resources", "tools"]
    client.call("tools/call", called("notify", kinds=kinds), token="t", log_level="debug").body()
    client.done("notify", kinds=["updated"], uri="demo://static")
    client.done("notify", kinds=["updated"], uri="demo://watched")
    found = [next(messages), next(messages)]
    assert [it["method"] for it in found] == [
        "notifications/tools/list_changed",
        "notifications/resources/updated",
    ]
    assert found[1]["params"]["uri"] == "demo://watched"
    assert all(it["params"]["_meta"] == {SUBSCRIPTION: "l"} for it in found)
    answer.close()


def test_two_subscriptions_with_one_id_each_get_their_own(client: ModernClient) -> None:
    """T72, T75."""
    tools, prompts = (
        client.listen(1, toolsListChanged=True),
        client.listen(1, promptsListChanged=True),
    )
    streams = [tools.stream(), prompts.stream()]
    for stream in streams:
        next(stream)
    client.done("notify", kinds=["tools", "prompts", "tools", "prompts"])
    for stream, kind in zip(streams, ("tools", "prompts"), strict=True):
        for _ in range(2):
            note = next(stream)
            assert note["method"] == f"notifications/{kind}/list_changed"
            assert note["params"]["_meta"] == {SUBSCRIPTION: 1}
    for answer in (tools, prompts):
        answer.close()


def test_an_idle_subscription_sends_comments(client: ModernClient) -> None:
    """T67."""
    answer = client.listen(toolsListChanged=True)
    raw = b""
    while raw.count(b"\n:") < 2:
        raw += next(answer.pieces)
    answer.close()


def test_a_subscription_to_nothing_ends(client: ModernClient) -> None:
    """T71, T73."""
    answer = client.listen("none")
    first, last = answer.messages()
    assert first["params"]["notifications"] == {}
    assert (last["id"], last["result"]["resultType"]) == ("none", "complete")
    assert last["result"]["_meta"][SUBSCRIPTION] == "none"


@pytest.mark.parametrize("wanted", [None, [], "all"])
def test_a_subscription_needs_a_filter(client: ModernClient, wanted: Any) -> None:
    params = {} if wanted is None else {"notifications": wanted}
    answer = client.call("subscriptions/listen", params, "f")
    message = answer.message()
    assert (answer.status, message["id"], message["error"]["code"]) == (200, "f", -32602)


def test_who_leaves_a_subscription_ends_it(scene: Scene) -> None:
    """T69: the server hears of it, too."""
    answer = scene.client.listen(resourceSubscriptions=["demo://watched"])
    next(answer.stream())
    scene.trace.wait("listening" if scene.era == "modern" else "subscribed")
    cancelled = len(scene.trace.lines("cancelled"))
    answer.close()
    if scene.era == "modern":
        eventually(lambda: len(scene.trace.lines("cancelled")) > cancelled)
    else:
        scene.trace.wait("unsubscribed demo://watched")


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GunicornProxy, Trace]]:
    """A real gunicorn in front of a legacy server."""
    trace = Trace(tmp_path_factory.mktemp("served") / "trace")
    command = server_of("legacy", "--trace", str(trace.path))
    with running("gunicorn", command, sse_after=0.3, keepalive_interval=60) as proxy:
        assert isinstance(proxy, GunicornProxy)
        yield proxy, trace


def post(proxy: GunicornProxy, names: list[str], message: Json) -> socket.socket:
    """A connection on which a request was sent, with these names of its headers."""
    values = [REVISION, message["method"], message["params"]["name"]]
    body = json.dumps(message).encode()
    lines = [
        "POST /mcp HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Accept: application/json, text/event-stream",
        f"Content-Length: {len(body)}",
        *(f"{name}:{value}" for name, value in zip(names, values, strict=True)),
    ]
    sock = socket.create_connection(("127.0.0.1", proxy.process.port), timeout=20)
    sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return sock


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_names_of_headers_have_no_case(served: tuple[GunicornProxy, Trace], change: Any) -> None:
    """T59."""
    names = [change(name) for name in ("MCP-Protocol-Version", "Mcp-Method", "Mcp-Name")]
    message = ModernClient(WsgiFront(None)).request("tools/call", called("echo", text="x"))
    with closing(post(served[0], names, message)) as sock:
        received = b""
        while b'"structuredContent"' not in received:
            piece = sock.recv(4096)
            assert piece, received
            received += piece
    assert received.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("method", ["subscriptions/listen", "tools/call"])
def test_a_connection_that_closes_takes_back(
    served: tuple[GunicornProxy, Trace], method: str
) -> None:
    """T69: noticed long before the next comment."""
    proxy, trace = served
    client = ModernClient(proxy.client().front)
    if method == "tools/call":
        answer = client.call(method, called("slow", label="cut"), token="t")
        trace.wait("started", end=" cut")
    else:
        answer = client.listen(resourceSubscriptions=["demo://watched"])
        trace.wait("subscribed demo://watched")
    next(answer.stream())
    answer.close()
    if method == "tools/call":
        trace.wait("cancelled", end=" cut")
    else:
        trace.wait("unsubscribed demo://watched")
