"""The tables of a legacy child whose clients are modern: pure, so nothing here starts a process."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import UNSET, Raw

from mcp_proxy.backends.exchange import MAX_BACKLOG, Exchange, ServerMessage
from mcp_proxy.eras import questions as asking
from mcp_proxy.eras.questions import MAX_LOG_BYTES, KeptRoots, QuestionSwitchboard, may_ask
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.capabilities import FORM, KINDS, ROOTS, URL
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from tests.support.modern_client import PREFIX

Json = dict[str, Any]

HOME = "home-" + "a" * 40
FORM_PARAMS: Json = {"mode": "form", "message": "?", "requestedSchema": {"type": "object"}}
ANSWER: Json = {"action": "accept", "content": {}}


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asking, "time", clock)
    return clock


class Board:
    """A switchboard, and what its owner was told."""

    def __init__(
        self,
        kinds: frozenset[str] = KINDS,
        input_timeout: float = 300.0,
        roots: KeptRoots | None = None,
    ) -> None:
        self.freed = 0
        self.due = 0  # how often clients are to be asked soon
        self.has_timer = True
        self.changes: list[str] = []
        self.board = QuestionSwitchboard(
            HOME,
            kinds,
            input_timeout,
            self._note_free,
            self._note_change,
            self._note_asked,
            KeptRoots() if roots is None else roots,
        )

    def _note_free(self) -> None:
        self.freed += 1

    def _note_asked(self) -> None:
        if not self.has_timer:
            raise RuntimeError("can't start new thread")
        self.due += 1

    def _note_change(self, change: Notification) -> None:
        self.changes.append(change.method)

    def call(self, key: Any = 1, method: str = "tools/call", **params: Any) -> tuple[Exchange, Any]:
        """A call: its exchange, and the lines that the child gets of it; a moment passes."""
        begun = self.begin(key, method, **params)
        self.board.ask_open()
        return begun

    def begin(
        self, key: Any = 1, method: str = "tools/call", **params: Any
    ) -> tuple[Exchange, Any]:
        """The same in no time."""
        meta = params.pop("meta", {})
        if meta:
            params["_meta"] = meta
        request = Request(key, method, jsonrpc.as_payload({"name": "t", **params}))
        exchange = Exchange([request])
        lines = self.board.enter(request, exchange)
        return exchange, [json.loads(line) for line in lines.splitlines() if line]

    def ask(self, key: Any, method: str = "elicitation/create", params: Any = None) -> None:
        """A question of the child; a moment passes."""
        self.put(key, method, params)
        self.board.ask_open()

    def put(self, key: Any, method: str = "elicitation/create", params: Any = None) -> None:
        """The same in no time."""
        payload = jsonrpc.as_payload(FORM_PARAMS if params is None else params)
        self.board.deliver(Request(key, method, payload))

    def say(self, method: str, **params: Any) -> None:
        """A notification of the child."""
        self.board.deliver(Notification(method, jsonrpc.as_payload(params)))

    def answer(self, wire_id: int, result: Any = None, error: Any = UNSET) -> None:
        """The child's answer to a call, passed on as the bridge does it."""
        result = UNSET if error is not UNSET else jsonrpc.as_payload(result or {})
        error = error if error is UNSET else jsonrpc.as_payload(error)
        call = self.board.pop_answered(wire_id)
        if call is not None:
            data = self.board.encoded(Response(wire_id, result, error), call)
            call.exchange.offer(ServerMessage(data, is_response=True))

    def written(self) -> list[Json]:
        """What the child gets besides calls and answers."""
        return [json.loads(line) for line in self.board.take_lines()]


def received(exchange: Exchange) -> list[Json]:
    """What has come to an exchange."""
    return [json.loads(message.data) for message in exchange.drain()]


def asked_of(exchange: Exchange) -> Json:
    (message,) = received(exchange)
    result: Json = message["result"]
    assert result["resultType"] == "input_required"
    return result


def retry(asked: Json, answer: Json | None = None) -> Json:
    keys = asked["inputRequests"]
    return {
        "requestState": asked["requestState"],
        "inputResponses": dict.fromkeys(keys, ANSWER if answer is None else answer),
    }


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board()


# --- one call ------------------------------------------------------------------------------------


