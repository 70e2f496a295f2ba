"""Groups under kills: nothing of one server, or of one session, is ever taken for another's.

`groups-same`: servers that are the same program, with the same names and URIs, on four workers of
which one is killed again and again. `groups-many`: a hundred sessions of ten servers each, while
children and workers are killed, the file is reloaded and idle children give way to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from urllib3.exceptions import HTTPError

from tests.clients.programs import node, node_modules
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.reloads import hang_up
from tests.support.startable import Startable
from tests.support.waiting import eventually

Json = dict[str, Any]

_MEMBER = Path(__file__).resolve().parents[1] / "servers" / "member.py"
_FILESYSTEM = "@modelcontextprotocol/server-filesystem/dist/index.js"

#: Seconds after a kill in which calls may fail: sessions are taken over, servers start anew.
AFTER_KILL = 40.0

SAME = "note://same"

# What a client sees of a worker that is killed.
_NO_ANSWER = (OSError, ValueError, AssertionError, HTTPError)

_WORKERS = 4
_CLIENTS = 6
_PATIENCE = 120.0


class Failed(Exception):
    """A call has no answer, or an error of the proxy: that may be around a kill."""


class Crossed(Exception):
    """What came was another's. That may never be."""


@contextmanager
def serving(document: Json, store: str, *options: str) -> Iterator[tuple[ProxyProcess, Path]]:
    """A proxy in front of what a file lists, with sessions in a store."""
    with tempfile.TemporaryDirectory(prefix="proof-") as folder, ExitStack() as stack:
        file = Path(folder, "servers.json")
        file.write_text(json.dumps(document))
        given = ["--config", str(file), "--log-level", "error", *options]
        if store == "redis":
            given += ["--redis-url", stack.enter_context(RedisServer()).url]
        with ProxyProcess(options=given) as process:
            try:
                yield process, file
            except BaseException as error:
                error.add_note(f"the proxy wrote:\n{process.log()[-3000:]}")
                raise


def member(name: str, *options: str) -> Json:
    """A server that says its name."""
    return {"command": sys.executable, "args": ["-I", "-S", str(_MEMBER), "--name", name, *options]}


class Session:
    """A client of a group that begins anew where its session is gone; `hear` gets what it hears."""

    def __init__(
        self, process: ProxyProcess, hear: Callable[[Json], None] = lambda message: None
    ) -> None:
        self._client = McpClient(HttpFront(process.base), "/groups/g/mcp")
        self._hear = hear
        self.opened = 0

    def ask(self, method: str, params: Json | None = None) -> Json:
        """The answer to a request; raises Failed, and Crossed where it answers another one."""
        try:
            if self._client.session is None:
                self._client.open()
                self.opened += 1
            key = next(self._client.ids)
            answer = self._client.call(method, params, key)
            if answer.status == 404:
                self._client.session = None
            *told, message = answer.messages()
        except _NO_ANSWER as error:
            raise Failed(f"{type(error).__name__}") from error
        if answer.status != 200:
            raise Failed(f"{answer.status}")
        if message.get("id") != key:
            raise Crossed(f"{message} came for {key}")
        for each in told:
            self._hear(each)
        return message

    def result(self, method: str, params: Json | None = None) -> Json:
        """The result of a request; raises Failed where it is an error."""
        message = self.ask(method, params)
        if "result" not in message:
            raise Failed(str(message["error"])[:120])
        result: Json = message["result"]
        return result

    def text(self, tool: str, arguments: Json | None = None) -> str:
        """What a tool says."""
        result = self.result("tools/call", {"name": tool, "arguments": arguments or {}})
        said: str = result["content"][0]["text"]
        return said

    def listen(self) -> None:
        """Hears the standing stream until it ends, if it can be had."""
        with contextlib.suppress(*_NO_ANSWER):
            stream = self._client.listen()
            if stream.is_stream:
                for message in stream.stream():
                    self._hear(message)

    def end(self) -> None:
        """Ends the session, if that can be told."""
        with contextlib.suppress(*_NO_ANSWER):
            self._client.delete().body()


