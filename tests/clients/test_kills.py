"""What a client of the official SDK lives through when processes die under its session.

A server is killed between two calls and during one, a worker is killed with everything it started,
and the proxy is told to stop while it is busy. The session of the client outlives what it can.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import pytest
from mcp import MCPError, types

from tests.clients.talk import Talk, talking
from tests.support.proxy_process import ProxyProcess, is_alive, is_guardian
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

_DEMO = str(Path(__file__).parents[2] / "mcp_proxy" / "demo" / "server.py")

# A server that does not go by itself: its shell ignores the end of its input and every signal that
# can be ignored, and it has two more children, of which one has left the process group.
_STUBBORN = """
trap '' TERM INT HUP
sleep 600 &
"$1" -c 'import os, time; os.setsid(); time.sleep(600)' &
"$@"
while :; do sleep 600; done
"""
_STUBBORN_COMMAND = ["sh", "-c", _STUBBORN, "stubborn", sys.executable, "-I", "-S", _DEMO]

_ACCEPT = {"Accept": "application/json, text/event-stream"}
_INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}

_KILLED_WITHIN = 2.0
_STOPPED_WITHIN = 15.0

Scenario = Callable[[Talk], Awaitable[None]]


def _play(proxy: ProxyProcess, scenario: Scenario) -> None:
    async def play() -> None:
        async with talking(proxy) as talk:
            await scenario(talk)

    anyio.run(play)


async def _until(condition: Callable[[], Any], timeout: float = 10, message: str = "") -> None:
    """Waits in another thread, so that the client lives on."""
    await anyio.to_thread.run_sync(functools.partial(eventually, condition, timeout, message))


async def _failure_of_a_call(talk: Talk, strike: Callable[[], None]) -> MCPError:
    """The error in which a call ends that is struck after it has begun."""
    begun = anyio.Event()
    errors: list[MCPError] = []

    async def count() -> None:
        with pytest.raises(MCPError) as raised:
            await talk.count(6000, begun)
        errors.append(raised.value)

    async with anyio.create_task_group() as calls:
        calls.start_soon(count)
        await begun.wait()
        await anyio.to_thread.run_sync(strike)
    (error,) = errors
    return error


def _kill_server(proxy: ProxyProcess) -> None:
    (server,) = proxy.server_pids()
    os.kill(server, signal.SIGKILL)


@pytest.fixture
def proxy() -> Iterator[ProxyProcess]:
    """The real command in front of the demo server."""
    with ProxyProcess() as process:
        yield process


# --- a server is killed --------------------------------------------------------------------------


def test_server_killed_between_two_calls_is_replaced_and_the_session_goes_on(
    proxy: ProxyProcess,
) -> None:
    async def scenario(talk: Talk) -> None:
        assert await talk.say("before") == "before"
        (first,) = proxy.server_pids()
        _kill_server(proxy)
        await _until(lambda: "exited by itself (signal SIGKILL)" in proxy.log())
        assert await talk.say("after") == "after"
        (second,) = proxy.server_pids()
        assert second != first
        assert len(talk.session_ids) == 1

    _play(proxy, scenario)


def test_server_killed_during_a_call_fails_it_by_name_of_the_signal_and_serves_the_next(
    proxy: ProxyProcess,
) -> None:
    async def scenario(talk: Talk) -> None:
        error = await _failure_of_a_call(talk, functools.partial(_kill_server, proxy))
        assert (error.code, "SIGKILL" in error.message) == (-32000, True), error
        assert await talk.say("after") == "after"
        assert len(talk.session_ids) == 1

    _play(proxy, scenario)


def test_server_killed_twice_in_a_row_is_given_time_and_then_replaced(proxy: ProxyProcess) -> None:
    async def scenario(talk: Talk) -> None:
        for round in ("first", "second"):
            assert await talk.say(round) == round
            _kill_server(proxy)
            await _until(lambda: not proxy.server_pids())
        with pytest.raises(MCPError, match="keeps ending"):
            await _until_it_is_noticed(talk)
        await _say_until_heard(talk)
        assert len(talk.session_ids) == 1

    _play(proxy, scenario)


async def _until_it_is_noticed(talk: Talk) -> None:
    await _until(lambda: talk.proxy.log().count("exited by itself") == 2)
    await talk.say("too early")


async def _say_until_heard(talk: Talk) -> None:
    """As a patient client does: again, until the server is there."""
    with anyio.fail_after(10):
        while True:
            try:
                assert await talk.say("patient") == "patient"
            except MCPError:
                await anyio.sleep(0.1)
            else:
                return


# --- a worker is killed --------------------------------------------------------------------------


def _kill_worker(proxy: ProxyProcess) -> None:
    """Kills the worker, and sees everything go that it and its servers had started."""
    (worker,) = proxy.worker_pids()
    doomed = set(proxy.all_pids()) - {proxy.master_pid}
    assert any(map(is_guardian, doomed))
    os.kill(worker, signal.SIGKILL)
    left = "of what the killed worker had started something is left"
    eventually(lambda: not any(is_alive(pid) for pid in doomed), _KILLED_WITHIN, left)


async def _all_started(proxy: ProxyProcess) -> None:
    """Master, worker, guardian, shell, demo server, and the shell's two other children."""
    await _until(lambda: len(proxy.all_pids()) >= 7, message=str(proxy.all_pids()))


