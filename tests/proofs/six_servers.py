"""Six servers that others have written, as `examples/servers.json` names them, and two mistakes.

Servers from PyPI and npm are started by `uvx` and `npx`, which fetch them first; the one that
speaks HTTP is the official SDK's and wants a key. What is fetched stays in the checkout.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import requests
import yaml

from tests.clients.programs import ROOT, environment_of
from tests.clients.real_servers import Page
from tests.clients.sdk_session import connected, plain
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.reloads import hang_up
from tests.support.sse_servers import SseServer
from tests.support.startable import ServerThread
from tests.support.waiting import eventually

Json = dict[str, Any]

#: Reloads under load, and sessions of each server that call meanwhile.
ROUNDS = 3
SESSIONS = 2

_EXAMPLE = ROOT / "examples" / "servers.json"
_KEY = "3c6c1b0a-of-the-http-server"

#: What the two mistakes are, as the proxy says it.
_BROKEN = {
    "no-such-key": "/run/secrets/no-such-key cannot be read",
    "of-an-editor": "${workspaceFolder} is known to an editor alone",
}

#: What `time` is told in the rounds.
_ZONES = ("Europe/Berlin", "Asia/Tokyo", "America/Lima")

# For a start, by programs that look into their caches first.
_PATIENCE = 120.0

# What has them ask nobody, once the table has shown that everything is there.
_OFFLINE = {"UV_OFFLINE": "1", "npm_config_offline": "true"}


class Use(NamedTuple):
    """A tool of a server, and what its answer has in it."""

    tool: str
    arguments: Json
    expected: str


def six_servers(store: str) -> None:
    """The table, and everything else with the sessions in memory or in Redis."""
    with (
        surroundings() as (environment, uses),
        tempfile.TemporaryDirectory(prefix="proof-") as folder,
        ExitStack() as stack,
    ):
        _check(environment)
        options = ["--workers", "1"]
        if store == "redis":
            redis = stack.enter_context(RedisServer())
            options = ["--workers", "2", "--redis-url", redis.url]
        file = Path(folder) / "servers.json"
        _write(file, _entries())
        options += ["--config", str(file), "--log-level", "warning"]
        settings = {**environment, **_OFFLINE, "MEMORY_FILE": f"{folder}/memory.jsonl"}
        proxy = stack.enter_context(ProxyProcess(options=options, environment=settings))
        _are_served(proxy, uses)
        _broken_say_why(proxy)
        _reload_under_load(proxy, file, uses)
        _kill_while_broken(proxy, file, uses, is_shared=store == "redis")


# --- what is around it ---------------------------------------------------------------------------


@contextmanager
def surroundings() -> Iterator[tuple[Mapping[str, str], Mapping[str, Use]]]:
    """The HTTP server and a page to fetch: the environment of the proxy, and what is called."""
    programs = environment_of("uv")
    server = [sys.executable, str(ROOT / "tests" / "servers" / "streamable_python.py"), "0", _KEY]
    with SseServer(lambda name: server, "http") as http, ServerThread(Page) as page:
        own = f"{programs / 'bin'}:{Path(sys.executable).parent}"
        yield (
            {
                "PATH": f"{own}:{os.environ['PATH']}",
                "UV_CACHE_DIR": str(programs / "uv"),
                "npm_config_cache": str(programs / "npm"),
                "HTTP_SERVER": f"{http.url}/mcp",
                "HTTP_SERVER_KEY": _KEY,
            },
            {
                "time": Use("get_current_time", {"timezone": "UTC"}, "UTC"),
                "git": Use("git_branch", {"repo_path": str(ROOT), "branch_type": "local"}, "*"),
                "fetch": Use(
                    "fetch", {"url": f"http://127.0.0.1:{page.port}/page"}, "A page to fetch."
                ),
                "everything": Use("echo", {"message": "hear, hear"}, "hear, hear"),
                "memory": Use("read_graph", {}, "entities"),
                "http": Use("echo", {"message": "hear, hear"}, "hear, hear"),
            },
        )


# --- the file ------------------------------------------------------------------------------------


def _entries() -> Json:
    """The example's, of which `fetch` may reach this machine, where the page is."""
    text = "\n".join(
        line for line in _EXAMPLE.read_text().splitlines() if not line.lstrip().startswith("//")
    )
    entries: Json = yaml.safe_load(text)["mcpServers"]  # which allows commas at the end of a list
    entries["fetch"]["args"].append("--allow-private-ips")
    entries["fetch"]["env"]["npm_config_offline"] = "false"  # its first call installs a reader
    return entries


