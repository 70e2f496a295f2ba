"""The command `ctl` against a proxy that runs."""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.callers import KeyFile, Knowing
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ROOT, ProxyProcess
from tests.support.redis_server import RedisServer
from tests.support.reloads import ENTRY, client_of, write
from tests.support.waiting import eventually

#: A proxy that does not hurry at its end.
PATIENT = ("-m", "gunicorn", "-c", "python:tests.live.patient_gunicorn", "mcp_proxy.wsgi:app")

REPLACED = "the server's processes are replaced, each as soon as no call needs it"
SERVED = "all workers serve what is in the file of servers"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket is."""
    return tmp_path / "ctl.sock"


@pytest.fixture(params=[pytest.param("memory", marks=needs.MEMORY), "redis"])
def process(
    request: pytest.FixtureRequest, path: Path, redis_server: RedisServer, redis_prefix: str
) -> Iterator[ProxyProcess]:
    """A proxy of two workers."""
    options = ["--ctl-socket", str(path), "--workers", "2"]
    if request.param == "redis":
        options += ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    with ProxyProcess(SCRIPTED, options=options) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the servers `one` and `two`."""
    made = tmp_path / "servers.json"
    write(made, one=ENTRY, two=ENTRY)
    return made


@pytest.fixture
def proxy(path: Path, file: Path, redis_url: str, redis_prefix: str) -> Iterator[ProxyProcess]:
    """A proxy of two workers with that file."""
    options = ["--ctl-socket", str(path), "--workers", "2", "--config", str(file)]
    store = needs.store_of_several(redis_url, redis_prefix)
    with ProxyProcess(options=options, environment=store) as made:
        yield made


def ctl(path: Path, *words: str) -> tuple[int, str]:
    """The exit code of `ctl`, and what it says."""
    return run("ctl", "--ctl-socket", str(path), *words)


