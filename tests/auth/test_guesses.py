"""What keys cost a running proxy: guesses, and a file that has a mistake when workers come and go.

All of it with real gunicorn, its workers and Redis.
"""

from __future__ import annotations

import http.client
import os
import signal
from pathlib import Path

import pytest
import redis

from tests.auth.deployments import EVERYWHERE, deployed
from tests.support import needs
from tests.support.callers import KeyFile, Knowing
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.monitor import recorded_commands
from tests.support.proxy_process import GUNICORN, ProxyProcess, is_alive
from tests.support.redis_server import RedisServer
from tests.support.reloads import ENTRY, write
from tests.support.tls import Certificates
from tests.support.waiting import eventually

GUESSES = 10_000


def memory_of(pid: int) -> int:
    """The resident memory of a process, in KiB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0])


def copy_of(proxy: ProxyProcess) -> bytes:
    """The keys that the master has last read."""
    files = Path(f"/proc/{proxy.master_pid}/fd")
    (copy,) = (each for each in files.iterdir() if "memfd:mcp-keys" in os.readlink(each))
    return copy.read_bytes()


def guess(proxy: ProxyProcess, count: int) -> set[int]:
    """So many keys that nobody has, on one connection; the statuses of the answers."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    statuses = set()
    for number in range(count):
        shown = {"Authorization": f"Bearer mcpk_{number}", "Mcp-Session-Id": f"guess-{number}"}
        connection.request("POST", "/mcp", b'{"jsonrpc":"2.0","id":1,"method":"ping"}', shown)
        answer = connection.getresponse()
        answer.read()
        statuses.add(answer.status)
    connection.close()
    return statuses


def test_guesses_leave_nothing_in_workers_store_and_log(
    tmp_path: Path, own_server: RedisServer, admin: redis.Redis
) -> None:
    with deployed(tmp_path, SCRIPTED, 2, own_server.url, log_level="warning") as deployment:
        proxy = deployment.process
        assert guess(proxy, 500) == {401}
        before = {pid: memory_of(pid) for pid in proxy.worker_pids()}
        with recorded_commands(own_server) as commands:
            assert guess(proxy, GUESSES) == {401}
        assert not [words for words in commands if "guess" in str(words)]
        assert not list(admin.scan_iter("*session*"))
        assert not list(admin.scan_iter("*guess*"))
        assert not proxy.server_pids()
        for pid, kilobytes in before.items():
            assert memory_of(pid) - kilobytes < 2048
        refusals = proxy.log().count("without a valid key")
        assert 1 <= refusals <= 2  # a minute and worker


@pytest.mark.parametrize("store", [pytest.param("memory", marks=needs.MEMORY), "redis"])
def test_a_worker_that_starts_while_the_file_has_a_mistake_knows_the_last_keys(
    store: str, redis_url: str, tmp_path: Path
) -> None:
    url = redis_url if store == "redis" else None
    with deployed(tmp_path, SCRIPTED, 2, url) as deployment:
        proxy, keys = deployment.process, deployment.keys
        late = McpClient(deployment.front("alice"))
        keys.remove("bob")
        eventually(lambda: McpClient(deployment.front("bob")).initialize().status == 401)
        eventually(lambda: b"bob" not in copy_of(proxy))
        good = keys.path.read_text()
        keys.write(f"{good}carol hunter2\n")
        eventually(lambda: proxy.log().count("the keys stay as they were") == 2)
        before = set(proxy.worker_pids())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(set(proxy.worker_pids()) - before) == 2, 20)
        eventually(lambda: late.initialize().status == 200, 20)
        for _ in range(EVERYWHERE):
            assert late.initialize().status == 200
            assert McpClient(deployment.front("bob")).initialize().status == 401
        assert "hunter2" not in proxy.log()
        keys.write("")
        eventually(lambda: {late.initialize().status for _ in range(EVERYWHERE)} == {401})


def test_a_worker_starts_although_keys_and_certificates_break_meanwhile(
    tmp_path: Path,
) -> None:
    """They break once the worker is there, and before it reads them."""
    keys, authorities, servers = (
        tmp_path / name for name in ("keys", "own-ca.pem", "servers.json")
    )
    alice = KeyFile(keys).add("alice")
    authorities.write_bytes(Path(Certificates(tmp_path).path("ca.pem")).read_bytes())
    write(servers, one=ENTRY)
    environment = {
        "MCP_PROXY_CONFIG": str(servers),
        "MCP_PROXY_API_KEYS": str(keys),
        "MCP_PROXY_CA_FILE": str(authorities),
        "BROKEN_AT_IMPORT": str(tmp_path / "broken"),
    }
    way = (*GUNICORN[:-1], "tests.live.breaking:app")
    with ProxyProcess(way=way, environment=environment) as proxy:
        client = McpClient(Knowing(HttpFront(proxy.base), alice), "/servers/one/mcp")
        assert client.initialize().status == 200
        (tmp_path / "new").mkdir()
        for name in ("keys", "own-ca.pem"):
            (tmp_path / "new" / name).write_text("nonsense hunter2\n")
        (tmp_path / "new").rename(tmp_path / "broken")
        for _ in range(2):
            kill_worker(proxy)
            eventually(lambda: has_begun(client), 20)
        assert proxy.log().count("this worker starts with the keys that were there before") == 2
        assert "hunter2" not in proxy.log()


def kill_worker(proxy: ProxyProcess) -> None:
    (worker,) = proxy.worker_pids()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not is_alive(worker))


def has_begun(client: McpClient) -> bool:
    """Whether a session begins, also where nobody listens yet."""
    try:
        return client.initialize().status == 200
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=needs.MEMORY)])
def test_sessions_that_outlive_a_restart_are_still_their_callers(
    tmp_path: Path, workers: int
) -> None:
    directory = tmp_path / "sessions"
    settings = {"session_dir": str(directory)}
    with deployed(tmp_path, SCRIPTED, workers, None, **settings) as deployment:
        alice = McpClient(deployment.front("alice")).open()
        names = {name: deployment.front(name) for name in ("alice", "mallory")}
    with deployed(tmp_path, SCRIPTED, workers, None, keys=deployment.keys, **settings) as again:
        eventually(lambda: "sessions are here again" in again.process.log())
        for name, front in names.items():
            front.front = again.front("alice").front
            client = alice.at(front)
            assert {client.call("ping").status for _ in range(EVERYWHERE)} == {
                200 if name == "alice" else 404
            }
    assert (directory / "caller.key").stat().st_mode & 0o077 == 0