def _write(file: Path, entries: Json) -> None:
    """Writes the file in one step."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"mcpServers": entries}))
    new.replace(file)


# --- what is to be shown -------------------------------------------------------------------------


def _check(environment: Mapping[str, str]) -> None:
    """The command prints a row for each server of the example itself, and exits with 1."""
    command = [sys.executable, "-m", "mcp_proxy", "check", "--workers", "1"]
    done = subprocess.run(
        [*command, "--config", str(_EXAMPLE)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    rows = [line.split(None, 4) for line in done.stdout.splitlines() if " server " in line]
    verdicts = {row[2]: (row[0], row[3]) for row in rows}
    kinds = {**dict.fromkeys(("time", "git", "fetch", "everything", "memory"), "stdio")}
    kinds["http"] = "http"
    expected = {name: ("ok", kind) for name, kind in kinds.items()}
    assert verdicts == {**expected, **dict.fromkeys(_BROKEN, ("FAIL", "-"))}, done.stderr
    assert done.returncode == 1


def _are_served(proxy: ProxyProcess, uses: Mapping[str, Use]) -> None:
    """The official SDK's client initializes, lists tools and calls one, in both eras."""
    for name, use in uses.items():
        for mode in ("legacy", "auto"):
            began = time.monotonic()
            seen = anyio.run(_walk, f"{proxy.base}/servers/{name}/mcp", mode, use)
            print(f"  {name:<12} {mode:<7} {seen} in {time.monotonic() - began:.1f} s", flush=True)


async def _walk(url: str, mode: str, use: Use) -> str:
    with anyio.fail_after(_PATIENCE):
        async with connected(url, mode) as (client, revision):
            tools = [tool["name"] for tool in plain(await client.list_tools())["tools"]]
            answer = plain(await client.call_tool(use.tool, use.arguments))
    assert use.tool in tools
    assert not answer.get("isError"), answer
    assert use.expected in answer["content"][0]["text"], answer
    return f"{revision}, {len(tools)} tools, {use.tool} answered"


def _broken_say_why(proxy: ProxyProcess) -> None:
    """In /readyz, and to a client that asks for one of them."""
    ready = requests.get(f"{proxy.base}/readyz", timeout=_PATIENCE)
    print(f"  /readyz: {ready.status_code} {ready.text.strip()}", flush=True)
    assert ready.status_code == 200
    for name, reason in _BROKEN.items():
        error = client_of(proxy, name).initialize().error()
        print(f"  {name}, to a client: {error['code']} {error['message']}", flush=True)
        assert reason in ready.text
        assert reason in error["message"]


# --- reloads -------------------------------------------------------------------------------------


def client_of(proxy: ProxyProcess, name: str) -> McpClient:
    """A client without a session of one of the servers; it waits for the start of that."""
    return McpClient(HttpFront(proxy.base, _PATIENCE), f"/servers/{name}/mcp")


class Caller(threading.Thread):
    """One session that calls its server all the time, each time over another connection."""

    def __init__(self, proxy: ProxyProcess, name: str, use: Use, stop: threading.Event) -> None:
        super().__init__(name=f"caller-{name}", daemon=True)
        self.server = name
        self.answered = 0
        self.failed: list[str] = []
        self._client = client_of(proxy, name).open()
        self._use = use
        self._stop_calling = stop

    def run(self) -> None:
        while not self._stop_calling.is_set():
            failure = failure_of(self._client, self._use)
            if failure is None:
                self.answered += 1
            else:
                self.failed.append(failure)