def run(*arguments: str) -> tuple[int, str]:
    """The exit code of the command, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "mcp_proxy", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def pid_of(client: McpClient) -> int:
    """The process that serves a session."""
    pid: int = client.result("count")["pid"]
    return pid


def test_a_session_is_ended_whichever_worker_has_it(process: ProxyProcess, path: Path) -> None:
    clients = [McpClient(HttpFront(process.base)).open() for _ in range(6)]
    for client in clients[:4]:
        assert ctl(path, "end", client.session or "") == (0, "the session is ended\n")
    assert [client.call("ping").status for client in clients] == [404] * 4 + [200] * 2
    eventually(lambda: len(process.server_pids()) == 2)
    assert ctl(path, "end", clients[0].session or "") == (1, "no such session\n")
    assert ctl(path, "end", "never-issued") == (1, "no such session\n")


def test_status_shows_servers_workers_and_sessions(process: ProxyProcess, path: Path) -> None:
    client = McpClient(HttpFront(process.base)).open()
    client.call("die")

    def said() -> str:
        code, text = ctl(path, "status")
        assert code == 0
        return text if text.count("worker ") == 2 else ""

    text = eventually(said, 20)
    assert "server  default  ok" in text
    assert f"session ...{(client.session or '')[-8:]}" in text
    assert (client.session or "") not in text
    assert "exited (exit code 1)" in text


def test_status_shows_the_workers_of_all_hosts_that_share_a_redis(
    tmp_path: Path, redis_server: RedisServer, redis_prefix: str
) -> None:
    redis = ["--redis-url", redis_server.url, "--redis-prefix", redis_prefix]
    one, other = tmp_path / "one.sock", tmp_path / "other.sock"
    with (
        ProxyProcess(SCRIPTED, options=[*redis, "--ctl-socket", str(one)]) as first,
        ProxyProcess(SCRIPTED, options=[*redis, "--ctl-socket", str(other)]) as second,
    ):
        McpClient(HttpFront(second.base)).open()
        pids = {first.worker_pids()[0], second.worker_pids()[0]}
        for path in (one, other):
            eventually(lambda at=path: pids_in(ctl(at, "status")[1]) == pids, 30)
            eventually(lambda at=path: ctl(at, "status")[1].count("session ...") == 1, 30)


def pids_in(text: str) -> set[int]:
    """The processes of the workers that are shown."""
    return set(map(int, re.findall(r"^worker .* pid=(\d+)", text, re.MULTILINE)))


def test_the_socket_is_for_the_user_alone_and_what_is_left_of_one_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with ProxyProcess(SCRIPTED, options=["--ctl-socket", str(path)]):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert ctl(path, "status")[0] == 0
        with pytest.raises(BaseException, match="ended with 1") as failed:
            ProxyProcess(SCRIPTED, options=["--ctl-socket", str(path)])
        assert "Address already in use" in "".join(failed.value.__notes__)


def test_what_cannot_be_asked_is_said_in_a_sentence(path: Path) -> None:
    code, text = ctl(path, "status")
    assert (code, f"no proxy answers at {path}" in text) == (2, True)
    code, text = ctl(path, "keys")
    assert (code, "needs the settings api_keys" in text) == (2, True)
    for words in ((), ("stop",), ("end",), ("restart",), ("end", "a", "b"), ("status", "a", "b")):
        code, text = ctl(path, *words)
        assert code == 2, words
        assert (
            "ctl takes status [SESSION], end SESSION" in text or "unrecognized arguments" in text
        ), words


def test_a_session_that_is_not_among_the_latest_is_shown_by_its_whole_id(
    process: ProxyProcess, path: Path
) -> None:
    client = McpClient(HttpFront(process.base)).open()
    client.call("ping")
    session = client.session or ""
    for _ in range(4):
        code, text = ctl(path, "status", session)
        assert code == 0, text
        assert text.startswith(f"session ...{session[-8:]}  default  ")
        assert text.count("\n") == 1
        assert " at worker://" in text
        assert "calls=3" in text
        assert session not in text
    assert ctl(path, "status", session[-8:]) == (1, "no such session\n")
    client.delete()
    eventually(lambda: ctl(path, "status", session) == (1, "no such session\n"), 30)


# --- a server is restarted -----------------------------------------------------------------------


def test_the_processes_of_a_server_are_replaced_and_its_sessions_stay(
    proxy: ProxyProcess, path: Path
) -> None:
    clients = [client_of(proxy, "one").open() for _ in range(4)]
    other = client_of(proxy, "two").open()
    before = [pid_of(client) for client in clients]
    untouched = pid_of(other)
    code, text = ctl(path, "restart", "one")
    assert (code, text) == (0, f"{REPLACED}\n")
    eventually(lambda: not set(before) & {pid_of(client) for client in clients}, 20)
    assert pid_of(other) == untouched
    assert ctl(path, "restart", "three") == (1, "no such server\n")


def test_a_call_that_runs_ends_before_its_process_is_replaced(
    proxy: ProxyProcess, path: Path
) -> None:
    client = client_of(proxy, "one").open()
    before = pid_of(client)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.result, "sleep", {"seconds": 4})
        eventually(lambda: "calls=" in ctl(path, "status")[1])
        assert ctl(path, "restart", "one")[0] == 0
        assert call.result()["slept"] == 4
    eventually(lambda: pid_of(client) != before, 20)


def test_processes_that_were_started_ahead_are_replaced_too(path: Path, file: Path) -> None:
    options = ["--ctl-socket", str(path), "--config", str(file), "--spare-children", "1"]
    with ProxyProcess(options=options) as process:
        eventually(lambda: len(process.server_pids()) == 2, 20)
        before = set(process.server_pids())
        assert ctl(path, "restart", "one")[0] == 0
        eventually(lambda: len(set(process.server_pids()) - before) == 1, 20)
        eventually(lambda: len(process.server_pids()) == 2, 20)
        assert len(before & set(process.server_pids())) == 1


def test_a_server_that_the_proxy_has_not_started_is_not_restarted(path: Path, file: Path) -> None:
    write(file, one=ENTRY, web={"url": "http://127.0.0.1:9/mcp"})
    with ProxyProcess(options=["--ctl-socket", str(path), "--config", str(file)]):
        code, text = ctl(path, "restart", "web")
        assert (code, text) == (
            1,
            "nothing is restarted: 'web' is no stdio server that is served\n",
        )


# --- the file of servers -------------------------------------------------------------------------


def test_reload_returns_when_every_worker_serves_what_is_in_the_file(
    proxy: ProxyProcess, path: Path, file: Path
) -> None:
    kept = client_of(proxy, "one").open()
    pid = pid_of(kept)
    for name in ("three", "four"):
        write(file, one=ENTRY, **{name: ENTRY})
        assert ctl(path, "reload") == (0, f"{SERVED}\n")
        answers = [client_of(proxy, name).initialize().status for _ in range(8)]
        assert answers == [200] * 8
        assert client_of(proxy, "two").initialize().status == 404
    assert pid_of(kept) == pid


def test_reload_says_what_is_wrong_in_the_file(proxy: ProxyProcess, path: Path, file: Path) -> None:
    file.write_text('{"mcpServers": {"one": {"comm')
    code, text = ctl(path, "reload")
    assert (code, "not served as it is" in text, "line 1" in text) == (1, True, True)
    write(file, one=ENTRY, two={"command": 3})
    code, text = ctl(path, "reload")
    assert (code, "served as it was before" in text) == (1, True)
    write(file, one=ENTRY, two=ENTRY)
    assert ctl(path, "reload")[0] == 0


def test_without_a_file_there_is_nothing_to_reload(path: Path) -> None:
    with ProxyProcess(SCRIPTED, options=["--ctl-socket", str(path)]):
        code, text = ctl(path, "reload")
        assert (code, "there is no file of servers" in text) == (1, True)


# --- API keys ------------------------------------------------------------------------------------


def test_keys_are_shown_with_their_last_use_whichever_worker_was_used(
    path: Path, tmp_path: Path, redis_url: str, redis_prefix: str
) -> None:
    keys = KeyFile(tmp_path / "keys")
    shown = {name: keys.add(name) for name in ("alice", "bob")}
    options = ["--ctl-socket", str(path), "--api-keys", keys.text, "--workers", "2"]
    store = needs.store_of_several(redis_url, redis_prefix)
    with ProxyProcess(SCRIPTED, options=options, environment=store) as process:
        began = time.time()
        McpClient(Knowing(HttpFront(process.base), shown["alice"])).open()
        code, text = ctl(path, "--api-keys", keys.text, "keys")
        assert code == 0
        for key in shown.values():
            assert key not in text
        uses = used_at(text)
        assert uses["bob"] == "-"
        used = datetime.datetime.fromisoformat(uses["alice"]).timestamp()
        assert began - 60 <= used <= time.time()
        (worker, _) = process.worker_pids()
        os.kill(worker, signal.SIGKILL)
        listed = run("key", "list", "--api-keys", keys.text, "--ctl-socket", str(path))
        assert used_at(listed[1]) == uses
    code, text = run("key", "list", "--api-keys", keys.text, "--ctl-socket", str(path))
    assert (code, "no proxy answers" in text) == (0, True)
    assert used_at(text) == {"alice": "-", "bob": "-"}


def test_a_key_that_was_used_on_another_host_is_shown_with_its_last_use(
    tmp_path: Path, redis_server: RedisServer, redis_prefix: str
) -> None:
    keys = KeyFile(tmp_path / "keys")
    alice = keys.add("alice")
    settings = {
        "MCP_PROXY_REDIS_URL": redis_server.url,
        "MCP_PROXY_REDIS_PREFIX": redis_prefix,
        "MCP_PROXY_API_KEYS": keys.text,
    }
    one, other = tmp_path / "one.sock", tmp_path / "other.sock"
    with ProxyProcess(SCRIPTED, environment=settings, options=["--ctl-socket", str(one)]):
        began = time.time()
        settings["MCP_PROXY_CTL_SOCKET"] = str(other)
        with ProxyProcess(SCRIPTED, environment=settings, way=PATIENT) as process:
            McpClient(Knowing(HttpFront(process.base), alice)).open()
        shown = used_at(ctl(one, "--api-keys", keys.text, "keys")[1])["alice"]
        used = datetime.datetime.fromisoformat(shown).timestamp()
        assert began - 60 <= used <= time.time()


def used_at(text: str) -> dict[str, str]:
    """The column LAST USE of the list, by the names."""
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines() if "sha256" not in line]
    return {row[0]: row[4] for row in rows if len(row) == 6 and row[0] != "NAME"}
