"""Clients and HTTP servers of different eras: what goes over a bridge, and what passes as it is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mcp_proxy import ProxyOptions, RedisStorage, TransparentProxy
from tests.servers.http_backend import HttpBackend, Turn, reply, reset, silent
from tests.support.era_servers import EraServerProcess
from tests.support.front import Json, McpClient
from tests.support.modern_client import FORM, ModernClient, answering, called
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

TOKEN = "Bearer token"
CANCELLED = "notifications/cancelled"
_JSON = "Content-Type: application/json"

#: What `modern.py` says to initialize.
NO_HANDSHAKE = {"code": -32022, "message": "no", "data": {"supported": ["2026-07-28"]}}


@contextlib.contextmanager
def proxied(url: str | list[str], storage: Any = None, **settings: Any) -> Iterator[LocalFront]:
    """A proxy in front of a server, or of several."""
    options = ProxyOptions(**{"request_timeout": 10, "stateless_children": "shared", **settings})
    proxy = TransparentProxy(url, storage, options=options)
    front = LocalFront(proxy)
    try:
        yield front
    finally:
        front.close()
        proxy.close()


@pytest.fixture(scope="module")
def legacy() -> Iterator[EraServerProcess]:
    with EraServerProcess("legacy") as server:
        yield server


@pytest.fixture(scope="module")
def modern() -> Iterator[EraServerProcess]:
    with EraServerProcess("modern") as server:
        yield server


@pytest.fixture
def counting() -> Iterator[HttpBackend]:
    """A server that says what the test wants, and counts what it was asked."""
    with HttpBackend(name="counting") as backend:
        yield backend


def opened(front: LocalFront, **headers: str) -> McpClient:
    """A session over the bridge, or without one."""
    client = McpClient(front)
    answer = client.initialize("2025-11-25", **headers)
    assert answer.status == 200, answer.body()
    assert client.session is not None
    client.notify("notifications/initialized")
    return client


def told(client: McpClient, name: str, /, **arguments: Any) -> Json:
    """What a tool tells a legacy client."""
    structured: Json = client.result("tools/call", called(name, **arguments))["structuredContent"]
    return structured


def refusing(error: Json, status: int = 400) -> Callable[[Turn], None]:
    """Answers with a JSON-RPC error."""

    def act(turn: Turn) -> None:
        body = {"jsonrpc": "2.0", "id": turn.seen.json.get("id"), "error": error}
        turn.reply(status, json.dumps(body).encode(), _JSON)

    return act


# --- where the eras agree ------------------------------------------------------------------------


def test_a_legacy_client_talks_to_a_legacy_server_itself(legacy: EraServerProcess) -> None:
    with proxied(legacy.url) as front:
        client = opened(front)
        assert told(client, "echo", text="hi") == {"text": "hi"}
        assert legacy.requests("initialize")[-1]["verb"] == "POST"
        assert client.session in {one.get("mcp-session-id") for one in legacy.requests()}
        assert client.delete().status == 204


def test_a_modern_client_talks_to_a_modern_server_itself(modern: EraServerProcess) -> None:
    with proxied(modern.url) as front:
        assert ModernClient(front).call("tools/list", key="my own id").status == 200
        last = modern.requests("tools/list")[-1]
        assert last["mcp-method"] == "tools/list"
        messages = ModernClient(front).told("seen")["messages"]
        assert "my own id" in {one.get("id") for one in messages}


# --- refusals that lead to a bridge ---------------------------------------------------------------


def test_a_modern_client_gets_on_with_a_legacy_server(legacy: EraServerProcess) -> None:
    with proxied(legacy.url) as front:
        client = ModernClient(front)
        discovered = client.call("server/discover").message()["result"]
        assert discovered["supportedVersions"] == ["2026-07-28"]
        assert client.told("echo", text="hi") == {"text": "hi"}


def test_a_legacy_client_gets_on_with_a_modern_server(modern: EraServerProcess) -> None:
    with proxied(modern.url) as front:
        client = opened(front)
        assert told(client, "echo", text="hi") == {"text": "hi"}
        assert client.result("ping") == {}
        assert client.delete().status == 204
        assert client.call("ping").status == 404


@pytest.mark.parametrize("code", [-32022, -32601, -32602, -32020])
def test_each_way_to_refuse_initialize_leads_to_a_bridge(code: int) -> None:
    with (
        EraServerProcess("modern", "--refuse-code", str(code)) as server,
        proxied(server.url) as front,
    ):
        assert told(opened(front), "echo", text="hi") == {"text": "hi"}


@pytest.mark.parametrize(
    "refusal",
    [
        reply(400, b"no session"),
        reply(405),
        refusing({"code": -32600, "message": "Missing session ID"}),
        refusing({"code": -32022, "message": "no", "data": {"supported": ["2025-11-25"]}}),
    ],
    ids=["text", "405", "json", "legacy by its word"],
)
def test_each_way_to_refuse_a_modern_request_leads_to_a_bridge(
    counting: HttpBackend, refusal: Callable[[Turn], None]
) -> None:
    def post(turn: Turn) -> None:
        if "io.modelcontextprotocol" in turn.seen.body.decode():
            refusal(turn)
        elif turn.seen.rpc == "initialize":
            counting.initialize(turn)
        elif "id" not in turn.seen.json:
            turn.reply(202)
        else:
            turn.result({"seen": turn.seen.rpc})

    counting.on("POST", "/mcp", post)
    with proxied(counting.url) as front:
        answer = ModernClient(front).call("tools/list")
        assert answer.message()["result"]["seen"] == "tools/list"
        assert len(counting.calls("initialize")) == 1


def test_a_refusal_of_initialize_needs_no_id(counting: HttpBackend) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": None, "error": NO_HANDSHAKE}).encode()
    counting.on("POST", "/mcp", reply(400, body, _JSON))
    with proxied(counting.url) as front:
        assert McpClient(front).initialize().status == 400
        assert counting.calls("server/discover")


@pytest.mark.parametrize("is_known", [False, True], ids=["at first", "once that is known"])
def test_a_notification_of_a_modern_client_is_accepted(
    legacy: EraServerProcess, is_known: bool
) -> None:
    """The Go SDK gives its connection up where the notification of a cancellation is refused."""
    cancelled = {"jsonrpc": "2.0", "method": CANCELLED, "params": {"requestId": "none"}}
    with proxied(legacy.url) as front:
        client = ModernClient(front)
        if is_known:
            assert client.told("echo", text="hi") == {"text": "hi"}
        sent = len(legacy.requests(CANCELLED))
        assert client.post(cancelled).status == 202
        assert len(legacy.requests(CANCELLED)) - sent == int(not is_known)


# --- refusals that do not ------------------------------------------------------------------------


def _cut(turn: Turn) -> None:
    turn.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
    turn.sock.close()


#: What the server does, and the status that the client gets; None: an answer of ours.
ANSWERS: dict[str, tuple[Callable[[Turn], None], int | None]] = {
    "401": (reply(401, b"{}", 'WWW-Authenticate: Bearer realm="x"', _JSON), 401),
    "403": (reply(403, b"{}", 'WWW-Authenticate: Bearer error="y"', _JSON), 403),
    "429": (reply(429, b"{}", "Retry-After: 7", _JSON), 429),
    "500": (reply(500, b"broken"), 500),
    "503": (reply(503, b"{}", "Retry-After: 7"), 503),
    "empty 200": (reply(200), 200),
    "error in 200": (refusing({"code": -32603, "message": "no"}, 200), 200),
    "modern error": (refusing({"code": -32021, "message": "no"}), 400),
    "unknown method": (refusing({"code": -32601, "message": "no"}, 404), 404),
    "other revision": (
        refusing({"code": -32022, "message": "no", "data": {"supported": ["2027-01-01"]}}),
        400,
    ),
    "cut": (_cut, None),
    "reset": (reset, None),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_nothing_else_is_sent_twice(counting: HttpBackend, what: str) -> None:
    act, status = ANSWERS[what]
    counting.on("POST", "/mcp", act)
    with proxied(counting.url) as front:
        answer = ModernClient(front).call("tools/call", called("pay"))
        with contextlib.suppress(Exception):
            answer.body()
        assert status in (None, answer.status)
        for name in ("WWW-Authenticate", "Retry-After"):
            sent = dict(line.split(": ") for line in _headers_of(what))
            assert answer.headers.get(name) == sent.get(name)
        assert len(counting.seen) == 1


def _headers_of(what: str) -> list[str]:
    return {
        "401": ['WWW-Authenticate: Bearer realm="x"'],
        "403": ['WWW-Authenticate: Bearer error="y"'],
        "429": ["Retry-After: 7"],
        "503": ["Retry-After: 7"],
    }.get(what, [])


def test_silence_leads_to_no_bridge(counting: HttpBackend) -> None:
    counting.on("POST", "/mcp", silent)
    with proxied(counting.url, request_timeout=1) as front:
        assert not ModernClient(front).call("tools/call", called("pay")).has_succeeded
        assert len(counting.calls("tools/call")) == 1
        assert not counting.calls("initialize")


@pytest.mark.parametrize("what", ["401", "403", "429", "500", "503", "cut"])
def test_initialize_is_not_sent_twice_either(counting: HttpBackend, what: str) -> None:
    act, status = ANSWERS[what]
    counting.on("POST", "/mcp", act)
    with proxied(counting.url) as front:
        answer = McpClient(front).initialize()
        assert status in (None, answer.status)
        assert len(counting.seen) == 1


def test_the_refusal_of_a_modern_server_passes(modern: EraServerProcess) -> None:
    """It had another reason than the era, and is asked for that only once a minute."""
    with HttpBackend() as backend:

        def post(turn: Turn) -> None:
            if turn.seen.rpc == "server/discover":
                turn.result({"supportedVersions": ["2026-07-28"], "capabilities": {}})
            else:
                refusing({"code": -32602, "message": "my own reason"})(turn)

        backend.on("POST", "/mcp", post)
        with proxied(backend.url) as front:
            for _ in range(2):
                answer = ModernClient(front).call("tools/call", called("pay"))
                assert (answer.status, answer.error()["message"]) == (400, "my own reason")
        assert len(backend.calls("tools/call")) == 2
        assert len(backend.calls("server/discover")) == 1


@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
def test_what_metadata_lack_is_said_with_its_code(counting: HttpBackend, method: str) -> None:
    """Where a server refuses such a request by the status by which others refuse the revision."""
    counting.on("POST", "/mcp", lambda turn: turn.error(400, -32602, "capabilities are missing"))
    with proxied(counting.url) as front:
        client = ModernClient(front)
        message = client.request(method)
        del message["params"]["_meta"]["io.modelcontextprotocol/clientCapabilities"]
        answer = client.post(message)
        assert (answer.status, answer.error()["code"]) == (400, -32602)


def test_a_server_that_takes_neither_keeps_its_own_words(counting: HttpBackend) -> None:
    counting.on("POST", "/mcp", reply(400, b"go away"))
    with proxied(counting.url) as front:
        tried = []
        for _ in range(2):
            answer = ModernClient(front).call("tools/list")
            assert (answer.status, answer.body()) == (400, b"go away")
            tried.append(len(counting.calls("initialize")))
        assert len(counting.calls("tools/list")) == 2
        assert tried == [2, 2]


def test_a_server_that_goes_away_meanwhile_is_asked_again(counting: HttpBackend) -> None:
    def post(turn: Turn) -> None:
        if turn.seen.rpc == "tools/list":
            turn.reply(400, b"what?")
        else:
            reset(turn)

    counting.on("POST", "/mcp", post)
    with proxied(counting.url) as front:
        tried = []
        for _ in range(2):
            assert ModernClient(front).call("tools/list").body() == b"what?"
            tried.append(len(counting.calls("initialize")))
    assert 0 < tried[0] < tried[1]


def test_bridge_off_passes_everything_as_it_is(
    legacy: EraServerProcess, modern: EraServerProcess
) -> None:
    with proxied(legacy.url, bridge=False) as front:
        assert ModernClient(front).call("tools/list").status == 400
    with proxied(modern.url, bridge=False) as front:
        answer = McpClient(front).initialize()
        assert (answer.status, answer.error()["code"]) == (400, -32022)


def test_a_modern_server_may_refuse_a_notification(counting: HttpBackend) -> None:
    counting.on("POST", "/mcp", refusing({"code": -32020, "message": "no"}))
    with proxied(counting.url) as front:
        assert ModernClient(front).post({"jsonrpc": "2.0", "method": CANCELLED}).status == 400


def test_a_home_is_no_session_of_a_client(legacy: EraServerProcess) -> None:
    with proxied(legacy.url) as front:
        modern_client = ModernClient(front)
        modern_client.told("echo", text="hi")
        stranger = McpClient(front)
        stranger.session = f"home-{hashlib.sha256(b'anonymous').hexdigest()[:40]}"
        assert stranger.call("tools/list").status == 400
        assert stranger.delete().status == 400
        assert modern_client.told("echo", text="hi") == {"text": "hi"}


# --- servers of both eras behind one name ---------------------------------------------------------


@pytest.fixture
def both() -> Iterator[tuple[EraServerProcess, EraServerProcess]]:
    """A legacy server, and the modern one that is to take its place."""
    with EraServerProcess("legacy") as old, EraServerProcess("modern") as new:
        yield old, new


def test_a_modern_client_goes_to_the_modern_one_of_several(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    old, new = both
    with proxied([old.url, new.url]) as front:
        client = ModernClient(front)
        for number in range(8):
            assert client.told("echo", text=str(number)) == {"text": str(number)}
        refused = [one for one in old.requests("tools/call") if "mcp-session-id" not in one]
        assert len(refused) <= 1
        assert len(new.requests("tools/call")) == 8
        assert front.app.is_busy is False


def test_a_legacy_client_goes_to_the_legacy_one_of_several(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    old, new = both
    with proxied([old.url, new.url]) as front:
        for number in range(6):
            assert told(opened(front), "echo", text=str(number)) == {"text": str(number)}
        assert len(old.requests("initialize")) >= 5
        assert len(new.requests("initialize")) <= 2  # its refusals, before that is known


def test_tasks_are_asked_for_at_those_that_may_have_them(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    old, new = both
    with proxied([old.url, new.url]) as front:
        client = ModernClient(front)
        while not old.requests("tools/call"):
            client.told("echo", text="hi")
        before = len(old.requests("tasks/get"))
        for _ in range(4):
            assert not client.call("tasks/get", {"taskId": "none"}).has_succeeded
        assert len(new.requests("tasks/get")) == 4
        assert len(old.requests("tasks/get")) == before


def test_while_the_one_of_its_era_is_away_a_client_is_bridged(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    old, new = both
    with proxied([old.url, new.url]) as front:
        client = ModernClient(front)
        for number in range(3):
            client.told("echo", text=str(number))
        new.kill()
        assert client.told("echo", text="bridged") == {"text": "bridged"}
    with proxied([old.url, new.url]) as front:
        new.start()
        for number in range(3):
            told(opened(front), "echo", text=str(number))
        old.kill()
        assert told(opened(front), "echo", text="bridged") == {"text": "bridged"}


def test_what_has_begun_over_the_bridge_stays_there(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    """A question that is open, and what the server keeps for its caller, are at the old server."""
    old, new = both
    new.kill()
    with proxied([old.url, new.url]) as front:
        client = ModernClient(front, {"elicitation": {"form": {}}})
        asked = client.asked("ask", kind="form")
        new.start()

        def has_come() -> bool:
            ModernClient(front, authorization="Bearer other").told("echo", text="hi")
            return bool(new.requests("tools/call"))

        eventually(has_come, 30)
        answer = client.tool("ask", kind="form", retry=answering(asked)).message()
        assert answer["result"]["structuredContent"]["answers"] == {"form": FORM}
        before = len(new.requests("tools/call"))
        assert client.told("echo", text="hi") == {"text": "hi"}
        assert len(new.requests("tools/call")) == before


@pytest.mark.parametrize(("before", "after"), [("legacy", "modern"), ("modern", "legacy")])
def test_a_server_of_the_other_era_may_take_the_place_of_one(before: str, after: str) -> None:
    with EraServerProcess(before) as old, EraServerProcess(after) as new:
        new.kill()
        with proxied(old.url) as front:
            client = ModernClient(front)
            assert client.told("echo", text="1") == {"text": "1"}
            session = opened(front)
            assert told(session, "echo", text="1") == {"text": "1"}
            old.kill()
            new.port = old.port
            new.start()
            for _ in range(3):
                assert client.told("echo", text="3") == {"text": "3"}
                assert told(opened(front), "echo", text="3") == {"text": "3"}
            last = new.requests("tools/call")[-2]
            assert last.get("mcp-method") == ("tools/call" if after == "modern" else None)
            if after == "legacy":
                assert told(session, "echo", text="4") == {"text": "4"}
            else:  # its client begins another one
                assert session.call("tools/call", called("echo", text="4")).status == 404


def test_a_legacy_server_without_ping_keeps_its_sessions(counting: HttpBackend) -> None:
    for method in ("ping", "server/discover", "resources/list"):
        counting.rpc[method] = lambda turn: turn.error(400, -32601, "Method not found")
    with proxied(counting.url) as front:
        client = opened(front)
        for _ in range(2):
            answer = client.call("resources/list")
            assert (answer.status, answer.error()["code"]) == (400, -32601)
        assert client.result("tools/list")["backend"] == "counting"
    assert counting.executed["initialize"] == 1
    assert counting.executed["resources/list"] == 2
    assert counting.calls("ping")[0].header("Mcp-Protocol-Version") == "2025-11-25"


def test_a_lost_session_goes_on_at_a_legacy_server_while_others_are_modern_already(
    both: tuple[EraServerProcess, EraServerProcess],
) -> None:
    old, new = both
    with proxied([new.url, old.url]) as front:
        client = opened(front)
        assert told(client, "echo", text="1") == {"text": "1"}
        assert len(old.requests("initialize")) == 1
        old.kill()
        old.start()
        assert told(client, "echo", text="2") == {"text": "2"}
        assert len(new.requests("initialize")) == 1  # it was tried first
        assert len(new.requests("tools/call")) == 0


def test_a_bridged_server_that_has_forgotten_all_is_asked_with_its_callers_token() -> None:
    with (
        EraServerProcess("legacy", "--deny", "401") as server,
        proxied(server.url, sse_after=1e-6) as front,
    ):
        client = ModernClient(front, authorization="Bearer token")
        assert client.told("echo", text="1") == {"text": "1"}
        server.kill()
        server.start()
        assert client.told("echo", text="2") == {"text": "2"}


def test_the_era_of_a_server_is_remembered(
    legacy: EraServerProcess, modern: EraServerProcess
) -> None:
    with proxied(legacy.url) as front:
        before = len(legacy.requests("server/discover"))
        for number in range(4):
            ModernClient(front, authorization=f"Bearer {number}").told("echo", text="hi")
        assert len(legacy.requests("server/discover")) - before == 1
    with proxied(modern.url) as front:
        before = len(modern.requests("initialize"))
        for _ in range(4):
            told(opened(front), "echo", text="hi")
        assert len(modern.requests("initialize")) - before == 1 + 4  # a refusal, and one a session


# --- headers -------------------------------------------------------------------------------------


def test_the_headers_of_each_call_reach_a_legacy_server(legacy: EraServerProcess) -> None:
    with proxied(legacy.url) as front:
        client = ModernClient(front, authorization="Bearer one")
        client.call("tools/call", called("echo", text="1"), X_Request_Id="first").body()
        client.call("tools/call", called("echo", text="2"), X_Request_Id="second").body()
        calls = legacy.requests("tools/call")[-2:]
        assert {one["authorization"] for one in calls} == {"Bearer one"}
        assert [one["x-request-id"] for one in calls] == ["first", "second"]
        assert all(one["x-forwarded-for"] == "127.0.0.1" for one in calls)
        assert legacy.requests("initialize")[-1]["authorization"] == "Bearer one"


def test_the_headers_of_each_call_reach_a_modern_server(modern: EraServerProcess) -> None:
    with proxied(modern.url) as front:
        client = opened(front, Authorization="Bearer one")
        client.call("tools/call", called("echo", text="1"), Authorization="Bearer two").body()
        last = modern.requests("tools/call")[-1]
        assert (last["authorization"], last["mcp-name"]) == ("Bearer two", "echo")
        told(client, "header", region="Zürich", query="all")
        assert modern.requests("tools/call")[-1]["mcp-param-region"].startswith("=?base64?")


def test_arguments_are_repeated_in_headers_wherever_their_tool_is_listed() -> None:
    with EraServerProcess("modern", "--page-size", "2") as modern, proxied(modern.url) as front:
        told(opened(front), "header", region="Zürich", query="all")


def test_calls_at_the_same_time_go_with_the_headers_of_their_own(
    legacy: EraServerProcess,
) -> None:
    """A home is shared by those whose other headers differ."""
    with proxied(legacy.url) as front:
        client = ModernClient(front, authorization="Bearer same")
        client.told("pid")

        def call(number: int) -> Json:
            params = called("echo", text=f"call {number}")
            return client.call("tools/call", params, X_Request_Id=f"call {number}").message()

        answers = run_together([functools.partial(call, number) for number in range(16)])
        texts = [answer["result"]["structuredContent"]["text"] for answer in answers]
        assert texts == [f"call {number}" for number in range(16)]
        got = [one.get("x-request-id", "") for one in legacy.requests("tools/call")]
        assert sorted(got[-16:]) == sorted(texts)


@pytest.mark.parametrize("name", ["Authorization", "X_Api_Key"])
def test_callers_who_show_other_credentials_share_no_session(
    legacy: EraServerProcess, name: str
) -> None:
    with proxied(legacy.url) as front:
        before = len(legacy.requests("initialize"))
        for value in ("one", "two", "one"):
            params = called("echo", text="hi")
            ModernClient(front).call("tools/call", params, **{name: value}).body()
        assert len(legacy.requests("initialize")) - before == 2


# --- statuses that the client has to see ----------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 429])
@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_bridged_call_is_refused_by_the_status_of_the_server(era: str, status: int) -> None:
    with EraServerProcess(era, "--deny", str(status)) as server, proxied(server.url) as front:
        params = called("echo", text="hi")
        if era == "modern":
            client = opened(front, Authorization=TOKEN)
            answer = client.call("tools/call", params, Authorization="Bearer old")
            again = client.call("tools/call", params, Authorization=TOKEN)
        else:
            ModernClient(front, authorization=TOKEN).told("pid")
            answer = ModernClient(front, authorization="Bearer old").call("tools/call", params)
            again = ModernClient(front, authorization=TOKEN).call("tools/call", params)
        assert answer.status == status
        assert answer.headers["Retry-After"] == "7"
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        assert "error" in answer.message()
        assert again.message()["result"]["structuredContent"] == {"text": "hi"}


# --- servers that go away -------------------------------------------------------------------------


def test_a_session_survives_the_restart_of_a_modern_server() -> None:
    with EraServerProcess("modern") as server, proxied(server.url) as front:
        client = opened(front)
        told(client, "echo", text="hi")
        server.kill()
        server.start()
        assert told(client, "echo", text="again") == {"text": "again"}


def test_a_home_survives_the_restart_of_a_legacy_server() -> None:
    with EraServerProcess("legacy") as server, proxied(server.url) as front:
        client = ModernClient(front)
        client.told("echo", text="hi")
        server.kill()
        server.start()
        assert client.told("echo", text="again") == {"text": "again"}


def test_calls_in_flight_fail_at_once_when_the_server_goes() -> None:
    for era in ("legacy", "modern"):
        with EraServerProcess(era) as server, proxied(server.url) as front:
            params = called("slow", label="x")
            if era == "modern":
                answer = opened(front).call("tools/call", params)
            else:
                answer = ModernClient(front).call("tools/call", params)
            server.await_line("started")
            began = time.monotonic()
            server.kill()
            assert "error" in answer.message()
            assert time.monotonic() - began < 5


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_while_a_server_is_away_each_call_says_so_and_the_next_one_works(era: str) -> None:
    with EraServerProcess(era) as server, proxied(server.url) as front:
        client: Any = opened(front) if era == "modern" else ModernClient(front)
        params = called("pid")
        assert client.call("tools/call", params).has_succeeded
        server.kill()
        for _ in range(4):
            error = client.call("tools/call", params).error()
            assert "cannot be reached" in error["message"]
        server.start()
        assert client.call("tools/call", params).has_succeeded


# --- cancellation, streams, ends ------------------------------------------------------------------


def test_a_modern_client_that_leaves_cancels_its_call_at_a_legacy_server(
    legacy: EraServerProcess,
) -> None:
    with proxied(legacy.url) as front:
        params = called("slow", label="modern leaves")
        answer = ModernClient(front).call("tools/call", params, token="t")
        next(answer.stream())
        answer.close()
        eventually(lambda: any("modern leaves" in x for x in legacy.lines if "cancelled" in x))


def test_a_cancelled_of_a_legacy_client_takes_the_call_back_at_a_modern_server(
    modern: EraServerProcess,
) -> None:
    with proxied(modern.url) as front:
        client = opened(front)
        params = {**called("slow", label="legacy cancels"), "_meta": {"progressToken": "t"}}
        answer = client.call("tools/call", params, key="to cancel")
        next(answer.stream())
        client.notify("notifications/cancelled", {"requestId": "to cancel"})
        eventually(lambda: any("legacy cancels" in x for x in modern.lines if "cancelled" in x))


def test_a_legacy_client_that_leaves_cancels_nothing(modern: EraServerProcess) -> None:
    with proxied(modern.url) as front:
        client = opened(front)
        params = {
            **called("slow", label="legacy leaves", seconds=1),
            "_meta": {"progressToken": "t"},
        }
        answer = client.call("tools/call", params)
        next(answer.stream())
        answer.close()
        eventually(lambda: any(x.startswith("done") and "legacy leaves" in x for x in modern.lines))


def test_the_end_of_a_bridged_session_ends_its_subscription(modern: EraServerProcess) -> None:
    with proxied(modern.url) as front:
        client = opened(front)
        standing = client.listen()
        before = len([line for line in modern.lines if line.startswith("listening")])
        client.result("resources/subscribe", {"uri": "demo://watched"})
        eventually(lambda: len([x for x in modern.lines if x.startswith("listening")]) > before)
        client.delete()
        standing.close()
        eventually(lambda: any(x.startswith("cancelled") for x in modern.lines))


def test_the_end_of_a_home_ends_the_session_at_its_server() -> None:
    with EraServerProcess("legacy") as server:
        with proxied(server.url) as front:
            ModernClient(front).told("echo", text="hi")
        server.await_line("session ended")


def test_questions_of_a_legacy_server_reach_a_modern_client(legacy: EraServerProcess) -> None:
    with proxied(legacy.url) as front:
        client = ModernClient(front, {"elicitation": {"form": {}}})
        asked = client.asked("ask", kind="form")
        answer = client.tool("ask", kind="form", retry=answering(asked)).message()
        assert answer["result"]["structuredContent"]["answers"] == {"form": FORM}


# --- several replicas -----------------------------------------------------------------------------


@pytest.fixture
def replicas(redis_server: RedisServer) -> Callable[[str], Any]:
    """Proxies that share their sessions."""
    prefix = f"bridging-{secrets.token_hex(4)}:"

    @contextlib.contextmanager
    def replica(url: str) -> Iterator[LocalFront]:
        with (
            contextlib.closing(RedisStorage(redis_server.url, prefix=prefix)) as storage,
            proxied(url, storage) as front,
        ):
            yield front

    return replica


def test_another_replica_takes_a_session_over(
    modern: EraServerProcess, replicas: Callable[[str], Any]
) -> None:
    with replicas(modern.url) as second:
        with replicas(modern.url) as first:
            client = opened(first)
            assert told(client.at(second), "echo", text="1") == {"text": "1"}
            first.app.hand_over()
        assert told(client.at(second), "echo", text="2") == {"text": "2"}


def test_another_replica_takes_a_home_over(
    legacy: EraServerProcess, replicas: Callable[[str], Any]
) -> None:
    with replicas(legacy.url) as second:
        with replicas(legacy.url) as first:
            client = ModernClient(first)
            client.told("pid")
            assert client.at(second).told("echo", text="1") == {"text": "1"}
            first.app.hand_over()
        assert client.at(second).told("echo", text="2") == {"text": "2"}


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_a_restart_is_no_matter_for_another_replica_either(
    era: str, replicas: Callable[[str], Any]
) -> None:
    with (
        EraServerProcess(era) as server,
        replicas(server.url) as first,
        replicas(server.url) as second,
    ):
        client: Any = opened(first) if era == "modern" else ModernClient(first)
        params = called("echo", text="hi")
        assert client.call("tools/call", params).has_succeeded
        assert client.at(second).call("tools/call", params).has_succeeded
        server.kill()
        server.start()
        message = client.at(second).call("tools/call", params).message()
        assert message["result"]["structuredContent"] == {"text": "hi"}


def test_the_log_shows_no_secret_of_a_url(
    legacy: EraServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with proxied(f"{legacy.url}?key=TopSecret") as front:
        ModernClient(front).told("echo", text="hi")
    assert "go over a bridge" in caplog.text
    assert "TopSecret" not in caplog.text


def test_a_refusal_crosses_replicas(replicas: Callable[[str], Any]) -> None:
    with (
        EraServerProcess("modern", "--deny", "401") as server,
        replicas(server.url) as first,
        replicas(server.url) as second,
    ):
        client = opened(first, Authorization=TOKEN)
        params = called("echo", text="hi")
        answer = client.at(second).call("tools/call", params, Authorization="Bearer old")
        assert (answer.status, answer.headers["Retry-After"]) == (401, "7")


# --- what is left ---------------------------------------------------------------------------------


def test_closing_leaves_no_thread_and_no_connection() -> None:
    with EraServerProcess("legacy") as server:
        before = set(threading.enumerate())
        with proxied(server.url) as front:
            client = ModernClient(front)
            client.told("echo", text="hi")
            server.await_line("stream opened")
            assert not front.app.is_busy
            params = called("slow", label="busy")
            answer = client.call("tools/call", params, token="t")
            next(answer.stream())
            assert front.app.is_busy
        server.await_line("stream closed")
        eventually(lambda: set(threading.enumerate()) <= before, message="a thread is left")


def test_the_log_says_once_what_is_bridged(
    legacy: EraServerProcess, modern: EraServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with proxied(legacy.url) as front:
        for number in range(3):
            ModernClient(front).told("echo", text=str(number))
    with proxied(modern.url) as front:
        for number in range(3):
            told(opened(front), "echo", text=str(number))
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "requests of 2026-07-28 go over a bridge" in line]) == 1
    assert len([line for line in lines if "sessions go over a bridge" in line]) == 1
    assert not [record for record in caplog.records if record.levelname != "INFO"]
