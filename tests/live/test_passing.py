"""Requests that one worker passes to another with their connection, in a real gunicorn."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.live import connections
from tests.live.connections import Answer
from tests.proofs.labelled import LABEL, WAY
from tests.proofs.sockets import peers_of
from tests.support import needs
from tests.support.front import SCRIPTED, Json
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

LABELLED = ("-m", "gunicorn", "-c", "python:mcp_proxy.gunicorn_conf", "tests.proofs.labelled:app")

_ACCEPT = "Accept: application/json, text/event-stream\r\n"
_META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


class Got(NamedTuple):
    """A whole answer, the worker that sent it, and whether the request had been passed to it."""

    status: int
    worker: int
    is_passed: bool
    body: bytes
    session: str | None

    @property
    def result(self) -> Any:
        return json.loads(self.body)["result"]


class Client(connections.Connection):
    """One connection that speaks MCP."""

    def call(self, method: str, params: Any = None, session: str | None = None) -> Got:
        self.send_raw(request(method, params, session))
        return self.got()

    def got(self) -> Got:
        return got(self.read_head())


def got(answer: Answer) -> Got:
    given = answer.headers
    body = answer.read() if answer.status != 202 else b""
    return Got(
        answer.status, int(given[LABEL]), given[WAY] == "passed", body, given["Mcp-Session-Id"]
    )


def message(method: str, params: Any = None) -> Json:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params or {}}


def head(session: str | None, *more: str, version: str = "1.1", path: str = "/mcp") -> bytes:
    named = "" if session is None else f"Mcp-Session-Id: {session}\r\n"
    extra = "".join(f"{line}\r\n" for line in more)
    return (
        f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{_ACCEPT}{named}{extra}\r\n"
    ).encode()


def request(
    method: str, params: Any = None, session: str | None = None, *more: str, version: str = "1.1"
) -> bytes:
    body = json.dumps(message(method, params)).encode()
    return head(session, f"Content-Length: {len(body)}", *more, version=version) + body


class Pair:
    """A proxy of two workers."""

    def __init__(self, process: ProxyProcess, stack: ExitStack) -> None:
        self.process = process
        self._stack = stack

    def connect(self) -> Client:
        return self._stack.enter_context(closing(Client(self.process.port)))

    def at(self, worker: int) -> Client:
        """A connection that this worker has accepted."""
        while True:
            client = self.connect()
            client.send_raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if client.got().worker == worker:
                return client
            client.close()

    def other(self, worker: int) -> int:
        return next(pid for pid in self.process.worker_pids() if pid != worker)

    def open(self, worker: int | None = None) -> tuple[str, int]:
        """A session, and the worker that has it."""
        client = self.connect() if worker is None else self.at(worker)
        begun = client.call("initialize", {"protocolVersion": "2025-03-26", "capabilities": {}})
        assert begun.session is not None
        body = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
        client.send_raw(head(begun.session, f"Content-Length: {len(body)}") + body)
        assert client.got().status == 202
        return begun.session, begun.worker

    def held(self) -> dict[int, tuple[int, int]]:
        """How many connections of clients each worker has open, and how many tokens and the like.

        Not what it has to Redis: that depends on how many requests met.
        """
        return {
            pid: (len(peers_of(pid, self.process.port)), _anonymous(pid))
            for pid in self.process.worker_pids()
        }


def _anonymous(pid: int) -> int:
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            count += "[event" in os.readlink(f"/proc/{pid}/fd/{name}")
    return count


@contextmanager
def pair_over(url: str, prefix: str, *options: str, **settings: str) -> Iterator[Pair]:
    environment = {
        "MCP_PROXY_WORKERS": "2",
        "MCP_PROXY_REDIS_URL": url,
        "MCP_PROXY_REDIS_PREFIX": prefix,
        "MCP_PROXY_STATELESS_CHILDREN": "shared",
        "MCP_PROXY_PASSING": "on",
        **settings,
    }
    with (
        ProxyProcess(SCRIPTED, way=LABELLED, options=options, environment=environment) as process,
        ExitStack() as stack,
    ):
        eventually(lambda: len(process.worker_pids()) == 2)
        pair = Pair(process, stack)
        for worker in process.worker_pids():
            pair.at(worker)
        yield pair


@pytest.fixture(scope="module")
def shared(redis_server: RedisServer) -> Iterator[Pair]:
    """A proxy that no test harms."""
    with pair_over(redis_server.url, f"passing-{os.getpid()}:") as pair:
        yield pair


@pytest.fixture
def pair(redis_url: str, redis_prefix: str) -> Iterator[Pair]:
    """A proxy of one test."""
    with pair_over(redis_url, redis_prefix) as pair:
        yield pair


# --- the way of a request ------------------------------------------------------------------------


@needs.PASSING
def test_a_connection_goes_to_its_session_and_stays_there(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    first = client.call("echo", {"a": 1}, session)
    assert (first.worker, first.is_passed, first.result) == (owner, True, {"a": 1})
    for number in range(5):
        later = client.call("echo", {"a": number}, session)
        assert (later.worker, later.is_passed, later.result) == (owner, False, {"a": number})


@needs.PASSING
def test_a_passed_request_has_one_line_in_the_log(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    client.send_raw(request("echo", {}, session, "X-Request-ID: the-only-one"))
    assert client.got().is_passed
    eventually(lambda: "the-only-one" in shared.process.log())
    assert shared.process.log().count("the-only-one") == 1


@needs.PASSING
def test_what_wants_no_answer_is_passed_too(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    body = json.dumps({"jsonrpc": "2.0", "method": "notifications/x"}).encode()
    client.send_raw(head(session, f"Content-Length: {len(body)}") + body)
    accepted = client.got()
    assert (accepted.status, accepted.worker, accepted.is_passed) == (202, owner, True)
    methods = [one.get("method") for one in client.call("seen", {}, session).result["messages"]]
    assert methods.count("notifications/x") == 1


@pytest.mark.parametrize("keep", ["close", "keep-alive"])
@needs.PASSING
def test_http_1_0(shared: Pair, keep: str) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    client.send_raw(request("echo", {"a": 1}, session, f"Connection: {keep}", version="1.0"))
    first = client.got()
    assert (first.worker, first.is_passed, first.result) == (owner, True, {"a": 1})
    if keep == "close":
        assert client.is_closed_by_server()
    else:
        assert client.call("echo", {"a": 2}, session).result == {"a": 2}


@needs.PASSING
def test_a_client_that_waits_to_be_told_to_go_on(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    body = json.dumps(message("echo", {"a": 1})).encode()
    client.send_raw(head(session, f"Content-Length: {len(body)}", "Expect: 100-continue"))
    assert client.read_head().status == 100
    client.send_raw(body)
    answered = client.got()
    assert (answered.worker, answered.is_passed, answered.result) == (owner, True, {"a": 1})
    assert client.call("echo", {"a": 2}, session).result == {"a": 2}


@pytest.mark.parametrize("size", [10, 100_000, 150_000, 400_000])
@needs.PASSING
def test_a_body_in_chunks(shared: Pair, size: int) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    body = json.dumps(message("echo", {"a": "x" * size})).encode()
    pieces = [body[at : at + 7000] for at in range(0, len(body), 7000)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    client.send_raw(head(session, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
    answered = client.got()
    assert (answered.worker, answered.is_passed) == (owner, True)
    assert answered.result == {"a": "x" * size}
    assert client.call("echo", {"a": 2}, session).result == {"a": 2}


def test_trailers_are_not_passed(shared: Pair) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    body = json.dumps(message("echo", {"a": 1})).encode()
    chunks = b"%x\r\n%s\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body), body)
    client.send_raw(head(session, "Transfer-Encoding: chunked") + chunks)
    answered = client.got()
    assert (answered.worker == owner, answered.result) == (False, {"a": 1})


@pytest.mark.parametrize("size", [130_000, 200_000, 3_000_000])
@needs.PASSING
def test_a_large_body(shared: Pair, size: int) -> None:
    session, owner = shared.open()
    client = shared.at(shared.other(owner))
    for number in range(3):
        answered = client.call("echo", {"a": "x" * size}, session)
        assert (answered.worker, answered.is_passed) == (owner, number == 0)
        assert answered.result == {"a": "x" * size}


def test_pipelined_requests_of_two_sessions(shared: Pair) -> None:
    """They are answered in their order, each by its own session's server."""
    first, owner = shared.open()
    second, _ = shared.open(shared.other(owner))
    for begin in (owner, shared.other(owner)):
        client = shared.at(begin)
        asked = [first, second, second, first, first, first, second, second]
        client.send_raw(
            b"".join(request("count", {"n": n}, session) for n, session in enumerate(asked))
        )
        pids = [client.got().result["pid"] for _ in asked]
        ours = dict(zip(asked, pids, strict=True))
        assert len(set(ours.values())) == 2
        assert pids == [ours[session] for session in asked]


