"""The servers of one era each do what official clients expect, and what their options say.

What test_corners.py has its clients do is shown there; here is the rest, over bare stdio.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client, MCPError, StdioServerParameters, types

from tests.clients.programs import ROOT
from tests.support.waiting import eventually

Json = dict[str, Any]
Start = Callable[..., "Wire"]

_PREFIX = "io.modelcontextprotocol/"
_VERSION = f"{_PREFIX}protocolVersion"
_CAPABILITIES = f"{_PREFIX}clientCapabilities"
_ASKABLE = {"elicitation": {"form": {}, "url": {}}, "sampling": {}, "roots": {}}
_PATIENCE = 10.0


def _command(server: str, *options: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(ROOT / "tests" / "servers" / f"{server}.py"), *options]


# --- bare messages -------------------------------------------------------------------------------


class Wire:
    """A server at whose pipe a test sits."""

    def __init__(self, server: str, *options: str) -> None:
        self.process = subprocess.Popen(
            _command(server, *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.came: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.came.put(json.loads(line))

    def send(self, method: str, params: Json | None = None, key: Any = None) -> None:
        """A request, or a notification where there is no key."""
        message: Json = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        self.write(message if key is None else {**message, "id": key})

    def write(self, message: Json) -> None:
        """Any message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def next(self) -> Json:
        """The next message of the server."""
        return self.came.get(timeout=_PATIENCE)

    def ask(self, method: str, params: Json | None = None, key: Any = 1) -> Json:
        """The next message after a request."""
        self.send(method, params, key)
        return self.next()

    def end_input(self) -> int:
        """The exit code after the end of its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(_PATIENCE)

    def close(self) -> None:
        """Ends it, however it is."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers, which end with the test."""
    started: list[Wire] = []

    def begin(server: str, *options: str) -> Wire:
        started.append(Wire(server, *options))
        return started[-1]

    yield begin
    for wire in started:
        wire.close()


def _modern(capabilities: Json | None = None, **params: Any) -> Json:
    meta = {
        _VERSION: "2026-07-28",
        _CAPABILITIES: _ASKABLE if capabilities is None else capabilities,
    }
    return {**params, "_meta": {**meta, **params.get("_meta", {})}}


def _called(name: str, **arguments: Any) -> Json:
    return {"name": name, "arguments": arguments}


def _initialize(capabilities: Json | None = None, revision: str = "2025-11-25") -> Json:
    return {
        "protocolVersion": revision,
        "capabilities": _ASKABLE if capabilities is None else capabilities,
        "clientInfo": {"name": "test", "version": "1"},
    }


# --- the modern server ---------------------------------------------------------------------------


def test_modern_refuses_initialize_and_says_what_it_speaks(start: Start) -> None:
    error = start("modern").ask("initialize", _initialize())["error"]
    assert error["code"] == -32022
    assert error["data"] == {"supported": ["2026-07-28"], "requested": "2025-11-25"}


def test_modern_refuses_initialize_with_another_code(start: Start) -> None:
    error = start("modern", "--refuse-code", "-32601").ask("initialize", _initialize())["error"]
    assert error["code"] == -32601


def test_modern_may_leave_initialize_without_an_answer(start: Start) -> None:
    wire = start("modern", "--silent-initialize")
    wire.send("initialize", _initialize(), 1)
    assert wire.ask("server/discover", _modern(), 2)["id"] == 2
    time.sleep(0.2)
    assert wire.came.empty()


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_server_may_be_slow_to_start(server: str, start: Start) -> None:
    begun = time.monotonic()
    start(server, "--slow-start", "0.5").ask("initialize", _initialize())
    assert time.monotonic() - begun > 0.5


def test_modern_discovers(start: Start) -> None:
    result = start("modern").ask("server/discover", _modern())["result"]
    assert result["resultType"] == "complete"
    assert result["supportedVersions"] == ["2026-07-28"]
    assert (result["ttlMs"], result["cacheScope"]) == (0, "private")


