"""Questions of stdio servers to modern clients: asked by a result, answered by calling again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.eras import legacy_home, questions
from tests.support.front import Answer, Json, WsgiFront
from tests.support.modern_client import (
    ANSWERS,
    ASKABLE,
    FORM,
    ModernClient,
    Trace,
    answering,
    asked_in,
    called,
    server_of,
)
from tests.support.proxies import replicas
from tests.support.threads import run_together
from tests.support.waiting import eventually


class Scene:
    """A transport in front of a server, what the server traces, and a client of every ability."""

    def __init__(self, era: str, app: Any, client: ModernClient, trace: Trace) -> None:
        self.era = era
        self.app = app
        self.client = client
        self.trace = trace

    @property
    def children(self) -> int:
        count: int = self.app.owner.supervisor.children
        return count


@contextmanager
def scene_of(era: str, path: Path, *options: str, **settings: Any) -> Iterator[Scene]:
    trace = Trace(path / "trace")
    command = server_of(era, "--trace", str(trace.path), *options)
    quick = {"sse_after": 3, "keepalive_interval": 0.2}
    with replicas(1, command=command, **{**quick, **settings}) as one:
        yield Scene(era, one[0].app, ModernClient(one[0].front, ASKABLE), trace)


@pytest.fixture(scope="module", params=["modern", "legacy"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """For tests of answers, which leave nothing behind."""
    with scene_of(request.param, tmp_path_factory.mktemp(request.param)) as scene:
        yield scene


@pytest.fixture(scope="module")
def legacy_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The same where only what the proxy does counts."""
    with scene_of("legacy", tmp_path_factory.mktemp("alone")) as scene:
        yield scene


@pytest.fixture
def client(shared: Scene) -> ModernClient:
    return shared.client


@pytest.fixture
def legacy(tmp_path: Path) -> Iterator[Scene]:
    """A legacy server of this test alone, whose abandoned calls are looked at often."""
    with scene_of("legacy", tmp_path, idle_timeout=2) as scene:
        yield scene


def content(answer: Answer) -> Json:
    """The structured content of a result that is complete."""
    message = answer.message()
    assert "result" in message, message
    assert message["result"]["resultType"] == "complete", message
    told: Json = message["result"]["structuredContent"]
    return told


def finished(client: ModernClient, name: str, answer: Answer, **arguments: Any) -> Json:
    """What a tool tells in the end, each of its questions having been answered."""
    for _ in range(10):
        message = answer.message()
        assert "result" in message, message
        if message["result"]["resultType"] == "complete":
            told: Json = message["result"]["structuredContent"]
            return told
        retry = answering(message["result"])
        answer = client.tool(name, retry=retry, **arguments)
    raise AssertionError("the tool asks for ever")


def refused(answer: Answer) -> None:
    """The state of a retry was no good."""
    message = answer.message()
    assert answer.status == 200
    assert message["error"]["code"] == -32602
    assert message["error"]["data"] == {"reason": "invalid_request_state"}


# --- what is asked -------------------------------------------------------------------------------

