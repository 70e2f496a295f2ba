"""Parts of the proxy end one at a time, under load: what callers see, and what /readyz says."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.proofs.hostile import Caller
from tests.proofs.replica_failures import GONE, ask
from tests.servers.http_backend import HttpBackend
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess, children_of, is_alive, is_guardian
from tests.support.redis_server import RedisServer
from tests.support.waiting import eventually

_CALLERS = 6
_MAX_CALLERS = 100
_LOOK = 0.1

#: Seconds within which nothing is left of a proxy whose arbiter was killed: gunicorn's own limit.
ORPHANED = 30.0

#: Seconds within which all works again.
AGAIN = 5.0

#: Our threads that live as long as a worker.
THREADS = (
    "mcp-supervisor",
    "mcp-relay",
    "mcp-relay-sender",
    "mcp-relay-lease",
    "mcp-sweeper",
    "mcp-session-refresher",
    "mcp-disconnects",
)

# Seconds for the round of a thread that comes seldom; and for which callers are watched then.
_ROUND = 12.0
_AFTERWARDS = 4.0

_ENDING = ("-m", "gunicorn", "-c", "python:tests.proofs.ending_gunicorn", "mcp_proxy.wsgi:app")
_STUBBORN = (*SCRIPTED, "--ignore-eof", "--ignore-term")


class Scene(NamedTuple):
    """A proxy over its Redis, with callers."""

    redis: RedisServer
    proxy: ProxyProcess
    callers: list[Caller]

    def wrong(self) -> Counter[str]:
        """What was wrong with calls so far."""
        return Counter(one.wrong[:120] for c in self.callers for one in c.done if one.wrong)

    def calls(self) -> int:
        """How many calls have been made."""
        return sum(len(caller.done) for caller in self.callers)

    def guardians(self) -> dict[int, int]:
        """The guardian of each worker."""
        return {
            worker: child
            for worker in self.proxy.worker_pids()
            for child in children_of(worker)
            if is_guardian(child)
        }


@contextmanager
def under_load(
    workers: int,
    way: tuple[str, ...] = ("-m", "mcp_proxy"),
    environment: Mapping[str, str] | None = None,
    is_stdio: bool = True,
) -> Iterator[Scene]:
    """The scene; its servers ignore everything but SIGKILL, or there is one that speaks HTTP."""
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        settings = {
            "MCP_PROXY_WORKERS": str(workers),
            "MCP_PROXY_REDIS_URL": redis.url,
            "MCP_PROXY_SESSION_TTL": "20",
            "MCP_PROXY_LOG_LEVEL": "error",
            **(environment or {}),
        }
        if not is_stdio:
            settings["MCP_PROXY_TARGET_URL"] = stack.enter_context(HttpBackend()).url
        command = _STUBBORN if is_stdio else ()
        proxy = stack.enter_context(ProxyProcess(command, environment=settings, way=way))
        scene = Scene(redis, proxy, [])
        # The kernel shares connections out as it likes: more come until each worker has a server.
        guardians = workers if is_stdio else 0
        while len(scene.callers) < _CALLERS or len(scene.guardians()) < guardians:
            assert len(scene.callers) < _MAX_CALLERS, "a worker gets no sessions"
            caller = Caller(proxy.port, "/mcp", {"name": "x"})
            scene.callers.append(caller)
            caller.start()
            stack.callback(caller.stop)
            eventually(partial(len, caller.done), 30, "a caller does not call")
        eventually(lambda: scene.calls() > 20 * len(scene.callers), 30, "not everybody calls")
        yield scene


# Seconds for which the owner of a session may go on without its record, with some to spare.
_KNOWN = 1.5

# --- processes -----------------------------------------------------------------------------------


def guardian_killed() -> None:
    """The guardian of each worker is killed, then a worker: no call fails, nothing is left."""
    with under_load(workers=2) as scene:
        before = scene.guardians()
        assert len(before) == 2, before
        for worker, guardian in before.items():
            os.kill(guardian, signal.SIGKILL)
            began = time.monotonic()
            while scene.guardians().get(worker, guardian) == guardian:
                assert time.monotonic() < began + AGAIN, "no new guardian"
                time.sleep(_LOOK)
            print(f"  a guardian was replaced after {time.monotonic() - began:.2f} s")
        time.sleep(1)
        print(f"  {scene.calls()} calls, wrong: {dict(scene.wrong())}", flush=True)
        assert not scene.wrong(), "calls failed because a guardian was killed"
        worker = max(before, key=lambda pid: len(children_of(pid)))
        servers = [pid for pid in children_of(worker) if not is_guardian(pid)]
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        while any(map(is_alive, servers)):
            assert time.monotonic() < began + 10, "servers outlived their worker"
            time.sleep(0.01)
        seconds = time.monotonic() - began
        print(
            f"  then a worker with {len(servers)} servers: gone after {seconds:.2f} s", flush=True
        )
        assert seconds < GONE


def arbiter_killed() -> None:
    """gunicorn's master is killed: its workers leave, and a new one goes on with the sessions."""
    with under_load(2, environment={"MCP_PROXY_SESSION_TTL": "300"}) as scene:
        clients = [caller.session for caller in scene.callers]
        os.kill(scene.proxy.master_pid, signal.SIGKILL)
        began = time.monotonic()
        while scene.proxy.all_pids():
            assert time.monotonic() < began + ORPHANED, "processes are left"
            time.sleep(_LOOK)
        print(f"  nothing was left after {time.monotonic() - began:.1f} s", flush=True)
        made = scene.calls()
        settings = {"MCP_PROXY_REDIS_URL": scene.redis.url, "MCP_PROXY_LOG_LEVEL": "error"}
        with ProxyProcess(_STUBBORN, environment=settings) as successor:
            for session in clients:
                client = McpClient(HttpFront(successor.base))
                client.session = session
                assert client.result("echo", {"a": 1}) == {"a": 1}
        print(f"  {made} calls before; all {len(clients)} sessions went on at its successor")