def failure_of(client: McpClient, use: Use) -> str | None:
    """Calls the tool: None where that was answered as it should be, else what came."""
    try:
        answer = client.call("tools/call", {"name": use.tool, "arguments": use.arguments})
        message = answer.message()
    except (requests.RequestException, ValueError) as error:
        return repr(error)
    has_succeeded = answer.has_succeeded and use.expected in json.dumps(message.get("result"))
    return None if has_succeeded else f"{answer.status} {message}"


def _reload_under_load(proxy: ProxyProcess, file: Path, uses: Mapping[str, Use]) -> None:
    """In each round one server is changed, one removed and one added; no call of the others fails.

    Nor does one of the server that is changed, whose sessions stay.
    """
    kept = [name for name in uses if name != "memory"]
    stop = threading.Event()
    callers = [Caller(proxy, name, uses[name], stop) for name in kept * SESSIONS]
    for caller in callers:
        caller.start()
    try:
        for number in range(ROUNDS):
            _play_round(proxy, file, number, uses["memory"])
    finally:
        stop.set()
        for caller in callers:
            caller.join(_PATIENCE)
    calls, failed = Counter[str](), Counter[str]()
    for caller in callers:
        calls[caller.server] += caller.answered
        failed[caller.server] += len(caller.failed)
    said = [f"{caller.server}: {one}" for caller in callers for one in caller.failed]
    print(f"  {ROUNDS} reloads: {dict(calls)} answered, {dict(failed)} failed", flush=True)
    assert said == [], said[:3]
    assert all(caller.answered > ROUNDS for caller in callers)


def _play_round(proxy: ProxyProcess, file: Path, number: int, use: Use) -> None:
    """`time` gets another time zone, and `memory` another name."""
    old, new = f"memory-{number}" if number else "memory", f"memory-{number + 1}"
    leaving = client_of(proxy, old).open()
    entries = _entries()
    entries["time"]["args"][-1] = _ZONES[number % len(_ZONES)]
    entries[new] = entries.pop("memory")
    _write(file, entries)
    hang_up(proxy)

    def is_removed() -> bool:
        answer = leaving.call("tools/list")
        return answer.status == 404 and "has been removed" in answer.error()["message"]

    def is_changed() -> bool:
        tools = client_of(proxy, "time").open().result("tools/list")
        return entries["time"]["args"][-1] in json.dumps(tools)

    eventually(is_removed, _PATIENCE, "a removed server is served")
    eventually(is_changed, _PATIENCE, "a changed server is as it was")
    assert failure_of(client_of(proxy, new).open(), use) is None


def _kill_while_broken(
    proxy: ProxyProcess, file: Path, uses: Mapping[str, Use], is_shared: bool
) -> None:
    """A worker that is killed comes back with the last good table; with Redis sessions stay."""
    last = {**uses, f"memory-{ROUNDS}": uses["memory"]}
    del last["memory"]
    clients = {name: client_of(proxy, name).open() for name in last}
    refused = proxy.log().count("nothing is reloaded")
    file.write_text('{"mcpServers": {"time": {"comm')
    hang_up(proxy)
    eventually(lambda: proxy.log().count("nothing is reloaded") > refused, _PATIENCE)
    for before in proxy.worker_pids():
        os.kill(before, signal.SIGKILL)
        eventually(functools.partial(_is_replaced, proxy, before), _PATIENCE, "no worker came back")
    for name, use in last.items():
        if not is_shared:
            clients[name].open()
        failure = failure_of(clients[name], use)
        assert failure is None, f"{name}: {failure}"
    print(f"  each worker killed while the file is broken: {len(last)} servers serve", flush=True)


def _is_replaced(proxy: ProxyProcess, before: int) -> bool:
    workers = proxy.worker_pids()
    return before not in workers and bool(workers)
