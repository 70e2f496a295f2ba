"""Who shares a server process, and who never does: the homes of modern clients."""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import mcp
from mcp import types
from mcp.client.streamable_http import streamable_http_client

from tests.clients.programs import ROOT, node, node_modules
from tests.clients.sdk_session import Json, httpx, plain
from tests.proofs.questions import proxied, together
from tests.proofs.replicas import LABELLED
from tests.proofs.wires import MODERN, Legacy, Modern
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

#: How often each of the callers counts, and how many there are.
COUNTS = 50
CALLERS = 3

CLIENTS = 20
ROUNDS = 5


def homes(rounds: int = ROUNDS, counts: int = COUNTS) -> None:
    """Everything that section 7 of the design names."""
    strangers_never_share(rounds)
    anonymous_strangers_are_refused()
    sealed_states(rounds)
    counted_by_one(counts)
    counted_by_several(counts)
    roots_cross()


# --- strangers -----------------------------------------------------------------------------------


def strangers_never_share(rounds: int) -> None:
    """Two with an Authorization and one without: their processes have nothing in common."""
    for server in ("legacy", "modern"):
        with proxied(server) as port, ThreadPoolExecutor(3 * CALLERS) as pool:
            callers = [Modern(port, one) for one in ("Bearer a", "Bearer b", None)]
            seen: list[set[int]] = [set() for _ in callers]

            def count(at: int, callers: list[Modern] = callers, seen: Any = seen) -> None:
                answer = callers[at].call("counter", {"seconds": 0.05})
                seen[at].add(answer.structured["pid"])

            for _ in range(rounds):
                together(pool, [lambda at=at: count(at) for at in [0, 1, 2] * CALLERS])  # type: ignore[misc]
            sizes = [len(pids) for pids in seen]
            print(f"{server}: processes of each of three callers: {sizes}", flush=True)
            for one, other in itertools.combinations(seen, 2):
                assert not one & other, f"{server}: two callers share {one & other}"
            assert server == "legacy" or sizes == [1, 1, 1], "a modern server has one a caller"


def anonymous_strangers_are_refused() -> None:
    """On an address that others reach, nobody without a name shares a legacy server unasked."""
    for server, setting, is_served in (
        ("legacy", "", False),
        ("legacy", "shared", True),
        ("legacy", "one", True),
        ("modern", "", True),
    ):
        more: dict[str, Any] = {"stateless_children": setting} if setting else {}
        with proxied(server, workers=1, bind="0.0.0.0:0", **more) as port:
            heard = Modern(port).call("pid", {})
            code = heard.answer.get("error", {}).get("code")
            print(f"0.0.0.0, {server}, {setting or 'unset'}: {heard.status} {code}", flush=True)
            if is_served:
                assert heard.status == 200, heard
                assert heard.structured["pid"], heard
                continue
            assert (heard.status, code) == (400, -32600), heard
            named = Modern(port, "Bearer name").call("pid", {})
            fallen = [Legacy(port), Legacy(port)]
            for one in fallen:
                one.open()
            pids = [one.call("pid", {}).structured["pid"] for one in fallen]
            pids.append(named.structured["pid"])
            assert len(set(pids)) == 3, f"strangers share: {pids}"


# --- clients of the SDK --------------------------------------------------------------------------


async def elicited(context: Any, params: Any) -> types.ElicitResult:
    """Something for each field."""
    properties = plain(params).get("requestedSchema", {}).get("properties", {})
    given = {name: field.get("type") == "boolean" or "text" for name, field in properties.items()}
    return types.ElicitResult(action="accept", content=given)


async def sampled(context: Any, params: Any) -> types.CreateMessageResult:
    """A model."""
    said = types.TextContent(type="text", text="a thought")
    return types.CreateMessageResult(role="assistant", content=said, model="none")


@asynccontextmanager
async def client_at(port: int, roots: Sequence[str] = ("file:///proof",)) -> AsyncIterator[Any]:
    """A client of the SDK in modern mode, each of whose requests has a new connection."""

    async def rooted(context: Any) -> types.ListRootsResult:
        listed = [{"uri": uri, "name": "proof"} for uri in roots]
        return types.ListRootsResult.model_validate({"roots": listed})

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    through = httpx.AsyncHTTPTransport(limits=limits)
    async with httpx.AsyncClient(transport=through, timeout=httpx.Timeout(30, read=60)) as http:
        transport = streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)
        sdk: Any = mcp
        async with sdk.Client(
            transport,
            mode=MODERN,
            elicitation_callback=elicited,
            sampling_callback=sampled,
            list_roots_callback=rooted,
        ) as client:
            yield client


def text_of(result: Any) -> str:
    """The texts of a result."""
    return " ".join(part.get("text", "") for part in plain(result)["content"])


