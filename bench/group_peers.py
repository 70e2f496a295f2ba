"""Groups of several servers beside those of other proxies: `bench/groups --peers`.

Each of them stands in front of the same eight stdio servers, whose file it is given, and is started
as its documentation says. Where one cannot do a thing, that is a dash, and a sentence below.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import msgspec
from contenders import NODE_PEERS
from load import PATIENCE, Client, Reply
from machine import cpu_seconds, processes_under
from measuring import HERE, Document, Finding, Options, Row, Run, Wrong, compared
from processes import ECHO, SCRIPTS, Process, node, ours, running

#: Servers of the group, and how many of them each of many sessions calls.
MEMBERS, USED = 8, 2

#: Seconds that one of them needs to start, where one is slow; with --quick less.
SLOW, QUICK_SLOW = 12, 1

WARM_UP = 0.3

# Seconds between two looks whether a proxy is ready.
_PAUSE = 0.02

P50, CPU, MODERN_P50 = "p50 ms", "CPU us", "modern p50 ms"
COLD, WARM = "start to the whole list ms", "of a second session ms"
PROCESSES = "processes"
TOOLS, FIRST_LIST, CALL_THEN = "tools", "initialize and list ms", "then a call ms"

CALLS = f"one call at a time through a group of {MEMBERS} stdio servers"
LISTS = f"the first list of {MEMBERS} stdio servers"

_HUB = NODE_PEERS / "mcp-hub" / "dist" / "cli.js"
_FASTMCP = HERE / ".venv-fastmcp" / "bin" / "fastmcp"

# An event with a message, or with the address that messages go to.
_EVENT = re.compile(rb"\ndata: ?(.+?)\r?\n\r?\n")


class GroupsOfPeersOptions(Options):
    """What is used of the command line of `bench/groups`."""

    sessions: int
    only: list[str] | None


class SseClient(Client):
    """One session with the transport of 2024-11-05: requests go one way, answers come another.

    An event is expected to come in one piece of a chunked answer.
    """

    def __init__(self, port: int, path: str, tool: str) -> None:
        super().__init__(port, False, path, tool)
        self._unread = b""
        self._events = self._connect()
        self._events.sendall(self._head(b"GET") + b"\r\n")
        self._path = self._next_event()

    def close_session(self) -> None:
        """Ends the stream, and with it the session."""
        self._events.close()
        self.socket.close()

    def _ask(self, body: bytes, method: bytes = b"POST") -> Reply:
        accepted = super()._ask(body, method)
        if accepted.status != 202:
            raise Wrong(f"{body[:200]!r} was answered by {accepted.status}")
        if b'"id"' not in body:
            return accepted
        while not (message := self._next_event()).startswith(b'{"result"'):
            pass  # a notification
        return Reply(200, accepted.head, message)

    def _next_event(self) -> bytes:
        while (found := _EVENT.search(self._unread)) is None:
            piece = self._events.recv(1 << 16)
            if not piece:
                raise Wrong(f"the stream ended after {self._unread[-500:]!r}")
            self._unread += piece
        self._unread = self._unread[found.end() :]
        return found[1]


class Contender(NamedTuple):
    """A proxy that has groups: `command` makes its command line for a file and a port.

    `tool` is what it calls the tool of a server, `path` where the group is; `program` is what
    somebody else's needs, and `no_modern` why modern clients are not served.
    """

    name: str
    title: str
    kind: Literal["ours", "peer"]
    command: Callable[[Path, int], Sequence[str]]
    tool: str
    path: str = "/mcp"
    wire: type[Client] = Client
    program: Path | None = None
    no_modern: str = ""

    @property
    def missing(self) -> str | None:
        """What it needs and cannot be found."""
        if self.program is not None and not self.program.exists():
            return "not installed (bench/peers)"
        return "there is no node" if self.program == _HUB and node() is None else None

    def client(self, port: int, number: int = 0) -> Client:
        """A client that calls the tool of one of the servers."""
        tool = self.tool.format(f"m{number}")
        if self.wire is SseClient:
            return SseClient(port, self.path, tool)
        return Client(port, False, self.path, tool)


def _ours(file: Path, port: int) -> Sequence[str]:
    return ours("--config", str(file), "--aggregate", "--max-sessions", "1000")(port)


def _hub(file: Path, port: int) -> Sequence[str]:
    folders = [f"XDG_{kind}_HOME={file.parent}" for kind in ("STATE", "DATA", "CONFIG", "CACHE")]
    arguments = ["--port", str(port), "--config", str(file)]
    return ["env", *folders, str(node()), str(_HUB), *arguments]


def _fastmcp(file: Path, port: int) -> Sequence[str]:
    options = ["--transport", "http", "--host", "127.0.0.1", "--port", str(port), "--no-banner"]
    return [str(_FASTMCP), "run", str(file), *options, "--log-level", "ERROR"]


CONTENDERS = (
    Contender("ours", "1 worker, memory", "ours", _ours, "{}__echo"),
    Contender(
        *("mcp-hub", "npm mcp-hub", "peer", _hub, "{}__echo"),
        wire=SseClient,
        program=_HUB,
        no_modern="it serves HTTP+SSE of revision 2024-11-05 alone",
    ),
    Contender(
        *("fastmcp", "FastMCP", "peer", _fastmcp, "{}_echo"),
        program=_FASTMCP,
        no_modern="modern clients get no tools of servers that speak legacy revisions alone",
    ),
)


def chosen(options: GroupsOfPeersOptions) -> list[Contender]:
    """Who takes part; says who cannot."""
    names = [one.name for one in CONTENDERS]
    if unknown := set(options.only or ()) - set(names):
        sys.exit(f"{', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    wanted = [one for one in CONTENDERS if not options.only or one.name in options.only]
    for one in wanted:
        if one.missing:
            print(f"left out: {one.title}: {one.missing}", file=sys.stderr)
    return [one for one in wanted if not one.missing]


@contextlib.contextmanager
def serving(contender: Contender, slow: int = 0) -> Iterator[Process]:
    """A proxy in front of the servers, of which the last is slow."""
    entry: dict[str, Any] = {"command": ECHO[0], "args": list(ECHO[1:])}
    servers = {f"m{number}": entry for number in range(MEMBERS)}
    if slow:
        script = ["-c", f'sleep {slow}; exec "$@"', "sh", *ECHO]
        servers[f"m{MEMBERS - 1}"] = {"command": "sh", "args": script}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder, "servers.json")
        file.write_bytes(msgspec.json.encode({"mcpServers": servers}))
        with running(contender.title, lambda port: contender.command(file, port)) as proxy:
            yield proxy


# --- what is measured ----------------------------------------------------------------------------


def opened(contender: Contender, port: int, number: int = 0) -> Client:
    """A client with a session; mcp-hub refuses all with 500 while it begins."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            client = contender.client(port, number)
            client.open_session()
            return client
        except Wrong:
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE)