KINDS = {
    "form": "elicitation/create",
    "url": "elicitation/create",
    "sampling": "sampling/createMessage",
    "roots": "roots/list",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_question_is_asked_and_answered(client: ModernClient, kind: str) -> None:
    """T89."""
    asked = client.asked("ask", kind=kind, message="Well?")
    (question,) = asked["inputRequests"].values()
    assert question["method"] == KINDS[kind]
    params = question.get("params", {})
    assert "elicitationId" not in params
    if kind in ("form", "url"):
        assert (params["mode"], params["message"]) == (kind, "Well?")
    elif kind == "sampling":
        assert params["messages"][0]["content"]["text"] == "Well?"
    answer = client.tool("ask", kind=kind, message="Well?", retry=answering(asked))
    assert content(answer) == {"answers": {kind: ANSWERS[KINDS[kind]]}}


@pytest.mark.parametrize(
    ("method", "params", "where"),
    [
        ("prompts/get", {"name": "asking", "arguments": {}}, "messages"),
        ("resources/read", {"uri": "demo://asking"}, "contents"),
    ],
)
def test_prompts_and_resources_may_ask(
    client: ModernClient, method: str, params: Json, where: str
) -> None:
    """T89."""
    asked = asked_in(client.call(method, params))
    result = client.call(method, {**params, **answering(asked)}).message()["result"]
    assert '\\"answer\\": \\"ten\\"' in json.dumps(result[where])
    assert result["resultType"] == "complete"


def test_several_questions_are_all_answered(client: ModernClient) -> None:
    """T89."""
    told = finished(client, "ask", client.tool("ask", kind="both"), kind="both")
    assert told == {
        "answers": {
            "form": ANSWERS["elicitation/create"],
            "sampling": ANSWERS["sampling/createMessage"],
        }
    }


def test_questions_of_one_moment_are_one_round(client: ModernClient) -> None:
    """T89."""
    asked = client.asked("ask", kind="both")
    assert len(asked["inputRequests"]) == 2
    told = content(client.tool("ask", kind="both", retry=answering(asked)))
    assert len(told["answers"]) == 2


def test_several_rounds_are_gone_through(client: ModernClient) -> None:
    """T89."""
    told = finished(client, "chain", client.tool("chain", rounds=5), rounds=5)
    assert told["answers"] == [{"form": FORM}] * 5


@pytest.mark.parametrize(
    "given", [{"action": "decline"}, {"action": "cancel"}, {"error": {"code": -1}}]
)
def test_whatever_the_client_answers_is_passed_on(client: ModernClient, given: Json) -> None:
    asked = client.asked("ask")
    answer = client.tool("ask", retry=answering(asked, elicitation=given))
    assert content(answer) == {"answers": {"form": given}}


def test_each_round_has_an_id_of_its_own(client: ModernClient) -> None:
    """T89."""
    first = client.call("tools/call", called("ask"), "one").message()
    assert first["id"] == "one"
    retry = {**called("ask"), **answering(first["result"])}
    assert client.call("tools/call", retry, "two").message()["id"] == "two"


def test_progress_has_the_token_of_the_round_in_which_it_comes(client: ModernClient) -> None:
    """T89."""
    answer = client.call("tools/call", called("chain", rounds=3), token="t0")
    for number in range(1, 4):
        messages = answer.messages()
        asked = messages[-1]["result"]
        if number > 1:
            assert {note["params"]["progressToken"] for note in messages[:-1]} == {number - 1}
        retry = {**called("chain", rounds=3), **answering(asked)}
        answer = client.call("tools/call", retry, f"id{number}", token=number)
    *progress, last = answer.messages()
    assert progress
    assert {note["params"]["progressToken"] for note in progress} == {3}
    assert last["id"] == "id3"
    assert last["result"]["resultType"] == "complete"


def test_a_retry_without_a_token_has_no_progress(client: ModernClient) -> None:
    """T89."""
    asked = asked_in(client.call("tools/call", called("chain", rounds=1), token="t"))
    answer = client.call("tools/call", {**called("chain", rounds=1), **answering(asked)})
    (last,) = answer.messages()
    assert last["result"]["resultType"] == "complete"


def test_answers_that_belong_to_no_question_make_no_retry(client: ModernClient) -> None:
    asked = client.asked("ask")
    responses = answering(asked)["inputResponses"]
    again = asked_in(client.tool("ask", retry={"inputResponses": responses}))
    assert content(client.tool("ask", retry=answering(again)))


# --- what a client has not declared ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "declared"),
    [
        ("form", {}),
        ("form", {"elicitation": {"url": {}}}),
        ("url", {"elicitation": {}}),
        ("url", {"elicitation": {"form": {}}}),
        ("sampling", {"elicitation": {}, "roots": {}}),
        ("roots", {"sampling": {}}),
    ],
)
def test_who_has_not_declared_it_is_never_asked(shared: Scene, kind: str, declared: Json) -> None:
    """T90."""
    client = shared.client.declaring(**declared)
    assert "error" in client.tool("ask", kind=kind).message()
    if shared.era == "legacy":  # also where the server asks all the same
        told = content(client.tool("ask", kind=kind, force=True))
        assert told["answers"][kind]["error"]["code"] == -32601


# --- answers that are incomplete, or wrong --------------------------------------------------------


@pytest.mark.parametrize("responses", [{}, None, {"other": FORM}])
def test_what_is_missing_is_asked_for_again(client: ModernClient, responses: Any) -> None:
    """T89."""
    asked = client.asked("ask")
    retry = {"inputResponses": responses, "requestState": asked["requestState"]}
    again = asked_in(client.tool("ask", retry=retry))
    assert list(again["inputRequests"].values()) == list(asked["inputRequests"].values())
    assert content(client.tool("ask", retry=answering(again)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputResponses": []},
        {"inputResponses": "yes"},
        {"inputResponses": {"key": 5}},
        {"inputResponses": {"key": None}},
        {"inputResponses": {"key": []}},
    ],
)
def test_answers_of_another_type_are_refused_and_the_state_stays_good(
    client: ModernClient, wrong: Json
) -> None:
    """T89."""
    asked = client.asked("ask")
    answer = client.tool("ask", retry={"requestState": asked["requestState"], **wrong})
    assert answer.error()["code"] == -32602
    assert content(client.tool("ask", retry=answering(asked)))