def test_worker_killed_takes_even_stubborn_servers_with_it_and_ends_sessions_kept_in_memory() -> (
    None
):
    async def scenario(talk: Talk) -> None:
        assert await talk.say("before") == "before"
        await _all_started(talk.proxy)
        await anyio.to_thread.run_sync(_kill_worker, talk.proxy)
        with pytest.raises(MCPError, match="Session terminated"):  # its own words for 404
            await talk.say("after")

    with ProxyProcess(_STUBBORN_COMMAND) as proxy:
        _play(proxy, scenario)


def test_worker_killed_leaves_the_session_in_redis_and_the_next_worker_goes_on_with_it(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    async def scenario(talk: Talk) -> None:
        assert await talk.say("before") == "before"
        await _all_started(talk.proxy)
        await anyio.to_thread.run_sync(_kill_worker, talk.proxy)
        assert await talk.say("after") == "after"
        assert await talk.count(3) == "counted to 3"
        assert len(talk.session_ids) == 1

    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(_STUBBORN_COMMAND, options=options) as proxy:
        _play(proxy, scenario)


def test_worker_killed_during_a_call_fails_that_call_and_the_session_goes_on(
    redis_server: RedisServer, redis_prefix: str
) -> None:
    async def scenario(talk: Talk) -> None:
        error = await _failure_of_a_call(talk, functools.partial(_kill_worker, talk.proxy))
        # The client resumes the stream that broke, and is told by the worker that came after.
        assert error.message == "The server was lost before it answered", error
        assert await talk.say("after") == "after"
        assert len(talk.session_ids) == 1

    options = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(options=options) as proxy:
        _play(proxy, scenario)


def test_guardian_killed_first_is_replaced_before_the_next_server_starts(
    proxy: ProxyProcess,
) -> None:
    async def scenario(talk: Talk) -> None:
        assert await talk.say("before") == "before"
        (guardian,) = filter(is_guardian, proxy.all_pids())
        os.kill(guardian, signal.SIGKILL)
        async with talking(proxy) as other:
            assert await other.say("another session") == "another session"
            await _until(lambda: any(map(is_guardian, proxy.all_pids())))
            await anyio.to_thread.run_sync(_kill_worker, proxy)

    _play(proxy, scenario)


# --- the proxy is told to stop -------------------------------------------------------------------


@asynccontextmanager
async def _listening(proxy: ProxyProcess) -> AsyncIterator[AsyncIterator[bytes]]:
    """The standing stream of a session of its own, opened without the SDK: byte by byte."""
    async with httpx2.AsyncClient(timeout=60) as http:
        opened = await http.post(proxy.url, headers=_ACCEPT, json=_INITIALIZE)
        session = {"Mcp-Session-Id": opened.headers["Mcp-Session-Id"]}
        async with http.stream("GET", proxy.url, headers={**_ACCEPT, **session}) as stream:
            assert stream.status_code == 200
            yield stream.aiter_raw()


async def _read_to_the_end(pieces: AsyncIterator[bytes], ended: anyio.Event) -> None:
    """Raises httpx2.RemoteProtocolError if the stream breaks off instead of ending."""
    async for _ in pieces:
        pass
    ended.set()


def test_proxy_told_to_stop_ends_streams_lets_a_call_finish_and_leaves_nothing() -> None:
    answers: list[str] = []

    async def scenario(talk: Talk) -> None:
        begun, ended = anyio.Event(), anyio.Event()

        async def count() -> None:
            answers.append(await talk.count(20, begun))

        await talk.client.list_tools()  # the SDK wants the schema of a tool after its first result
        async with _listening(talk.proxy) as pieces, anyio.create_task_group() as tasks:
            assert await anext(pieces)
            tasks.start_soon(_read_to_the_end, pieces, ended)
            tasks.start_soon(count)
            await begun.wait()
            _tell_to_stop(talk.proxy)
            await ended.wait()
            assert not answers, "the standing stream waited for the call"
        await anyio.to_thread.run_sync(_stopped_in_order, talk.proxy)

    with ProxyProcess() as proxy:
        _play(proxy, scenario)
    assert answers == ["counted to 20"]


def test_proxy_told_to_stop_fails_a_call_that_takes_too_long_and_leaves_nothing() -> None:
    async def scenario(talk: Talk) -> None:
        error = await _failure_of_a_call(talk, functools.partial(_tell_to_stop, talk.proxy))
        assert error.code == -32000, error
        await anyio.to_thread.run_sync(_stopped_in_order, talk.proxy)

    with ProxyProcess() as proxy:
        _play(proxy, scenario)


def test_proxy_told_to_stop_still_takes_the_answer_that_a_running_call_waits_for() -> None:
    answers: list[str] = []

    async def scenario(talk: Talk) -> None:
        await talk.client.list_tools()

        async def answer(context: Any, params: Any) -> types.ElicitResult:
            _tell_to_stop(talk.proxy)
            await _until(lambda: "Handling signal: term" in talk.proxy.log())
            return types.ElicitResult(action="accept", content={"answer": "in time"})

        talk.elicited = answer
        answers.append(await talk.ask())
        await anyio.to_thread.run_sync(_stopped_in_order, talk.proxy)

    with ProxyProcess() as proxy:
        _play(proxy, scenario)
    assert ["in time" in answer for answer in answers] == [True]


def test_proxy_told_to_stop_says_so_to_whoever_comes_while_a_call_still_runs() -> None:
    async def scenario(talk: Talk) -> None:
        begun = anyio.Event()
        await talk.client.list_tools()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(talk.count, 20, begun)
            await begun.wait()
            _tell_to_stop(talk.proxy)
            await _until(lambda: "Handling signal: term" in talk.proxy.log())
            async with httpx2.AsyncClient(timeout=1) as http:
                ready = await http.get(f"{talk.proxy.base}/readyz")
                assert (ready.status_code, "draining" in ready.text) == (503, True)
                opened = await http.post(talk.proxy.url, headers=_ACCEPT, json=_INITIALIZE)
                assert (opened.status_code, opened.headers["Retry-After"]) == (200, "5")
                assert opened.headers["X-MCP-Proxy-Error"] == "draining"
        await anyio.to_thread.run_sync(_stopped_in_order, talk.proxy)

    with ProxyProcess() as proxy:
        _play(proxy, scenario)


def _tell_to_stop(proxy: ProxyProcess) -> None:
    os.kill(proxy.master_pid, signal.SIGTERM)


def _stopped_in_order(proxy: ProxyProcess) -> None:
    assert proxy.wait(_STOPPED_WITHIN) == 0
    eventually(lambda: not proxy.all_pids(), message="the proxy left something")
