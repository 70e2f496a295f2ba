"""Variables of callers in real gunicorns: nobody has a server with those of somebody else.

They are in the memory of the worker that holds the session and in the server's own environment.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.auth.deployments import EVERYWHERE, all_told, unknown_like
from tests.auth.test_bound_sessions import WAYS
from tests.support import needs
from tests.support.callers import KeyFile
from tests.support.front import SCRIPTED, Answer, Front, HttpFront, Json, McpClient
from tests.support.modern_client import ModernClient, server_of
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess, children_of, is_alive
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

#: Workers are two; whether their sessions are in Redis, and whether they pass requests.
DEPLOYMENTS = {"memory": (False, "on"), "Redis": (True, "on"), "relayed": (True, "off")}

#: Their names, for parameters.
NAMES = [pytest.param("memory", marks=needs.MEMORY), "Redis", "relayed"]

SOURCES = ("TOKEN=header:X-Token", "REGION=header:X-Region?")


class Carrying:
    """A way in whose every request carries these headers."""

    def __init__(self, front: Front, **shown: str) -> None:
        self.front = front
        self.shown = {name.replace("_", "-"): value for name, value in shown.items()}

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        return self.front.request(method, path, {**headers, **self.shown}, body)


def new_token() -> str:
    return f"token-{uuid.uuid4().hex}"


class Deployment:
    """A running proxy whose server gets variables of its callers."""

    def __init__(self, process: ProxyProcess) -> None:
        self.process = process
        self.front = HttpFront(process.base)

    def bearing(self, token: str, **shown: str) -> Carrying:
        """A way in of who has a token."""
        return Carrying(self.front, X_Token=token, **shown)

    def worker_of(self, server: int) -> int:
        """The worker that holds a server."""
        workers = self.process.worker_pids()
        return next(worker for worker in workers if server in children_of(worker))

    def kill_worker_of(self, server: int) -> None:
        """Kills a worker, and waits until its server has gone and another worker is there."""
        worker = self.worker_of(server)
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: not is_alive(server), 10.0, "the server of a killed worker lives on")
        eventually(
            lambda: len(set(self.process.worker_pids()) - {worker}) == 2, 20.0, "no new worker"
        )
        eventually(
            lambda: self.front.request("GET", "/readyz", {}, None).status == 200, 20.0, "not ready"
        )


def deployed(command: tuple[str, ...], *given: str, **settings: Any) -> ProxyProcess:
    options = as_options({"workers": 2, "env_from": SOURCES, **settings})
    return ProxyProcess(command, options=[*options, *given])


def in_store(redis_server: RedisServer, is_shared: bool, prefix: str = "") -> dict[str, str]:
    if not is_shared:
        return {}
    return {"redis_url": redis_server.url, "redis_prefix": prefix or f"t-{uuid.uuid4().hex}:"}


@pytest.fixture(scope="module", params=NAMES)
def legacy(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Deployment]:
    """Two workers in front of the scripted server."""
    is_shared, passing = DEPLOYMENTS[request.param]
    store = in_store(redis_server, is_shared)
    with deployed(SCRIPTED, passing=passing, **store) as process:
        yield Deployment(process)


@pytest.fixture(params=["Redis", "relayed"])
def mortal(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Deployment]:
    """Two workers that a test may kill."""
    is_shared, passing = DEPLOYMENTS[request.param]
    with deployed(SCRIPTED, passing=passing, **in_store(redis_server, is_shared)) as process:
        yield Deployment(process)


def environment(client: McpClient) -> Json:
    """What the server of a session says of itself."""
    told: Json = client.result("environment")
    return told


def environ_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace")


# --- whose a server is ---------------------------------------------------------------------------


def test_each_caller_has_a_server_with_the_own_values(legacy: Deployment) -> None:
    tokens = [new_token(), new_token()]
    clients = [McpClient(legacy.bearing(token, X_Region="here")).open() for token in tokens]
    servers = set()
    for client, token in zip(clients, tokens, strict=True):
        for _ in range(EVERYWHERE):
            told = environment(client)
            assert told["environ"]["TOKEN"] == token
            assert told["environ"]["REGION"] == "here"
            servers.add(told["pid"])
    assert len(servers) == 2


def test_an_optional_header_may_be_missing(legacy: Deployment) -> None:
    client = McpClient(legacy.bearing(new_token())).open()
    assert "REGION" not in environment(client)["environ"]


def test_a_missing_header_refuses_initialize_and_is_named(legacy: Deployment) -> None:
    before = set(legacy.process.server_pids())
    answer = McpClient(legacy.front).initialize()
    assert answer.status == 400
    assert answer.headers.get("Mcp-Session-Id") is None
    stream = SseClient(legacy.front).connect()
    assert stream.status == 400
    modern = ModernClient(legacy.front).call("tools/list")
    assert modern.status == 400
    for refused in (answer, stream, modern):
        error = refused.error()
        assert error["code"] == -32600
        assert "X-Token" in error["message"]
    assert not set(legacy.process.server_pids()) - before


@pytest.mark.parametrize("way", WAYS)
def test_without_the_values_a_session_is_as_unknown(
    legacy: Deployment, way: Callable[[McpClient], Answer]
) -> None:
    owner = McpClient(legacy.bearing(new_token())).open()
    assert owner.session is not None
    for front in (legacy.bearing(new_token()), legacy.front):
        other, stranger = McpClient(front), McpClient(front)
        other.session, stranger.session = owner.session, unknown_like(owner.session)
        found = all_told(way(other) for _ in range(EVERYWHERE))
        assert found == all_told(way(stranger) for _ in range(EVERYWHERE))
        (told,) = found
        assert told.startswith("(404, ")
    assert environment(owner)["pid"]


def test_a_session_of_the_sse_transport_takes_the_values_alone(legacy: Deployment) -> None:
    token = new_token()
    client = SseClient(legacy.bearing(token)).open()
    try:
        assert client.result("environment")["environ"]["TOKEN"] == token
        message = {"jsonrpc": "2.0", "id": 9, "method": "environment"}
        for front in (legacy.bearing(new_token()), legacy.front):
            client.posts = front
            assert {client.post(message).status for _ in range(EVERYWHERE)} == {404}
    finally:
        client.close()


# --- homes of modern calls -----------------------------------------------------------------------


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize("kind", NAMES)
def test_a_home_is_for_callers_of_the_same_values(
    redis_server: RedisServer, era: str, kind: str
) -> None:
    is_shared, passing = DEPLOYMENTS[kind]
    tokens = [new_token(), new_token()]
    store = in_store(redis_server, is_shared)
    with deployed(server_of(era), passing=passing, **store) as process:
        deployment = Deployment(process)
        for token in tokens:
            client = ModernClient(deployment.bearing(token))
            for _ in range(EVERYWHERE):
                assert client.call("tools/list").has_succeeded
        environs = [environ_of(pid) for pid in process.server_pids()]
        assert len(environs) == 2
        for token in tokens:
            assert sum(f"TOKEN={token}" in environ for environ in environs) == 1


def test_a_home_of_a_killed_worker_comes_back_with_the_values(redis_server: RedisServer) -> None:
    token = new_token()
    with deployed(server_of("legacy"), **in_store(redis_server, True)) as process:
        deployment = Deployment(process)
        client = ModernClient(deployment.bearing(token))
        assert client.call("tools/list").has_succeeded
        (server,) = process.server_pids()
        deployment.kill_worker_of(server)
        assert client.call("tools/list").has_succeeded
        (again,) = process.server_pids()
        assert again != server
        assert f"TOKEN={token}" in environ_of(again)


# --- take-over -----------------------------------------------------------------------------------


def test_a_killed_workers_session_returns_with_the_values_alone(mortal: Deployment) -> None:
    token = new_token()
    client = McpClient(mortal.bearing(token)).open()
    before = environment(client)["pid"]
    mortal.kill_worker_of(before)
    for front in (mortal.front, mortal.bearing(new_token())):
        assert {client.at(front).call("environment").status for _ in range(EVERYWHERE)} == {404}
    told = environment(client)
    assert told["pid"] != before
    assert told["environ"]["TOKEN"] == token


def test_a_server_that_exits_comes_back_with_the_values(mortal: Deployment) -> None:
    tokens = [new_token() for _ in range(8)]  # some of the calls are relayed
    clients = [McpClient(mortal.bearing(token)).open() for token in tokens]
    for client, token in zip(clients, tokens, strict=True):
        before = environment(client)["pid"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda before=before: not is_alive(before), 10.0, "the server lives on")
        told = environment(client)
        assert told["pid"] != before
        assert told["environ"]["TOKEN"] == token


def test_a_call_whose_answer_has_begun_is_sent_again_with_the_values(
    redis_server: RedisServer,
) -> None:
    token, store = new_token(), in_store(redis_server, True)
    with deployed(SCRIPTED, passing="off", sse_after=0.2, **store) as process:
        deployment = Deployment(process)
        client = McpClient(deployment.bearing(token)).open()
        before = environment(client)["pid"]
        worker = deployment.worker_of(before)
        os.kill(worker, signal.SIGSTOP)
        try:
            os.kill(before, signal.SIGKILL)
            answer = client.call("environment")  # which is relayed
            assert answer.is_stream
        finally:
            os.kill(worker, signal.SIGCONT)
        told = answer.message()["result"]
        assert told["pid"] != before
        assert told["environ"]["TOKEN"] == token


# --- with a principal ----------------------------------------------------------------------------


@pytest.fixture(params=["Redis", "relayed"])
def keyed(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path
) -> Iterator[tuple[Deployment, str]]:
    """Two workers that want a key, and the key."""
    is_shared, passing = DEPLOYMENTS[request.param]
    keys = KeyFile(tmp_path / "keys")
    shown = f"Bearer {keys.add('alice')}"
    store = in_store(redis_server, is_shared)
    with deployed(SCRIPTED, passing=passing, api_keys=keys.text, **store) as process:
        yield Deployment(process), shown


def test_other_values_of_a_principal_apply_at_the_next_start(
    keyed: tuple[Deployment, str],
) -> None:
    deployment, key = keyed
    first, second = new_token(), new_token()
    client = McpClient(deployment.bearing(first, Authorization=key)).open()
    server = environment(client)["pid"]
    refreshed = client.at(deployment.bearing(second, Authorization=key))
    told = environment(refreshed)
    assert (told["pid"], told["environ"]["TOKEN"]) == (server, first)
    deployment.kill_worker_of(server)
    without = client.at(Carrying(deployment.front, Authorization=key))
    assert {without.call("environment").status for _ in range(EVERYWHERE)} == {404}
    told = environment(refreshed)
    assert told["environ"]["TOKEN"] == second
    assert environment(without)["pid"] == told["pid"]


def test_the_worker_that_has_the_session_knows_the_values(tmp_path: Path) -> None:
    """Of a server that exits, for a principal that shows them once."""
    token = new_token()
    keys = KeyFile(tmp_path / "keys")
    key = f"Bearer {keys.add('alice')}"
    with deployed(SCRIPTED, "--workers", "1", api_keys=keys.text) as process:
        deployment = Deployment(process)
        client = McpClient(deployment.bearing(token, Authorization=key)).open()
        without = client.at(Carrying(deployment.front, Authorization=key))
        before = environment(without)["pid"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: not is_alive(before), 10.0, "the server lives on")
        told = environment(without)
        assert told["pid"] != before
        assert told["environ"]["TOKEN"] == token


# --- nowhere else --------------------------------------------------------------------------------


def stored(url: str, prefix: str) -> list[bytes]:
    """Every key under a prefix, and its value as the server would dump it."""
    with redis.Redis.from_url(url) as client:
        keys = list(client.scan_iter(match=f"{prefix}*"))
        return [*keys, *(client.dump(key) or b"" for key in keys), *map(repr_of(client), keys)]


def repr_of(client: Any) -> Callable[[bytes], bytes]:
    """A value as it reads, since a dump may be compressed."""

    def read(key: bytes) -> bytes:
        match client.type(key):
            case b"string":
                return client.get(key) or b""
            case b"stream":
                return repr(client.xrange(key)).encode()
            case b"hash":
                return repr(client.hgetall(key)).encode()
            case b"zset":
                return repr(client.zrange(key, 0, -1)).encode()
            case b"list":
                return repr(client.lrange(key, 0, -1)).encode()
            case _:
                return b""

    return read


def in_proc(process: ProxyProcess, token: str) -> set[int]:
    """The processes of a proxy whose environment or command line has a token."""
    found = set()
    for pid in process.all_pids():
        shown = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")]
        if any(token.encode() in text for text in shown):
            found.add(pid)
    return found


@pytest.mark.parametrize("passing", ["on", "off"])
def test_the_values_are_in_the_environment_of_their_server_alone(
    redis_server: RedisServer, passing: str
) -> None:
    token, prefix = new_token(), f"t-{uuid.uuid4().hex}:"
    store = in_store(redis_server, True, prefix)
    with deployed(SCRIPTED, passing=passing, log_level="debug", **store) as process:
        deployment = Deployment(process)
        client = McpClient(deployment.bearing(token)).open()
        server = environment(client)["pid"]
        for _ in range(EVERYWHERE):
            client.call("echo", {"x": 1}).body()
        assert in_proc(process, token) == {server}
        deployment.kill_worker_of(server)
        server = client.result("environment")["pid"]
        modern = ModernClient(deployment.bearing(token))
        modern.call("tools/list").body()
        assert McpClient(deployment.bearing(f"{token}x")).initialize().has_succeeded
        kept = stored(redis_server.url, prefix)
        assert any(b"env_digest" in value for value in kept)
        assert not any(token.encode() in value for value in kept)
        assert in_proc(process, token) <= set(process.server_pids())
    assert token not in process.log()
