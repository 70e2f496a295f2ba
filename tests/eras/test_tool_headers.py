"""What is known of a server's tools, and when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from mcp_proxy.backends.exchange import Exchange
from mcp_proxy.eras import tool_headers
from mcp_proxy.eras.tool_headers import KNOWN_TIME, RETRY_TIME, ToolHeaders
from mcp_proxy.errors import BackendError
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request
from tests.relay.scripted import ScriptedBackend, ScriptedCall
from tests.support.waiting import eventually


def tool(header: str) -> dict[str, Any]:
    """A tool whose argument `a` is repeated in a header."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "x-mcp-header": header}}}
    return {"name": "tool", "inputSchema": schema}


def exchange_of(**headers: str) -> Exchange:
    """A call of that tool with these headers."""
    params = jsonrpc.as_payload({"name": "tool", "arguments": {"a": "x"}})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange([Request(1, "tools/call", params)], headers=named)


class Scene:
    """A server whose list of tools can be held up or fail, and a time that is told to pass."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.header = "Region"
        self.failure: BackendError | None = None
        self.may_list = threading.Event()
        self.may_list.set()
        self.backend = ScriptedBackend(**{"tools/list": self.list})
        self.headers = ToolHeaders()

    def monotonic(self) -> float:
        return self.now

    def list(self, call: ScriptedCall, requests: Sequence[Request]) -> None:
        assert self.may_list.wait(20)
        if self.failure is not None:
            call.fail(self.failure)
        else:
            call.answer({"tools": [tool(self.header)]}, requests[0].id)

    @property
    def listed(self) -> int:
        return self.backend.executed["tools/list"]

    def refuses(self, **headers: str) -> bool:
        return self.headers.has_refused(self.backend, exchange_of(**headers))


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene()
    monkeypatch.setattr(tool_headers, "time", scene)
    return scene


def test_tools_are_known_for_a_while(scene: Scene) -> None:
    assert scene.refuses()
    assert not scene.refuses(mcp_param_region="x")
    assert scene.listed == 1
    scene.now += KNOWN_TIME + 1
    assert not scene.refuses(mcp_param_region="x")
    assert scene.listed == 2


def test_a_call_that_does_not_fit_has_the_tools_asked_for_anew(scene: Scene) -> None:
    assert not scene.refuses(mcp_param_region="x")
    scene.header = "Zone"
    scene.now += 2
    assert not scene.refuses(mcp_param_zone="x")
    assert scene.listed == 2
    assert scene.refuses(mcp_param_region="x")  # and not at once again
    assert scene.listed == 2


def test_others_go_on_with_what_is_known_while_the_tools_are_asked_for(scene: Scene) -> None:
    assert not scene.refuses(mcp_param_region="x")
    scene.now += KNOWN_TIME + 1
    scene.may_list.clear()
    refuses = partial(scene.refuses, mcp_param_region="x")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(refuses)
        eventually(lambda: scene.listed == 2)
        try:
            assert pool.submit(refuses).result(5) is False
            assert not first.done()
        finally:
            scene.may_list.set()
        assert first.result(20) is False
    assert scene.listed == 2


def test_where_tools_cannot_be_listed_those_that_were_known_still_are(scene: Scene) -> None:
    assert not scene.refuses(mcp_param_region="x")
    scene.failure = BackendError("it does not answer")
    scene.now += KNOWN_TIME + 1
    assert scene.refuses()
    assert not scene.refuses(mcp_param_region="x")
    assert scene.listed == 2
    scene.failure = None
    scene.header = "Zone"
    scene.now += RETRY_TIME + 1
    assert not scene.refuses(mcp_param_zone="x")
    assert scene.listed == 3


def test_where_tools_were_never_listed_calls_pass_and_they_are_asked_for_soon(scene: Scene) -> None:
    scene.failure = BackendError("it does not answer")
    assert not scene.refuses()
    assert not scene.refuses()
    assert scene.listed == 1
    scene.failure = None
    scene.now += RETRY_TIME + 1
    assert scene.refuses()
