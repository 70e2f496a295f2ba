"""What is one caller's is nobody else's: sessions, streams, homes and questions of stdio servers.

Whoever else asks gets what is said of a session that there never was, on whichever worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.auth.deployments import (
    DEPLOYMENTS,
    EVERYWHERE,
    NAMES,
    Deployment,
    all_told,
    deployed,
    unknown_like,
)
from tests.support.callers import Knowing, ended
from tests.support.front import SCRIPTED, Answer, HttpFront, McpClient
from tests.support.modern_client import ASKABLE, ModernClient, answering, server_of
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

EVENTS = "text/event-stream"


def _call(client: McpClient) -> Answer:
    return client.call("echo", {"from": "mallory"}, key=7)


def _notify(client: McpClient) -> Answer:
    return client.notify("notifications/from", {"from": "mallory"})


def _respond(client: McpClient) -> Answer:
    return client.post({"jsonrpc": "2.0", "id": "question", "result": {"from": "mallory"}})


def _cancel(client: McpClient) -> Answer:
    return client.notify("notifications/cancelled", {"requestId": 1})


def _batch(client: McpClient) -> Answer:
    return client.post([{"jsonrpc": "2.0", "id": 7, "method": "echo", "params": {}}])


def _listen(client: McpClient) -> Answer:
    return client.request("GET", None, Accept=EVENTS)


def _resume(client: McpClient) -> Answer:
    return client.request("GET", None, Accept=EVENTS, Last_Event_ID="1")


def _delete(client: McpClient) -> Answer:
    return client.request("DELETE", None)


WAYS: list[Callable[[McpClient], Answer]] = [
    *(_call, _notify, _respond, _cancel, _batch, _listen, _resume, _delete)
]


def _as_said(
    name: str,
    command: Sequence[str],
    paths: pytest.TempPathFactory,
    redis_server: RedisServer,
) -> AbstractContextManager[Deployment]:
    """The deployment of this name in front of a server."""
    workers, in_redis, passing = DEPLOYMENTS[name]
    url = redis_server.url if in_redis else None
    return deployed(paths.mktemp("keys"), command, workers, url, passing=passing)


@pytest.fixture(scope="module", params=NAMES)
def legacy(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
) -> Iterator[Deployment]:
    """A deployment in front of the scripted server."""
    with _as_said(request.param, SCRIPTED, tmp_path_factory, redis_server) as deployment:
        yield deployment


@pytest.fixture(scope="module", params=["legacy", "modern"])
def era(request: pytest.FixtureRequest) -> str:
    era: str = request.param
    return era


@pytest.fixture(scope="module", params=NAMES)
def homes(
    request: pytest.FixtureRequest,
    era: str,
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
) -> Iterator[Deployment]:
    """A deployment in front of a server of either era, for modern clients."""
    with _as_said(request.param, server_of(era), tmp_path_factory, redis_server) as deployment:
        yield deployment


# --- streamable HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_somebody_elses_session_is_as_unknown(
    legacy: Deployment, way: Callable[[McpClient], Answer]
) -> None:
    alice = McpClient(legacy.front("alice")).open()
    assert alice.session is not None
    mallory, stranger = McpClient(legacy.front("mallory")), McpClient(legacy.front("mallory"))
    mallory.session, stranger.session = alice.session, unknown_like(alice.session)
    found = all_told(way(mallory) for _ in range(EVERYWHERE))
    assert found == all_told(way(stranger) for _ in range(EVERYWHERE))
    (told,) = found
    assert told.startswith("(404, ")
    assert "mallory" not in json.dumps(alice.result("seen"))
    assert alice.result("count")["calls"] == 1


def test_a_session_goes_on_with_another_key_of_the_same_caller(legacy: Deployment) -> None:
    alice = McpClient(legacy.front("alice")).open()
    again = alice.at(legacy.front("alice again"))
    pids = {client.result("count")["pid"] for client in (alice, again) * EVERYWHERE}
    assert len(pids) == 1
    assert again.request("DELETE", None).status == 204
    assert alice.call("ping").status == 404


def test_a_session_is_nobodys_without_a_key(legacy: Deployment) -> None:
    alice = McpClient(legacy.front("alice")).open()
    nobody = alice.at(HttpFront(legacy.process.base))
    assert {way(nobody).status for way in WAYS} == {401}
    assert alice.result("echo", {}) == {}


def test_events_of_a_session_are_its_callers_alone(legacy: Deployment) -> None:
    alice = McpClient(legacy.front("alice")).open("2025-11-25")
    answer = alice.call("notify", {"count": 3}, Accept=EVENTS)
    events = [event for event in answer.events() if event.id]
    answer.close()
    mallory = McpClient(legacy.front("mallory")).open("2025-11-25")
    own = mallory.session
    for session in (alice.session, own):
        mallory.session = session
        for _ in range(EVERYWHERE):
            last = (events[0].id or b"").decode()
            resumed = mallory.request("GET", None, Accept=EVENTS, Last_Event_ID=last)
            assert resumed.status == (400 if session == own else 404)


def test_a_question_is_answered_by_the_caller_that_was_asked(legacy: Deployment) -> None:
    alice = McpClient(legacy.front("alice")).open()
    asking = {"id": "question", "method": "sampling/createMessage"}
    answer = alice.call("ask", asking, Accept=EVENTS)
    messages = answer.stream()
    assert next(messages)["id"] == "question"
    mallory = alice.at(legacy.front("mallory"))
    assert all_told(_respond(mallory) for _ in range(EVERYWHERE)).pop().startswith("(404, ")
    alice.post({"jsonrpc": "2.0", "id": "question", "result": {"from": "alice"}})
    assert "mallory" not in str(final := next(messages))
    assert final["result"]["result"] == {"from": "alice"}
    answer.close()


# --- HTTP+SSE ------------------------------------------------------------------------------------


def test_somebody_elses_stream_takes_no_message(legacy: Deployment) -> None:
    alice = SseClient(legacy.front("alice")).open()
    mallory = SseClient(legacy.front("mallory"))
    message = {"jsonrpc": "2.0", "id": 7, "method": "echo", "params": {"from": "mallory"}}
    unknown = alice.uri.replace(alice.session, unknown_like(alice.session))
    found = all_told(mallory.post(message, alice.uri) for _ in range(EVERYWHERE))
    assert found == all_told(mallory.post(message, unknown) for _ in range(EVERYWHERE))
    (told,) = found
    assert told.startswith("(404, ")
    again = SseClient(legacy.front("alice again"))
    assert {again.post({**message, "id": n}, alice.uri).status for n in range(100, 112)} == {202}
    assert {alice.next()["id"] for _ in range(12)} == set(range(100, 112))
    assert alice.result("echo", {"a": 1}) == {"a": 1}
    alice.close()


# --- 2026-07-28 ----------------------------------------------------------------------------------


def modern(deployment: Deployment, name: str) -> ModernClient:
    return ModernClient(deployment.front(name), ASKABLE)


def test_every_caller_has_a_home_and_all_its_keys_have_the_same(homes: Deployment) -> None:
    names = ("alice", "alice again", "mallory")
    pids = {name: {modern(homes, name).pid() for _ in range(EVERYWHERE)} for name in names}
    assert pids["alice"] == pids["alice again"]
    assert {len(found) for found in pids.values()} == {1}
    assert pids["alice"] != pids["mallory"]


def test_a_question_of_another_callers_call_cannot_be_answered(homes: Deployment) -> None:
    alice, mallory = modern(homes, "alice"), modern(homes, "mallory")
    asked = alice.asked("ask", message="How much?")
    stolen = {**answering(asked), "inputResponses": answering(asked)["inputResponses"]}
    forged = {**stolen, "requestState": f"home-{'0' * 40}.AAAA"}

    def outcome(retry: Any) -> str:
        told: dict[str, Any] = mallory.tool("ask", retry=retry, message="How much?").message()
        return str(told.get("error", {}).get("code"))

    assert {outcome(stolen) for _ in range(EVERYWHERE)} == {outcome(forged)} == {"-32602"}
    again = modern(homes, "alice again")
    assert "result" in again.tool("ask", retry=answering(asked), message="How much?").message()


def test_a_change_is_told_to_its_own_callers_alone(homes: Deployment) -> None:
    clients = {name: modern(homes, name) for name in ("alice", "mallory")}
    streams = {name: client.listen(1, toolsListChanged=True) for name, client in clients.items()}
    heard = {name: answer.stream() for name, answer in streams.items()}
    for messages in heard.values():
        next(messages)  # that it listens
    clients["mallory"].done("notify", kinds=["tools"])
    assert next(heard["mallory"])["method"] == "notifications/tools/list_changed"
    clients["alice"].done("log", levels=["info"], label="x")
    clients["alice"].done("notify", kinds=["tools"], times=2)
    told = [next(heard["alice"])["method"] for _ in range(2)]
    assert told == ["notifications/tools/list_changed"] * 2
    for answer in streams.values():
        answer.close()


# --- keys that come and go -----------------------------------------------------------------------


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_the_streams_of_a_key_end_within_two_seconds_of_its_removal(
    tmp_path: Path, redis_server: RedisServer, worker_class: str
) -> None:
    with deployed(tmp_path, SCRIPTED, 2, redis_server.url, worker_class=worker_class) as deployment:
        bob, alice = McpClient(deployment.front("bob")).open(), SseClient(deployment.front("alice"))
        streams = [bob.listen(), SseClient(deployment.front("bob")).connect()]
        kept = [alice.connect(), McpClient(deployment.front("alice")).open().listen()]
        for answer in [*streams, *kept]:
            assert answer.status == 200
        deployment.keys.remove("bob")
        began = time.monotonic()
        assert max(map(ended, streams)) - began < 2
        eventually(lambda: bob.call("ping").status == 401, 2)
        alice.initialize()
        for answer in kept:
            answer.close()


def test_a_subscription_ends_within_two_seconds_of_the_removal_of_its_key(
    homes: Deployment,
) -> None:
    key = homes.keys.add("carol")
    carol = ModernClient(Knowing(HttpFront(homes.process.base), key), ASKABLE)
    eventually(lambda: {carol.call("tools/list").status for _ in range(EVERYWHERE)} == {200})
    answer = carol.listen(1, toolsListChanged=True)
    assert next(answer.stream())["method"] == "notifications/subscriptions/acknowledged"
    homes.keys.remove("carol")
    began = time.monotonic()
    assert ended(answer) - began < 2
