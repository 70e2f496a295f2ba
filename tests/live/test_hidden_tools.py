"""`tools` of an entry of the file: what is hidden is neither listed nor called, by any way."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import ProxyConfig, StdioServer, StreamableProxy, ToolFilter, create_app
from tests.servers.http_backend import Feed, HttpBackend, Turn, reply, stream
from tests.servers.old_server import OldServer
from tests.support.era_servers import EraServerProcess
from tests.support.front import HttpFront, Json, McpClient, WsgiFront
from tests.support.modern_client import ModernClient, called, server_of
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually

TOOLS: Json = {"allow": ["echo", "c*", "seen", "counter"], "deny": ["count", "c?ash", "client_*"]}
SHOWN = ["echo", "chain", "counter", "seen"]
HIDDEN = ["count", "crash", "pid", "client_of"]

ERAS = ["legacy", "modern"]


@contextlib.contextmanager
def served(tmp_path: Path, entry: Json, **settings: Any) -> Iterator[LocalFront]:
    """The application with this server, named `one`."""
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"one": {"tools": TOOLS, **entry}}}))
    with create_app(ProxyConfig(config=str(file), request_timeout=10, **settings)) as app:
        front = LocalFront(app)
        try:
            yield front
        finally:
            front.close()


@pytest.fixture(params=["stdio", "http"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ERAS)
def front(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Iterator[LocalFront]:
    """A server of each era, a process or over HTTP."""
    with contextlib.ExitStack() as stack:
        if kind == "stdio":
            program, *arguments = server_of(request.param)
            entry: Json = {"command": program, "args": arguments}
        else:
            entry = {"url": stack.enter_context(EraServerProcess(request.param)).url}
        yield stack.enter_context(served(tmp_path, entry))


def refusal(name: str) -> Json:
    return {"code": -32602, "message": f"Unknown tool: {name}"}


def names(result: Json) -> list[str]:
    return [tool["name"] for tool in result["tools"]]


# --- both eras, by /mcp --------------------------------------------------------------------------


def test_a_client_with_a_session_sees_and_calls_what_is_shown(front: LocalFront) -> None:
    client = McpClient(front, "/servers/one/mcp").open("2025-11-25")
    assert sorted(names(client.result("tools/list"))) == sorted(SHOWN)
    assert client.result("tools/call", called("echo", text="é"))["structuredContent"]
    for name in HIDDEN:
        answer = client.call("tools/call", called(name))
        assert answer.status == 200
        assert answer.error() == refusal(name)
    seen = client.result("tools/call", called("seen"))["structuredContent"]
    assert not any(name in json.dumps(seen) for name in HIDDEN)


def test_a_modern_client_sees_and_calls_what_is_shown(front: LocalFront) -> None:
    client = ModernClient(front, path="/servers/one/mcp", authorization="Bearer x")
    assert sorted(names(client.call("tools/list").message()["result"])) == sorted(SHOWN)
    assert client.told("echo", text="é")["text"] == "é"
    for name in HIDDEN:
        answer = client.tool(name)
        assert answer.status == 200
        assert answer.error() == refusal(name)


def test_a_server_with_no_tools_hidden_has_all_of_them(tmp_path: Path) -> None:
    program, *arguments = server_of("legacy")
    with served(tmp_path, {"command": program, "args": arguments, "tools": None}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        assert set(HIDDEN) < set(names(client.result("tools/list")))
        assert client.result("tools/call", called("pid"))["structuredContent"]["pid"]


@pytest.mark.parametrize("kind", ["stdio", "http"])
def test_a_batch_calls_nothing_that_is_hidden(kind: str, tmp_path: Path) -> None:
    """In front of a process each call is judged, in front of an HTTP server the batch."""
    calls = [("a", "tools/call", called("echo", text="x")), ("b", "tools/call", called("pid"))]
    batch = [{"jsonrpc": "2.0", "id": i, "method": m, "params": p} for i, m, p in calls]
    with contextlib.ExitStack() as stack:
        if kind == "stdio":
            program, *arguments = server_of("legacy", "--version", "2025-03-26")
            entry: Json = {"command": program, "args": arguments}
        else:
            backend = stack.enter_context(HttpBackend())
            entry = {"url": f"{backend.url}/mcp"}
        front = stack.enter_context(served(tmp_path, entry))
        client = McpClient(front, "/servers/one/mcp").open("2025-03-26")
        answers = {message["id"]: message for message in client.post(batch).messages()}
        assert answers["b"]["error"] == refusal("pid")
        if kind == "stdio":
            assert answers["a"]["result"]["structuredContent"] == {"text": "x"}
        else:
            assert answers["a"]["error"]["code"] == -32600
            assert not any(isinstance(seen.json, list) for seen in backend.seen)


def test_a_notification_calls_nothing(front: LocalFront) -> None:
    client = McpClient(front, "/servers/one/mcp").open("2025-11-25")
    before = client.result("tools/call", called("counter"))["structuredContent"]["count"]
    for name in ("counter", "crash"):
        assert client.notify("tools/call", called(name)).status == 202
    after = client.result("tools/call", called("counter"))["structuredContent"]["count"]
    assert after == before + 1


# --- HTTP+SSE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_a_client_of_2024_11_05_sees_and_calls_what_is_shown(era: str, tmp_path: Path) -> None:
    program, *arguments = server_of(era)
    with served(tmp_path, {"command": program, "args": arguments}) as front:
        client = SseClient(front, path="/servers/one/sse").open()
        assert sorted(names(client.result("tools/list"))) == sorted(SHOWN)
        assert client.result("tools/call", called("echo", text="x"))["structuredContent"]
        for name in HIDDEN:
            key = client.call("tools/call", called(name))
            assert client.answer(key)["error"] == refusal(name)


def test_a_stream_of_an_http_server_of_2024_11_05_is_filtered_too(tmp_path: Path) -> None:
    """The server refuses a hidden tool itself, as one that it does not know."""
    listed: Json = {"tools": [{"name": "echo"}, {"name": "pid"}]}
    with OldServer("old") as backend, served(tmp_path, {"url": f"{backend.url}/sse"}) as front:
        client = SseClient(front, path="/servers/one/sse").open()
        for key, result in ((99, listed), (98, {"content": []})):
            message = {"jsonrpc": "2.0", "id": key, "result": result}
            backend.only.feed.put(b"event: message\ndata: %s\n\n" % json.dumps(message).encode())
        assert [client.next()["result"] for _ in range(2)] == [
            {"tools": [{"name": "echo"}]},
            {"content": []},
        ]
        client.call("tools/call", {"name": "pid", "arguments": {"secret": 1}})
        params = backend.only.posted[-1]["params"]
        assert re.fullmatch("no-such-tool-[0-9a-f]{16}", params["name"])
        assert params["arguments"] == {}


# --- what other readers would read ---------------------------------------------------------------

TRICKS = [
    b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","Name":"pid"}}',
    b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"pid","name":"echo"}}',
    b'{"jsonrpc":"2.0","id":1,"method":"ping","Method":"tools/call","params":{"name":"pid"}}',
    b'{"jsonrpc":"2.0","id":1,"method":"tools/call","method":"ping","params":{"name":"pid"}}',
    b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo"},"PARAMS":{"name":"pid"}}',
]


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as made:
        yield made


@pytest.mark.parametrize("body", TRICKS, ids=range(len(TRICKS)))
@pytest.mark.parametrize("media_type", ["application/json", "text/plain"])
def test_an_http_server_gets_what_was_checked_and_nothing_else(
    backend: HttpBackend, tmp_path: Path, body: bytes, media_type: str
) -> None:
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        client.post(body, Content_Type=media_type).body()
    (sent,) = [seen.body for seen in backend.seen if b'"id":1' in seen.body]
    keys = [key for key, _ in json.loads(sent, object_pairs_hook=lambda pairs: pairs)]
    assert keys == ["jsonrpc", "id", "method", "params"]
    params = json.loads(sent, object_pairs_hook=lambda pairs: pairs)[3][1]
    is_call = json.loads(sent)["method"] == "tools/call"
    assert params == ([("name", "echo")] if is_call else [("name", "pid")])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"jsonrpc":"1.0","id":1,"method":"tools/call","params":{"name":"pid"}}', 400),
        (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"pid"},}', 400),
        (gzip.compress(b'{"jsonrpc":"2.0","id":1,"method":"tools/call"}'), 415),
        (b"", 400),
    ],
    ids=["1.0", "comma", "gzip", "empty"],
)
def test_what_the_endpoint_of_an_http_server_could_read_otherwise_is_refused(
    backend: HttpBackend, tmp_path: Path, body: bytes, status: int
) -> None:
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/mcp")
        assert client.post(body).status == status
        coded = client.post(b"{}", Content_Encoding="gzip")
        assert coded.status == 415
    assert backend.seen == []


def test_other_paths_of_an_http_server_take_what_is_no_message(
    backend: HttpBackend, tmp_path: Path
) -> None:
    backend.on("POST", "/register", reply(201, b"{}", "Content-Type: application/json"))
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        other = McpClient(front, "/servers/one/register")
        for body in (b'{"client_name": "x"}', b"a=b&c=d", b""):
            assert other.post(body).status == 201
            assert backend.last.body == body
        count = len(backend.seen)
        assert other.post(b'{"Method": "tools/call", "name": "pid"}').status == 400
        assert other.post(b'[{"method": "tools/call"}]').status == 400
        answer = other.call("tools/call", called("pid"))
        assert answer.error() == refusal("pid")
        assert len(backend.seen) == count


def test_a_header_that_names_a_hidden_tool_is_a_call_of_it(
    backend: HttpBackend, tmp_path: Path
) -> None:
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = ModernClient(front, path="/servers/one/mcp")
        for method in ("tools/call", "tools/list"):
            params = called("echo") if method == "tools/call" else {}
            answer = client.call(method, params, Mcp_Name="pid", Mcp_Method="tools/call")
            assert answer.error() == refusal("pid")
        answer = client.call("tools/call", called("echo"), Mcp_Name="=?base64?x?=")
        assert answer.error()["code"] == -32602
    assert backend.seen == []


@pytest.mark.parametrize("named", ["echo", "pid"])
@pytest.mark.parametrize("mirrored", ["echo", "pid"])
def test_a_call_in_vain_names_no_tool_in_its_header(
    backend: HttpBackend, tmp_path: Path, named: str, mirrored: str
) -> None:
    """What may be for a stream of 2024-11-05, whose server refuses it there."""
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/messages?session_id=x")
        params = {**called(named), "arguments": {"secret": 1}}
        client.call("tools/call", params, Mcp_Name=mirrored, Mcp_Method="tools/call").body()
    is_refused = "pid" in (named, mirrored)
    sent = json.loads(backend.last.body)["params"]
    assert (sent["name"] == named) is not is_refused
    assert (sent["arguments"] == {}) is is_refused
    assert backend.last.header("Mcp-Name") == (None if is_refused else mirrored)


# --- the answers of HTTP servers -----------------------------------------------------------------

ENTRY = b'{"name": "echo", "inputSchema": {"type":"object", "x": 1.0, "y": "\\u00e9"}}'
LIST = b'{"jsonrpc":"2.0","id":1,"result":{"tools":[%s, {"name":"pid"}], "nextCursor":"n"}}' % ENTRY
WANTED = b'"tools":[%s]' % ENTRY
_JSON = "Content-Type: application/json"


def answering(data: bytes, *headers: str, length: int = -1) -> Any:
    def act(turn: Turn) -> None:
        key = json.dumps(turn.seen.json["id"]).encode()
        turn.reply(200, data.replace(b'"id":1', b'"id":' + key), *headers, length=length)

    return act


@pytest.mark.parametrize("padding", [0, 200_000], ids=["small", "large"])
def test_the_entries_of_a_list_that_stay_keep_their_bytes(
    backend: HttpBackend, tmp_path: Path, padding: int
) -> None:
    data = LIST.replace(b'"n"', b'"%s"' % (b"n" * padding))
    backend.rpc["tools/list"] = answering(data, _JSON)
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        body = client.call("tools/list", Accept_Encoding="gzip").body()
    assert WANTED in body
    assert b"pid" not in body
    assert len(json.loads(body)["result"]["nextCursor"]) == padding
    assert backend.last.header("Accept-Encoding") in (None, "identity")


def test_a_list_in_an_event_stream_keeps_what_is_beside_it(
    backend: HttpBackend, tmp_path: Path
) -> None:
    note = b'{"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "pid"}}'
    events = b": hi\r\n\r\nid: 1\r\ndata: %s\r\n\r\nid: 2\r\ndata: %s\r\n\r\n" % (note, LIST)
    backend.rpc["tools/list"] = answering(events, "Content-Type: text/event-stream")
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        body = client.call("tools/list").body()
    assert body.startswith(b": hi\r\n\r\nid: 1\r\ndata: %s\r\n\r\nid: 2\r\ndata: " % note)
    assert WANTED in body
    assert b'{"name":"pid"}' not in body


def test_a_list_that_comes_by_a_resumed_stream_is_filtered(
    backend: HttpBackend, tmp_path: Path
) -> None:
    feed = Feed()
    backend.on("GET", "/mcp", stream(b"id: 1\ndata: %s\n\n" % LIST, feed))
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        listening = client.listen(Last_Event_ID="0")
        message = next(listening.stream())
        assert names(message["result"]) == ["echo"]
        listening.close()


def test_a_compressed_list_is_not_passed(backend: HttpBackend, tmp_path: Path) -> None:
    backend.rpc["tools/list"] = reply(200, gzip.compress(LIST), _JSON, "Content-Encoding: gzip")
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        answer = McpClient(front, "/servers/one/mcp").open().call("tools/list")
        assert answer.failure == "bad-answer"


@pytest.mark.parametrize("data", [LIST[:-1], LIST.replace(b"2.0", b"1.0")], ids=["cut", "1.0"])
def test_a_list_that_cannot_be_read_is_not_passed(
    backend: HttpBackend, tmp_path: Path, data: bytes
) -> None:
    backend.rpc["tools/list"] = answering(data, _JSON)
    with served(tmp_path, {"url": f"{backend.url}/mcp"}) as front:
        answer = McpClient(front, "/servers/one/mcp").open().call("tools/list")
        assert answer.failure == "bad-answer"
        assert b'"pid"' not in answer.body()


def test_where_nothing_is_hidden_bytes_pass(backend: HttpBackend, tmp_path: Path) -> None:
    backend.rpc["tools/list"] = answering(LIST, _JSON)
    body = b'{ "jsonrpc":"2.0", "id":1, "method":"tools/list" }'
    with served(tmp_path, {"url": f"{backend.url}/mcp", "tools": None}) as front:
        client = McpClient(front, "/servers/one/mcp").open()
        assert client.post(body, Accept_Encoding="gzip").body() == LIST
    assert backend.last.body == body
    assert backend.last.header("Accept-Encoding") == "gzip"


# --- workers, and embedders ----------------------------------------------------------------------


def test_what_is_relayed_is_filtered_by_the_worker_that_has_the_server(
    redis_server: RedisServer, redis_prefix: str, tmp_path: Path
) -> None:
    program, *arguments = server_of("legacy")
    file = tmp_path / "servers.json"
    entry = {"command": program, "args": arguments, "tools": TOOLS}
    file.write_text(json.dumps({"mcpServers": {"one": entry}}))
    settings = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    options = ["--config", str(file), "--workers", "2", "--passing", "off", *settings]
    with ProxyProcess(options=options) as process:
        eventually(lambda: len(process.worker_pids()) == 2)
        client = McpClient(HttpFront(process.base), "/servers/one/mcp").open()
        for _ in range(8):  # each by a connection of its own
            assert sorted(names(client.result("tools/list"))) == sorted(SHOWN)
            assert client.call("tools/call", called("pid")).error() == refusal("pid")


def test_an_embedder_hides_tools_of_a_stdio_server() -> None:
    server = StdioServer("one", server_of("legacy"), tools=ToolFilter(allow=("echo",)))
    with StreamableProxy(server) as proxy:
        client = McpClient(WsgiFront(proxy)).open()
        assert names(client.result("tools/list")) == ["echo"]
        assert client.call("tools/call", called("seen")).error() == refusal("seen")
