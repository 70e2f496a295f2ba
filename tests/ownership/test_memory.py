"""Sessions that move from the memory of one worker to that of another."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mcp_proxy.app import Application, create_app
from mcp_proxy.config import ProxyConfig
from mcp_proxy.ownership.memory import Memory
from mcp_proxy.storage.records import LocalStorage
from mcp_proxy.storage.session import new_session
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.modern_client import ModernClient
from tests.support.waiting import eventually


def memory_of(app: Application) -> Memory:
    assert app.memory is not None
    return app.memory


def app(**settings: Any) -> Application:
    return create_app(ProxyConfig(command=SCRIPTED, **settings))


def test_an_idle_session_goes_on_elsewhere() -> None:
    with app() as first, app() as second:
        client = McpClient(WsgiFront(first)).open()
        assert client.result("count")["calls"] == 1
        records = memory_of(first).take_out_idle()
        assert memory_of(first).session_count == 0
        assert client.call("count").status == 404
        assert memory_of(second).put_in(records) == [client.session]
        client.front = WsgiFront(second)
        assert client.result("count")["calls"] == 1, "its server was started again"
        assert client.result("count")["calls"] == 2


def test_a_home_that_nobody_needs_is_dropped() -> None:
    """It is begun anew elsewhere, and nobody waits for it to move."""
    with app(stateless_children="shared") as first:
        client = ModernClient(WsgiFront(first))
        client.call("tools/list").body()
        assert memory_of(first).owned_count == 1
        assert memory_of(first).take_out_idle() == b""
        assert (memory_of(first).owned_count, memory_of(first).homes()) == (0, ())
        client.call("tools/list").body()
        assert memory_of(first).owned_count == 1


def test_a_busy_session_stays() -> None:
    with app() as first:
        client = McpClient(WsgiFront(first)).open()
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(client.result, "sleep", {"seconds": 1})
            eventually(lambda: first.parts.owners[0].is_busy)
            assert memory_of(first).take_out_idle() == b""
            assert slow.result()["slept"] == 1
        assert memory_of(first).take_out_idle() != b""


def test_all_sessions_can_be_taken_out_at_the_end() -> None:
    with app() as first:
        client = McpClient(WsgiFront(first)).open()
        (line,) = memory_of(first).take_out_all().splitlines()
        found = json.loads(line)
        assert (found["server"], found["session"]["id"]) == ("default", client.session)
        assert found["expires"] == pytest.approx(time.time() + 7200, abs=60)


def test_a_store_that_others_share_moves_nothing(redis_url: str, redis_prefix: str) -> None:
    with app(redis_url=redis_url, redis_prefix=redis_prefix) as shared:
        assert shared.memory is None


def test_what_is_of_no_use_is_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    storage = LocalStorage()
    memory = Memory({"here": storage}, {})
    record = new_session("a", "mcp", backend_url="http://a")
    others = {"here": LocalStorage(), "gone": LocalStorage()}
    for other in others.values():
        other.create(record)
    lines = Memory(others, {}).take_out_all().splitlines()
    expired = lines[0].replace(b'"expires":', b'"expires":1e0,"was":')
    for damaged in (b"{", b"[]", b"\xff", b'{"server":"here","expires":9e9,"session":{}}', expired):
        lines.append(damaged)
    lines.append(lines[0])
    assert memory.put_in(b"\n".join(lines)) == ["a"]
    assert "7 records of sessions cannot be used any more" in caplog.text
    assert storage.load("a").metadata == {**record.metadata, "moved": "yes"}
