"""A request about a task reaches the backend that has the task, of several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from mcp_proxy import LocalStorage, Principal, ProxyOptions, RedisStorage, Storage, TransparentProxy
from mcp_proxy.errors import StorageUnavailable
from tests.servers.http_backend import HttpBackend, Turn, reply
from tests.support.front import Answer, Json
from tests.support.modern_client import ModernClient
from tests.support.monitor import recorded_commands
from tests.support.redis_server import RedisServer
from tests.support.transparent import LocalFront

TASKS = "io.modelcontextprotocol/tasks"
DAY = 24 * 3600.0
UNKNOWN = {"code": -32602, "message": "unknown task"}


class TaskBackend(HttpBackend):
    """Begins a task with each call of a tool; `form` says how it answers, `ttl` is the tasks'."""

    def __init__(self, form: str = "json", ttl: Any = 60_000, prefix: str = "") -> None:
        super().__init__()
        self.form = form
        self.ttl = ttl
        self.tasks: set[str] = set()
        self.prefix = prefix or f"{self.port}"
        self.on("POST", "/mcp", self._act)

    @property
    def asked(self) -> list[str | None]:
        """The methods of the requests that have come."""
        return [seen.rpc for seen in self.seen]

    def _act(self, turn: Turn) -> None:
        message = turn.seen.json
        answer: Json = {"jsonrpc": "2.0", "id": message["id"]}
        if message["method"] == "tools/call":
            task_id = f"{self.prefix}-é-{len(self.tasks)}"
            self.tasks.add(task_id)
            task = {"taskId": task_id, "status": "working", "ttlMs": self.ttl}
            answer["result"] = {"resultType": "task", **task}
        elif message["params"].get("taskId") in self.tasks:
            answer["result"] = {"resultType": "complete", "backend": self.port}
        else:
            answer["error"] = UNKNOWN
        said = json.dumps(answer).encode()
        if self.form == "json":
            turn.reply(200, said, "Content-Type: application/json")
        else:
            progress = b'data: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n'
            said = progress + b"data: " + said + b"\n\n"
            turn.reply(200, said, "Content-Type: text/event-stream")


