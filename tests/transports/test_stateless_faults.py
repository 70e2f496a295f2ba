"""Modern calls when something is wrong, full, ending, or asked for by a stranger."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.front import Answer, Json, WsgiFront
from tests.support.modern_client import (
    ASKABLE,
    PREFIX,
    SUBSCRIPTION,
    ModernClient,
    Trace,
    called,
    server_of,
)
from tests.support.proxies import replicas
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

ERAS = ["modern", "legacy"]


@contextmanager
def proxied(command: tuple[str, ...], **settings: Any) -> Iterator[tuple[Any, ModernClient]]:
    """A transport in front of a server, and a client."""
    quick = {"sse_after": 0.3, "keepalive_interval": 0.2}
    with replicas(1, command=command, **{**quick, **settings}) as one:
        yield one[0].app, ModernClient(one[0].front)


def failed(answer: Answer, kind: str, key: Any, status: int = 200, code: int = -32000) -> Json:
    """The error of an answer that failed through no fault of its client."""
    assert (answer.status, answer.failure) == (status, kind), answer.body()
    message = answer.message()
    assert (message["id"], message["error"]["code"]) == (key, code)
    error: Json = message["error"]
    return error


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_server_that_ends_fails_its_calls_and_is_started_again(era: str, accept: str) -> None:
    with proxied(server_of(era)) as (_, client):
        pid = client.pid()
        answer = client.call("tools/call", called("crash", code=3), "c", Accept=accept)
        assert answer.status == 200
        message = answer.message()
        assert (message["id"], message["error"]["code"]) == ("c", -32000)
        assert "exit code 3" in message["error"]["message"]
        assert client.pid() != pid


@pytest.mark.parametrize("era", ERAS)
def test_a_server_that_is_killed_fails_all_that_is_in_flight(era: str, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    with proxied(server_of(era, "--trace", str(trace.path))) as (_, client):
        pid = client.pid()
        streamed = client.call("tools/call", called("slow", label="a"), "s", token="t")
        stream = streamed.stream()
        assert next(stream)["method"] == "notifications/progress"
        standing = client.listen("l", toolsListChanged=True)
        listening = standing.stream()
        acknowledged = next(listening)
        assert acknowledged["params"]["_meta"] == {SUBSCRIPTION: "l"}
        with ThreadPoolExecutor(1) as pool:
            params = called("slow", label="b")
            accept = {"Accept": "application/json"}
            call = pool.submit(lambda: client.call("tools/call", params, "j", **accept))
            trace.wait("started", end=" b")
            os.kill(pid, signal.SIGKILL)
            failed(call.result(20), "server-exited", "j")
        last = next(stream)
        assert (last["id"], last["error"]["code"]) == ("s", -32000)
        assert next(stream, None) is None
        last = next(listening)  # an end, so that the client opens another
        assert last["id"] == "l"
        assert client.pid() != pid


@pytest.mark.parametrize(
    "argv",
    [("/no/such/program",), (sys.executable, "-c", "raise SystemExit(7)"), ("true",)],
)
def test_a_server_that_does_not_start_is_named(argv: tuple[str, ...]) -> None:
    with proxied(argv, sse_after=30) as (_, client):
        answer = client.call("tools/list", key="k")
        message = answer.message()
        assert (answer.status, message["id"], message["error"]["code"]) == (200, "k", -32000)
        assert answer.failure in ("server-start-failed", "server-exited")
        discovered = client.call("server/discover", key="d")
        message = discovered.message()
        assert (message["id"], message["error"]["code"]) == ("d", -32603)
        assert discovered.status in (502, 503)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("method", ["tools/list", "subscriptions/listen"])
def test_a_client_hears_comments_while_its_server_starts(
    era: str, is_first: bool, method: str
) -> None:
    with proxied(server_of(era, "--slow-start", "1.5")) as (app, client):
        if not is_first:
            os.kill(client.pid(), signal.SIGKILL)
            eventually(lambda: app.owner.supervisor.children == 0)
        params = {"notifications": {"toolsListChanged": True}}
        answer = client.call(method, params)
        assert answer.is_stream
        raw = b""
        while b"data:" not in raw:
            raw += next(answer.pieces)
        assert raw.partition(b"data:")[0].count(b"\n:") >= 2
        answer.close()
        assert client.pid()


@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
def test_a_server_that_takes_long_to_fail_is_named(method: str) -> None:
    """For discover by a status: a client that is answered 200 takes the server for a legacy one."""
    program = "import time; time.sleep(1); raise SystemExit(7)"
    with proxied((sys.executable, "-c", program)) as (_, client):
        answer = client.call(method, key="k")
        message = answer.message()
        assert message["id"] == "k"
        assert "exit code 7" in message["error"]["message"]
        assert answer.is_stream is (method == "tools/list")
        assert (answer.status == 200) is (method == "tools/list")


def test_a_server_that_does_not_answer_is_waited_for_as_long_as_was_said(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    command = server_of("legacy", "--trace", str(trace.path))
    with proxied(command, request_timeout=1, sse_after=5) as (_, client):
        assert client.pid()
        answer = client.call("tools/call", called("slow", label="late"), "k")
        error = failed(answer, "server-timeout", "k")
        assert error["message"] == "The server did not answer within 1 second"
        trace.wait("cancelled", end=" late")
        assert client.pid()


# --- what is full, or ending ---------------------------------------------------------------------


@pytest.mark.parametrize("era", ERAS)
def test_a_full_worker_says_so(era: str) -> None:
    with proxied(server_of(era), max_sessions=1, evict_after=60) as (_, client):
        busy = client.call("tools/call", called("slow"), token="t")
        next(busy.stream())
        other = client.known_as("Bearer other")
        answer = other.call("tools/list", key="k")
        failed(answer, "overloaded", "k")
        assert answer.headers["Retry-After"]
        discovered = other.call("server/discover", key="d")
        failed(discovered, "overloaded", "d", 503, -32603)
        busy.close()


@pytest.mark.parametrize("era", ERAS)
def test_an_idle_home_gives_way(era: str) -> None:
    with proxied(server_of(era), max_sessions=1, evict_after=0.01) as (app, client):
        pid = client.pid()
        other = client.known_as("Bearer other")
        eventually(lambda: other.call("tools/call", called("pid")).has_succeeded)
        assert other.pid() != pid
        eventually(lambda: app.owner.supervisor.children == 1)


@pytest.mark.parametrize("era", ERAS)
def test_no_place_for_a_subscription_is_an_error_and_no_stream_that_ends(era: str) -> None:
    with proxied(server_of(era), max_streams=1) as (_, client):
        first = client.listen(toolsListChanged=True)
        next(first.stream())
        answer = client.listen("l", toolsListChanged=True)
        failed(answer, "overloaded", "l")
        assert answer.headers["Retry-After"]
        assert not answer.is_stream
        assert client.pid()  # calls need no such place
        first.close()
        again = client.listen(toolsListChanged=True)
        assert next(again.stream())["method"] == "notifications/subscriptions/acknowledged"
        again.close()


@pytest.mark.parametrize(
    ("era", "wanted"), [*((era, {}) for era in ERAS), ("legacy", {"toolsListChanged": 5})]
)
def test_a_subscription_that_ends_at_once_keeps_no_place(era: str, wanted: Json) -> None:
    with proxied(server_of(era), max_streams=1) as (_, client):
        for _ in range(3):
            client.listen("l", **wanted).body()
        standing = client.listen(toolsListChanged=True)
        next(standing.stream())
        standing.close()


@pytest.mark.parametrize("era", ERAS)
def test_what_is_draining_takes_no_new_calls_and_ends_subscriptions(era: str) -> None:
    """T73."""
    with proxied(server_of(era)) as (app, client):
        standing = client.listen("l", toolsListChanged=True)
        messages = standing.stream()
        next(messages)
        params = called("slow", seconds=1.0)
        running_call = client.call("tools/call", params, "r", Accept="text/event-stream")
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(app.close, 20)
            last = next(messages)
            assert (last["id"], last["result"]["resultType"]) == ("l", "complete")
            assert next(messages, None) is None
            eventually(lambda: client.call("tools/list").failure == "draining")
            failed(client.call("server/discover", key="d"), "draining", "d", 503, -32603)
            assert running_call.message()["result"]["structuredContent"] == {"label": ""}
            ending.result(20)


# --- the store -----------------------------------------------------------------------------------


@pytest.fixture
def redis(own_redis: Callable[..., RedisServer]) -> RedisServer:
    return own_redis()


@pytest.mark.parametrize("era", ERAS)
def test_calls_fail_while_the_store_is_away_and_discover_says_so_by_its_status(
    era: str, redis: RedisServer
) -> None:
    command = server_of(era)
    with replicas(2, redis_url=redis.url, command=command, sse_after=0.3) as several:
        clients = [ModernClient(replica.front) for replica in several.each]
        pids = [client.pid() for client in clients]
        assert len(set(pids)) == 1
        redis.stop()
        for client in clients:
            answer = client.call("tools/list", key="k")
            failed(answer, "store-unavailable", "k")
            assert answer.headers["Retry-After"]
            discovered = client.call("server/discover", key="d")
            failed(discovered, "store-unavailable", "d", 503, -32603)
            note = {"jsonrpc": "2.0", "method": "notifications/x"}
            assert client.post(note).status == 202
        redis.start()
        for client in clients:
            eventually(lambda client=client: client.call("tools/list").has_succeeded)
            assert client.pid() == pids[0]


@pytest.mark.parametrize("status", ["json-rpc", "http"])
def test_failures_may_be_told_by_their_status(status: str) -> None:
    settings = {"failure_status": status, "max_sessions": 1}
    with proxied(server_of("modern"), **settings) as (_, client):
        busy = client.call("tools/call", called("slow"), token="t")
        next(busy.stream())
        other = client.known_as("Bearer other")
        expected = 503 if status == "http" else 200
        failed(other.call("tools/list", key="k"), "overloaded", "k", expected)
        failed(other.call("server/discover", key="d"), "overloaded", "d", 503, -32603)
        busy.close()


# --- strangers -----------------------------------------------------------------------------------

ELSEWHERE = [
    {"SERVER_NAME": "10.0.0.7"},
    {"HTTP_X_FORWARDED_FOR": "203.0.113.9"},
    {"HTTP_FORWARDED": "for=203.0.113.9"},
    {"HTTP_VIA": "1.1 proxy"},
    {"HTTP_X_REAL_IP": "127.0.0.1"},
    {"REMOTE_ADDR": "203.0.113.9"},
]


@pytest.mark.parametrize("environ", ELSEWHERE, ids=lambda environ: "".join(environ))
def test_an_anonymous_stranger_is_refused_so_that_it_falls_back(environ: Json) -> None:
    """T86: by none of the codes that would make it take us for a modern server."""
    with proxied(server_of("legacy")) as (app, _):
        client = ModernClient(WsgiFront(app, environ))
        for method in ("server/discover", "tools/list"):
            answer = client.call(method, key="s")
            message = answer.message()
            assert (answer.status, message["id"]) == (400, "s")
            assert message["error"]["code"] == -32600
            assert answer.headers["Content-Type"] == "application/json"
        known = client.known_as("Bearer a")
        assert known.pid()
        assert known.call("server/discover").status == 200


def test_with_a_public_url_everybody_is_a_stranger() -> None:
    with proxied(server_of("legacy"), public_url="https://public.example") as (_, client):
        assert client.call("tools/list").status == 400
        assert client.known_as("Bearer a").pid()


@pytest.mark.parametrize("environ", ELSEWHERE[:2], ids=lambda environ: "".join(environ))
def test_an_anonymous_stranger_is_served_by_a_modern_server(environ: Json) -> None:
    with proxied(server_of("modern")) as (app, _):
        assert ModernClient(WsgiFront(app, environ)).pid()


@pytest.mark.parametrize("setting", ["shared", "one"])
def test_an_anonymous_stranger_is_served_where_that_was_said(setting: str) -> None:
    with proxied(server_of("legacy"), stateless_children=setting) as (app, _):
        clients = [ModernClient(WsgiFront(app, environ)) for environ in ELSEWHERE]
        assert len({client.pid() for client in clients}) == 1


@pytest.mark.parametrize("era", ERAS)
def test_who_authorizes_otherwise_has_another_server(era: str) -> None:
    with proxied(server_of(era)) as (_, client):
        names = ["Bearer a", "Bearer b", "bearer a", "Basic YTpi", None]
        pids = [client.known_as(name).pid() for name in names]
        assert len(set(pids)) == len(names)
        assert [client.known_as(name).pid() for name in names] == pids


def test_who_declares_otherwise_has_another_legacy_server() -> None:
    with proxied(server_of("legacy")) as (_, client):
        declared: list[Json] = [{}, {"elicitation": {}}, {"sampling": {}}, ASKABLE]
        pids = [client.declaring(**each).pid() for each in declared]
        assert len(set(pids)) == len(declared)
        assert client.declaring(elicitation={"form": {}}).pid() == pids[1]
        assert client.declaring(experimental={"x": {}}).pid() == pids[0]


def test_who_declares_otherwise_has_the_same_modern_server() -> None:
    with proxied(server_of("modern")) as (_, client):
        declared: list[Json] = [{}, {"elicitation": {}}, ASKABLE]
        assert len({client.declaring(**each).pid() for each in declared}) == 1


def test_a_legacy_server_hears_nothing_of_its_clients_own_words() -> None:
    with proxied(server_of("legacy")) as (_, client):
        said = client.declaring(sampling={"tools": {"secret": 1}}, extra={"mine": {}})
        told = said.told("client_of")
        assert told["clientInfo"]["name"] == "mcp_proxy"
        assert told["capabilities"] == {"sampling": {"tools": {}}}
        seen = [it for it in said.told("seen")["messages"] if it.get("method") == "tools/call"]
        assert seen
        assert all("_meta" not in message["params"] for message in seen)


@pytest.mark.parametrize("era", ERAS)
def test_who_cannot_take_a_stream_cannot_listen(era: str) -> None:
    with proxied(server_of(era)) as (_, client):
        params = {"notifications": {"toolsListChanged": True}}
        answer = client.call("subscriptions/listen", params, Accept="application/json")
        assert answer.status == 406


def test_a_server_that_never_starts_makes_the_replica_not_ready() -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    with proxied(command) as (app, client):
        for _ in range(2):
            assert client.call("tools/list").message()["error"]["code"] == -32000
        reason = app.not_ready_reason()
        assert reason is not None
        paused = client.call("tools/list").message()["error"]["message"]
        assert "started again in" in paused


@pytest.mark.parametrize("version", [7, ["2026-07-28"]])
def test_metadata_of_a_wrong_type_is_an_invalid_param(version: object) -> None:
    """T55."""
    with proxied(server_of("modern")) as (_, client):
        params = {"_meta": {**client.meta(), f"{PREFIX}protocolVersion": version}}
        answer = client.call("tools/list", params, key="k")
        assert (answer.status, answer.error()["code"]) == (400, -32602)