@pytest.mark.parametrize(
    ("meta", "code"),
    [
        ({}, -32602),
        ({_VERSION: "2026-07-28"}, -32602),
        ({_CAPABILITIES: {}}, -32602),
        ({_VERSION: "2099-01-01", _CAPABILITIES: {}}, -32022),
    ],
)
def test_modern_wants_its_meta(meta: Json, code: int, start: Start) -> None:
    assert start("modern").ask("tools/list", {"_meta": meta})["error"]["code"] == code


@pytest.mark.parametrize("method", ["initialize", "ping", "logging/setLevel", "no/such"])
def test_modern_does_not_know_what_was_removed(method: str, start: Start) -> None:
    assert start("modern").ask(method, _modern())["error"]["code"] == -32601


def test_modern_refuses_to_ask_what_the_client_has_not_declared(start: Start) -> None:
    params = _modern({"elicitation": {"url": {}}, "roots": {}}, **_called("ask", kind="both"))
    error = start("modern").ask("tools/call", params)["error"]
    assert error["code"] == -32021
    assert error["data"] == {"requiredCapabilities": {"elicitation": {"form": {}}, "sampling": {}}}


def test_modern_asks_again_for_what_is_missing_and_refuses_other_states(start: Start) -> None:
    one, other = start("modern"), start("modern")
    call = _called("ask", kind="both")
    first = one.ask("tools/call", _modern(**call))["result"]
    assert first["resultType"] == "input_required"
    assert first["inputRequests"].keys() == {"form", "sampling"}
    partly = {
        "requestState": first["requestState"],
        "inputResponses": {"form": {"action": "decline"}},
    }
    for wire, told in (
        (other, {**call, **partly}),
        (one, {**call, **partly, "requestState": first["requestState"][:-4] + "AAA="}),
        (one, {**call, **partly, "arguments": {"kind": "form"}}),
    ):
        assert wire.ask("tools/call", _modern(**told), 2)["error"]["code"] == -32602
    second = one.ask("tools/call", _modern(**call, **partly), 3)["result"]
    assert second["inputRequests"].keys() == {"sampling"}
    rest = {"requestState": second["requestState"], "inputResponses": {"sampling": {"model": "m"}}}
    third = one.ask("tools/call", _modern(**call, **rest), 4)["result"]
    answers = {"form": {"action": "decline"}, "sampling": {"model": "m"}}
    assert third["structuredContent"]["answers"] == answers


def test_modern_listens_for_what_it_honours(start: Start) -> None:
    wire = start("modern", "--honour", "tools,updated")
    wanted = {"toolsListChanged": True, "promptsListChanged": True}
    listen = _modern(notifications={**wanted, "resourceSubscriptions": ["demo://watched"]})
    stamp = {f"{_PREFIX}subscriptionId": "mine"}
    acknowledged = wire.ask("subscriptions/listen", listen, "mine")
    assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
    honoured = {"toolsListChanged": True, "resourceSubscriptions": ["demo://watched"]}
    assert acknowledged["params"] == {"notifications": honoured, "_meta": stamp}
    wire.send("tools/call", _modern(**_called("notify")), 2)
    told = [wire.next() for _ in range(3)]
    assert [it.get("method") for it in told] == [
        "notifications/tools/list_changed",
        "notifications/resources/updated",
        None,
    ]
    assert told[1]["params"] == {"uri": "demo://watched", "_meta": stamp}
    assert wire.end_input() == 0
    ended = wire.next()
    assert ended["id"] == "mine"
    assert ended["result"]["_meta"][f"{_PREFIX}subscriptionId"] == "mine"


def test_modern_acknowledges_an_empty_set_and_ends_it(start: Start) -> None:
    wire = start("modern")
    acknowledged = wire.ask("subscriptions/listen", _modern(notifications={}), 7)
    assert acknowledged["params"]["notifications"] == {}
    assert wire.next()["result"]["_meta"][f"{_PREFIX}subscriptionId"] == 7