class Client(Startable):
    """Somebody who does one thing after the other, in a thread, and notes how it went."""

    def __init__(self, steps: Sequence[Callable[[], None]]) -> None:
        self._steps = steps
        self.answered: list[float] = []
        self.failed: list[tuple[float, float, str]] = []  # from when till when, and why
        self.crossed: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        order = random.Random(id(self))
        while not self._is_over.wait(0.01):
            begun = time.monotonic()
            try:
                order.choice(self._steps)()
                self.answered.append(time.monotonic())
            except Failed as error:
                self.failed.append((begun, time.monotonic(), str(error)))
            except Crossed as error:
                self.crossed.append(str(error))


def require(found: object, expected: object) -> None:
    """Raises Crossed where these differ."""
    if found != expected:
        raise Crossed(f"{found!r} in place of {expected!r}")


# --- two servers that are the same ---------------------------------------------------------------


def groups_same(seconds: float = 180.0, between_kills: float = 60.0) -> None:
    """Two folders of npm's server-filesystem, and two servers with the same names and URIs."""
    for store in ("memory", "redis"):
        with tempfile.TemporaryDirectory(prefix="same-") as folder:
            _same(store, Path(folder), seconds, between_kills)


def _same(store: str, folder: Path, seconds: float, between_kills: float) -> None:
    shared = ("--resource", SAME, "--template", "note://{id}", "--tool", "touch")
    servers = {name: member(name, *shared) for name in ("a", "b")}
    for name in ("left", "right"):
        (folder / name).mkdir()
        (folder / name / "who.txt").write_text(name)
        script = str(node_modules() / _FILESYSTEM)
        servers[name] = {"command": node(), "args": [script, str(folder / name)]}
    document = {"mcpServers": servers, "groups": {"g": {"members": list(servers)}}}
    with (
        serving(document, store, "--workers", str(_WORKERS)) as (process, _),
        ExitStack() as stack,
    ):
        twins = [Twins(process, folder, "ab"[number % 2]) for number in range(_CLIENTS)]
        clients = [stack.enter_context(Client(each.steps())) for each in twins]
        listeners = [stack.enter_context(Listener(each)) for each in twins]
        _wait_for_all(clients, 0.0, "not everybody has begun")
        begun = time.monotonic()
        kills: list[float] = []
        while time.monotonic() < begun + seconds:
            time.sleep(max(0.0, min(between_kills, begun + seconds - time.monotonic())))
            kills.append(time.monotonic())
            os.kill(random.choice(process.worker_pids()), signal.SIGKILL)
            _wait_for_all(clients, kills[-1], "not everybody goes on after a kill")
        for listener in listeners:
            listener.stop()
        for each in twins:
            each.session.end()
        stack.close()
    updates = sum(each.updates for each in twins)
    print(f"{store}: {updates} updates heard, {sum(t.session.opened for t in twins)} sessions")
    report(clients, kills)
    assert sum(len(each.wrong_updates) for each in twins) == 0, twins[0].wrong_updates
    assert updates > 0, "no update was heard"
    require_none_crossed(clients)
    require_failures_near(clients, kills)