def test_a_call_reaches_the_child_without_what_only_modern_servers_know(board: Board) -> None:
    _, (line,) = board.call(
        meta={f"{PREFIX}protocolVersion": "2026-07-28", "progressToken": 5, "mine": 1},
        inputResponses={"old": {}},
        arguments={"a": 1},
    )
    assert line["id"] == 1
    assert line["params"] == {
        "name": "t",
        "arguments": {"a": 1},
        "_meta": {"progressToken": 5, "mine": 1},
    }


def test_a_question_is_the_answer_to_the_call(board: Board) -> None:
    exchange, _ = board.call("mine")
    board.ask("q1", params={**FORM_PARAMS, "elicitationId": "e"})
    (message,) = received(exchange)
    assert message["id"] == "mine"
    result = message["result"]
    assert re.fullmatch(rf"{HOME}\.[0-9A-Za-z_-]{{22}}", result["requestState"])
    (question,) = result["inputRequests"].values()
    assert question == {"method": "elicitation/create", "params": FORM_PARAMS}
    assert board.written() == []


def test_the_answer_to_a_question_goes_to_the_child(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    second, lines = board.call(2, **retry(asked_of(exchange)))
    assert lines == [{"jsonrpc": "2.0", "id": "q1", "result": ANSWER}]
    assert (received(second), board.freed) == ([], 0)
    board.answer(1, {"content": []})
    (message,) = received(second)
    assert (message["id"], message["result"]) == (2, {"content": [], "resultType": "complete"})
    assert board.freed == 1


def test_a_state_works_once(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    again = retry(asked_of(exchange))
    assert board.call(2, **again)[1]
    third, lines = board.call(3, **again)
    assert lines == []
    (message,) = received(third)
    assert message["error"]["data"] == {"reason": "invalid_request_state"}


@pytest.mark.parametrize(
    "change",
    [
        {"requestState": f"{HOME}.AAAAAAAAAAAAAAAAAAAAAA"},
        {"requestState": ""},
        {"name": "other"},
        {"arguments": {"a": 1}},
    ],
)
def test_a_foreign_attempt_consumes_nothing(board: Board, change: Json) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    good = retry(asked_of(exchange))
    other, lines = board.call(2, **{**good, **change})
    assert lines == []
    assert received(other)[0]["error"]["code"] == -32602
    assert board.call(3, **good)[1] == [{"jsonrpc": "2.0", "id": "q1", "result": ANSWER}]


def test_the_method_belongs_to_the_state(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    other, lines = board.call(2, "prompts/get", **retry(asked_of(exchange)))
    assert lines == []
    assert received(other)[0]["error"]["code"] == -32602


def test_what_is_not_answered_is_asked_again_under_another_state(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    asked = asked_of(exchange)
    second, lines = board.call(2, requestState=asked["requestState"], inputResponses={"x": {}})
    assert lines == []
    again = asked_of(second)
    assert again["inputRequests"] == asked["inputRequests"]
    assert again["requestState"] != asked["requestState"]
    assert board.call(3, **retry(again))[1]


def test_of_two_questions_one_may_be_answered_first(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    board.ask("q2")  # with the next round
    first = asked_of(exchange)
    assert len(first["inputRequests"]) == 1
    second, lines = board.call(2, **retry(first))
    assert [line["id"] for line in lines] == ["q1"]
    asked = asked_of(second)
    assert len(asked["inputRequests"]) == 1
    assert board.call(3, **retry(asked))[1] == [{"jsonrpc": "2.0", "id": "q2", "result": ANSWER}]


def test_an_answer_while_nobody_is_there_waits(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    asked = asked_of(exchange)
    board.answer(1, {"content": []})
    assert board.freed == 1
    second, _ = board.call("two", **retry(asked))
    (message,) = received(second)
    assert (message["id"], message["result"]["resultType"]) == ("two", "complete")


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_question_that_outlives_its_call_is_answered_or_refused(
    board: Board, is_answered: bool
) -> None:
    """One from outside any call, which a quick call has carried to the client."""
    board.ask("s1", "roots/list")
    exchange, _ = board.call()
    asked = asked_of(exchange)
    board.answer(1)
    again = retry(asked, {"roots": []})
    _, (line,) = board.call(2, **(again if is_answered else {**again, "inputResponses": {}}))
    assert line["id"] == "s1"
    if is_answered:
        assert line["result"] == {"roots": []}
    else:
        assert line["error"]["code"] == -32000


def test_a_question_that_outlives_its_call_is_refused_in_the_end(clock: Clock) -> None:
    """T91."""
    board = Board(input_timeout=10)
    board.call()
    board.ask("q1")
    board.answer(1)
    clock.now += 11
    board.board.do_overdue()
    (refused,) = board.written()
    assert (refused["id"], refused["error"]["code"]) == ("q1", -32000)


def test_a_question_that_is_withdrawn_is_answered_no_more(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    asked = asked_of(exchange)
    board.say("notifications/cancelled", requestId="q1")
    second, lines = board.call(2, **retry(asked))
    assert (lines, received(second)) == ([], [])  # it waits for the child
    board.answer(1)
    assert received(second)[0]["id"] == 2


@pytest.mark.parametrize(
    ("kinds", "method", "params", "is_asked"),
    [
        ({FORM}, "elicitation/create", {}, True),
        ({FORM}, "elicitation/create", {"mode": "url"}, False),
        ({URL}, "elicitation/create", {"mode": "url"}, True),
        ({URL}, "elicitation/create", {"mode": "form"}, False),
        ({ROOTS}, "roots/list", {}, True),
        ({FORM}, "roots/list", {}, False),
        ({ROOTS}, "sampling/createMessage", {}, False),
        (KINDS, "no/such", {}, False),
        (KINDS, "tasks/get", {}, False),
    ],
)
def test_only_what_was_declared_is_asked(
    clock: Clock, kinds: set[str], method: str, params: Json, is_asked: bool
) -> None:
    """T90."""
    board = Board(frozenset(kinds))
    exchange, _ = board.call()
    board.ask("q1", method, params)
    if is_asked:
        assert asked_of(exchange)
        assert board.written() == []
    else:
        assert received(exchange) == []
        ((answer),) = board.written()
        assert (answer["id"], answer["error"]["code"]) == ("q1", -32601)


def test_a_ping_is_answered(board: Board) -> None:
    board.ask("p", "ping")
    assert board.written() == [{"jsonrpc": "2.0", "id": "p", "result": {}}]


# --- several questions in a moment ----------------------------------------------------------------


def test_questions_of_one_moment_go_out_in_one_round(board: Board) -> None:
    exchange, _ = board.call()
    board.put("q1")
    board.put("q2", "roots/list")
    assert (received(exchange), board.due) == ([], 1)
    board.board.ask_open()
    asked = asked_of(exchange)
    assert len(asked["inputRequests"]) == 2
    _, lines = board.call(2, **retry(asked))
    assert [line["id"] for line in lines] == ["q1", "q2"]


def test_a_question_that_comes_later_goes_out_with_the_next_round(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    first = asked_of(exchange)
    board.put("q2")
    second, lines = board.call(2, **retry(first))
    assert [line["id"] for line in lines] == ["q1"]
    assert len(asked_of(second)["inputRequests"]) == 1


def test_who_has_been_asked_meanwhile_is_not_asked_twice(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    asked_of(exchange)
    board.board.ask_open()
    assert received(exchange) == []
    assert len(board.board.parked) == 1


def test_a_question_that_is_withdrawn_at_once_is_never_asked(board: Board) -> None:
    exchange, _ = board.call()
    board.put("q1")
    board.say("notifications/cancelled", requestId="q1")
    board.board.ask_open()
    assert received(exchange) == []
    board.answer(1)
    assert received(exchange)[0]["result"]["resultType"] == "complete"


def test_an_answer_right_after_a_question_waits_for_the_retry(board: Board) -> None:
    exchange, _ = board.call()
    board.put("q1")
    board.answer(1, {"content": []})
    again = retry(asked_of(exchange))
    second, lines = board.call(2, **again)
    assert [line["id"] for line in lines] == ["q1"]
    assert received(second)[0]["result"]["resultType"] == "complete"
    assert board.freed == 1


def test_a_call_that_ends_before_its_client_was_asked_has_its_question_refused(
    board: Board,
) -> None:
    exchange, _ = board.call()
    board.put("q1")
    board.board.pop_exchange(exchange)
    (refused,) = board.written()
    assert (refused["id"], refused["error"]["code"]) == ("q1", -32000)
    board.board.ask_open()
    assert (received(exchange), board.freed) == ([], 1)


def test_without_a_timer_a_question_goes_out_at_once(board: Board) -> None:
    board.has_timer = False
    exchange, _ = board.call()
    board.put("q1")
    assert asked_of(exchange)


# --- roots ---------------------------------------------------------------------------------------

HERE: Json = {"roots": [{"uri": "file:///here"}]}


def test_roots_are_asked_for_once_for_all_children_of_a_home(clock: Clock) -> None:
    roots = KeptRoots()
    one, other = Board(roots=roots), Board(roots=roots)
    exchange, _ = one.call()
    one.ask("r1", "roots/list")
    assert len(one.call(2, **retry(asked_of(exchange), HERE))[1]) == 1
    for board, key in ((one, "r2"), (other, "r3")):
        elsewhere, _ = board.call(3)
        board.ask(key, "roots/list")
        (line,) = board.written()
        assert (line["id"], line["result"]) == (key, HERE)
        assert received(elsewhere) == []


def test_roots_are_asked_for_anew_after_a_while(clock: Clock) -> None:
    board = Board()
    for number in (1, 3):
        exchange, _ = board.call(number)
        board.ask(f"r{number}", "roots/list")
        board.call(number + 1, **retry(asked_of(exchange), HERE))
        board.answer((number + 1) // 2)
        clock.now += asking.ROOTS_TIME + 1


@pytest.mark.parametrize("answer", [{"error": {"code": -1}}, {}])
def test_what_is_no_list_of_roots_is_not_kept(board: Board, answer: Json) -> None:
    exchange, _ = board.call()
    board.ask("r1", "roots/list")
    second, _ = board.call(2, **retry(asked_of(exchange), answer))
    board.ask("r2", "roots/list")
    assert asked_of(second)


def test_roots_asked_for_outside_any_call_are_given_once_they_are_known(clock: Clock) -> None:
    roots = KeptRoots()
    one, two, three = (Board(roots=roots) for _ in range(3))
    for board in (two, three):
        board.ask("s1", "roots/list")
    exchange, _ = one.call()
    one.ask("r1", "roots/list")
    one.call(2, **retry(asked_of(exchange), HERE))
    elsewhere, lines = two.call()
    assert [line.get("method", line["id"]) for line in lines] == ["tools/call", "s1"]
    assert received(elsewhere) == []
    three.board.do_overdue()
    assert [line["result"] for line in three.written()] == [HERE]


# --- progress and logs ---------------------------------------------------------------------------


def test_progress_has_the_token_of_the_round(board: Board) -> None:
    exchange, _ = board.call(meta={"progressToken": "one"})
    board.say("notifications/progress", progressToken="one", progress=1)
    assert received(exchange)[0]["params"]["progressToken"] == "one"
    board.ask("q1")
    asked = asked_of(exchange)
    board.say("notifications/progress", progressToken="one", progress=2)  # nobody is there
    second, _ = board.call(2, meta={"progressToken": "two"}, **retry(asked))
    board.say("notifications/progress", progressToken="one", progress=3)
    (note,) = received(second)
    assert note["params"] == {"progressToken": "two", "progress": 3}


def test_a_round_without_a_token_gets_no_progress(board: Board) -> None:
    exchange, _ = board.call(meta={"progressToken": "one"})
    board.ask("q1")
    second, _ = board.call(2, **retry(asked_of(exchange)))
    board.say("notifications/progress", progressToken="one", progress=3)
    assert received(second) == []


def test_the_level_of_logs_is_set_where_it_differs(board: Board) -> None:
    board.board.has_logging = True
    meta = {f"{PREFIX}logLevel": "info"}
    _, lines = board.call(meta=meta)
    assert [line["method"] for line in lines] == ["logging/setLevel", "tools/call"]
    assert lines[0]["params"] == {"level": "info"}
    board.answer(2)
    assert [line["method"] for line in board.call(meta=meta)[1]] == ["tools/call"]


def test_no_level_is_set_where_the_child_has_no_logs(board: Board) -> None:
    _, lines = board.call(meta={f"{PREFIX}logLevel": "info"})
    assert [line["method"] for line in lines] == ["tools/call"]


def test_logs_are_for_the_call_that_asked_for_them(board: Board) -> None:
    exchange, _ = board.call(meta={f"{PREFIX}logLevel": "info"})
    board.say("notifications/message", level="info", data="a")
    assert received(exchange)[0]["params"]["data"] == "a"
    board.answer(1)
    received(exchange)
    silent, _ = board.call()
    board.say("notifications/message", level="info", data="b")
    assert received(silent) == []


def test_logs_of_a_call_whose_client_is_asked_wait_and_are_bounded(board: Board) -> None:
    exchange, _ = board.call(meta={f"{PREFIX}logLevel": "info"})
    board.ask("q1")
    asked = asked_of(exchange)
    for number in range(asking.MAX_LOGS + 10):
        board.say("notifications/message", level="info", data=number)
    second, _ = board.call(2, **retry(asked))
    found = [message["params"]["data"] for message in received(second)]
    assert found == list(range(asking.MAX_LOGS))


def test_changes_are_for_listeners(board: Board) -> None:
    exchange, _ = board.call()
    board.say("notifications/tools/list_changed")
    assert board.changes == ["notifications/tools/list_changed"]
    assert received(exchange) == []


# --- answers -------------------------------------------------------------------------------------

REQUIRED = {"mode": "url", "url": "https://a.example", "elicitationId": "e", "message": "m"}


def test_a_page_that_is_required_is_a_question_and_its_retry_a_new_call(board: Board) -> None:
    exchange, _ = board.call()
    error = {"code": -32042, "message": "m", "data": {"elicitations": [REQUIRED]}}
    board.answer(1, error=error)
    asked = asked_of(exchange)
    (question,) = asked["inputRequests"].values()
    assert question["params"] == {key: REQUIRED[key] for key in REQUIRED if key != "elicitationId"}
    assert board.freed == 1
    state = asked["requestState"]
    request = Request(2, "tools/call", jsonrpc.as_payload({"name": "t"}))
    assert board.board.is_retry_of(state, request)
    assert board.board.take_fresh(state) == 1
    assert board.board.take_fresh(state) is None
    assert not board.board.is_retry_of(state, request)


@pytest.mark.parametrize(
    "data", [{}, {"elicitations": []}, {"elicitations": 5}, {"elicitations": [1]}, None, []]
)
def test_a_page_that_is_not_named_is_an_error(board: Board, data: Any) -> None:
    exchange, _ = board.call()
    board.answer(1, error={"code": -32042, "message": "m", "data": data})
    assert received(exchange)[0]["error"]["code"] == -32603


def test_a_page_for_who_cannot_open_it_is_an_error(clock: Clock) -> None:
    """T84."""
    board = Board(frozenset({FORM}))
    exchange, _ = board.call()
    board.answer(1, error={"code": -32042, "message": "m", "data": {"elicitations": [REQUIRED]}})
    assert received(exchange)[0]["error"]["code"] == -32603


def test_the_state_of_a_parked_call_is_no_new_call(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    assert board.board.take_fresh(asked_of(exchange)["requestState"]) is None


# --- time ----------------------------------------------------------------------------------------


def test_a_state_expires_and_the_child_hears_of_it(clock: Clock) -> None:
    """T91."""
    board = Board(input_timeout=10)
    exchange, _ = board.call()
    board.ask("q1")
    asked = asked_of(exchange)
    clock.now += 9
    board.board.do_overdue()
    assert board.written() == []
    clock.now += 2
    second, lines = board.call(2, **retry(asked))  # before anybody has looked
    assert lines == []
    assert received(second)[0]["error"]["code"] == -32602
    board.board.do_overdue()
    refused, cancelled = board.written()
    assert (refused["id"], refused["error"]["code"]) == ("q1", -32000)
    assert cancelled["method"] == "notifications/cancelled"
    assert cancelled["params"]["requestId"] == 1
    assert board.freed == 1
    assert not board.board.is_awaited


def test_a_call_that_is_given_up_takes_its_late_answer_along(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    state = asked_of(exchange)["requestState"]
    board.board.end_parked(state)
    board.answer(1)
    assert board.call(2, requestState=state, inputResponses={})[1] == []
    assert board.board.parked == {}


@pytest.mark.parametrize("is_page", [True, False])
def test_states_of_calls_that_are_over_are_bounded(board: Board, is_page: bool) -> None:
    """T91: the child is free for the next call, so nothing else bounds them."""
    states, refused = [], []
    for number in range(1, asking.MAX_OVER + 4):
        exchange, lines = board.call(number)
        refused += [line["id"] for line in lines if "error" in line]
        if is_page:
            data = {"elicitations": [REQUIRED]}
            board.answer(number, error={"code": -32042, "message": "m", "data": data})
        else:
            board.ask(f"q{number}")
            board.answer(number)
        states.append(asked_of(exchange)["requestState"])
    assert list(board.board.parked) == states[-asking.MAX_OVER :]
    refused += [message["id"] for message in board.written()]
    assert refused == ([] if is_page else ["q1", "q2", "q3"])


def test_a_question_outside_any_call_waits_for_one(clock: Clock) -> None:
    board = Board()
    board.ask("s1", "roots/list")
    assert board.written() == []
    clock.now += asking.STRAY_TIME - 1
    exchange, lines = board.call()
    assert [line["method"] for line in lines] == ["tools/call"]
    (question,) = asked_of(exchange)["inputRequests"].values()
    assert question["method"] == "roots/list"


def test_a_question_outside_any_call_does_not_wait_for_ever(clock: Clock) -> None:
    board = Board()
    board.ask("s1", "roots/list")
    clock.now += asking.STRAY_TIME + 1
    board.board.do_overdue()
    (refused,) = board.written()
    assert (refused["id"], refused["error"]["code"]) == ("s1", -32000)
    exchange, _ = board.call()
    assert received(exchange) == []


def test_questions_outside_any_call_are_bounded(board: Board) -> None:
    for number in range(asking.MAX_STRAYS + 3):
        board.ask(f"s{number}", "roots/list")
    assert [refused["id"] for refused in board.written()] == ["s0", "s1", "s2"]
    exchange, _ = board.call()
    assert len(asked_of(exchange)["inputRequests"]) >= 1


def test_a_question_outside_any_call_may_be_withdrawn(board: Board) -> None:
    board.ask("s1", "roots/list")
    board.say("notifications/cancelled", requestId="s1")
    exchange, _ = board.call()
    assert (received(exchange), board.written()) == ([], [])


def test_a_call_that_cannot_ask_takes_no_question(board: Board) -> None:
    board.ask("s1", "roots/list")
    exchange, _ = board.call(1, "tools/list")
    assert received(exchange) == []


@pytest.mark.parametrize(
    ("method", "meta", "kinds", "expected"),
    [
        ("tools/call", {}, {FORM}, True),
        ("prompts/get", {}, {FORM}, True),
        ("resources/read", {}, {ROOTS}, True),
        ("tools/list", {}, {FORM}, False),
        ("completion/complete", {}, {FORM}, False),
        ("tools/call", {}, set(), False),
        ("tools/list", {f"{PREFIX}logLevel": "info"}, set(), True),
    ],
)
def test_which_calls_may_ask(method: str, meta: Json, kinds: set[str], expected: bool) -> None:
    request = Request(1, method, jsonrpc.as_payload({"_meta": meta}))
    assert may_ask(request, frozenset(kinds)) is expected


def test_the_end_of_the_child_leaves_nothing(board: Board) -> None:
    exchange, _ = board.call()
    board.ask("q1")
    state = asked_of(exchange)["requestState"]
    calls, _ = board.board.clear()
    assert [call.wire_id for call in calls] == [1]
    assert (board.board.parked, board.board.is_awaited) == ({}, False)
    assert board.call(2, requestState=state, inputResponses={})[1] == []


# --- any order -----------------------------------------------------------------------------------


class Call:
    """A call as its client sees it, and the questions of the child for it."""

    def __init__(self, number: int, wire_id: int, exchange: Exchange) -> None:
        self.number = number
        self.wire_id = wire_id
        self.exchange = exchange
        self.asked: Json | None = None
        self.is_answered = False  # by the child
        self.is_over = False  # the client has its answer


class AnyOrder(RuleBasedStateMachine):
    """One child, calls one after the other, and everything that can happen to their questions."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(asking, "time", self.clock)
        self.board = Board(input_timeout=100)
        self.numbers = iter(range(1, 10_000))
        self.calls: list[Call] = []
        self.current: Call | None = None  # the one that has the child to itself
        self.questions: dict[str, Call | None] = {}  # which call each was asked for; None: stray
        self.ended: dict[str, str] = {}  # how each question ended
        self.used: list[tuple[Call, Json]] = []  # states that were taken
        self.wire_ids = 0

    # --- what is noted ---------------------------------------------------------------------------

    def end(self, key: str, how: str) -> None:
        assert key in self.questions, f"{key} was never asked"
        assert key not in self.ended, f"{key} has ended twice: {self.ended.get(key)}, {how}"
        self.ended[key] = how

    def note_lines(self, lines: list[Json], call: Call) -> None:
        for line in lines:
            assert "method" not in line
            if "error" in line:
                assert call.is_answered
                self.end(line["id"], "refused")
                continue
            assert self.questions[line["id"]] in (call, None)
            assert line["result"] == {"for": call.number}
            self.end(line["id"], "answered")

    def note_written(self) -> None:
        for message in self.board.written():
            if "method" in message:
                assert message["method"] == "notifications/cancelled"
            else:
                self.end(message["id"], "refused")

    def note_received(self, call: Call) -> None:
        for message in received(call.exchange):
            assert not call.is_over
            if message["result"]["resultType"] == "input_required":
                assert message["result"]["inputRequests"]
                call.asked = message["result"]
            else:
                assert message["result"]["for"] == call.number
                call.is_over = True

    def open_questions(self) -> list[str]:
        return [key for key in self.questions if key not in self.ended]

    # --- what happens ----------------------------------------------------------------------------

    @precondition(lambda self: self.current is None)
    @rule()
    def begin(self) -> None:
        number = next(self.numbers)
        self.wire_ids += 1
        exchange, (line, *others) = self.board.begin(f"c{number}", arguments={"call": number})
        assert line["id"] == self.wire_ids
        for other in others:
            self.end(other["id"], "refused")
        call = self.current = Call(number, self.wire_ids, exchange)
        self.calls.append(call)
        self.note_written()
        self.note_received(call)

    @rule()
    def ask(self) -> None:
        key = f"q{next(self.numbers)}"
        self.questions[key] = self.current
        self.board.put(key)
        self.note_written()
        if self.current is not None:
            self.note_received(self.current)

    @rule()
    def let_a_moment_pass(self) -> None:
        self.board.board.ask_open()
        self.note_written()
        if self.current is not None:
            self.note_received(self.current)

    @precondition(lambda self: self.open_questions())
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.open_questions()))
        self.board.say("notifications/cancelled", requestId=key)
        self.end(key, "withdrawn")

    @precondition(lambda self: self.current is not None)
    @rule()
    def answer(self) -> None:
        """The child answers the call, whether its questions are answered or not."""
        call, self.current = self.current, None
        assert call is not None
        self.board.answer(call.wire_id, {"for": call.number})
        call.is_answered = True
        self.note_written()
        if call.asked is None:
            self.note_received(call)
        if call.asked is None:
            assert call.is_over
            assert not [key for key in self.open_questions() if self.questions[key] is call]

    def waiting(self) -> list[Call]:
        return [call for call in self.calls if call.asked is not None and not call.is_over]

    def again(self, call: Call, asked: Json, number: int, keys: Any) -> tuple[Exchange, list[Json]]:
        return self.board.begin(
            f"r{next(self.numbers)}",
            arguments={"call": number},
            requestState=asked["requestState"],
            inputResponses={key: {"for": call.number} for key in keys},
        )

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def call_again(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.waiting()))
        asked = call.asked
        assert asked is not None
        known = list(asked["inputRequests"])
        keys = data.draw(st.lists(st.sampled_from([*known, "unknown"]), unique=True))
        is_good = asked["requestState"] in self.board.board.parked
        is_late = is_good and (
            self.board.board.parked[asked["requestState"]].until < self.clock.now
        )
        exchange, lines = self.again(call, asked, call.number, keys)
        if not is_good or is_late:
            assert lines == []
            assert received(exchange)[0]["error"]["code"] == -32602
            return
        self.used.append((call, asked))
        call.exchange, call.asked = exchange, None
        self.note_lines(lines, call)
        self.note_received(call)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def call_with_a_used_state(self, data: st.DataObject) -> None:
        call, asked = data.draw(st.sampled_from(self.used))
        exchange, lines = self.again(call, asked, call.number, asked["inputRequests"])
        assert lines == []
        assert received(exchange)[0]["error"]["code"] == -32602

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def call_with_a_foreign_state(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.waiting()))
        assert call.asked is not None
        exchange, lines = self.again(call, call.asked, -1, call.asked["inputRequests"])
        assert lines == []
        assert received(exchange)[0]["error"]["code"] == -32602

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0, 99.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.board.board.do_overdue()
        self.note_written()
        call = self.current
        for other in self.waiting():
            assert other.asked is not None
            if other.asked["requestState"] not in self.board.board.parked:
                other.is_over = True  # it was given up
                self.current = None if other is call else self.current

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def whoever_is_asked_can_answer(self) -> None:
        parked = self.board.board.parked
        states = [call.asked["requestState"] for call in self.waiting() if call.asked]
        assert sorted(states) == sorted(parked)

    def teardown(self) -> None:
        try:
            if self.current is not None:
                self.answer()
            self.clock.now += 1000
            self.board.board.do_overdue()
            self.note_written()
            assert self.board.board.parked == {}
            assert not self.board.board.is_awaited
            assert self.open_questions() == []
            free = sum(call.is_answered or call.is_over for call in self.calls)
            assert self.board.freed == free == len(self.calls)
            exchange, _ = self.board.call("last")
            assert received(exchange) == []
        finally:
            self.patch.undo()


TestAnyOrder = AnyOrder.TestCase


def test_raw_results_stay_what_they_are(board: Board) -> None:
    exchange, _ = board.call()
    board.board.server_info = Raw(b'{"name":"n","version":"1"}')
    board.answer(1, {"content": [], "_meta": {"mine": 1}})
    (message,) = received(exchange)
    assert message["result"]["_meta"] == {
        "mine": 1,
        f"{PREFIX}serverInfo": {"name": "n", "version": "1"},
    }


# --- what nobody waits for -----------------------------------------------------------------------


def test_nobody_waits_for_room_where_a_call_is_parked(board: Board) -> None:
    """Else the child's reader stood still, for every client of the home, and for ever."""
    exchange, _ = board.call()
    board.ask(9)
    asked = asked_of(exchange)
    waiting = board.board.parked[asked["requestState"]].waiting
    board.answer(1, {"text": "x" * (MAX_BACKLOG + 1)})
    reader = threading.Thread(target=waiting.wait_for_room, daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()
    retried, _ = board.call(2, **retry(asked))
    assert len(received(retried)[0]["result"]["text"]) > MAX_BACKLOG


def test_logs_of_a_parked_call_are_bounded_in_bytes(board: Board) -> None:
    exchange, _ = board.call(meta={f"{PREFIX}logLevel": "info"})
    board.ask(9)
    asked = asked_of(exchange)
    for _ in range(20):
        board.say("notifications/message", level="info", data="x" * 65536)
    assert board.board.parked[asked["requestState"]].waiting.backlog < 2 * MAX_LOG_BYTES


def test_a_parked_call_that_two_would_end_is_ended_once(board: Board) -> None:
    exchange, _ = board.call()
    board.ask(9)
    state = asked_of(exchange)["requestState"]
    board.board.end_parked(state)
    assert len(board.written()) == 2
    board.board.end_parked(state)
    assert board.written() == []


def test_a_state_for_a_new_call_is_taken_once(board: Board) -> None:
    exchange, _ = board.call()
    url = {"mode": "url", "elicitationId": "e", "url": "http://a/", "message": "m"}
    board.answer(1, error={"code": -32042, "message": "m", "data": {"elicitations": [url]}})
    state = asked_of(exchange)["requestState"]
    assert board.board.take_fresh(state) == 1
    assert board.board.take_fresh(state) is None
