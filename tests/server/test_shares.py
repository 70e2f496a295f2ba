"""The share of one session: its calls leave threads to the others, and none of them is lost."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.live.connections import Connection
from tests.proofs.sockets import peers_of
from tests.support import needs
from tests.support.front import HttpFront, Json, McpClient
from tests.support.proxy_process import ROOT, ProxyProcess
from tests.support.waiting import eventually

# Long enough for a test to look on meanwhile, in seconds.
PAUSE = 0.5

# Seconds within which everything here is answered.
PATIENCE = 30

# Seconds after which a client that has ended its side of the connection has left, and some more.
LEFT = 3

# How often a call is taken back, so that it waits by then.
CANCELLATIONS = 50

SHARED = {"threads": ("--threads", "4"), "without passing": ("--threads", "4", "--passing", "off")}


TWO = pytest.param((*SHARED["threads"], "--workers", "2"), marks=needs.MEMORY)


@pytest.fixture(params=[*SHARED.values(), TWO], ids=str)
def proxy(request: pytest.FixtureRequest) -> Iterator[ProxyProcess]:
    with ProxyProcess(options=request.param) as process:
        yield process


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def session_of(proxy: ProxyProcess, version: str = "2025-06-18") -> McpClient:
    return McpClient(HttpFront(proxy.base)).open(version)


def count(client: McpClient, key: int, to: int = 1) -> Json:
    """The answer to a call that takes a while, which is an error where none comes."""
    arguments = {"to": to, "pause": PAUSE}
    answer = client.call("tools/call", {"name": "count", "arguments": arguments}, key)
    return answer.message()


def as_bytes(client: McpClient, body: bytes) -> bytes:
    """A POST in the session of a client."""
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Accept: application/json\r\nMcp-Session-Id: {client.session}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def counting(pool: ThreadPoolExecutor, client: McpClient, keys: Sequence[int]) -> list[Future[Any]]:
    return [pool.submit(count, client, key) for key in keys]


@needs.SHARES
def test_the_calls_of_one_session_leave_threads_to_the_others(
    proxy: ProxyProcess, pool: ThreadPoolExecutor
) -> None:
    greedy, modest = session_of(proxy), session_of(proxy)
    calls = counting(pool, greedy, range(10, 22))
    eventually(lambda: any(call.done() for call in calls))
    answered = 0
    while not all(call.done() for call in calls):
        before = time.monotonic()
        modest.result("ping")
        assert time.monotonic() - before < PAUSE
        answered += 1
    assert answered > 3
    answers = [call.result() for call in calls]
    assert [answer["id"] for answer in answers] == list(range(10, 22))
    texts = {answer["result"]["content"][0]["text"] for answer in answers}
    assert texts == {"counted to 1"}


def test_what_calls_may_wait_for_does_not_wait(
    proxy: ProxyProcess, pool: ThreadPoolExecutor
) -> None:
    client = session_of(proxy)
    calls = [pool.submit(count, client, key, 600) for key in range(10, 16)]
    done = threading.Event()

    def cancel() -> None:
        while not done.is_set():
            for key in range(10, 16):  # a call that waits is not there yet to be cancelled
                params = {"requestId": key}
                assert client.notify("notifications/cancelled", params).status == 202
            done.wait(0.1)

    cancelling = pool.submit(cancel)
    try:
        eventually(lambda: all(call.done() for call in calls), 30)
    finally:
        done.set()
    cancelling.result()
    assert client.delete().status == 204


class Tally:
    """A server that writes down which calls it has begun and what it has heard besides."""

    def __init__(self, folder: Path) -> None:
        self._executions, self._gate = folder / "executions", folder / "gate"
        self._heard = folder / "heard"
        server = str(ROOT / "tests" / "servers" / "tally.py")
        files = ("--executions", str(self._executions), "--gate", str(self._gate))
        files = (*files, "--heard", str(self._heard))
        self.command = (sys.executable, "-I", "-S", server, *files)

    def begun(self) -> set[int]:
        """The numbers of these calls."""
        if not self._executions.exists():
            return set()
        return {int(line.split()[1]) for line in self._executions.read_text().splitlines()}

    def heard(self) -> list[str]:
        """The methods of notifications."""
        return self._heard.read_text().splitlines()

    def let_end(self) -> None:
        """Has the calls end that are gated."""
        self._gate.touch()


def plain(number: int, gated: bool = False) -> Json:
    """The parameters of a call that the server counts."""
    arguments = {"token": "t", "number": number, "gated": gated}
    return {"name": "plain", "arguments": arguments}


def fill_share(pool: ThreadPoolExecutor, client: McpClient, tally: Tally) -> list[Future[Any]]:
    """Calls that have the whole share until the tally lets them end."""
    running = [
        pool.submit(lambda key: client.call("tools/call", plain(key, True), key).message(), key)
        for key in (1, 2)
    ]
    eventually(lambda: tally.begun() == {1, 2})
    return running


@pytest.fixture
def tally(tmp_path: Path) -> Iterator[Tally]:
    made = Tally(tmp_path)
    yield made
    made.let_end()


@pytest.fixture(params=["stdio", "http"])
def before_tally(request: pytest.FixtureRequest, tally: Tally) -> Iterator[ProxyProcess]:
    """A proxy in front of that server, or of another proxy in front of it."""
    with ExitStack() as stack:
        if request.param == "http":
            server = stack.enter_context(ProxyProcess(tally.command, options=("--threads", "32")))
            options = (*SHARED["threads"], "--target-url", server.url)
            yield stack.enter_context(ProxyProcess(options=options))
        else:
            yield stack.enter_context(ProxyProcess(tally.command, options=SHARED["threads"]))


def cancel_until_done(client: McpClient, keys: Sequence[int], waiting: Future[Any]) -> None:
    """Takes calls back until what waits for one of them is answered: it may not wait yet."""
    until = time.monotonic() + PATIENCE
    while not waiting.done():
        assert time.monotonic() < until, "what was cancelled has no answer"
        for key in keys:
            assert client.notify("notifications/cancelled", {"requestId": key}).status == 202


@needs.SHARES
def test_a_call_that_is_cancelled_while_it_waits_is_not_made(
    pool: ThreadPoolExecutor, before_tally: ProxyProcess, tally: Tally
) -> None:
    client = session_of(before_tally)
    running = fill_share(pool, client, tally)
    waiting = pool.submit(client.call, "tools/call", plain(3), 3)
    cancel_until_done(client, [3], waiting)
    assert waiting.result().status == 200
    answer = waiting.result().message()
    assert (answer["id"], answer["error"]["code"]) == (3, -32000)
    assert "cancelled" in answer["error"]["message"]
    tally.let_end()
    assert all("result" in call.result() for call in running)
    assert "result" in client.call("tools/call", plain(4), 3).message()
    assert tally.begun() == {1, 2, 4}


def as_batch(*numbers: int) -> list[Json]:
    about = {"jsonrpc": "2.0", "method": "tools/call"}
    return [{**about, "id": number, "params": plain(number)} for number in numbers]


@needs.SHARES
def test_a_call_of_a_batch_that_is_cancelled_while_it_waits_is_not_made(
    pool: ThreadPoolExecutor, before_tally: ProxyProcess, tally: Tally
) -> None:
    client = session_of(before_tally, "2025-03-26")
    running = fill_share(pool, client, tally)
    with closing(Connection(before_tally.port)) as connection:  # it is there before the next one
        connection.send_raw(as_bytes(client, json.dumps(as_batch(3, 4, 5)).encode()))
        whole = pool.submit(client.post, as_batch(6, 7))
        cancel_until_done(client, (4, 6, 7), whole)
        refused = {answer["id"]: answer["error"]["message"] for answer in whole.result().messages()}
        assert refused.keys() == {6, 7}
        assert all("cancelled" in message for message in refused.values())
        tally.let_end()
        assert all("result" in call.result() for call in running)
        answers = json.loads(connection.read_head().read())
        assert {answer["id"] for answer in answers} == {3, 5}, "MCP wants none for the other"
        assert all("result" in answer for answer in answers)
    assert tally.begun() == {1, 2, 3, 5}


@needs.SHARES
def test_what_a_batch_has_besides_its_cancelled_calls_goes_on(
    pool: ThreadPoolExecutor, before_tally: ProxyProcess, tally: Tally
) -> None:
    client = session_of(before_tally, "2025-03-26")
    running = fill_share(pool, client, tally)
    changed: Json = {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}
    whole = pool.submit(client.post, [*as_batch(3), changed, *as_batch(4)])
    cancel_until_done(client, (3, 4), whole)
    answers = {answer["id"]: answer["error"]["message"] for answer in whole.result().messages()}
    assert answers.keys() == {3, 4}
    assert all("cancelled" in message for message in answers.values())
    eventually(lambda: changed["method"] in tally.heard())
    tally.let_end()
    assert all("result" in call.result() for call in running)
    assert tally.begun() == {1, 2}


def connection_to(worker: int, proxy: ProxyProcess, stack: ExitStack) -> http.client.HTTPConnection:
    """A kept connection that this worker has accepted: the others could not."""
    others = [pid for pid in proxy.worker_pids() if pid != worker]
    try:
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda it=pid: is_stopped(it))
        made = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        connection = stack.enter_context(closing(made))
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        assert connection.sock.getsockname()[1] in peers_of(worker, proxy.port)
        return connection
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "T"


def ask(connection: http.client.HTTPConnection, client: McpClient, message: Json) -> Json:
    """The answer to a message of a client's session, on this connection."""
    assert client.session is not None
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers["Mcp-Session-Id"] = client.session
    connection.request("POST", "/mcp", json.dumps({"jsonrpc": "2.0", **message}), headers)
    body = connection.getresponse().read()
    answer: Json = json.loads(body) if body else {}
    return answer