def test_modern_ends_a_subscription_that_is_cancelled(start: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    wire = start("modern", "--trace", str(trace))
    wire.ask("subscriptions/listen", _modern(notifications={"toolsListChanged": True}), 7)
    wire.send("notifications/cancelled", {"requestId": 7})
    eventually(lambda: "cancelled 7" in trace.read_text(), _PATIENCE, "it was not cancelled")
    assert wire.ask("tools/call", _modern(**_called("notify")), 8)["id"] == 8


# --- the legacy server ---------------------------------------------------------------------------


def test_legacy_does_not_know_discover(start: Start) -> None:
    wire = start("legacy")
    assert wire.ask("server/discover", _modern())["error"]["code"] == -32601
    assert wire.ask("initialize", _initialize())["result"]["protocolVersion"] == "2025-11-25"


def test_legacy_may_leave_discover_without_an_answer(start: Start) -> None:
    wire = start("legacy", "--ignore-discover")
    wire.send("server/discover", _modern(), 1)
    assert wire.ask("initialize", _initialize(), 2)["id"] == 2


def test_legacy_may_exit_on_discover(start: Start) -> None:
    wire = start("legacy", "--exit-on-discover")
    wire.send("server/discover", _modern(), 1)
    assert wire.process.wait(_PATIENCE) == 4


def test_legacy_wants_to_be_initialized(start: Start) -> None:
    assert start("legacy").ask("tools/list")["error"]["code"] == -32602


@pytest.mark.parametrize(
    ("options", "wanted", "agreed"),
    [
        ([], "2024-11-05", "2024-11-05"),
        ([], "2026-07-28", "2025-11-25"),
        (["--version", "2025-06-18"], "2025-11-25", "2025-06-18"),
    ],
)
def test_legacy_agrees_on_a_revision(
    options: list[str], wanted: str, agreed: str, start: Start
) -> None:
    result = start("legacy", *options).ask("initialize", _initialize(revision=wanted))["result"]
    assert result["protocolVersion"] == agreed


def test_legacy_asks_for_roots_outside_any_call(start: Start) -> None:
    wire = start("legacy", "--roots-first")
    wire.ask("initialize", _initialize())
    wire.send("notifications/initialized")
    question = wire.next()
    assert question["method"] == "roots/list"
    wire.write({"jsonrpc": "2.0", "id": question["id"], "result": {"roots": []}})
    result = wire.ask("tools/call", _called("roots_of", seconds=5), 2)["result"]
    assert result["structuredContent"] == {"answer": {"roots": []}}


def test_legacy_asks_nobody_who_cannot_be_asked_unless_told_to(start: Start) -> None:
    wire = start("legacy", "--roots-first")
    wire.ask("initialize", _initialize({}))
    wire.send("notifications/initialized")
    assert wire.ask("tools/call", _called("ask"), 2)["error"]["code"] == -32602
    forced = wire.ask("tools/call", _called("ask", force=True), 3)
    assert forced["method"] == "elicitation/create"


def test_legacy_asks_both_at_once_and_stops_when_the_call_is_cancelled(
    start: Start, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wire = start("legacy", "--trace", str(trace))
    wire.ask("initialize", _initialize())
    first = wire.ask("tools/call", _called("ask", kind="both"), 2)
    assert {first["method"], wire.next()["method"]} == {
        "elicitation/create",
        "sampling/createMessage",
    }
    wire.send("notifications/cancelled", {"requestId": 2})
    eventually(lambda: "cancelled 2" in trace.read_text(), _PATIENCE, "it was not cancelled")
    assert wire.ask("ping", key=3) == {"jsonrpc": "2.0", "id": 3, "result": {}}


def test_legacy_withdraws_a_question(start: Start) -> None:
    wire = start("legacy")
    wire.ask("initialize", _initialize())
    question = wire.ask("tools/call", _called("ask_late", seconds=0.1), 2)
    withdrawn, result = wire.next(), wire.next()
    assert withdrawn["method"] == "notifications/cancelled"
    assert withdrawn["params"]["requestId"] == question["id"]
    assert result["result"]["content"][0]["text"] == "withdrawn"


def test_legacy_exits_while_it_asks(start: Start) -> None:
    wire = start("legacy")
    wire.ask("initialize", _initialize())
    assert wire.ask("tools/call", _called("exit_while_asking", code=9), 2)["id"] == "question-1"
    assert wire.process.wait(_PATIENCE) == 9


@pytest.mark.parametrize("kind", ["form", "ping"])
def test_legacy_asks_when_no_call_is_running(kind: str, start: Start) -> None:
    wire = start("legacy")
    wire.ask("initialize", _initialize())
    assert wire.ask("tools/call", _called("ask_later", kind=kind), 2)["id"] == 2
    assert wire.next()["method"] == {"form": "elicitation/create", "ping": "ping"}[kind]


def test_legacy_logs_at_a_level_from_the_start(start: Start) -> None:
    wire = start("legacy", "--log-level", "error")
    wire.ask("initialize", _initialize())
    assert wire.ask("tools/call", _called("log"), 2)["params"]["level"] == "error"


# --- the tools, by the official client -----------------------------------------------------------


async def _accept(context: Any, params: Any) -> types.ElicitResult:
    return types.ElicitResult(action="accept", content={"answer": "yes"})


@asynccontextmanager
async def _client(server: str, *options: str) -> AsyncIterator[Client]:
    command, *arguments = _command(server, *options)
    parameters = StdioServerParameters(command=command, args=arguments)
    mode = "legacy" if server == "legacy" else "auto"
    async with Client(parameters, mode=mode, elicitation_callback=_accept) as client:
        yield client


def _run(work: Callable[[Client], Awaitable[Any]], server: str, *options: str) -> Any:
    async def session() -> Any:
        async with _client(server, *options) as client:
            with anyio.fail_after(_PATIENCE):
                return await work(client)

    return anyio.run(session)


async def _structured(client: Client, tool: str, **arguments: Any) -> Any:
    return (await client.call_tool(tool, arguments)).structured_content


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_counter_counts_in_one_process(server: str) -> None:
    async def work(client: Client) -> None:
        pid = (await _structured(client, "pid"))["pid"]
        assert await _structured(client, "counter") == {"count": 1, "pid": pid}
        assert await _structured(client, "counter") == {"count": 2, "pid": pid}

    _run(work, server)


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_a_slow_call_holds_up_no_other(server: str) -> None:
    async def work(client: Client) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "slow", {"seconds": 30})
            assert await _structured(client, "echo", text="a") == {"text": "a"}
            group.cancel_scope.cancel()

    _run(work, server)


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_tools_come_in_pages(server: str) -> None:
    async def work(client: Client) -> None:
        names, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            assert len(page.tools) <= 5
            names += [it.name for it in page.tools]
            if (cursor := page.next_cursor) is None:
                break
        assert len(names) == len(set(names)) > 10

    _run(work, server, "--page-size", "5")


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_header_is_annotated_and_seen_shows_what_came(server: str) -> None:
    async def work(client: Client) -> None:
        tools = {it.name: it for it in (await client.list_tools()).tools}
        region = tools["header"].input_schema["properties"]["region"]
        assert region["x-mcp-header"] == "Region"
        await client.call_tool("header", {"region": "eu"})
        methods = [it["method"] for it in (await _structured(client, "seen"))["messages"]]
        assert methods[-3:] == ["tools/list", "tools/call", "tools/call"]

    _run(work, server)


@pytest.mark.parametrize("server", ["modern", "legacy"])
def test_crash_closes_the_connection(server: str) -> None:
    async def work(client: Client) -> None:
        with pytest.raises(MCPError, match="Connection closed"):
            await client.call_tool("crash", {"code": 4})

    _run(work, server)


def test_legacy_tools_that_ask_in_their_own_ways() -> None:
    async def work(client: Client) -> None:
        accepted = {"action": "accept", "content": {"answer": "yes"}}
        assert await _structured(client, "ask_late", seconds=5) == {"answer": accepted}
        with pytest.raises(MCPError) as refused:
            await client.call_tool("url_required", {"key": "a"})
        assert refused.value.error.code == -32042
        assert await _structured(client, "url_required", key="a") == {"calls": 2}
        said = await _structured(client, "client_of")
        assert said["capabilities"]["elicitation"] == {"form": {}, "url": {}}

    _run(work, "legacy")
