"""Several workers whose sessions are in their memory alone, in a real gunicorn."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.live.test_passing import LABELLED, Client, Got, Pair, head, listened, message, request
from tests.proofs.labelled import LABEL
from tests.servers.http_backend import HttpBackend
from tests.support import needs
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually
from tests.transports.calls import say

MODERN = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@contextmanager
def workers(count: int, *options: str, **settings: str) -> Iterator[Pair]:
    environment = {
        "MCP_PROXY_WORKERS": str(count),
        "MCP_PROXY_STATELESS_CHILDREN": "shared",
        **settings,
    }
    with (
        ProxyProcess(SCRIPTED, way=LABELLED, options=options, environment=environment) as process,
        ExitStack() as stack,
    ):
        eventually(lambda: len(process.worker_pids()) == count)
        pair = Pair(process, stack)
        for worker in process.worker_pids():
            pair.at(worker)
        yield pair


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    """A proxy that no test harms."""
    with workers(3) as found:
        yield found


@pytest.fixture
def pair() -> Iterator[Pair]:
    with workers(2) as found:
        yield found


@needs.MEMORY
def test_a_session_is_served_through_every_worker(shared: Pair) -> None:
    session, owner = shared.open()
    for worker in shared.process.worker_pids():
        client = shared.at(worker)
        for number in range(3):
            answer = client.call("echo", {"n": number}, session)
            assert (answer.status, answer.worker) == (200, owner)
            assert answer.result == {"n": number}


@needs.MEMORY
def test_a_pool_of_connections_is_passed(shared: Pair) -> None:
    """There is nobody who could relay."""
    sessions = [shared.open(worker) for worker in shared.process.worker_pids()]
    client = shared.connect()
    for number in range(12):
        session, owner = sessions[number % 3]
        answer = client.call("echo", {"n": number}, session)
        assert (answer.status, answer.worker) == (200, owner)


@needs.MEMORY
def test_sessions_are_spread_where_one_worker_gets_all_connections() -> None:
    with workers(2) as pair:
        first = min(pair.process.worker_pids())
        owners = [pair.open(first)[1] for _ in range(20)]
        assert min(Counter(owners).values()) >= 7


@needs.MEMORY
def test_a_session_that_nobody_has_is_404(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    client.send_raw(
        f"DELETE /mcp HTTP/1.1\r\nHost: localhost\r\nMcp-Session-Id: {session}\r\n\r\n".encode()
    )
    assert client.read_head().status == 204
    for worker in shared.process.worker_pids():
        assert shared.at(worker).call("echo", None, session).status == 404
    unknown = f"mcp-{'0' * 8}-{'1' * 32}"
    assert shared.connect().call("echo", None, unknown).status == 404
    assert "set redis_url" not in shared.process.log()


@needs.MEMORY
def test_a_request_of_a_form_that_cannot_be_passed_is_refused_in_a_sentence(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    client.send_raw(request("echo", {}, session, "Connection: Upgrade", "Upgrade: websocket"))
    answer = client.got()
    assert answer.status == 400
    assert "cannot go to the worker that has its session" in answer.body.decode()


@needs.MEMORY
def test_a_standing_stream_is_passed(shared: Pair) -> None:
    session, owner = shared.open()
    stream = listened(shared.at(shared.other(owner)), session)
    assert (stream.status, stream.headers[LABEL]) == (200, str(owner))


def call_modern(client: Client, method: str = "count", caller: str = "") -> Got:
    client.send_raw(
        request(
            "tools/call",
            {"name": method, "arguments": {}, "_meta": MODERN},
            None,
            *("Mcp-Method: tools/call", f"Mcp-Name: {method}", "MCP-Protocol-Version: 2026-07-28"),
            *([f"Authorization: Bearer {caller}"] if caller else []),
        )
    )
    return client.got()


@pytest.mark.parametrize("caller", ["", "one", "two", "three"])
@needs.MEMORY
def test_a_caller_has_one_home_whichever_worker_is_asked(shared: Pair, caller: str) -> None:
    workers = shared.process.worker_pids()
    for worker in workers:
        call_modern(shared.at(worker), caller=caller)  # the era of the server is learnt
    found = [
        call_modern(shared.at(worker), caller=caller).worker for worker in workers for _ in range(2)
    ]
    assert len(set(found)) == 1


@needs.MEMORY
def test_messages_of_the_older_wire_go_to_their_stream() -> None:
    with workers(2, MCP_PROXY_STDIO_TRANSPORTS="sse") as pair:
        stream = pair.connect()
        stream.send_raw(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        owner = int(stream.read_head().headers[LABEL])
        event = b""
        while b"session_id=" not in event:
            event = stream.file.readline()
        session = event.decode().strip().rpartition("=")[2]
        body = json.dumps(message("echo", {"a": 1})).encode()
        client = pair.at(pair.other(owner))
        path = f"/messages?session_id={session}"
        client.send_raw(head(None, f"Content-Length: {len(body)}", path=path) + body)
        accepted = client.got()
        assert (accepted.status, accepted.worker) == (202, owner)


# --- workers that do not take ---------------------------------------------------------------------


@needs.MEMORY
def test_a_killed_worker_s_sessions_are_404_and_the_others_see_nothing(pair: Pair) -> None:
    first, owner = pair.open()
    other = pair.other(owner)
    second, _ = pair.open(other)
    client = pair.at(other)
    os.kill(owner, signal.SIGKILL)
    for number in range(20):
        assert client.call("echo", {"n": number}, second).result == {"n": number}
    eventually(lambda: pair.at(other).call("echo", {}, first).status == 404)


@needs.MEMORY
def test_a_request_waits_for_a_frozen_worker(pair: Pair) -> None:
    session, owner = pair.open()
    client = pair.at(pair.other(owner))
    os.kill(owner, signal.SIGSTOP)
    client.send_raw(request("count", {}, session))
    eventually(lambda: "is taken back" in pair.process.log())
    os.kill(owner, signal.SIGCONT)
    answer = client.got()
    assert (answer.worker, answer.result["calls"]) == (owner, 1)


@needs.MEMORY
def test_a_request_of_a_worker_that_stays_frozen_is_refused() -> None:
    with workers(2, MCP_PROXY_CLIENT_TIMEOUT="1.5") as pair:
        session, owner = pair.open()
        client = pair.at(pair.other(owner))
        os.kill(owner, signal.SIGSTOP)
        try:
            client.send_raw(request("count", {}, session))
            answer = client.read_head()
            body = json.loads(answer.read())
        finally:
            os.kill(owner, signal.SIGCONT)
        assert (answer.status, answer.headers["Retry-After"]) == (200, "5")
        assert body["error"]["code"] == -32000
        assert pair.at(owner).call("count", {}, session).result["calls"] == 1


# --- workers that leave ---------------------------------------------------------------------------


def gone(pair: Pair, worker: int) -> bool:
    return worker not in pair.process.worker_pids()


@needs.MEMORY
def test_sessions_of_a_worker_that_is_taken_away_go_on(pair: Pair) -> None:
    found = [pair.open(worker) for worker in pair.process.worker_pids() for _ in range(3)]
    leaving = min(pair.process.worker_pids())
    os.kill(pair.process.master_pid, signal.SIGTTOU)
    eventually(lambda: len(pair.process.worker_pids()) == 1, 30)
    for session, owner in found:
        answer = pair.connect().call("count", {}, session)
        assert (answer.status, answer.result["calls"]) == (200, 1), (owner, leaving)


@needs.MEMORY
def test_sessions_outlive_a_reload(pair: Pair) -> None:
    before = pair.process.worker_pids()
    found = [pair.open(worker)[0] for worker in before]
    os.kill(pair.process.master_pid, signal.SIGHUP)
    eventually(lambda: not set(before) & set(pair.process.worker_pids()), 30)
    for session in found:
        assert pair.connect().call("echo", {"a": 1}, session).result == {"a": 1}


@needs.MEMORY
def test_a_standing_stream_begins_anew_where_its_session_went(pair: Pair) -> None:
    """Its events stay behind. SDKs resume it by the last one, and give it up after a refusal."""
    before = pair.process.worker_pids()
    client = McpClient(HttpFront(pair.process.base)).open("2025-11-25")
    with closing(client.listen()) as stream:
        last = (next(stream.events()).id or b"").decode()
        os.kill(pair.process.master_pid, signal.SIGHUP)
        eventually(lambda: not set(before) & set(pair.process.worker_pids()), 30)
    with closing(client.listen(Last_Event_ID=last)) as again:
        assert (again.status, again.headers["Content-Type"]) == (200, "text/event-stream")
        say(client, 7)
        assert next(again.stream())["params"]["n"] == 7


@needs.MEMORY
def test_a_worker_with_homes_alone_leaves_at_once(pair: Pair) -> None:
    for worker in pair.process.worker_pids():
        call_modern(pair.at(worker))
    before = pair.process.worker_pids()
    began = time.monotonic()
    os.kill(pair.process.master_pid, signal.SIGHUP)
    eventually(lambda: not set(before) & set(pair.process.worker_pids()), 30)
    assert time.monotonic() - began < 8


@needs.HANDING_ON
def test_sessions_of_http_servers_outlive_a_reload() -> None:
    with HttpBackend() as backend, ProxyProcess(options=["--target-url", backend.url]) as process:
        client = McpClient(HttpFront(process.base)).open()
        before = process.worker_pids()
        os.kill(process.master_pid, signal.SIGHUP)
        eventually(lambda: not set(before) & set(process.worker_pids()), 30)
        assert client.call("tools/list").status == 200
        assert len(backend.calls("initialize")) == 1


@needs.MEMORY
def test_a_session_that_is_busy_to_the_end_goes_on_without_that_call() -> None:
    with workers(2, MCP_PROXY_SSE_AFTER="0.2") as pair:
        session, owner = pair.open(min(pair.process.worker_pids()))
        busy = pair.at(owner)
        busy.send_raw(request("sleep", {"seconds": 60}, session))
        stream = busy.read_head()  # it is under way
        assert int(stream.headers[LABEL]) == owner
        os.kill(owner, signal.SIGTERM)
        assert b"The proxy has stopped the server before it answered" in stream.read()
        answer = pair.connect().call("count", {}, session)
        assert (answer.status, answer.result["calls"]) == (200, 1)


@needs.MEMORY
def test_a_session_that_is_busy_follows_when_it_is_idle(pair: Pair) -> None:
    worker = min(pair.process.worker_pids())
    session, owner = pair.open(worker)
    busy = pair.at(owner)
    busy.send_raw(request("sleep", {"seconds": 2}, session))
    heir = pair.other(owner)
    os.kill(owner, signal.SIGTERM)
    answered = [pair.connect().call("count", {}, session)]
    while answered[-1].worker != heir:
        answered.append(pair.connect().call("count", {}, session))
    assert {one.status for one in answered} == {200}
    assert busy.got().status == 200


# --- a restart ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=needs.MEMORY)])
def test_sessions_outlive_a_restart(count: int, tmp_path: Path) -> None:
    kept = tmp_path / "sessions"
    settings = {"MCP_PROXY_SESSION_DIR": str(kept)}
    with workers(count, **settings) as pair:
        found = [pair.open(worker)[0] for worker in pair.process.worker_pids() for _ in range(2)]
        assert oct(kept.stat().st_mode)[-3:] == "700"
    files = list(kept.iterdir())
    assert files
    assert all(oct(file.stat().st_mode)[-3:] == "600" for file in files)
    with workers(count, **settings) as pair:
        assert [each.name for each in kept.iterdir()] == ["caller.key"]
        for session in found:
            for worker in pair.process.worker_pids():
                assert pair.at(worker).call("echo", {"a": 1}, session).result == {"a": 1}