def sealed_states(rounds: int) -> None:
    """A server of the Python SDK seals its states with a key of its process: all retries fit."""
    tools = [f"test_input_required_result_{name}" for name in ("request_state", "multi_round")]

    async def one(port: int, outcomes: Counter[str]) -> None:
        async with client_at(port) as client:
            for number in range(rounds):
                tool = tools[number % len(tools)]
                with anyio.fail_after(60):
                    text = text_of(await client.call_tool(tool, {}))
                is_right = text.startswith(("state-ok", "Both answered"))
                outcomes["right" if is_right else text[:200]] += 1

    async def everybody(port: int, outcomes: Counter[str]) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(CLIENTS):
                group.start_soon(one, port, outcomes)

    warnings.simplefilter("ignore")
    for setting in ("", "shared", "one"):
        outcomes: Counter[str] = Counter()
        more: dict[str, Any] = {"stateless_children": setting} if setting else {}
        begun = time.monotonic()
        with proxied("conformance", **more) as port:
            anyio.run(everybody, port, outcomes)
        print(
            f"sealed states, {setting or 'unset'}: {CLIENTS} clients, {dict(outcomes)} "
            f"in {time.monotonic() - begun:.1f} s",
            flush=True,
        )
        assert outcomes == {"right": CLIENTS * rounds}, outcomes


# --- counters ------------------------------------------------------------------------------------


def counted_by_one(counts: int) -> None:
    """With `one` all calls of a caller count in one process, whether they overlap or not."""
    with proxied("legacy", stateless_children="one") as port:
        seen = overlapping(port, counts)
    pids = {pid for pid, _ in seen}
    total = counts * CALLERS
    print(f"one: {len(seen)} calls, {len(pids)} process, up to {max(n for _, n in seen)}")
    assert len(pids) == 1, pids
    assert sorted(number for _, number in seen) == list(range(1, total + 1))


def counted_by_several(counts: int) -> None:
    """With `shared` calls that overlap spread; afterwards all go to the first process again."""
    with proxied("legacy", stateless_children="shared") as port:
        first = Modern(port).call("counter", {}).structured
        seen = overlapping(port, counts)
        after = [Modern(port).call("counter", {}).structured for _ in range(10)]
    assert len(seen) == counts * CALLERS
    processes = Counter(pid for pid, _ in seen)
    had = max(number for pid, number in seen if pid == first["pid"])
    print(
        f"shared: {len(seen)} overlapping calls in {len(processes)} processes, "
        f"{processes[first['pid']]} of them in the first; then {[one['count'] for one in after]}",
        flush=True,
    )
    assert len(processes) > 1, "nothing overlapped"
    assert {one["pid"] for one in after} == {first["pid"]}
    assert [one["count"] for one in after] == list(range(had + 1, had + 11))


def overlapping(port: int, counts: int) -> list[tuple[int, int]]:
    """The process and the count of every call of several callers at once."""

    def count() -> list[tuple[int, int]]:
        wire = Modern(port)
        answers = [wire.call("counter", {"seconds": 0.01}).structured for _ in range(counts)]
        return [(one["pid"], one["count"]) for one in answers]

    with ThreadPoolExecutor(CALLERS) as pool:
        return [one for found in together(pool, [count] * CALLERS) for one in found]


# --- servers that others have written ------------------------------------------------------------


def roots_cross() -> None:
    """Official servers that ask for roots as soon as they are initialized, behind the bridge."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="roots-") as folder:
        hello = Path(folder, "hello.txt")
        hello.write_text("hello from a root")
        filesystem = [*server_of("filesystem"), str(ROOT / "docs")]
        shown = "list_allowed_directories"
        read: Json = {"path": str(hello)}
        given: list[tuple[str, Json]] = [(shown, {}), (shown, {}), ("read_text_file", read)]
        first, second, text = of_server(filesystem, [f"file://{folder}"], given)
        print(f"filesystem: {first!r}, then {second!r}, then {text!r}", flush=True)
        assert folder in second, second
        assert text.strip() == "hello from a root", text
        everything = [*server_of("everything"), "stdio"]
        given = [("get-roots-list", {}), ("echo", {"message": "there"})]
        given += [("trigger-sampling-request", {"prompt": "why"})]
        given += [("trigger-elicitation-request", {})]
        listed, said, thought, asked = of_server(everything, [f"file://{folder}"], given)
        print(f"everything: {listed[:80]!r}, {said!r}, {thought[:60]!r}, {asked[:60]!r}")
        assert folder in listed, listed
        assert said == "Echo: there", said
        assert "a thought" in thought, thought
        assert "accept" in asked, asked


def server_of(name: str) -> list[str]:
    """The command of an official server in TypeScript."""
    package = node_modules() / "@modelcontextprotocol" / f"server-{name}"
    script = package / "dist" / "index.js"
    assert script.exists(), f"{script} is missing: run scripts/test once"
    return [node(), str(script)]


def of_server(
    command: list[str], roots: Sequence[str], calls: Sequence[tuple[str, Json]]
) -> list[str]:
    """What the tools of a server say to a modern client, one call after the other."""

    async def run(port: int) -> list[str]:
        async with client_at(port, roots) as client:
            return [text_of(await client.call_tool(name, given)) for name, given in calls]

    with RedisServer() as redis:
        environment = {"MCP_PROXY_REDIS_URL": redis.url, "MCP_PROXY_WORKERS": "4"}
        with ProxyProcess(command, environment=environment, way=LABELLED) as proxy:
            try:
                return anyio.run(run, proxy.port)
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{proxy.log()[-4000:]}")
                raise
