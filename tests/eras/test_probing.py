"""What a stdio server speaks is found out by asking it, whatever it does when it is asked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.switchboard import Switchboard
from mcp_proxy.eras import probing
from mcp_proxy.eras.probing import Found
from mcp_proxy.eras.questions import KeptRoots, QuestionSwitchboard
from mcp_proxy.errors import BackendError, BackendLost, BackendNotStarted, BadAnswer, ClientLeft
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer
from mcp_proxy.wire import jsonrpc, results
from mcp_proxy.wire.jsonrpc import Response
from tests.support.modern_client import ModernClient, Trace, server_of
from tests.support.proxies import replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually

Json = dict[str, Any]


class Prober:
    """Probes servers, and knows which processes are left of it."""

    def __init__(self) -> None:
        self.supervisor = Supervisor(Replica())
        self.spawned = 0

    def probe(
        self, *argv: str, timeout: float = 20.0, has_left: Callable[[], bool] | None = None
    ) -> Found:
        server = StdioServer("test", argv)

        def spawn(switchboard: Switchboard) -> Bridge:
            self.spawned += 1
            return Bridge(self.supervisor, server, 1 << 26, lambda lost: None, switchboard)

        def new_switchboard() -> QuestionSwitchboard:
            return QuestionSwitchboard(
                "home-x",
                frozenset(),
                300.0,
                on_free=lambda: None,
                on_change=lambda change: None,
                on_asked=lambda: None,
                roots=KeptRoots(),
            )

        return probing.probe(spawn, new_switchboard, Raw(b"{}"), timeout, has_left)

    def left(self, count: int) -> None:
        """Whether so many processes run in the end."""
        eventually(lambda: self.supervisor.children == count)


@pytest.fixture
def prober() -> Iterator[Prober]:
    prober = Prober()
    yield prober
    prober.supervisor.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second counts as silence."""
    monkeypatch.setattr(probing, "SILENCE", 0.5)


def test_a_modern_server_is_known_by_its_answer(prober: Prober) -> None:
    found = prober.probe(*server_of("modern"))
    assert found.switchboard is None
    assert b"2026-07-28" in bytes(found.result)
    assert prober.spawned == 1


def test_a_legacy_server_that_refuses_is_initialized_where_it_is(
    prober: Prober, tmp_path: Path
) -> None:
    trace = Trace(tmp_path / "trace")
    found = prober.probe(*server_of("legacy", "--trace", str(trace.path)))
    assert found.switchboard is not None
    assert b'"serverInfo"' in bytes(found.result)
    assert prober.spawned == 1
    assert trace.lines("discover") == ["discover"]


def test_a_legacy_server_that_exits_when_it_is_asked_is_started_anew(prober: Prober) -> None:
    found = prober.probe(*server_of("legacy", "--exit-on-discover"))
    assert found.switchboard is not None
    assert found.bridge.is_alive
    assert prober.spawned == 2
    prober.left(1)


@pytest.mark.usefixtures("quick")
def test_a_legacy_server_that_is_silent_is_asked_by_a_second_process(prober: Prober) -> None:
    found = prober.probe(*server_of("legacy", "--ignore-discover"))
    assert found.switchboard is not None
    assert prober.spawned == 2
    prober.left(1)  # the one that said nothing has ended


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_a_server_that_is_slow_is_neither_era_before_it_answers(prober: Prober, era: str) -> None:
    found = prober.probe(*server_of(era, "--slow-start", "1"))
    assert (found.switchboard is None) is (era == "modern")
    assert prober.spawned == 2
    prober.left(1)


@pytest.mark.usefixtures("quick")
def test_a_modern_server_that_is_slow_and_silent_to_initialize_is_modern(prober: Prober) -> None:
    found = prober.probe(*server_of("modern", "--slow-start", "1", "--silent-initialize"))
    assert found.switchboard is None


@pytest.mark.parametrize("code", [-32601, -32602, -32600, -32000])
def test_a_modern_server_is_modern_however_it_refuses_initialize(prober: Prober, code: int) -> None:
    assert prober.probe(*server_of("modern", "--refuse-code", str(code))).switchboard is None


SLEEPER = (sys.executable, "-c", "import sys; sys.stdin.read()")


@pytest.mark.usefixtures("quick")
def test_a_server_that_never_says_anything_is_given_up(prober: Prober) -> None:
    with pytest.raises(BackendNotStarted, match="did not answer when it was started"):
        prober.probe(*SLEEPER, timeout=1.5)
    prober.left(0)