# --- Redis ---------------------------------------------------------------------------------------


def redis_emptied() -> None:
    """Redis is emptied, then replaced by an empty one: old sessions are over, new ones work."""
    with under_load(workers=2) as scene:
        for what in ("emptied", "replaced"):
            old = [caller.session for caller in scene.callers]
            children = set(scene.proxy.server_pids())
            if what == "replaced":
                scene.redis.kill()
                time.sleep(1)
                scene.redis.start()
            with scene.redis.client() as client:
                client.flushall()
            began = time.monotonic()
            seconds = _until_new_sessions_work(scene.proxy, began)
            ready = _until_ready(scene.proxy, began)
            time.sleep(max(0.0, began + _KNOWN - time.monotonic()))
            statuses = Counter(_status(scene.proxy, session) for session in old)
            print(
                f"  {what}: ready after {ready:.2f} s, a new session works after {seconds:.2f} s, "
                f"the old ones are answered {dict(statuses)}",
                flush=True,
            )
            assert set(statuses) == {404}, "a session whose record is lost is not answered 404"
            assert max(seconds, ready) < AGAIN
            while children & set(scene.proxy.server_pids()):
                assert time.monotonic() < began + 60, "servers of lost sessions are left"
                time.sleep(_LOOK)
            print(f"    their servers were gone after {time.monotonic() - began:.1f} s")
            for caller in scene.callers:
                caller.begin_anew()
        print(f"  {scene.calls()} calls, wrong: {dict(scene.wrong())}", flush=True)


def _until_new_sessions_work(proxy: ProxyProcess, began: float) -> float:
    def works() -> bool:
        clients = [McpClient(HttpFront(proxy.base)) for _ in range(4)]
        if not all(client.initialize().has_succeeded for client in clients):
            return False
        answers = [client.call("echo") for client in clients for _ in range(4)]
        is_right = all(answer.has_succeeded for answer in answers)
        for client in clients:
            client.delete().body()
        return is_right

    eventually(works, 30, "new sessions do not work")
    return time.monotonic() - began


def _until_ready(proxy: ProxyProcess, began: float) -> float:
    def is_ready() -> bool:
        return all(ask(proxy.port, "GET", "/readyz")[0].status == 200 for _ in range(6))

    eventually(is_ready, 30, "not ready again")
    return time.monotonic() - began


def _status(proxy: ProxyProcess, session: str) -> int:
    ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
    return ask(proxy.port, "POST", "/mcp", ping, session)[0].status


# --- threads -------------------------------------------------------------------------------------


def threads_ended() -> None:
    """Each of our threads ends: it begins again, or /readyz says that it is missing."""
    silent: list[str] = []
    for name in THREADS:
        with tempfile.TemporaryDirectory(prefix="proof-") as folder:
            file = Path(folder) / "name"
            way = (
                "-m",
                "gunicorn",
                "-c",
                "python:tests.proofs.ending_gunicorn",
                "mcp_proxy.wsgi:app",
            )
            # The relay has something to do where another worker has a session, and sessions are
            # refreshed in front of HTTP servers.
            workers = 2 if name.startswith("mcp-relay") else 1
            is_stdio = name != "mcp-session-refresher"
            given = {"ENDING_FILE": str(file), "MCP_PROXY_PASSING": "off"}
            with under_load(workers, way, given, is_stdio) as scene:
                outcome, is_said = _end(scene, file, name)
        print(f"  {name:<22} {outcome}", flush=True)
        if not is_said:
            silent.append(name)
    assert silent == [], f"nobody says that these ended: {', '.join(silent)}"


def _end(scene: Scene, file: Path, name: str) -> tuple[str, bool]:
    """What came of the end of a thread; whether it began again or is missed."""
    said = file.with_suffix(".said")
    listener = McpClient(HttpFront(scene.proxy.base)).open()
    stream = listener.listen()
    try:
        if f"began {name}\n" not in said.read_text():
            return "does not run here", False
        wrong, began_before = scene.wrong(), said.read_text().count(f"began {name}\n")
        file.write_text(name)
        McpClient(HttpFront(scene.proxy.base)).open().delete().body()  # has the others look up
        deadline = time.monotonic() + _ROUND
        while f"ended {name}\n" not in said.read_text():
            if time.monotonic() > deadline:
                return f"did not come round within {_ROUND:.0f} s", False
            time.sleep(_LOOK)
        reasons: set[str] = set()
        began, before = time.monotonic(), scene.calls()
        while time.monotonic() < began + _AFTERWARDS:
            checks = json.loads(ask(scene.proxy.port, "GET", "/readyz")[1])["checks"].values()
            reasons |= {check["reason"] for check in checks if check["state"] != "ok"}
            time.sleep(_LOOK)
        began_again = said.read_text().count(f"began {name}\n") > began_before
        failed = sum((scene.wrong() - wrong).values())
        what = "began again" if began_again else f"/readyz: {'; '.join(sorted(reasons)) or 'ready'}"
        calls = scene.calls() - before
        return f"{what}; {failed} of {calls} calls failed", began_again or bool(reasons)
    finally:
        stream.close()
        sys.stdout.flush()
