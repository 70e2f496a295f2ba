"""What one warm call costs, counted instead of timed: each ceiling is a little above today's count.

A change that needs more raises the ceiling in the same commit, with the reason.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import redis

import mcp_proxy
from mcp_proxy.app import create_app
from mcp_proxy.config import ProxyConfig
from tests.live.connections import Connection
from tests.support.front import Answer, HttpFront, McpClient, WsgiFront
from tests.support.groups import House
from tests.support.modern_client import ModernClient, server_of
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

PACKAGE = str(Path(mcp_proxy.__file__).parent)
CALL = {"name": "echo", "arguments": {"text": "x"}}
CALLS = 200

# So many that what other threads do once meanwhile is little beside them.
MANY = 600


class Counted:
    """Calls of functions of ours in this process, in threads that were started within the block."""

    def __init__(self) -> None:
        self.count = 0
        self.is_counting = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self.is_counting and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.count += 1


@contextmanager
def profiled() -> Iterator[Counted]:
    counted, before = Counted(), sys.getprofile()
    threading.setprofile(counted)
    sys.setprofile(counted)
    try:
        yield counted
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def functions_of(counted: Counted, call: Callable[[], Answer]) -> float:
    """How many functions of ours one warm call goes through."""
    for _ in range(20):
        assert call().has_succeeded
    counted.is_counting = True
    for _ in range(CALLS):
        call().body()
    counted.is_counting = False
    return counted.count / CALLS


def test_the_functions_of_ours_that_a_call_goes_through() -> None:
    with profiled() as counted, create_app(ProxyConfig()) as app:
        client = McpClient(WsgiFront(app)).open()
        assert functions_of(counted, lambda: client.call("tools/call", CALL)) < 74  # 73


def test_the_functions_of_a_modern_call() -> None:
    with profiled() as counted, create_app(ProxyConfig(command=server_of("modern"))) as app:
        client = ModernClient(WsgiFront(app))
        assert functions_of(counted, lambda: client.tool("pid")) < 121  # 120


@pytest.mark.parametrize(("era", "most"), [("legacy", 131), ("modern", 173)])
def test_the_functions_of_a_call_through_a_group(tmp_path: Path, era: str, most: int) -> None:
    program, *options = server_of(era)
    server = {"command": program, "args": options}
    named = {"name": "one__pid", "arguments": {}}
    with profiled() as counted, closing(House(tmp_path)) as house:
        client = house.serve({"one": server, "two": server})
        if era == "modern":
            count = functions_of(counted, lambda: house.modern().call("tools/call", named))
        else:
            count = functions_of(counted, lambda: client.call("tools/call", named))
        assert count < most


@pytest.fixture
def without_log() -> Iterator[None]:
    """pytest would keep the lines."""
    logger = logging.getLogger("mcp_proxy")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


def blocks() -> int:
    """The blocks of memory that Python has, without garbage."""
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.usefixtures("without_log")
def test_what_a_call_leaves_in_memory() -> None:
    with create_app(ProxyConfig()) as app:
        client = McpClient(WsgiFront(app)).open()
        for _ in range(CALLS):
            client.result("tools/call", CALL)
        before = blocks()
        for _ in range(MANY):
            client.result("tools/call", CALL)
        assert (blocks() - before) / MANY < 1 / 4


def switches_of(pid: int) -> int:
    """How often threads of a process have waited: each hand-over from one to another is one."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("voluntary"))
        count += int(line.split()[1])
    return count


def warm_call(connection: Connection, client: McpClient) -> None:
    data = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo",'
    data += b'"arguments":{"text":"x"}}}'
    head = (
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Accept: application/json\r\nMcp-Session-Id: {client.session}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.send_raw(head.encode() + data)
    assert b'"text": "x"' in connection.read_head().read()


def test_how_often_threads_wait_in_a_call() -> None:
    """Of the worker: for the next request, and for the server's answer, which a reader takes."""
    with ProxyProcess() as proxy, closing(Connection(proxy.port)) as connection:
        client = McpClient(HttpFront(proxy.base)).open()
        (worker,) = proxy.worker_pids()
        for _ in range(20):
            warm_call(connection, client)
        before = switches_of(worker)
        for _ in range(MANY):
            warm_call(connection, client)
        assert (switches_of(worker) - before) / MANY < 6  # 4.7


def commands_of(server: RedisServer) -> int:
    """How many commands a Redis has had."""
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("stats")["total_commands_processed"])


def test_the_commands_to_redis_of_a_call(redis_server: RedisServer) -> None:
    """None: there is one look-up a second, and what keeps the lease."""
    options = ("--redis-url", redis_server.url)
    with ProxyProcess(options=options) as proxy, closing(Connection(proxy.port)) as connection:
        client = McpClient(HttpFront(proxy.base)).open()
        for _ in range(20):
            warm_call(connection, client)
        before = commands_of(redis_server)
        for _ in range(CALLS):
            warm_call(connection, client)
        assert commands_of(redis_server) - before < 15


def test_the_commands_to_redis_of_a_relayed_call(redis_server: RedisServer) -> None:
    config = ProxyConfig(redis_url=redis_server.url)
    with create_app(config) as owner, create_app(config) as other:
        there = McpClient(WsgiFront(owner)).open().at(WsgiFront(other))
        for _ in range(20):
            there.result("tools/call", CALL)
        before = commands_of(redis_server)
        for _ in range(CALLS):
            there.result("tools/call", CALL)
        assert (commands_of(redis_server) - before) / CALLS < 8  # 7.0
