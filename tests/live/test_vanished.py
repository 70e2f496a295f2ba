"""A client vanishes, with or without a word: its stream, thread, child and record go with it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.network import Network
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

KEEPALIVE = 0.5

#: What it takes to notice, on a machine that is busy.
_A_BIT = 2.5

# A keepalive is sent and not acknowledged until the user timeout (RFC 5482), which is two
# keepalives; the next look finds the connection broken.
_GIVEN_UP = KEEPALIVE + 2 * KEEPALIVE + KEEPALIVE

_PATIENCE = 10.0


class Scene(NamedTuple):
    """A proxy on one of two hosts."""

    network: Network
    redis: RedisServer
    process: ProxyProcess

    def get(self, path: str, session: str = "") -> socket.socket:
        """A stream of a client on the other host."""
        with self.network.on(self.network.client):
            return get((self.network.SERVER, self.process.port), path, session)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """This test, the proxy and its Redis on the one host."""
    everywhere = ("--bind", "0.0.0.0:0")  # of this namespace, which nobody else is in
    with (
        Network() as network,
        network.on(network.server),
        RedisServer() as redis,
        served(redis, *everywhere) as process,
    ):
        yield Scene(network, redis, process)


@contextlib.contextmanager
def served(redis: RedisServer, *options: str) -> Iterator[ProxyProcess]:
    """A proxy with room for one stream, its sessions in Redis."""
    given = ["--max-streams", "1", "--keepalive-interval", str(KEEPALIVE), *options]
    with ProxyProcess(SCRIPTED, options=[*given, "--redis-url", redis.url]) as process:
        yield process


def records(redis: RedisServer) -> int:
    """How many sessions Redis knows."""
    with redis.client() as client:
        return sum(1 for _ in client.scan_iter("*session:mcp-*"))


def get(address: tuple[str, int], path: str, session: str = "") -> socket.socket:
    """A connection on which a stream has begun."""
    connection = socket.create_connection(address, _PATIENCE)
    own = f"Mcp-Session-Id: {session}\r\n" if session else ""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{own}\r\n"
    connection.sendall(head.encode())
    begun = b""
    while b"\r\n\r\n" not in begun or b"\n\n" not in begun.partition(b"\r\n\r\n")[2]:
        piece = connection.recv(4096)
        assert piece, begun
        begun += piece
    assert begun.startswith(b"HTTP/1.1 200"), begun
    return connection


def close(connection: socket.socket) -> None:
    """FIN."""
    connection.close()


def reset(connection: socket.socket) -> None:
    """RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def require_gone(process: ProxyProcess, redis: RedisServer, within: float) -> None:
    """The session's server and record are gone in time, and its thread's place is free again."""
    begun = time.monotonic()
    eventually(lambda: not process.server_pids(), within, "the server is left")
    eventually(lambda: not records(redis), within, "the record is left")
    print(f"gone after {time.monotonic() - begun:.2f} s")
    client = SseClient(HttpFront(process.base)).open()
    assert client.result("count")["calls"] == 1
    client.close()


@pytest.mark.parametrize("leave", [close, reset])
def test_a_closed_connection_is_noticed_within_a_keepalive(
    leave: Callable[[socket.socket], None], own_redis: Callable[[], RedisServer]
) -> None:
    redis = own_redis()
    with served(redis) as process:
        connection = get(("127.0.0.1", process.port), "/sse")
        assert (len(process.server_pids()), records(redis)) == (1, 1)
        leave(connection)
        require_gone(process, redis, KEEPALIVE + _A_BIT)


def test_a_client_behind_a_cut_is_given_up_after_the_user_timeout(scene: Scene) -> None:
    with scene.get("/sse"):
        assert (len(scene.process.server_pids()), records(scene.redis)) == (1, 1)
        scene.network.silence_client()
        require_gone(scene.process, scene.redis, _GIVEN_UP + _A_BIT)


def test_a_standing_stream_behind_a_cut_frees_its_place_and_keeps_its_session(
    scene: Scene,
) -> None:
    client = McpClient(HttpFront(scene.process.base)).open()
    assert client.session is not None

    def has_a_place() -> bool:
        answer = client.listen()
        answer.close()
        return answer.status == 200

    with scene.get("/mcp", client.session):
        assert not has_a_place()
        scene.network.silence_client()
        eventually(has_a_place, _GIVEN_UP + _A_BIT)
        assert client.result("count")["calls"] == 1


# Answers the first line it reads, and reads no other one.
_DEAF = """
import json, sys, time
asked = json.loads(sys.stdin.readline())
result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "d"}}
print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("path", ["/mcp", "/messages"])
def test_who_leaves_holds_no_thread_while_a_server_takes_nothing(path: str) -> None:
    """Half of the first message is in the pipe, and the others wait for their turn."""
    said = {"jsonrpc": "2.0", "method": "notifications/x", "params": {"pad": "x" * 200_000}}
    options = ["--threads", "4", "--max-streams", "1"]
    with ProxyProcess([sys.executable, "-c", _DEAF], options=options) as process:
        front = HttpFront(process.base)
        if path == "/mcp":
            client = McpClient(front)
            assert client.initialize().status == 200
            own = f"Mcp-Session-Id: {client.session}\r\n"
        else:
            old = SseClient(front)
            old.connect()
            old.answer(old.call("initialize", {"protocolVersion": "2025-06-18"}))
            own, path, said["id"] = "", old.uri, 7
        body = json.dumps(said).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{own}Content-Type: application/json\r\n"
        for _ in range(4):
            connection = socket.create_connection(("127.0.0.1", process.port), _PATIENCE)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.close()
        begun = time.monotonic()
        assert McpClient(front).initialize().status == 200
        assert time.monotonic() - begun < 12  # the server has half a minute to read
