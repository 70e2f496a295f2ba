"""A conversation with an HTTP server as a child: what is sent, what comes, and how it ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mcp_proxy.backends import event_reader, repeated_arguments
from mcp_proxy.backends import upstream as upstream_module
from mcp_proxy.backends.http import HttpClient
from mcp_proxy.backends.owned import called_by
from mcp_proxy.backends.upstream import Upstream, Upstreams
from mcp_proxy.errors import BackendUnreached, ServerRefused
from mcp_proxy.servers import HttpServer
from mcp_proxy.wire import refusals
from mcp_proxy.wire.urls import Address
from tests.servers.http_backend import Feed, HttpBackend, Leave, Turn, reply, reset, stream
from tests.support.waiting import eventually

Json = dict[str, Any]

SERVER = HttpServer("upstream", ("http://127.0.0.1/mcp",))
MODERN = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}


class StraightLink:
    """The way to servers of the test, one after the other."""

    sticky_cookies = ("route",)
    timeout = 5.0

    def __init__(self, *backends: HttpBackend) -> None:
        self.client = HttpClient(1, 4)
        self.addresses = [Address("http", "127.0.0.1", backend.port) for backend in backends]
        self.failures: list[Address] = []

    def address(self) -> Address:
        return next(one for one in self.addresses if one not in self.failures[-1:])

    def target(self, address: Address) -> str:
        return "/mcp"

    def note_failure(self, address: Address, error: BackendUnreached) -> None:
        self.failures.append(address)


class Conversation:
    """A conversation whose lines and end the test sees."""

    def __init__(self, upstreams: Upstreams) -> None:
        self.lines: list[Json] = []
        self.raw: list[bytes] = []
        self.ends: list[str] = []
        self.upstream: Upstream = upstreams.spawn(SERVER, 0, self.ends.append)
        upstreams.read(self.upstream, self.take)

    def take(self, line: bytes) -> None:
        self.raw.append(line)
        self.lines.append(json.loads(line))

    def write(self, *messages: Json) -> None:
        lines = [json.dumps({"jsonrpc": "2.0", **message}).encode() for message in messages]
        self.upstream.write(b"\n".join(lines), 5)

    def answer(self, key: Any) -> Json:
        """The answer to a request."""

        def found() -> Json | None:
            return next((it for it in self.lines if it.get("id") == key), None)

        answer = eventually(found)
        assert answer is not None
        return answer

    def ask(self, method: str, key: Any, params: Mapping[str, Any] | None = None) -> Json:
        """The answer to a new request."""
        self.write({"id": key, "method": method, "params": params or {}})
        return self.answer(key)

    def open(self) -> Conversation:
        """The handshake with a legacy server."""
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {}}
        self.ask("initialize", 0, params)
        self.write({"method": "notifications/initialized"})
        return self


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as backend:
        yield backend


@pytest.fixture
def link(backend: HttpBackend) -> Iterator[StraightLink]:
    link = StraightLink(backend)
    yield link
    link.client.close()


@pytest.fixture
def upstreams(link: StraightLink) -> Iterator[Upstreams]:
    upstreams = Upstreams(link)
    yield upstreams
    upstreams.close()


@pytest.fixture
def new(upstreams: Upstreams) -> Iterator[Conversation]:
    """A conversation of which the server has heard nothing."""
    conversation = Conversation(upstreams)
    yield conversation
    conversation.upstream.close()
    eventually(lambda: conversation.ends)


def event(message: Json | None = None, **fields: Any) -> bytes:
    """An event of a stream."""
    lines = [f"{name}: {value}" for name, value in fields.items()]
    if message is not None:
        lines.append(f"data: {json.dumps({'jsonrpc': '2.0', **message})}")
    return "\n".join(lines).encode() + b"\n\n"


def broken(turn: Turn) -> bytes | None:
    """The end of a connection, in the middle of a stream."""
    raise Leave


# --- what is sent --------------------------------------------------------------------------------


def test_a_session_has_its_headers(new: Conversation, backend: HttpBackend) -> None:
    new.open().ask("tools/list", 1)
    last = backend.calls("tools/list")[0]
    assert last.header("Mcp-Session-Id") in backend.sessions
    assert last.header("MCP-Protocol-Version") == "2025-11-25"
    assert last.header("Accept") == "application/json, text/event-stream"


def test_a_request_waits_until_the_server_knows_that_it_is_initialized(
    new: Conversation, backend: HttpBackend
) -> None:
    may_answer = threading.Event()

    def slow(turn: Turn) -> None:
        may_answer.wait(10)
        turn.reply(202)

    backend.rpc["notifications/initialized"] = slow
    new.open().write({"id": 1, "method": "tools/list"})
    time.sleep(0.2)
    assert not backend.calls("tools/list")
    may_answer.set()
    assert "result" in new.answer(1)


def test_a_message_goes_with_the_headers_of_whom_it_is_for(
    new: Conversation, backend: HttpBackend
) -> None:
    new.open()
    with called_by({"Authorization": "Bearer one", "Mcp-Name": "ours"}):
        new.write({"id": 1, "method": "tools/list"})
    with called_by({"Authorization": "Bearer two"}):
        new.write({"id": 2, "method": "prompts/list"})
    new.answer(1)
    new.answer(2)
    first = backend.calls("tools/list")[0]
    assert (first.header("Authorization"), first.header("Mcp-Name")) == ("Bearer one", None)
    assert backend.calls("prompts/list")[0].header("Authorization") == "Bearer two"


def test_a_modern_request_has_headers_that_say_what_it_says(
    new: Conversation, backend: HttpBackend
) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "x-mcp-header": "City"}},
    }
    tools = {"tools": [{"name": "go", "inputSchema": schema}]}
    backend.rpc["tools/list"] = lambda turn: turn.result(tools)
    for key in (1, 2):
        params = {"name": "go", "arguments": {"city": "Oslo"}, "_meta": MODERN}
        new.ask("tools/call", key, params)
    call = backend.calls("tools/call")[1]
    assert call.header("Mcp-Method") == "tools/call"
    assert call.header("Mcp-Name") == "go"
    assert call.header("Mcp-Param-City") == "Oslo"
    assert call.header("MCP-Protocol-Version") == "2026-07-28"
    assert len(backend.calls("tools/list")) == 1


def test_a_call_whose_tool_has_changed_is_sent_again_with_other_headers(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_arguments, "RENEWAL_PAUSE", 0.0)
    listed = {"name": "go", "inputSchema": {"type": "object"}}
    backend.rpc["tools/list"] = lambda turn: turn.result({"tools": [listed]})
    params = {"name": "go", "arguments": {"city": "Oslo"}, "_meta": MODERN}
    assert "result" in new.ask("tools/call", 1, params)
    city = {"type": "string", "x-mcp-header": "City"}
    listed["inputSchema"] = {"type": "object", "properties": {"city": city}}
    mismatch = {"jsonrpc": "2.0", "id": 2, "error": {"code": -32020, "message": "Mcp-Param-City"}}

    def call(turn: Turn) -> None:
        if turn.seen.header("Mcp-Param-City") == "Oslo":
            turn.result({"content": []})
        else:
            reply(400, json.dumps(mismatch).encode(), "Content-Type: application/json")(turn)

    backend.rpc["tools/call"] = call
    assert "result" in new.ask("tools/call", 2, params)
    assert len(backend.calls("tools/call")) == 3
    backend.rpc["tools/call"] = reply(
        400, json.dumps(mismatch).encode(), "Content-Type: application/json"
    )
    assert new.ask("tools/call", 3, params)["error"]["code"] == -32020


MISMATCH = {"jsonrpc": "2.0", "id": None, "error": {"code": -32020, "message": "Mcp-Param-City"}}
GO = {"name": "go", "arguments": {"city": "Oslo"}, "_meta": MODERN}


class ChangingTool:
    """A tool one of whose arguments is to be repeated, from `change` on.

    Its second list, and all after that, come when `may_list` is set.
    """

    def __init__(self, backend: HttpBackend) -> None:
        self.backend = backend
        self.may_list = threading.Event()
        self.schema: Json = {"type": "object"}
        backend.rpc["tools/list"] = self.list
        backend.rpc["tools/call"] = self.call

    def change(self) -> None:
        city = {"type": "string", "x-mcp-header": "City"}
        self.schema = {"type": "object", "properties": {"city": city}}

    def list(self, turn: Turn) -> None:
        if len(self.backend.calls("tools/list")) > 1:
            self.may_list.wait(10)
        turn.result({"tools": [{"name": "go", "inputSchema": self.schema}]})

    def call(self, turn: Turn) -> None:
        if "properties" in self.schema and turn.seen.header("Mcp-Param-City") != "Oslo":
            turn.reply(400, json.dumps(MISMATCH).encode(), "Content-Type: application/json")
        else:
            turn.result({"content": []})


@pytest.fixture
def changed(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> ChangingTool:
    """A tool that has changed since it was called first."""
    monkeypatch.setattr(repeated_arguments, "RENEWAL_PAUSE", 0.0)
    tool = ChangingTool(backend)
    assert "result" in new.ask("tools/call", 1, GO)
    tool.change()
    return tool


def test_calls_at_the_same_time_learn_of_a_changed_tool_by_one_list(
    new: Conversation, backend: HttpBackend, changed: ChangingTool
) -> None:
    keys = range(2, 6)
    for key in keys:
        new.write({"id": key, "method": "tools/call", "params": GO})
    eventually(lambda: len(backend.calls("tools/list")) == 2)
    changed.may_list.set()
    assert all("result" in new.answer(key) for key in keys)
    assert len(backend.calls("tools/list")) == 2


def test_a_call_that_is_cancelled_before_it_is_sent_again_is_not_sent(
    new: Conversation, backend: HttpBackend, changed: ChangingTool
) -> None:
    new.write({"id": 2, "method": "tools/call", "params": GO})
    eventually(lambda: len(backend.calls("tools/list")) == 2)
    new.write({"method": "notifications/cancelled", "params": {"requestId": 2}})
    changed.may_list.set()
    assert "cancelled" in new.answer(2)["error"]["message"]
    assert len(backend.calls("tools/call")) == 2


def test_a_refusal_that_breaks_off_leaves_no_call(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_arguments, "RENEWAL_PAUSE", 0.0)

    def broken_off(turn: Turn) -> None:
        turn.reply(400, b"{", "Content-Type: application/json", length=99)
        raise Leave

    backend.rpc["tools/list"] = lambda turn: turn.result({"tools": []})
    backend.rpc["tools/call"] = broken_off
    assert "98 bytes too early" in new.ask("tools/call", 1, GO)["error"]["message"]
    eventually(lambda: "calls=0" in repr(new.upstream))


def test_a_call_is_answered_where_there_is_no_time_for_a_list(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_arguments, "LIST_TIME", 0.0)
    assert "result" in new.ask("tools/call", 1, GO)
    assert not backend.calls("tools/list")


def test_sticky_cookies_are_kept(new: Conversation, backend: HttpBackend) -> None:
    cookie = "Set-Cookie: route=a; Path=/"
    backend.rpc["initialize"] = lambda turn: backend.initialize(turn, cookie)
    new.open()
    with called_by({"Cookie": "own=1"}):
        new.ask("tools/list", 1)
    assert backend.calls("tools/list")[0].header("Cookie") == "own=1; route=a"


def test_a_redirect_is_followed(new: Conversation, backend: HttpBackend) -> None:
    backend.on("POST", "/mcp", reply(307, b"", "Location: /mcp/"))
    assert "result" in new.open().ask("tools/list", 1)


# --- what comes ----------------------------------------------------------------------------------


def test_everything_on_a_stream_is_a_line(new: Conversation, backend: HttpBackend) -> None:
    progress = {"method": "notifications/progress", "params": {"progressToken": 1, "progress": 1}}
    pieces = event(progress), event({"id": 1, "result": {}}), event({"id": 9, "result": {}})
    backend.rpc["tools/call"] = stream(*pieces)
    new.open().ask("tools/call", 1)
    assert [it.get("method", it.get("id")) for it in new.lines] == [0, progress["method"], 1]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (reply(500, b"<h1>broken"), "The server answered 500: <h1>broken"),
        (reply(200), "The server answered 200 without an answer"),
        (stream(event({"method": "x"})), "The server's stream ended without the answer"),
        (stream(event({"method": "x"}), broken), "The server broke off in the middle"),
        (reset, "The server closed the connection before it answered"),
    ],
    ids=["text", "nothing", "end", "break", "reset"],
)
def test_a_call_without_an_answer_fails_at_once(
    new: Conversation, backend: HttpBackend, act: Any, said: str
) -> None:
    backend.rpc["tools/call"] = act
    answer = new.open().ask("tools/call", 1)
    assert answer["error"]["code"] == -32000
    assert said in answer["error"]["message"]
    assert backend.executed["tools/call"] == 1
    assert "result" in new.ask("tools/list", 2)


def test_a_json_error_passes_whatever_its_status(new: Conversation, backend: HttpBackend) -> None:
    backend.rpc["tools/call"] = lambda turn: turn.error(400, -32020, "mismatch")
    assert new.open().ask("tools/call", 1)["error"] == {"code": -32020, "message": "mismatch"}


def test_a_stream_that_can_be_resumed_goes_on(new: Conversation, backend: HttpBackend) -> None:
    backend.rpc["tools/call"] = stream(event(id="7", retry="10", data=""))
    rest = stream(event({"id": 1, "result": {"late": True}}, id="8"))

    def get(turn: Turn) -> None:
        if turn.seen.header("Last-Event-ID") == "7":
            rest(turn)
        else:
            turn.reply(405)

    backend.on("GET", "/mcp", get)
    new.open()
    assert new.ask("tools/call", 1)["result"] == {"late": True}
    resumed = [seen for seen in backend.seen if seen.header("Last-Event-ID") == "7"]
    assert len(resumed) == 1
    assert backend.executed["tools/call"] == 1


def test_the_standing_stream_begins_again(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "FIRST_PAUSE", 0.05)
    feed = Feed()
    change = {"method": "notifications/tools/list_changed"}
    backend.on("GET", "/mcp", stream(event(change, id="3"), feed))
    new.open()
    eventually(lambda: len(new.lines) == 2)
    feed.put(Feed.BREAK)
    eventually(lambda: len(new.lines) == 3)
    again = [seen.header("Last-Event-ID") for seen in backend.seen if seen.method == "GET"]
    assert again == [None, "3"]


def test_streams_on_which_nothing_comes_hold_no_thread(
    link: StraightLink, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "WIDTH", 2)
    monkeypatch.setattr(event_reader, "WIDTH", 2)
    feeds = [Feed() for _ in range(8)]
    given = iter(feeds)
    backend.rpc["subscriptions/listen"] = lambda turn: stream(b": hi\n\n", next(given))(turn)
    upstreams = Upstreams(link)
    conversations = [Conversation(upstreams) for _ in feeds]
    for conversation in conversations:
        conversation.open()
        conversation.write({"id": 1, "method": "subscriptions/listen", "params": {}})
    eventually(lambda: len(backend.calls("subscriptions/listen")) == len(feeds))
    assert "result" in conversations[0].ask("tools/list", 2)
    for feed in feeds:
        feed.put(event({"id": 1, "result": {"ended": True}}))
    assert all(each.answer(1)["result"] == {"ended": True} for each in conversations)
    for conversation in conversations:
        conversation.upstream.close()
    upstreams.close()
    assert all(conversation.ends for conversation in conversations)


def test_an_event_in_pieces_is_one_line(new: Conversation, backend: HttpBackend) -> None:
    feed = Feed()
    backend.rpc["tools/call"] = stream(b": hi\n\n", feed)
    new.open().write({"id": 1, "method": "tools/call", "params": {}})
    for piece in event({"id": 1, "result": {"text": "x" * 20}}).partition(b"xxx"):
        feed.put(piece)
        time.sleep(0.05)
    assert new.answer(1)["result"] == {"text": "x" * 20}


def test_a_server_without_a_standing_stream_is_asked_once(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "FIRST_PAUSE", 0.05)
    backend.on("GET", "/mcp", reply(405))
    new.open()
    eventually(lambda: [seen for seen in backend.seen if seen.method == "GET"])
    time.sleep(0.3)
    assert len([seen for seen in backend.seen if seen.method == "GET"]) == 1


def test_tools_that_are_never_listed_hold_a_call_up_for_a_while(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_arguments, "LIST_TIME", 0.3)
    backend.rpc["tools/list"] = stream(b": hi\n\n", Feed())
    answer = new.ask("tools/call", 1, {"name": "echo", "_meta": MODERN})
    assert "result" in answer


@pytest.mark.parametrize("status", [401, 403, 429])
def test_what_the_client_has_to_see_is_a_line_of_its_own(
    new: Conversation, backend: HttpBackend, status: int
) -> None:
    given = "WWW-Authenticate: Bearer", "Retry-After: 3", "X-Other: 1"
    backend.rpc["tools/call"] = reply(status, b"{}", *given)
    new.open().ask("tools/call", 1)
    with pytest.raises(ServerRefused) as caught:
        refusals.require_none(new.raw[-1])
    assert caught.value.status == status
    assert caught.value.headers == [("WWW-Authenticate", "Bearer"), ("Retry-After", "3")]


# --- cancellation --------------------------------------------------------------------------------


def test_a_cancelled_call_loses_its_response(new: Conversation, backend: HttpBackend) -> None:
    backend.rpc["tools/call"] = stream(b": hi\n\n", Turn.wait_until_gone)
    new.open().write({"id": 1, "method": "tools/call", "params": {}})
    eventually(lambda: backend.calls("tools/call"))
    new.write({"method": "notifications/cancelled", "params": {"requestId": 1}})
    eventually(lambda: backend.gone)
    assert "cancelled" in new.answer(1)["error"]["message"]
    eventually(lambda: backend.calls("notifications/cancelled"))


def test_what_is_cancelled_before_it_was_sent_is_not_sent(
    new: Conversation, backend: HttpBackend
) -> None:
    may_answer = threading.Event()

    def slow(turn: Turn) -> None:
        may_answer.wait(10)
        turn.reply(202)

    backend.rpc["notifications/initialized"] = slow
    new.open().write({"id": 1, "method": "tools/call", "params": {}})
    new.write({"method": "notifications/cancelled", "params": {"requestId": 1}})
    may_answer.set()
    assert "cancelled" in new.answer(1)["error"]["message"]
    assert not backend.calls("tools/call")


# --- the end -------------------------------------------------------------------------------------


def test_closing_ends_the_session(upstreams: Upstreams, backend: HttpBackend) -> None:
    conversation = Conversation(upstreams).open()
    eventually(lambda: any(seen.method == "GET" for seen in backend.seen))
    upstreams.stop_child(conversation.upstream)
    upstreams.close()
    assert conversation.ends == ["it was left"]
    assert len(backend.ended) == 1
    eventually(lambda: backend.gone, message="the standing stream is still there")
    with pytest.raises(BackendUnreached):
        conversation.write({"id": 5, "method": "ping"})


def test_what_is_on_its_way_when_we_leave_is_no_warning(
    new: Conversation, backend: HttpBackend, caplog: pytest.LogCaptureFixture
) -> None:
    may_answer = threading.Event()

    def slow(turn: Turn) -> None:
        may_answer.wait(20)
        turn.reply(202)

    backend.rpc["notifications/initialized"] = slow
    new.open()
    eventually(lambda: backend.calls("notifications/initialized"))
    with caplog.at_level("DEBUG"):
        new.upstream.close()
        eventually(lambda: "was not delivered" in caplog.text)
    may_answer.set()
    assert [each.levelname for each in caplog.records if "delivered" in each.message] == ["DEBUG"]


def test_a_server_that_has_forgotten_the_session_has_taken_nothing(
    new: Conversation, backend: HttpBackend
) -> None:
    backend.on("GET", "/mcp", reply(405))
    new.open()
    eventually(lambda: any(seen.method == "GET" for seen in backend.seen))
    backend.sessions.clear()
    new.write({"id": 1, "method": "tools/call", "params": {}})
    assert eventually(lambda: new.ends) == ["it does not know the session any more"]
    assert new.upstream.untaken == {1}
    assert not backend.executed["tools/call"]


def test_the_standing_stream_learns_that_the_session_is_forgotten(
    new: Conversation, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "FIRST_PAUSE", 0.05)
    new.open()
    eventually(lambda: any(seen.method == "GET" for seen in backend.seen))
    backend.stop()
    backend.start()
    assert eventually(lambda: new.ends) == ["it does not know the session any more"]


def _misses_metadata(turn: Turn) -> None:
    turn.error(400, -32602, "_meta lacks the protocol version")


def test_a_modern_server_in_the_place_of_a_legacy_one_has_taken_nothing(
    new: Conversation, backend: HttpBackend
) -> None:
    def post(turn: Turn) -> None:
        if turn.seen.rpc == "server/discover":
            turn.result({"supportedVersions": ["2026-07-28"], "capabilities": {}})
        else:
            _misses_metadata(turn)

    new.open()
    backend.on("POST", "/mcp", post)
    new.write({"id": 1, "method": "tools/call", "params": {}})
    assert eventually(lambda: new.ends) == ["it does not know the session any more"]
    assert new.upstream.untaken == {1}


@pytest.mark.parametrize("status", [200, 400])
def test_a_legacy_server_without_ping_may_refuse_params(
    new: Conversation, backend: HttpBackend, status: int
) -> None:
    backend.rpc["tools/call"] = lambda turn: turn.error(status, -32602, "no such tool")
    for method in ("ping", "server/discover"):
        backend.rpc[method] = lambda turn: turn.error(400, -32601, "Method not found")
    new.open()
    new.write({"id": "server-error", "method": "tools/call"})
    assert new.answer("server-error")["error"]["code"] == -32602
    assert "result" in new.ask("tools/list", 2)
    assert not new.ends


def test_a_legacy_server_may_refuse_params(new: Conversation, backend: HttpBackend) -> None:
    backend.rpc["tools/call"] = _misses_metadata
    assert new.open().ask("tools/call", 1)["error"]["code"] == -32602
    assert "result" in new.ask("tools/list", 2)
    assert not new.ends


def test_a_server_that_is_away_has_taken_nothing(new: Conversation, backend: HttpBackend) -> None:
    backend.on("GET", "/mcp", reply(405))
    new.open()
    eventually(lambda: any(seen.method == "GET" for seen in backend.seen))
    backend.stop()
    new.write({"id": 1, "method": "tools/call", "params": {}})
    (how,) = eventually(lambda: new.ends)
    assert how.startswith("it cannot be reached")
    assert new.upstream.untaken == {1}


def test_a_modern_request_goes_to_another_backend_where_one_is_away() -> None:
    with HttpBackend() as gone, HttpBackend(name="second") as second:
        gone.stop()
        link = StraightLink(gone, second)
        upstreams = Upstreams(link)
        conversation = Conversation(upstreams)
        answer = conversation.ask("tools/list", 1, {"_meta": MODERN})
        assert answer["result"]["backend"] == "second"
        assert link.failures == [Address("http", "127.0.0.1", gone.port)]
        conversation.upstream.close()
        upstreams.close()
        link.client.close()