@needs.SHARES
def test_a_cancellation_that_another_worker_gets_is_heard_of(
    pool: ThreadPoolExecutor, tally: Tally, redis_url: str, redis_prefix: str
) -> None:
    options = ("--threads", "4", "--workers", "2", "--redis-url", redis_url)
    with ExitStack() as stack:
        server = stack.enter_context(ProxyProcess(tally.command, options=("--threads", "32")))
        options = (*options, "--redis-prefix", redis_prefix, "--target-url", server.url)
        proxy = stack.enter_context(ProxyProcess(options=options))
        one, other = proxy.worker_pids()
        client = session_of(proxy)
        connections = [connection_to(one, proxy, stack) for _ in range(4)]
        elsewhere = connection_to(other, proxy, stack)

        def call(key: int, gated: bool = False) -> Future[Json]:
            message = {"id": key, "method": "tools/call", "params": plain(key, gated)}
            return pool.submit(ask, connections[key - 1], client, message)

        running = [call(1, True), call(2, True)]
        eventually(lambda: tally.begun() == {1, 2})
        waiting = [call(3), call(4)]
        cancel = {"method": "notifications/cancelled", "params": {"requestId": 3}}
        for _ in range(CANCELLATIONS):  # before the call waits it would be too early
            assert ask(elsewhere, client, cancel) == {}
        tally.let_end()
        while not all(each.done() for each in running):
            assert ask(elsewhere, client, cancel) == {}
        assert all("result" in each.result() for each in running)
        assert "cancelled" in waiting[0].result()["error"]["message"]
        assert "result" in waiting[1].result()
        assert tally.begun() == {1, 2, 4}