@pytest.fixture(params=["json", "stream"])
def backends(request: pytest.FixtureRequest) -> Iterator[list[TaskBackend]]:
    """Three servers that share nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(TaskBackend(request.param)) for _ in range(3)]


@contextmanager
def proxied(
    backends: list[TaskBackend], storage: Storage | None = None, **more: Any
) -> Iterator[ModernClient]:
    """A client, by way of a proxy, of servers that have forgotten what they were asked."""
    options = ProxyOptions(request_timeout=10)
    urls = [backend.url for backend in backends]
    with (
        TransparentProxy(urls, storage, options=options, name="t", **more) as app,
        closing(LocalFront(app)) as front,
    ):
        yield ModernClient(front, {"extensions": {TASKS: {}}})


def by_name(environ: Json) -> Principal | None:
    """Whoever says who they are."""
    name = environ.get("HTTP_AUTHORIZATION")
    return None if name is None else Principal(name)


def begun(client: ModernClient, count: int = 1) -> list[str]:
    """The ids of new tasks."""
    return [
        client.call("tools/call", {"name": "x"}).message()["result"]["taskId"] for _ in range(count)
    ]


def about(client: ModernClient, task_id: str, method: str = "tasks/get") -> Answer:
    """The answer to a request about a task."""
    return client.call(method, {"taskId": task_id})


def forget(backends: list[TaskBackend]) -> None:
    """Has the servers begin to count what they are asked."""
    for backend in backends:
        backend.seen.clear()


def test_a_request_about_a_task_goes_where_the_task_is(backends: list[TaskBackend]) -> None:
    with proxied(backends) as client:
        tasks = begun(client, 6)
        assert all(len(backend.tasks) == 2 for backend in backends)
        for method in ("tasks/get", "tasks/update", "tasks/cancel"):
            forget(backends)
            for task_id in reversed(tasks):  # else new requests would go there in their turn
                (owner,) = (each for each in backends if task_id in each.tasks)
                assert about(client, task_id, method).message()["result"]["backend"] == owner.port
            assert [backend.asked for backend in backends] == [[method] * 2] * 3


def test_every_replica_knows_where_a_task_is(
    backends: list[TaskBackend], redis_server: RedisServer, redis_prefix: str
) -> None:
    with (
        closing(RedisStorage(redis_server.url, prefix=redis_prefix)) as store,
        closing(RedisStorage(redis_server.url, prefix=redis_prefix)) as same,
        proxied(backends, store) as one,
        proxied(backends, same) as other,
    ):
        tasks = begun(one, 3)
        forget(backends)
        for task_id in reversed(tasks):
            assert "result" in about(other, task_id).message()
        assert [backend.asked for backend in backends] == [["tasks/get"]] * 3


def test_where_it_is_not_known_every_backend_is_asked_once(backends: list[TaskBackend]) -> None:
    with proxied(backends) as client:
        tasks = begun(client, 3)
    with proxied(backends) as client:  # in memory: the first one knew
        for task_id in tasks:
            for is_known in (False, True):
                forget(backends)
                assert "result" in about(client, task_id).message()
                times = [len(backend.seen) for backend in backends]
                assert max(times) == 1
                assert sum(times) == 1 or not is_known


def test_a_task_that_nobody_has_is_refused(backends: list[TaskBackend]) -> None:
    with proxied(backends) as client:
        for count in (1, 2):
            assert about(client, "none").error() == UNKNOWN
            assert [len(backend.seen) for backend in backends] == [count] * 3


def test_what_is_no_refusal_of_the_task_is_the_answer(backends: list[TaskBackend]) -> None:
    for backend in backends:
        backend.on("POST", "/mcp", reply(401, b"{}", "WWW-Authenticate: Bearer"))
    with proxied(backends) as client:
        assert about(client, "x").status == 401
        assert sum(len(backend.seen) for backend in backends) == 1


def test_a_backend_that_cannot_be_asked_may_have_the_task(backends: list[TaskBackend]) -> None:
    backends[1].stop()
    with proxied(backends) as client:
        answer = about(client, "none")
        assert (answer.status, answer.failure) == (200, "server-unreachable")
        assert [len(backend.seen) for backend in backends] == [1, 0, 1]


def test_where_the_backend_of_a_task_is_gone_the_others_are_asked(
    backends: list[TaskBackend],
) -> None:
    with proxied(backends) as client:
        (task_id,) = begun(client)
        (owner,) = (each for each in backends if task_id in each.tasks)
        owner.stop()
        assert about(client, task_id).failure == "server-unreachable"
        other = next(each for each in backends if each is not owner)
        other.tasks.add(task_id)  # it has a store in common with the one that is gone
        assert about(client, task_id).message()["result"]["backend"] == other.port


class Away(LocalStorage):
    """A store that cannot be reached."""

    def keep(self, name: str, value: str, ttl: float) -> str:
        raise StorageUnavailable

    def kept(self, name: str) -> str | None:
        raise StorageUnavailable

    def scoped(self, name: str) -> Away:
        return self


def test_without_the_store_every_backend_is_asked(backends: list[TaskBackend]) -> None:
    with proxied(backends, Away()) as client:
        for task_id in begun(client, 3):
            assert "result" in about(client, task_id).message()


class Given(LocalStorage):
    """A store that knows one address for everything, and for how long it was to keep others."""

    def __init__(self, address: str | None = None) -> None:
        super().__init__()
        self.address = address
        self.seconds: list[float] = []

    def keep(self, name: str, value: str, ttl: float) -> str:
        self.seconds.append(ttl)
        return value

    def kept(self, name: str) -> str | None:
        return self.address

    def scoped(self, name: str) -> Given:
        return self


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [(1500, 1.5), (864_000_000, DAY), (None, DAY), (-5, DAY), ("x", DAY), (0, DAY)],
)
def test_it_is_kept_for_the_time_that_the_task_has(ttl: Any, seconds: float) -> None:
    storage = Given()
    with (
        TaskBackend(ttl=ttl) as one,
        TaskBackend() as other,
        proxied([one, other], storage) as client,
    ):
        begun(client, 2)
    assert sorted(storage.seconds) == sorted([60.0, seconds])


def test_a_store_leads_to_no_other_server(backends: list[TaskBackend]) -> None:
    with TaskBackend() as evil:
        for address in (f"{evil.url} ", f"{evil.url} localhost", "nonsense", " ", "http://é ö"):
            with proxied(backends, Given(address), allowed_backends=()) as client:
                (task_id,) = begun(client)
                assert "result" in about(client, task_id).message()
        assert evil.seen == []


def test_of_a_single_backend_nothing_is_kept() -> None:
    storage = Given()
    with TaskBackend() as backend, proxied([backend], storage) as client:
        (task_id,) = begun(client)
        assert about(client, "none").error() == UNKNOWN
        assert "result" in about(client, task_id).message()
        assert len(backend.seen) == 3
    assert storage.seconds == []


def test_results_are_read_for_clients_that_know_tasks_alone(backends: list[TaskBackend]) -> None:
    storage = Given()
    with proxied(backends, storage) as client:
        begun(client.declaring(elicitation={}))
        assert storage.seconds == []
        begun(client)
        assert len(storage.seconds) == 1


def test_a_listener_hears_of_a_task_where_that_is(backends: list[TaskBackend]) -> None:
    acknowledged = (
        b'data: {"jsonrpc":"2.0","method":"notifications/subscriptions/acknowledged"}\n\n'
    )
    with proxied(backends) as client:
        tasks = begun(client, 3)
        for backend in backends:
            backend.on("POST", "/mcp", reply(200, acknowledged, "Content-Type: text/event-stream"))
        for task_id in reversed(tasks):
            forget(backends)
            client.call("subscriptions/listen", {"notifications": {"taskIds": [task_id]}}).close()
            (asked,) = (each for each in backends if each.seen)
            assert task_id in asked.tasks
        for wanted in ({"taskIds": ["none"]}, {"taskIds": 7}, {}):
            forget(backends)
            client.call("subscriptions/listen", {"notifications": wanted}).close()
            assert sum(len(backend.seen) for backend in backends) == 1


def test_redis_is_told_once_and_asked_once(
    backends: list[TaskBackend], redis_server: RedisServer, redis_prefix: str
) -> None:
    with (
        closing(RedisStorage(redis_server.url, prefix=redis_prefix)) as store,
        proxied(backends, store) as client,
    ):
        begun(client)
        with recorded_commands(redis_server) as commands:
            (task_id,) = begun(client)
            about(client, task_id).body()
        assert [command[0].upper() for command in commands] == ["SET", "GET"]


@pytest.mark.parametrize("count", [1, 3])
def test_a_task_is_its_callers_alone(backends: list[TaskBackend], count: int) -> None:
    """The servers know no callers: their credentials stop at the proxy."""
    with proxied(backends[:count], authenticate=by_name) as client:
        alice, mallory = client.known_as("alice"), client.known_as("mallory")
        (task_id,) = begun(alice)
        forget(backends)
        for method in ("tasks/get", "tasks/update", "tasks/cancel"):
            theirs, nobodys = (about(mallory, each, method) for each in (task_id, "unknown"))
            assert theirs.error() == nobodys.error() == {"code": -32602, "message": "Unknown task"}
            assert "result" in about(alice, task_id, method).message()
        refused = mallory.call("subscriptions/listen", {"notifications": {"taskIds": [task_id]}})
        assert refused.error()["code"] == -32602
        for params in ({"TaskId": task_id}, {"taskId": "own", "TASKID": task_id}, {}):
            assert mallory.call("tasks/cancel", params).error()["code"] == -32602
        assert sum(len(backend.asked) for backend in backends) == 3