def test_a_pool_of_connections_is_relayed(shared: Pair) -> None:
    first, owner = shared.open()
    second, _ = shared.open(shared.other(owner))
    client = shared.at(owner)
    found = [client.call("echo", {}, session) for session in (first, second) * 6]
    assert {one.status for one in found} == {200}
    assert {one.worker for one in found} == {owner}, "it is passed to and fro"
    assert not any(one.is_passed for one in found)
    again = [client.call("echo", {}, second) for _ in range(3)]
    assert {one.worker for one in again} == {owner}, "it was a pool's"


@needs.PASSING
def test_who_changes_once_goes_there_with_the_second_request(shared: Pair) -> None:
    first, owner = shared.open()
    second, other = shared.open(shared.other(owner))
    client = shared.at(owner)
    asked = (first, first, second, second, second)
    workers = [client.call("echo", {}, session).worker for session in asked]
    assert workers == [owner, owner, owner, other, other]


def listened(client: Client, session: str) -> Answer:
    """The head of a standing stream."""
    client.send_raw(
        f"GET /mcp HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        f"Mcp-Session-Id: {session}\r\n\r\n".encode()
    )
    return client.read_head()


@needs.PASSING
def test_a_standing_stream(shared: Pair) -> None:
    session, owner = shared.open()
    stream = listened(shared.at(shared.other(owner)), session)
    assert (stream.status, stream.headers[LABEL]) == (200, str(owner))
    assert stream.headers[WAY] == "passed"