@pytest.mark.parametrize("state", [5, {}, ["a"], True, "\ud800"])
def test_a_state_that_is_no_text_is_refused(client: ModernClient, state: Any) -> None:
    answer = client.tool("ask", retry={"requestState": state, "inputResponses": {}})
    assert answer.error()["code"] == -32602


Tamper = Callable[[str], str]

TAMPERED: dict[str, Tamper] = {
    "empty": lambda state: "",
    "another": lambda state: "other",
    "first": lambda state: ("a" if state[0] != "a" else "b") + state[1:],
    "middle": lambda state: state[:60] + ("a" if state[60] != "a" else "b") + state[61:],
    "longer": lambda state: state + "A",
    "shorter": lambda state: state[:-2],
    "spaced": lambda state: f" {state}",
    "foreign": lambda state: f"home-{'0' * 40}.{state[-22:]}",
    "no server": lambda state: state.partition(".")[0],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_state_that_was_tampered_with_is_refused_and_the_right_one_works(
    legacy_shared: Scene, how: str
) -> None:
    """T89."""
    client = legacy_shared.client
    asked = client.asked("ask")
    wrong = {**answering(asked), "requestState": TAMPERED[how](asked["requestState"])}
    refused(client.tool("ask", retry=wrong))
    assert content(client.tool("ask", retry=answering(asked)))


def test_a_state_works_once(shared: Scene) -> None:
    """T89: where the server is modern the state is its own."""
    client = shared.client
    asked = client.asked("ask")
    assert content(client.tool("ask", retry=answering(asked)))
    if shared.era == "legacy":
        refused(client.tool("ask", retry=answering(asked)))


def test_a_state_works_once_for_many_at_once(legacy: Scene) -> None:
    """T89."""
    client = legacy.client
    for _ in range(5):
        retry = answering(client.asked("ask"))
        answers = run_together([lambda r=retry: client.tool("ask", retry=r).message()] * 6)
        assert sum("result" in answer for answer in answers) == 1
        errors = [answer["error"] for answer in answers if "error" in answer]
        assert [error["code"] for error in errors] == [-32602] * 5


@pytest.mark.parametrize(
    "other",
    [
        ("ask", {"kind": "form", "message": "other"}),
        ("ask", {"kind": "sampling", "message": "first"}),
        ("ask", {}),
        ("chain", {"kind": "form", "message": "first"}),
    ],
)
def test_a_state_of_another_call_is_refused_and_stays_good(
    client: ModernClient, other: tuple[str, Json]
) -> None:
    """T89."""
    arguments = {"kind": "form", "message": "first"}
    asked = client.asked("ask", **arguments)
    name, others = other
    assert client.tool(name, retry=answering(asked), **others).error()["code"] == -32602
    wrong = {"name": "asking", "arguments": arguments, **answering(asked)}
    assert client.call("prompts/get", wrong).error()["code"] == -32602
    reordered = {"message": "first", "kind": "form"}
    assert content(client.tool("ask", retry=answering(asked), **reordered))


def test_a_state_of_another_caller_is_refused_and_stays_good(client: ModernClient) -> None:
    """T89."""
    mine = client.known_as("Bearer mine")
    asked = mine.asked("ask")
    for thief in (client, client.known_as("Bearer thief")):
        assert thief.tool("ask", retry=answering(asked)).error()["code"] == -32602
    assert content(mine.tool("ask", retry=answering(asked)))


def test_a_retry_needs_not_declare_again_what_the_call_did(client: ModernClient) -> None:
    asked = client.asked("ask")
    assert content(client.declaring(roots={}).tool("ask", retry=answering(asked)))


def test_a_legacy_server_sees_neither_answers_nor_states(legacy: Scene) -> None:
    client = legacy.client
    retry = answering(client.asked("ask"))
    assert content(client.tool("ask", retry=retry))
    stale = {"inputResponses": retry["inputResponses"]}
    asked = asked_in(client.tool("ask", retry=stale))
    assert content(client.tool("ask", retry=answering(asked)))
    seen = client.told("seen")["messages"]
    calls = [message["params"] for message in seen if message.get("method") == "tools/call"]
    assert len(calls) == 3
    assert all(call.keys() <= {"name", "arguments"} for call in calls)


# --- nobody answers ------------------------------------------------------------------------------


def test_a_state_expires_and_the_server_hears_of_it(tmp_path: Path) -> None:
    """T89, T91."""
    with scene_of("legacy", tmp_path, idle_timeout=2, input_timeout=1) as scene:
        client = scene.client
        asked = client.asked("ask")
        (line,) = scene.trace.wait("cancelled")
        assert line.startswith("cancelled ")
        refused(client.tool("ask", retry=answering(asked)))
        seen = client.told("seen")["messages"]
        (error,) = [message["error"] for message in seen if "error" in message]
        assert error["code"] == -32000
        again = client.asked("ask")
        assert content(client.tool("ask", retry=answering(again)))


def test_a_home_with_an_open_question_is_not_idle(tmp_path: Path) -> None:
    with scene_of("legacy", tmp_path, idle_timeout=1) as scene:
        client = scene.client
        asked = client.asked("ask")
        looks = []

        def has_looked() -> bool:
            looks.append(scene.children)
            return len(looks) > 250  # longer than two times of idleness

        eventually(has_looked)
        assert set(looks) == {1}
        assert content(client.tool("ask", retry=answering(asked)))
        eventually(lambda: scene.children == 0)


def test_abandoned_questions_make_room_for_others(tmp_path: Path) -> None:
    """T91: the oldest of a key gives way to the ninth."""
    with scene_of("legacy", tmp_path, max_sessions=40) as scene:
        client = scene.client
        states = [client.asked("ask", message=str(number)) for number in range(8)]
        assert scene.children == 8
        scene.trace.lines("cancelled")
        ninth = client.asked("ask", message="8")
        scene.trace.wait("cancelled")
        refused(client.tool("ask", message="0", retry=answering(states[0])))
        for number in range(1, 8):
            retry = answering(states[number])
            assert content(client.tool("ask", message=str(number), retry=retry))
        assert content(client.tool("ask", message="8", retry=answering(ninth)))
        assert legacy_home.MAX_PARKED == 8


def test_where_no_server_may_be_started_the_oldest_question_gives_way(tmp_path: Path) -> None:
    """T91."""
    with scene_of("legacy", tmp_path, max_sessions=2) as scene:
        client = scene.client
        states = [client.asked("ask", message=str(number)) for number in range(3)]
        assert scene.children == 2
        refused(client.tool("ask", message="0", retry=answering(states[0])))
        for number in (1, 2):
            retry = answering(states[number])
            assert content(client.tool("ask", message=str(number), retry=retry))


# --- what a server does meanwhile ----------------------------------------------------------------


def test_what_the_server_says_without_an_answer_waits_for_the_retry(legacy: Scene) -> None:
    """T89: it withdraws its question and ends the call, while nobody has called again."""
    client = legacy.client
    pid = client.pid()
    asked = client.asked("ask_late", seconds=0.2)
    eventually(lambda: client.pid() == pid)  # the process is free: the call is over
    message = client.tool("ask_late", seconds=0.2, retry=answering(asked)).message()
    assert message["result"]["content"][0]["text"] == "withdrawn"
    assert not legacy.trace.lines("stray response")  # nobody answers what was withdrawn


def test_a_question_that_is_withdrawn_is_asked_no_more(legacy: Scene) -> None:
    """T89: the retry brings nothing, and waits for what the server makes of it."""
    client = legacy.client
    asked = client.asked("ask_late", seconds=0.5)

    def result() -> Json | None:
        nonlocal asked
        retry = {"inputResponses": {}, "requestState": asked["requestState"]}
        found: Json = client.tool("ask_late", seconds=0.5, retry=retry).message()["result"]
        asked = found
        return found if found["resultType"] == "complete" else None

    assert eventually(result)["content"][0]["text"] == "withdrawn"


def test_a_server_that_ends_while_it_asks_says_so_to_the_retry(legacy: Scene) -> None:
    client = legacy.client
    pid = client.pid()
    asked = client.asked("exit_while_asking", seconds=0.2, code=5)
    eventually(lambda: legacy.children == 0)
    answer = client.tool("exit_while_asking", seconds=0.2, code=5, retry=answering(asked))
    error = answer.message()["error"]
    assert error["code"] == -32000
    assert error["message"] == "The server exited (exit code 5) while its question was open"
    assert answer.failure == "server-exited"
    assert client.pid() != pid


def test_questions_of_many_callers_leave_room_for_others(tmp_path: Path) -> None:
    """A quarter of the sessions that a worker may have, whoever asks."""
    with scene_of("legacy", tmp_path, max_sessions=8) as scene:
        callers = [scene.client.known_as(f"Bearer {number}") for number in range(4)]
        asked = [caller.asked("ask", kind="form") for caller in callers]
        answers = [
            caller.tool("ask", kind="form", retry=answering(question))
            for caller, question in zip(callers, asked, strict=True)
        ]
        refused(answers[0])
        assert content(answers[-1])["answers"]


def test_leaving_a_retry_cancels_the_call(legacy: Scene) -> None:
    """T69, T89."""
    client = legacy.client
    asked = client.asked("exit_while_asking", seconds=60)
    answer = client.tool("exit_while_asking", seconds=60, retry=answering(asked))
    assert answer.is_stream
    answer.close()
    legacy.trace.wait("cancelled")
    assert client.pid()


@pytest.mark.parametrize("times", [1, 3])
def test_a_page_that_has_to_be_visited_is_a_question(legacy: Scene, times: int) -> None:
    """T84: -32042 is not for modern clients."""
    client = legacy.client
    arguments = {"key": f"k{times}", "times": times}
    answer = client.tool("url_required", **arguments)
    for _ in range(times):
        asked = asked_in(answer)
        (question,) = asked["inputRequests"].values()
        assert question["method"] == "elicitation/create"
        assert question["params"] == {
            "mode": "url",
            "url": "https://example.com/authorize",
            "message": "Please authorize",
        }
        answer = client.tool("url_required", retry=answering(asked), **arguments)
        used = asked
    assert content(answer) == {"calls": times + 1}
    refused(client.tool("url_required", retry=answering(used), **arguments))


def test_a_page_is_asked_for_ten_times_in_a_row(legacy: Scene) -> None:
    """T84: then the call fails, and a new one begins anew."""
    client = legacy.client
    for _ in range(2):
        answer = client.tool("url_required", times=100)
        for _ in range(10):
            answer = client.tool("url_required", times=100, retry=answering(asked_in(answer)))
        assert answer.error()["code"] == -32603


def test_a_page_for_who_cannot_visit_it_is_an_error(legacy: Scene) -> None:
    """T84, T90."""
    for declared in ({}, {"elicitation": {"form": {}}}):
        error = legacy.client.declaring(**declared).tool("url_required", key="no").error()
        assert error["code"] == -32603


# --- questions outside any call ------------------------------------------------------------------


def test_a_question_before_any_call_waits_for_one(tmp_path: Path) -> None:
    """T89."""
    with scene_of("legacy", tmp_path, "--roots-first") as scene:
        client = scene.client
        assert client.call("tools/list").status == 200
        asked = client.asked("roots_of", seconds=20)
        (question,) = asked["inputRequests"].values()
        assert question["method"] == "roots/list"
        told = content(client.tool("roots_of", seconds=20, retry=answering(asked)))
        assert told == {"answer": ANSWERS["roots/list"]}


def test_a_question_before_any_call_is_answered_although_its_call_was_quick(
    tmp_path: Path,
) -> None:
    """T89: by then the server has answered the call."""
    with scene_of("legacy", tmp_path, "--roots-first") as scene:
        client = scene.client

        def have_come() -> list[str]:
            told = finished(client, "echo", client.tool("echo", text="x"), text="x")
            assert told == {"text": "x"}
            return scene.trace.lines("roots came")

        eventually(have_come)
        assert content(client.tool("roots_of")) == {"answer": ANSWERS["roots/list"]}


def test_roots_hold_for_the_other_servers_of_a_caller(tmp_path: Path) -> None:
    with scene_of("legacy", tmp_path, "--roots-first") as scene:
        client = scene.client
        asked = client.asked("roots_of", seconds=20)
        told = content(client.tool("roots_of", seconds=20, retry=answering(asked)))
        parked = client.asked("ask", message="first")
        assert content(client.tool("roots_of", seconds=20)) == told  # of another process
        assert scene.children == 2
        assert content(client.tool("ask", message="first", retry=answering(parked)))


def test_nobody_is_asked_for_roots_where_strangers_share(tmp_path: Path) -> None:
    with scene_of("legacy", tmp_path, stateless_children="shared") as scene:
        stranger = scene.client.at(WsgiFront(scene.app, {"REMOTE_ADDR": "203.0.113.9"}))
        for client, is_askable in (
            (stranger, False),
            (stranger.known_as("Bearer me"), True),
            (scene.client, True),
        ):
            declared = client.told("client_of")["capabilities"]
            assert ("roots" in declared) is is_askable
            assert "sampling" in declared


def test_a_question_before_any_call_is_not_for_who_cannot_answer(tmp_path: Path) -> None:
    """T90."""
    with scene_of("legacy", tmp_path, "--roots-first") as scene:
        client = scene.client.declaring(sampling={})
        assert content(client.tool("roots_of")) == {"answer": None}


def test_a_question_between_calls_waits_for_the_next(legacy: Scene) -> None:
    """T89."""
    client = legacy.client
    assert client.tool("ask_later", seconds=0.5).message()["result"]["content"]
    (home,) = legacy.app.owner.backends

    def asked() -> Json | None:
        result: Json = client.tool("pid").message()["result"]
        return result if result["resultType"] == "input_required" else None

    question = eventually(asked)
    assert content(client.tool("pid", retry=answering(question)))["pid"]
    assert "accept" in legacy.trace.wait("answer form")[0]
    assert home.is_alive


def test_a_question_that_nobody_can_be_asked_is_refused(
    legacy: Scene,
) -> None:
    """T90, T91."""
    client = legacy.client.declaring(roots={})
    client.tool("ask_later", seconds=0, kind="sampling").body()
    (line,) = legacy.trace.wait("answer sampling")
    assert "-32601" in line


def test_a_question_for_which_no_call_comes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T91."""
    monkeypatch.setattr(questions, "STRAY_TIME", 0.3)
    with scene_of("legacy", tmp_path) as scene:
        assert scene.client.tool("ask_later", seconds=0.5).message()["result"]["content"]

        def refusals() -> list[str]:
            scene.app.owner.sweep()
            return scene.trace.lines("answer form")

        (line,) = eventually(refusals)
        assert "-32000" in line


def test_a_ping_of_the_server_is_answered_here(legacy: Scene) -> None:
    legacy.client.tool("ask_later", seconds=0, kind="ping").body()
    assert legacy.trace.wait("answer ping") == ["answer ping {}"]


# --- several at once -----------------------------------------------------------------------------


def test_questions_of_several_clients_do_not_cross(legacy: Scene) -> None:
    """T89."""
    client = legacy.client

    def chain(number: int) -> bool:
        answer = client.tool("chain", rounds=3, label=number)
        for turn in range(3):
            asked = asked_in(answer)
            given = {"action": "accept", "content": {"answer": f"{number}-{turn}"}}
            retry = answering(asked, elicitation=given)
            answer = client.tool("chain", rounds=3, label=number, retry=retry)
        got = [each["form"]["content"]["answer"] for each in content(answer)["answers"]]
        return got == [f"{number}-{turn}" for turn in range(3)]

    assert all(run_together([lambda n=n: chain(n) for n in range(5)]))


def test_after_an_overlap_everything_returns_to_the_first_server(legacy: Scene) -> None:
    client = legacy.client
    pid = client.pid()
    asked = client.asked("ask")
    other = client.pid()  # it may ask, too, and the first is waiting
    assert other != pid
    assert client.call("tools/list").status == 200
    assert content(client.tool("ask", retry=answering(asked)))
    assert [client.pid() for _ in range(3)] == [pid] * 3


def test_calls_that_cannot_ask_share_one_server(legacy: Scene) -> None:
    client = legacy.client.declaring()
    pids = run_together([client.pid] * 6)
    assert len(set(pids)) == 1
    assert legacy.children == 1


def test_with_one_server_calls_take_turns(tmp_path: Path) -> None:
    with scene_of("legacy", tmp_path, stateless_children="one") as scene:
        client = scene.client

        def count() -> list[Json]:
            return [client.told("counter", seconds=0.01) for _ in range(10)]

        counts = run_together([count] * 3)
        found = sorted(each["count"] for some in counts for each in some)
        assert found == list(range(1, 31))
        assert scene.children == 1
        asked = client.asked("ask")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.pid)
            assert content(client.tool("ask", retry=answering(asked)))
            assert waiting.result(20)