def await_whole_list(contender: Contender, port: int) -> None:
    """Returns once a session is told of all tools."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        client = opened(contender, port)
        count = len(client.list_tools())
        client.close_session()
        if count == MEMBERS:
            return
        time.sleep(_PAUSE)
    raise Wrong(f"{contender.title} never lists all tools")


def calls(contender: Contender, proxy: Process, seconds: float) -> dict[str, float]:
    """Latency and CPU time of a call, one at a time in one session."""
    client = opened(contender, proxy.port)
    client.list_tools()
    _call_for(client, WARM_UP)
    processes = processes_under(proxy.pid, SCRIPTS)
    before = cpu_seconds(processes)
    took = _call_for(client, seconds)
    spent = cpu_seconds(processes) - before
    client.close_session()
    return {P50: 1000 * median(took), CPU: 1e6 * spent / len(took)}


def _call_for(client: Client, seconds: float) -> list[float]:
    took: list[float] = []
    until = time.perf_counter() + seconds
    while not took or time.perf_counter() < until:
        began = time.perf_counter()
        client.first_call()
        took.append(time.perf_counter() - began)
    return took


def modern_calls(contender: Contender, proxy: Process, seconds: float) -> dict[str, float]:
    """The same of a modern client; nothing where those are not served."""
    client = Client(proxy.port, True, contender.path, contender.tool.format("m0"))
    try:
        client.open_session()
    except Wrong:
        return {}
    return {MODERN_P50: 1000 * median(_call_for(client, seconds))}


def lists(contender: Contender) -> dict[str, float]:
    """What the first client waits for all tools, from the start of the proxy, and another one."""
    began = time.perf_counter()
    with serving(contender) as proxy:
        await_whole_list(contender, proxy.port)
        cold = time.perf_counter() - began
        began = time.perf_counter()
        client = opened(contender, proxy.port)
        count = len(client.list_tools())
        warm = time.perf_counter() - began
        if count != MEMBERS:
            raise Wrong(f"{contender.title} lists {count} tools to a second session")
        client.close_session()
    return {COLD: 1000 * cold, WARM: 1000 * warm}


def slow_list(contender: Contender, slow: int) -> dict[str, float]:
    """What a client is told that comes as soon as the proxy listens, and what a call then takes."""
    with serving(contender, slow) as proxy:
        began = time.perf_counter()
        client = opened(contender, proxy.port)
        count = len(client.list_tools())
        found = {TOOLS: float(count), FIRST_LIST: 1000 * (time.perf_counter() - began)}
        if count:
            found[CALL_THEN] = 1000 * _call_for(client, 0)[0]
        client.close_session()
    return found


def processes(contender: Contender, count: int) -> dict[str, float]:
    """How many servers there are once so many sessions have called two each, and are open."""
    with serving(contender) as proxy, contextlib.ExitStack() as stack:
        await_whole_list(contender, proxy.port)
        for number in range(count):
            first = opened(contender, proxy.port, number % MEMBERS)
            stack.callback(_close, first)
            first.first_call()
            if contender.wire is Client:  # else a session has one client
                other = contender.client(proxy.port, (number + 1) % MEMBERS)
                other.session = first.session
                other.first_call()
        under = processes_under(proxy.pid)
        return {PROCESSES: float(len(under) - len(processes_under(proxy.pid, SCRIPTS)))}


def _close(client: Client) -> None:
    """Ends a session whose connection the server may have closed meanwhile."""
    if not isinstance(client, SseClient):
        client.reconnect()
    client.close_session()


# --- the run -------------------------------------------------------------------------------------


def benchmark(options: GroupsOfPeersOptions) -> Document:
    """All of them take turns."""
    options.name = f"{options.name}-peers"
    contenders = chosen(options)
    count, slow = (5, QUICK_SLOW) if options.quick else (options.sessions, SLOW)
    many = f"{count} sessions with a group of {MEMBERS} stdio servers, each calls {USED}"
    slowly = f"the first list where one of {MEMBERS} servers needs {slow} s to start"
    rows = {
        (group, one.name): Row(group, one.name, one.title, one.kind)
        for group in (CALLS, LISTS, slowly, many)
        for one in contenders
    }
    steps = len(contenders) * (2 * options.rounds + 2)
    run = Run("Groups beside those of other proxies", options, steps, 2 * options.seconds)
    for number in range(options.rounds):
        for one in contenders:
            run.step(f"round {number + 1}, {one.title}, calls")
            with serving(one) as proxy:
                await_whole_list(one, proxy.port)
                found = calls(one, proxy, options.seconds)
                found |= modern_calls(one, proxy, options.seconds)
            rows[CALLS, one.name].add(found)
            if MODERN_P50 not in found:
                rows[CALLS, one.name].missing[MODERN_P50] = one.no_modern
            run.step(f"round {number + 1}, {one.title}, lists")
            rows[LISTS, one.name].add(lists(one))
    for one in contenders:
        run.step(f"{one.title}, a slow server")
        rows[slowly, one.name].add(told := slow_list(one, slow))
        if CALL_THEN not in told:
            rows[slowly, one.name].missing[CALL_THEN] = "no tool is there to be called"
        run.step(f"{one.title}, {count} sessions")
        rows[many, one.name].add(processes(one, count))
    return run.finish(list(rows.values()), [*judged(rows)], command="bench/groups --peers")


def judged(rows: Mapping[tuple[str, str], Row]) -> Iterator[Finding]:
    """What others take, beside what we take."""
    for (group, name), row in rows.items():
        base = rows.get((group, "ours"))
        if base is not None and name != "ours" and group in (CALLS, LISTS):
            for quantity in (P50, CPU) if group == CALLS else (COLD, WARM):
                what = f"{row.title}, beside {base.title}: {quantity} ({group})"
                yield Finding(what, compared(row, base, quantity))
