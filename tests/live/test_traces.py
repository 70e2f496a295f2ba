"""Spans of calls, as a collector gets them: names, attributes, and whose child each is."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest

from mcp_proxy import Principal, ProxyConfig, create_app
from mcp_proxy.app import Application
from mcp_proxy.errors import ConfigError
from mcp_proxy.traces import Tracing, require_library
from tests.servers.http_backend import HttpBackend, Turn
from tests.support.era_servers import EraServerProcess
from tests.support.front import SCRIPTED, Answer, HttpFront, McpClient, WsgiFront
from tests.support.modern_client import ModernClient
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront
from tests.support.waiting import eventually


class Parent:
    """The span of a client that calls, by which its trace is known."""

    def __init__(self, is_sampled: bool = True) -> None:
        self.trace, self.id = secrets.token_hex(16), secrets.token_hex(8)
        self.traceparent = f"00-{self.trace}-{self.id}-{is_sampled:02x}"

    @property
    def meta(self) -> dict[str, Any]:
        """Params that have it."""
        return {"_meta": {"traceparent": self.traceparent, "kept": [1, {"a": None}]}}


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@contextmanager
def traced(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[Application]:
    """An application of this process whose spans go to the receiver."""
    for name, value in receiver.environment.items():
        monkeypatch.setenv(name, value)
    settings = {"command": SCRIPTED, **settings}
    if "target_url" in settings:
        del settings["command"]
    with create_app(ProxyConfig(traces=True, **settings)) as app:
        yield app


@pytest.fixture
def app(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    with traced(receiver, monkeypatch) as made:
        yield made


def echoed(client: McpClient, params: dict[str, Any]) -> dict[str, Any]:
    """The `_meta` that the server has got with a call."""
    result = client.result("echo", params)
    meta: dict[str, Any] = result["_meta"]
    return meta


# --- one tree ------------------------------------------------------------------------------------


def relayed(receiver: OtlpReceiver, client: McpClient) -> tuple[Parent, dict[str, Any]]:
    """A call of which both workers have made spans, and the `_meta` that the server has got."""

    def attempt() -> tuple[Parent, dict[str, Any]] | None:
        parent = Parent()
        meta = echoed(client, parent.meta)
        spans = receiver.of_trace(parent.trace, 2)
        if "worker:" not in str(spans[1].attributes["mcp_proxy.backend"]):
            return None
        return parent, meta

    return eventually(attempt, 60, "no call was relayed")


def test_a_relayed_call_has_its_four_spans_in_one_tree(
    receiver: OtlpReceiver, redis_server: RedisServer
) -> None:
    options = ["--redis-url", redis_server.url, "--workers", "2", "--passing", "off"]
    with ProxyProcess(
        SCRIPTED, options=[*options, "--traces", "on"], environment=receiver.environment
    ) as process:
        client = McpClient(HttpFront(process.base)).open()
        parent, meta = relayed(receiver, client)
        chain = receiver.of_trace(parent.trace, 4)
        workers = process.worker_pids()
    assert [span.kind for span in chain] == ["server", "client", "server", "client"]
    assert chain[0].parent == parent.id
    assert [span.process for span in chain] == [chain[0].process] * 2 + [chain[2].process] * 2
    assert {chain[0].process, chain[2].process} == set(workers)
    assert meta["traceparent"] == chain[3].traceparent
    assert meta["kept"] == parent.meta["_meta"]["kept"]
    assert {span.name for span in chain} == {"echo"}
    assert {span.service for span in chain} == {"mcp-wsgi-proxy"}
    assert not any(span.has_failed for span in chain)
    assert [span.seconds for span in chain] == sorted((s.seconds for s in chain), reverse=True)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_call_is_a_server_span_and_a_client_span_below(
    app: Application, receiver: OtlpReceiver, accept: str
) -> None:
    client = McpClient(WsgiFront(app)).open()
    parent = Parent()
    params = {"name": "say hi", "arguments": {"word": "secret-1"}, **parent.meta}
    client.call("tools/call", params, Accept=accept).messages()
    server, below = receiver.of_trace(parent.trace, 2)
    assert (server.kind, server.parent, server.name) == ("server", parent.id, "tools/call say hi")
    assert (below.kind, below.parent, below.name) == ("client", server.id, "tools/call say hi")
    common = {
        "mcp.method.name": "tools/call",
        "gen_ai.tool.name": "say hi",
        "gen_ai.operation.name": "execute_tool",
        "jsonrpc.request.id": server.attributes["jsonrpc.request.id"],
    }
    assert server.attributes == {
        **common,
        "network.transport": "tcp",
        "network.protocol.name": "http",
        "client.address": "127.0.0.1",
        "mcp.session.id": (client.session or "")[-8:],
        "mcp_proxy.server": "default",
    }
    backend = below.attributes.pop("mcp_proxy.backend")
    assert str(backend).startswith("pid:")
    assert below.attributes == {**common, "network.transport": "pipe"}


def test_the_header_is_the_parent_where_meta_has_none(
    app: Application, receiver: OtlpReceiver
) -> None:
    client = McpClient(WsgiFront(app)).open()
    parent, other = Parent(), Parent()
    client.call("echo", {}, Traceparent=parent.traceparent).body()
    assert receiver.of_trace(parent.trace, 2)[0].parent == parent.id
    client.call("echo", other.meta, Traceparent=parent.traceparent).body()
    (server, _) = receiver.of_trace(other.trace, 2)
    assert (server.parent, server.links) == (other.id, [parent.id])


def test_without_a_parent_a_call_begins_a_trace(app: Application, receiver: OtlpReceiver) -> None:
    client = McpClient(WsgiFront(app)).open()
    meta = echoed(client, {"a": 1})
    server = receiver.named("echo")
    assert server.parent == ""
    below = receiver.of_trace(server.trace, 2)[1]
    assert meta["traceparent"].split("-")[1:3] == [below.trace, below.id]


def test_a_parent_that_is_not_sampled_makes_no_spans(
    app: Application, receiver: OtlpReceiver
) -> None:
    client = McpClient(WsgiFront(app)).open()
    parent, sampled = Parent(is_sampled=False), Parent()
    meta = echoed(client, parent.meta)
    assert meta["traceparent"].startswith(f"00-{parent.trace}-")
    assert meta["traceparent"].endswith("-00")
    echoed(client, sampled.meta)
    receiver.of_trace(sampled.trace, 2)
    assert not [span for span in receiver.spans if span.trace == parent.trace]


def test_a_context_that_cannot_be_read_is_none(app: Application, receiver: OtlpReceiver) -> None:
    client = McpClient(WsgiFront(app)).open()
    for wrong in (7, None, "00-zz", {"a": 1}):
        client.result("echo", {"_meta": {"traceparent": wrong}})
    client.call("echo", {"_meta": None}).body()
    client.post(b'{"jsonrpc":"2.0","id":9,"method":"echo","params":[1]}').body()
    eventually(lambda: len([s for s in receiver.spans if s.name == "echo"]) == 12)
    assert all(s.parent == "" for s in receiver.spans if (s.name, s.kind) == ("echo", "server"))


# --- how it has ended ----------------------------------------------------------------------------


def failures(spans: Sequence[ReceivedSpan]) -> list[tuple[Any, Any]]:
    """What each span says of its failure."""
    assert all(span.has_failed for span in spans)
    names = ("error.type", "rpc.response.status_code")
    return [(span.attributes.get(names[0]), span.attributes.get(names[1])) for span in spans]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_span_has_the_code_of_an_error_and_the_kind_of_a_failure(
    app: Application, receiver: OtlpReceiver, accept: str
) -> None:
    client = McpClient(WsgiFront(app)).open()
    refused, died, nobody = Parent(), Parent(), Parent()
    client.call("fail", {"code": -32602, "message": "m", **refused.meta}, Accept=accept).body()
    assert failures(receiver.of_trace(refused.trace, 2)) == [("-32602", "-32602")] * 2
    client.call("die", died.meta, Accept=accept).body()
    assert failures(receiver.of_trace(died.trace, 2)) == [("server-exited", "-32000")] * 2
    unknown = McpClient(WsgiFront(app))
    unknown.session = "unknown"
    unknown.call("echo", nobody.meta, Accept=accept).body()
    assert failures(receiver.of_trace(nobody.trace, 1)) == [("session-unknown", "-32001")]


def test_a_tool_that_says_that_it_has_failed_is_an_error(
    app: Application, receiver: OtlpReceiver
) -> None:
    parent = Parent()
    client = McpClient(WsgiFront(app)).open()
    client.call("echo", {"isError": True, **parent.meta}).body()
    assert failures(receiver.of_trace(parent.trace, 2)) == [("tool_error", None)] * 2


def test_the_spans_of_a_client_that_leaves_end(app: Application, receiver: OtlpReceiver) -> None:
    parent = Parent()
    parent_meta = {**parent.meta["_meta"], "progressToken": 1}
    client = McpClient(WsgiFront(app)).open()
    answer = client.call("hold", {"name": "x", "_meta": parent_meta})
    next(answer.stream())
    answer.close()
    assert failures(receiver.of_trace(parent.trace, 2)) == [("client-left", None)] * 2
    client.result("release", {"name": "x"})


def test_each_call_of_a_batch_has_its_spans(app: Application, receiver: OtlpReceiver) -> None:
    client = McpClient(WsgiFront(app)).open("2025-03-26")
    one, two = Parent(), Parent()
    calls = [
        {"jsonrpc": "2.0", "id": 1, "method": "echo", "params": one.meta},
        {"jsonrpc": "2.0", "id": "1", "method": "fail", "params": {"code": 5, **two.meta}},
    ]
    client.post(calls).messages()
    assert not receiver.of_trace(one.trace, 2)[0].has_failed
    assert failures(receiver.of_trace(two.trace, 2)) == [("5", "5")] * 2


def test_no_span_has_what_was_said_or_shown(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in receiver.environment.items():
        monkeypatch.setenv(name, value)
    config = ProxyConfig(command=SCRIPTED, traces=True)
    with create_app(config, authenticate=lambda environ: Principal("alice")) as app:
        client = McpClient(WsgiFront(app)).open()
        params = {"name": "echo", "arguments": {"a": "hidden-1"}, "message": "hidden-2"}
        client.call("tools/call", params, Authorization="Bearer hidden-3").body()
        client.call("fail", {"code": 1, **params}, X_API_Key="hidden-4").body()
        found = receiver.named("fail")
        assert found.attributes["enduser.id"] == "alice"
        session = client.session
    assert session
    assert not [b for b in receiver.bodies if b"hidden-" in b or session.encode() in b]


# --- every wire ----------------------------------------------------------------------------------


def test_an_http_server_gets_the_context_in_header_and_meta(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(turn: Turn) -> None:
        turn.result({"header": turn.seen.header("Traceparent"), "body": turn.seen.json})

    with HttpBackend() as backend:
        backend.rpc["tools/call"] = act
        url = f"http://127.0.0.1:{backend.port}/mcp"
        with (
            traced(receiver, monkeypatch, target_url=(url,)) as app,
            closing(LocalFront(app)) as front,
        ):
            client = McpClient(front).open()
            parent = Parent()
            got = client.result("tools/call", {"name": "x", **parent.meta})
            server, below = receiver.of_trace(parent.trace, 2)
    assert (server.parent, below.parent) == (parent.id, server.id)
    assert got["header"] == below.traceparent
    assert got["body"]["params"]["_meta"]["traceparent"] == below.traceparent
    assert got["body"]["params"]["_meta"]["kept"] == parent.meta["_meta"]["kept"]
    assert (below.attributes["server.address"], below.attributes["server.port"]) == (
        "127.0.0.1",
        backend.port,
    )


def test_a_bridged_http_server_gets_the_context_too(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        EraServerProcess("modern") as upstream,
        traced(receiver, monkeypatch, target_url=(upstream.url,)) as app,
        closing(LocalFront(app)) as front,
    ):
        client = McpClient(front).open()
        parent = Parent()
        client.result("tools/list", parent.meta)
        chain = receiver.of_trace(parent.trace, 2)
        seen = [one.get("traceparent") for one in upstream.requests("tools/list")]
    assert chain[0].parent == parent.id
    assert chain[1].traceparent in seen
    assert chain[1].attributes["network.transport"] == "tcp"


def test_a_client_without_sessions_is_traced(app: Application, receiver: OtlpReceiver) -> None:
    client = ModernClient(WsgiFront(app))
    parent = Parent()
    meta = {**client.meta(), "traceparent": parent.traceparent}
    answer: Answer = client.call("echo", {"_meta": meta})
    assert answer.message()["result"]["_meta"]["traceparent"]
    server, below = receiver.of_trace(parent.trace, 2)
    assert (server.parent, below.parent) == (parent.id, server.id)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_over_http_sse_the_worker_that_has_the_stream_makes_the_spans(
    receiver: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    redis_server: RedisServer,
    is_elsewhere: bool,
) -> None:
    settings = {"redis_url": redis_server.url}
    with (
        traced(receiver, monkeypatch, **settings) as app,
        traced(receiver, monkeypatch, **settings) as other,
        closing(SseClient(WsgiFront(app), WsgiFront(other if is_elsewhere else app))) as client,
    ):
        client.open()
        by_meta, by_header, failing = Parent(), Parent(), Parent()
        got = client.result("echo", by_meta.meta)
        headers = {"Traceparent": by_header.traceparent}
        client.front = client.posts = HeaderFront(client.posts, headers)
        client.result("echo", {})
        client.answer(client.call("fail", {"code": 3, **failing.meta}))
        chain = receiver.of_trace(by_meta.trace, 2)
        assert [span.kind for span in chain] == ["server", "client"]
        assert (chain[0].parent, chain[1].traceparent) == (by_meta.id, got["_meta"]["traceparent"])
        assert receiver.of_trace(by_header.trace, 2)[0].parent == by_header.id
        assert failures(receiver.of_trace(failing.trace, 2)) == [("3", "3")] * 2


class HeaderFront:
    """A way in whose requests have headers of their own."""

    def __init__(self, front: Any, headers: dict[str, str]) -> None:
        self._front = front
        self._headers = headers

    def request(
        self, method: str, path: str, headers: dict[str, Any], body: bytes | None
    ) -> Answer:
        answer: Answer = self._front.request(method, path, {**headers, **self._headers}, body)
        return answer


# --- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_the_last_spans_of_a_worker_are_sent_at_its_end(receiver: OtlpReceiver, kind: str) -> None:
    environment = {**receiver.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    options = ["--traces", "on", "--worker-class", kind]
    with ProxyProcess(SCRIPTED, options=options, environment=environment) as process:
        client = McpClient(HttpFront(process.base)).open()
        for _ in range(50):
            client.result("echo", {})
        assert not receiver.spans
    assert len([span for span in receiver.spans if span.name == "echo"]) == 100


def test_a_collector_that_is_away_holds_up_no_call_and_no_end() -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with ProxyProcess(SCRIPTED, options=["--traces", "on"], environment=environment) as process:
        client = McpClient(HttpFront(process.base)).open()
        for _ in range(20):
            client.result("echo", {})
        before = time.monotonic()
        os.kill(process.master_pid, signal.SIGTERM)
        eventually(partial(has_ended, process), 30)
        assert time.monotonic() - before < 20


def has_ended(process: ProxyProcess) -> bool:
    """Whether the master is no more, or nobody has waited for it yet."""
    try:
        with open(f"/proc/{process.master_pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_line_of_a_traced_call_names_its_trace(receiver: OtlpReceiver) -> None:
    options = ["--traces", "on"]
    with ProxyProcess(SCRIPTED, options=options, environment=receiver.environment) as process:
        client = McpClient(HttpFront(process.base)).open()
        parent = Parent()
        client.result("echo", parent.meta)
        eventually(lambda: f" trace={parent.trace}" in process.log())


def test_without_traces_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys; from mcp_proxy import create_app, ProxyConfig\n"
        "from tests.support.front import McpClient, WsgiFront\n"
        "with create_app(ProxyConfig()) as app:\n"
        "    McpClient(WsgiFront(app)).open().result('tools/list')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_applications_share_the_tracer_of_their_process(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(receiver, monkeypatch) as one:
        with traced(receiver, monkeypatch) as two:
            for app in (one, two):
                McpClient(WsgiFront(app)).open()
            shared = Tracing.tracer
        assert Tracing.tracer is shared is not None
        McpClient(WsgiFront(one)).open()
    assert Tracing.tracer is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_library()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"mcp-wsgi-proxy\[otel\]"):
        require_library()