class Twins:
    """What one client does: with all four servers, but only one of the two has its resource
    changed, so that an update of the other's would be wrong.
    """

    def __init__(self, process: ProxyProcess, folder: Path, touched: str) -> None:
        self.session = Session(process, self.hear)
        self.updates = 0
        self.wrong_updates: list[str] = []
        self._folder = folder
        self._touched = touched
        self._numbers = iter(range(10**9))

    def steps(self) -> list[Callable[[], None]]:
        """What can be done."""
        return [
            *(self._reads_files, self._writes_files, self._calls, self._reads),
            *(self._completes, self._lists, self._touches),
        ]

    def hear(self, message: Json) -> None:
        """Something on the standing stream."""
        if message.get("method") == "notifications/resources/updated":
            uri = message["params"]["uri"]
            self.updates += 1
            if uri != {"a": SAME, "b": f"b+{SAME}"}[self._touched]:
                self.wrong_updates.append(uri)

    def _reads_files(self) -> None:
        for name in ("left", "right"):
            path = {"path": str(self._folder / name / "who.txt")}
            require(self.session.text(f"{name}__read_text_file", path).strip(), name)
            other = {"left": "right", "right": "left"}[name]
            said = self.session.text(f"{other}__read_text_file", path)
            require("Access denied" in said, True)

    def _writes_files(self) -> None:
        name = random.choice(("left", "right"))
        written = f"{name} {next(self._numbers)} {id(self)}"
        path = {"path": str(self._folder / name / f"{id(self)}.txt")}
        self.session.text(f"{name}__write_file", {**path, "content": written})
        require(self.session.text(f"{name}__read_text_file", path).strip(), written)

    def _calls(self) -> None:
        for name in ("a", "b"):
            require(json.loads(self.session.text(f"{name}__who"))["name"], name)
            found = self.session.result("prompts/get", {"name": f"{name}__greet"})
            require(found["description"], f"{name} greet")

    def _reads(self) -> None:
        for name, prefix in (("a", ""), ("b", "b+")):
            for uri, own in ((SAME, SAME), ("note://other", "note://other")):
                found = self.session.result("resources/read", {"uri": prefix + uri})
                (content,) = found["contents"]
                require((content["uri"], content["text"]), (prefix + uri, f"{name} has {own}"))

    def _completes(self) -> None:
        argument = {"name": "id", "value": ""}
        for name, prefix in (("a", ""), ("b", "b+")):
            for reference in (
                {"type": "ref/prompt", "name": f"{name}__greet"},
                {"type": "ref/resource", "uri": f"{prefix}note://{{id}}"},
            ):
                asked = {"ref": reference, "argument": argument}
                found = self.session.result("completion/complete", asked)
                require(found["completion"]["values"], [name])

    def _lists(self) -> None:
        found = self.session.result("resources/list")
        require([each["uri"] for each in found["resources"]], [SAME, f"b+{SAME}"])
        names = [each["name"] for each in self.session.result("tools/list")["tools"]]
        prefixes = list(dict.fromkeys(name.partition("__")[0] for name in names))
        require(prefixes, ["a", "b", "left", "right"])

    def _touches(self) -> None:
        uri = {"a": SAME, "b": f"b+{SAME}"}[self._touched]
        self.session.result("resources/subscribe", {"uri": uri})
        self.session.text(f"{self._touched}__touch")


class Listener(Startable):
    """Hears a session's standing stream, again and again."""

    def __init__(self, twins: Twins) -> None:
        self._twins = twins
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks for no more streams; the one that there is ends with the session."""
        self._is_over.set()

    def close(self) -> None:
        self.stop()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while not self._is_over.wait(0.2):
            self._twins.session.listen()


# --- many sessions -------------------------------------------------------------------------------


SESSIONS, MEMBERS, USED = 100, 10, 2


def groups_many(seconds: float = 60.0) -> None:
    """A hundred sessions have two hundred processes, and no answer is another session's."""
    names = [f"m{number}" for number in range(MEMBERS)]
    servers = {name: member(name) for name in names}
    document: Json = {"mcpServers": servers, "groups": {"g": {"members": names}}}
    options = ("--workers", "2", "--max-sessions", "250", "--evict-after", "1")
    with serving(document, "redis", *options) as (process, file), ExitStack() as stack:
        _learn(process)
        owned = [Owned(process, names, number) for number in range(SESSIONS)]
        for each in owned:
            for name in each.used:
                each.call(name)
        children = len(process.server_pids())
        print(f"{SESSIONS} sessions of {MEMBERS} servers, {USED} used: {children} processes")
        assert children == SESSIONS * USED, children
        steps = [each.call_some for each in owned]
        clients = [stack.enter_context(Client(steps[at::10])) for at in range(10)]
        begun, kills, most = time.monotonic(), [], 0
        counts: Counter[str] = Counter()
        while time.monotonic() < begun + seconds:
            what = ("child", "reload", "child", "reload", "worker")[sum(counts.values()) % 5]
            counts[what] += 1
            if what == "reload":
                version = ["--tool", f"version{sum(counts.values())}"]
                changed = {**servers, "m9": member("m9", *version)}
                file.write_text(json.dumps({**document, "mcpServers": changed}))
                hang_up(process)
            else:
                pids = process.server_pids() if what == "child" else process.worker_pids()
                os.kill(random.choice(pids), signal.SIGKILL)
                kills.append(time.monotonic())
            most = max(most, len(process.server_pids()))
            time.sleep(seconds / 15)
        stack.close()
        evicted = sum(each.begun for each in owned) - SESSIONS * USED
        print(f"  {dict(counts)}; up to {most} processes, {evicted} begun anew or more")
        report(clients, kills)
        require_none_crossed(clients)
        assert all(each.answered for each in clients)
        assert most <= 500, f"{most} processes"
        seen = Counter(token for each in owned for token in each.seen)
        assert max(seen.values()) == 1, "two sessions, or servers, had the same process"
        for each in owned:
            each.session.end()