@needs.PASSING
def test_calls_without_a_session_go_to_their_home(shared: Pair) -> None:
    def call(client: Client) -> Got:
        params = {"name": "any", "arguments": {}, "_meta": _META}
        about = ("Mcp-Method: tools/call", "Mcp-Name: any", "MCP-Protocol-Version: 2026-07-28")
        client.send_raw(request("tools/call", params, None, *about))
        return client.got()

    workers = shared.process.worker_pids()
    clients = {worker: shared.at(worker) for worker in workers}
    for client in clients.values():
        call(client)  # the era of the server is learnt
    clients = {worker: shared.at(worker) for worker in workers}
    found = {worker: call(client) for worker, client in clients.items()}
    (home,) = {one.worker for one in found.values()}
    assert {worker: one.is_passed for worker, one in found.items()} == {
        worker: worker != home for worker in workers
    }


@needs.PASSING
def test_messages_of_the_older_wire(redis_url: str, redis_prefix: str) -> None:
    with pair_over(redis_url, redis_prefix, MCP_PROXY_STDIO_TRANSPORTS="sse") as pair:
        stream = pair.connect()
        stream.send_raw(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begun = stream.read_head()
        owner = int(begun.headers[LABEL])
        event = b""
        while b"session_id=" not in event:
            event = stream.file.readline()
        session = event.decode().strip().rpartition("=")[2]
        body = json.dumps(message("echo", {"a": 1})).encode()
        path = f"/messages?session_id={session}"
        client = pair.at(pair.other(owner))
        for number in range(3):
            client.send_raw(head(None, f"Content-Length: {len(body)}", path=path) + body)
            accepted = client.got()
            assert (accepted.status, accepted.worker) == (202, owner)
            assert accepted.is_passed == (number == 0)


def test_a_directory_of_sessions_has_no_effect_with_redis(
    redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    with pair_over(redis_url, redis_prefix, MCP_PROXY_SESSION_DIR=str(tmp_path / "kept")) as pair:
        assert "session_dir has no effect: the sessions are in Redis" in pair.process.log()


def test_nothing_is_passed_where_passing_is_off(redis_url: str, redis_prefix: str) -> None:
    with pair_over(redis_url, redis_prefix, MCP_PROXY_PASSING="off") as pair:
        session, owner = pair.open()
        other = pair.other(owner)
        assert pair.at(other).call("echo", {"a": 1}, session).worker == other


# --- clients and workers that leave on the way ---------------------------------------------------


def test_clients_that_leave_at_once_leave_nothing_behind(shared: Pair) -> None:
    session, owner = shared.open()
    other = shared.other(owner)
    before = shared.held()
    for _ in range(200):
        client = shared.at(other)
        client.send_raw(request("echo", {}, session))
        client.close()
    assert shared.at(other).call("echo", {"a": 1}, session).result == {"a": 1}

    def is_as_before() -> bool:
        """But for the last connection, which is still there."""
        now = shared.held()
        return all(
            connections <= before[worker][0] + 1 and tokens == before[worker][1]
            for worker, (connections, tokens) in now.items()
        )

    eventually(is_as_before, 10)


@needs.PASSING
def test_a_frozen_owner_gets_nothing_and_its_clients_are_answered_once(pair: Pair) -> None:
    session, owner = pair.open()
    other = pair.other(owner)
    clients = [pair.at(other) for _ in range(6)]
    os.kill(owner, signal.SIGSTOP)
    try:
        for client in clients:
            client.send_raw(request("count", {}, session))
        eventually(lambda: pair.process.log().count("is taken back") == len(clients), 5)
    finally:
        os.kill(owner, signal.SIGCONT)
    found = [client.got() for client in clients]
    assert {one.worker for one in found} == {other}
    assert sorted(one.result["calls"] for one in found) == [1, 2, 3, 4, 5, 6]
    eventually(lambda: pair.at(other).call("count", {}, session).is_passed)


def test_a_killed_owner_takes_no_request_with_it_that_it_had_not_begun(pair: Pair) -> None:
    session, owner = pair.open()
    other = pair.other(owner)
    clients = [pair.at(other) for _ in range(6)]
    os.kill(owner, signal.SIGSTOP)
    for client in clients:
        client.send_raw(request("count", {}, session))
    begun = time.monotonic()
    os.kill(owner, signal.SIGKILL)
    found = [client.got() for client in clients]
    assert {one.status for one in found} == {200}
    assert sorted(one.result["calls"] for one in found) == [1, 2, 3, 4, 5, 6]
    assert time.monotonic() - begun < 20


@contextmanager
def occupied(pair: Pair, session: str, owner: int) -> Iterator[None]:
    """Every thread of the owner, which has four, has a call that waits at its server."""
    second = next(mine for mine, at in iter(pair.open, None) if at == owner)
    release = pair.at(pair.other(owner))
    begun = []
    for number in range(4):  # one session has two threads at the most
        mine, name = (session, second)[number % 2], f"held{number}"
        client = pair.at(owner)
        params = {"name": name, "_meta": {"progressToken": number}}
        client.send_raw(request("hold", params, mine))
        begun.append((mine, name, client.read_head()))  # its progress has come
    yield
    for mine, name, answer in begun:
        assert release.call("release", {"name": name}, mine).status == 200
        assert answer.status == 200
        answer.read()


@needs.PASSING
def test_an_owner_without_a_file_for_a_connection_is_relayed_to(
    redis_url: str, redis_prefix: str
) -> None:
    with pair_over(redis_url, redis_prefix, "--threads", "4") as pair:
        session, owner = pair.open()
        other = pair.other(owner)
        assert pair.at(other).call("count", {}, session).is_passed
        clients = [pair.at(other) for _ in range(4)]
        with occupied(pair, session, owner):  # it has its connections to Redis from now on
            for client in clients:
                client.send_raw(request("count", {}, session))
            assert sorted(client.got().result["calls"] for client in clients) == [2, 3, 4, 5]
        before = resource.prlimit(owner, resource.RLIMIT_NOFILE)
        resource.prlimit(owner, resource.RLIMIT_NOFILE, (3, before[1]))
        for number, client in enumerate(clients):
            answered = client.call("count", {}, session)
            assert (answered.worker, answered.result["calls"]) == (other, number + 6)
        resource.prlimit(owner, resource.RLIMIT_NOFILE, before)
        eventually(lambda: pair.at(other).call("echo", {}, session).is_passed)


def test_an_owner_without_a_free_thread_is_relayed_to(redis_url: str, redis_prefix: str) -> None:
    with pair_over(redis_url, redis_prefix, "--threads", "4") as pair:
        session, owner = pair.open()
        other = pair.other(owner)
        client = pair.at(other)
        with occupied(pair, session, owner):
            answered = client.call("echo", {"a": 1}, session)
            assert (answered.worker, answered.is_passed, answered.result) == (
                other,
                False,
                {"a": 1},
            )


def test_a_stopping_owner_is_not_offered_anything(pair: Pair) -> None:
    session, owner = pair.open()
    other = pair.other(owner)
    client = pair.at(other)
    os.kill(owner, signal.SIGTERM)
    for number in range(50):
        answered = pair.at(other).call("echo", {"a": number}, session)
        assert (answered.status, answered.result) == (200, {"a": number})
        if owner not in pair.process.worker_pids():
            break
    assert client.call("echo", {"a": 1}, session).result == {"a": 1}
    assert "is taken back" not in pair.process.log()