@pytest.mark.usefixtures("quick")
def test_a_client_that_leaves_is_waited_for_no_longer(prober: Prober) -> None:
    has_left = threading.Event()
    threading.Timer(0.7, has_left.set).start()
    with pytest.raises(ClientLeft):
        prober.probe(*SLEEPER, timeout=60, has_left=has_left.is_set)
    prober.left(0)


def test_a_server_that_exits_at_once_is_given_up(prober: Prober) -> None:
    with pytest.raises(BackendLost):
        prober.probe(sys.executable, "-c", "raise SystemExit(3)")
    prober.left(0)


def test_a_program_that_is_not_there_is_given_up(prober: Prober) -> None:
    with pytest.raises(BackendError):
        prober.probe("/no/such/program")
    assert prober.spawned == 1


REFUSES_ALL = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
        error = {"code": -32601, "message": "no"}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}), flush=True)
"""


def test_a_server_that_refuses_everything_is_given_up(prober: Prober) -> None:
    with pytest.raises(BadAnswer, match="refused initialize"):
        prober.probe(sys.executable, "-c", REFUSES_ALL)
    prober.left(0)


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "error", "expected"),
    [
        ({"supportedVersions": ["2026-07-28"]}, None, True),
        ({"supportedVersions": ["2025-11-25", "2026-07-28"]}, None, True),
        ({"supportedVersions": ["2025-11-25"]}, None, False),
        ({"supportedVersions": []}, None, False),
        ({}, None, False),
        (None, {"code": -32022, "data": {"supported": ["2026-07-28"]}}, True),
        (None, {"code": -32022, "data": {"supported": ["2025-11-25"]}}, False),
        (
            None,
            {"code": -32022, "data": {"supported": ["2025-11-25"], "requested": "2026-07-28"}},
            False,
        ),
        (None, {"code": -32022}, False),
        (None, {"code": -32601, "data": {"supported": ["2026-07-28"]}}, False),
        (None, {"code": -32602}, False),
    ],
)
def test_what_an_answer_says_of_the_era(
    result: Json | None, error: Json | None, expected: bool
) -> None:
    if result is not None:
        answer = Response(1, jsonrpc.as_payload(result))
    else:
        answer = Response(1, error=jsonrpc.as_payload({"message": "m", **(error or {})}))
    assert results.is_modern(answer) is expected


# --- through the proxy ---------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["modern", "legacy"])
def test_many_first_requests_learn_the_era_once(tmp_path: Path, era: str) -> None:
    trace = Trace(tmp_path / "trace")
    command = server_of(era, "--trace", str(trace.path))
    with replicas(1, command=command) as one:
        client = ModernClient(one[0].front)
        pids = run_together([client.pid] * 8)
        assert len(set(pids)) == 1
        assert len(trace.lines("pid")) == 1
        assert one[0].children == 1


def test_many_first_requests_of_many_callers_learn_the_era_once(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    with replicas(1, command=server_of("legacy", "--trace", str(trace.path))) as one:
        clients = [ModernClient(one[0].front, authorization=f"Bearer {n}") for n in range(6)]
        pids = run_together([client.pid for client in clients])
        assert len(set(pids)) == 6
        assert len(trace.lines("discover")) == 1
        eventually(lambda: one[0].children == 6)


def test_a_probe_that_fails_is_made_again_by_the_next_request(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text("raise SystemExit(3)\n", encoding="utf-8")
    with replicas(1, command=(sys.executable, str(program))) as one:
        client = ModernClient(one[0].front)
        answers = run_together([lambda: client.call("tools/list")] * 4)
        assert all(answer.failure for answer in answers)
        program.write_text(as_program("legacy"), encoding="utf-8")
        eventually(lambda: client.call("tools/list").failure is None)  # after a pause
        assert client.pid()


def as_program(era: str) -> str:
    """A program that is the server of an era."""
    command = list(server_of(era))
    return f"import os\nos.execv({command[0]!r}, {command!r})\n"


@pytest.mark.parametrize(("first", "then"), [("legacy", "modern"), ("modern", "legacy")])
def test_a_server_that_is_replaced_by_one_of_the_other_era_is_learnt_anew(
    tmp_path: Path, first: str, then: str
) -> None:
    program = tmp_path / "server.py"
    program.write_text(as_program(first), encoding="utf-8")
    with replicas(1, command=(sys.executable, str(program))) as one:
        client = ModernClient(one[0].front)
        assert client.call("server/discover").status == 200
        program.write_text(as_program(then), encoding="utf-8")
        assert client.tool("crash").message()["error"]
        assert client.pid()
        discovered = client.call("server/discover").message()["result"]
        info = discovered["_meta"]["io.modelcontextprotocol/serverInfo"]
        assert info["name"] == then
        assert one[0].children == 1