def _learn(process: ProxyProcess) -> None:
    """Has every worker know the lists, by sessions that are over afterwards."""
    sessions = [Session(process) for _ in range(12)]
    for session in sessions:
        session.result("tools/list")
    for session in sessions:
        session.end()
    eventually(lambda: not process.server_pids(), _PATIENCE, "servers are left")


class Owned:
    """A session, and the processes that have answered it: those are nobody else's."""

    def __init__(self, process: ProxyProcess, names: Sequence[str], number: int) -> None:
        self.session = Session(process)
        self.used = [names[(number + more) % len(names)] for more in range(USED)]
        self._names = names
        self._calls: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self.seen: set[str] = set()
        self.begun = 0

    def call(self, name: str) -> None:
        """A call of a server: it says its name, and counts the calls of its process."""
        with self._lock:
            told = json.loads(self.session.text(f"{name}__who"))
            require(told["name"], name)
            token, calls = self._calls.get(name, ("", 0))
            if told["born"] == token:
                require(told["calls"] > calls, True)
            else:
                require(told["born"] not in self.seen, True)
                self.seen.add(told["born"])
                self.begun += 1
            self._calls[name] = (told["born"], told["calls"])

    def call_some(self) -> None:
        """Mostly one that it has called before."""
        chosen = self.used if random.random() < 0.7 else self._names
        self.call(random.choice(list(chosen)))


# --- figures and claims --------------------------------------------------------------------------


def _wait_for_all(clients: Sequence[Client], since: float, what: str) -> None:
    eventually(
        lambda: all(each.answered and each.answered[-1] > since for each in clients),
        _PATIENCE,
        what,
    )


def report(clients: Sequence[Client], kills: Sequence[float]) -> None:
    """Prints how it went."""
    answered = sum(len(each.answered) for each in clients)
    failed = Counter(error for each in clients for *_, error in each.failed)
    crossed = sum(len(each.crossed) for each in clients)
    print(
        f"  {answered} steps done, {sum(failed.values())} failed, {crossed} crossed; "
        f"{len(kills)} kills"
    )
    for error, count in failed.most_common(8):
        print(f"    {count} x {error}")
    sys.stdout.flush()


def require_none_crossed(clients: Sequence[Client]) -> None:
    """Nothing was another's."""
    crossed = [one for each in clients for one in each.crossed]
    assert crossed == [], crossed[:5]


def require_failures_near(clients: Sequence[Client], kills: Sequence[float]) -> None:
    """What failed did so around a kill."""
    far = [
        (error, [round(begun - kill, 1) for kill in kills])
        for each in clients
        for begun, ended, error in each.failed
        if not any(begun - AFTER_KILL < kill < ended for kill in kills)
    ]
    assert far == [], far[:5]