@needs.SHARES
def test_a_call_whose_client_leaves_while_it_waits_is_not_made(
    pool: ThreadPoolExecutor, tally: Tally
) -> None:
    with ProxyProcess(tally.command, options=SHARED["threads"]) as proxy:
        client = session_of(proxy)
        running = fill_share(pool, client, tally)
        message = {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": plain(3)}
        with closing(Connection(proxy.port)) as connection:
            connection.send_raw(as_bytes(client, json.dumps(message).encode()))
        waiting = pool.submit(client.call, "tools/call", plain(4), 4)
        threading.Timer(LEFT, tally.let_end).start()
        assert all("result" in call.result() for call in running)
        assert waiting.result().has_succeeded
        assert tally.begun() == {1, 2, 4}


def test_a_batch_is_a_call_of_its_session(proxy: ProxyProcess, pool: ThreadPoolExecutor) -> None:
    client, other = session_of(proxy, "2025-03-26"), session_of(proxy)
    params = {"name": "count", "arguments": {"to": 1, "pause": PAUSE}}
    part = {"jsonrpc": "2.0", "method": "tools/call", "params": params}

    def batch(key: int) -> list[int]:
        answers = client.post([{**part, "id": key}, {**part, "id": key + 100}]).messages()
        return sorted(answer["id"] for answer in answers)

    batches = [pool.submit(batch, key) for key in range(8)]
    other.result("ping")
    assert [each.result() for each in batches] == [[key, key + 100] for key in range(8)]


def test_a_call_that_waits_keeps_its_connection(pool: ThreadPoolExecutor) -> None:
    """And what comes behind it on the connection is answered after it."""
    with ProxyProcess(options=SHARED["threads"]) as proxy:
        client = session_of(proxy)
        calls = counting(pool, client, (1, 2))
        body = b'{"jsonrpc":"2.0","id":%d,"method":"%s"}'
        with closing(Connection(proxy.port)) as connection:
            for key, method in ((7, b"tools/list"), (8, b"ping")):
                connection.send_raw(as_bytes(client, body % (key, method)))
            assert b'"id":7' in connection.read_head().read()
            assert b'"id":8' in connection.read_head().read()
        assert {call.result()["id"] for call in calls} == {1, 2}


def test_in_front_of_an_http_server(pool: ThreadPoolExecutor) -> None:
    with (
        ProxyProcess(options=("--threads", "32")) as server,
        ProxyProcess(options=("--threads", "4", "--target-url", f"{server.base}/mcp")) as proxy,
    ):
        greedy, modest = session_of(proxy), session_of(proxy)
        calls = counting(pool, greedy, range(10, 18))
        while not all(call.done() for call in calls):
            before = time.monotonic()
            modest.result("ping")
            assert time.monotonic() - before < PAUSE
        assert [call.result()["id"] for call in calls] == list(range(10, 18))


@needs.SHARES
def test_a_call_that_waits_too_long_is_refused(pool: ThreadPoolExecutor) -> None:
    options = ("--threads", "4", "--request-timeout", "1.5")
    with ProxyProcess(options=options) as proxy:
        client = session_of(proxy)
        params = {"name": "count", "arguments": {"to": 1, "pause": 600}}
        calls = [pool.submit(client.call, "tools/call", params, key) for key in range(6)]
        kinds = [call.result().failure for call in calls]
    assert set(kinds) == {"overloaded", "server-timeout"}
    assert kinds.count("overloaded") >= 2  # two more may have begun when the first two ended
