"""The proofs of modern clients, made short: what they claim holds with every change."""

from __future__ import annotations

import time

from mcp_proxy.eras.legacy_home import MAX_PARKED
from tests.proofs import both_eras, questions
from tests.proofs.wires import Modern


def test_questions_that_are_open_at_once_reach_their_own_clients_alone() -> None:
    with questions.proxied("legacy") as port:
        questions.run(port, clients=3, rounds=4)


def test_a_question_that_was_answered_too_late_is_asked_anew() -> None:
    with questions.proxied("legacy", input_timeout=str(questions.SHORT)) as port:
        questions.expire(port, clients=2, rounds=1)


def test_who_never_answers_keeps_no_more_servers_than_questions_may_be_open() -> None:
    with questions.scene_of("legacy", workers=1) as scene:
        client = Modern(scene.proxy.port)
        given = [{"kind": "form", "message": str(number)} for number in range(30)]
        asked = [client.call("ask", one).result for one in given]
        assert len(scene.proxy.server_pids()) == MAX_PARKED
        calls = list(zip(given, asked, strict=True))
        for one, question in calls[:-MAX_PARKED]:
            assert client.call("ask", one, state=question["requestState"]).is_refused_state
        for one, question in calls[-MAX_PARKED:]:
            (key,) = question["inputRequests"]
            answer = {"action": "accept", "content": {"answer": one["message"]}}
            state, responses = question["requestState"], {key: answer}
            answered = client.call("ask", one, state=state, responses=responses)
            assert answered.structured == {"answers": {"form": answer}}


def test_both_eras_are_served_at_once_while_workers_are_killed() -> None:
    both_eras.both_eras(seconds=9.0)


def test_what_a_server_answers_while_its_question_is_open_waits_for_the_client() -> None:
    with questions.scene_of("legacy", workers=1) as scene:
        client = Modern(scene.proxy.port)
        given = {"seconds": 0.1}
        asked = [client.call("ask_late", given) for _ in range(2)]
        time.sleep(0.5)  # by then the server has withdrawn both, and answered
        for one in asked:
            (key,) = one.result["inputRequests"]
            responses = {key: {"action": "accept", "content": {"answer": "yes"}}}
            state = one.result["requestState"]
            late = client.call("ask_late", given, state=state, responses=responses, token="t")
            assert late.result["content"] == [{"type": "text", "text": "withdrawn"}]
            assert client.call("ask_late", given, state=state).is_refused_state


def test_a_question_outside_any_call_goes_with_the_next_one_however_fast_that_is() -> None:
    with questions.scene_of("legacy", "--roots-first", workers=1) as scene:
        client = Modern(scene.proxy.port, capabilities={"roots": {}})
        client.ask("tools/list", {})  # so that the question has come
        asked = client.call("echo", {"text": "first"})
        (key,) = asked.result["inputRequests"]
        assert asked.result["inputRequests"][key]["method"] == "roots/list"
        time.sleep(0.3)  # the server has no reason to wait
        responses = {key: {"roots": [{"uri": "file:///here"}]}}
        state = asked.result["requestState"]
        answered = client.call("echo", {"text": "first"}, state=state, responses=responses)
        assert answered.structured == {"text": "first"}
        roots = client.call("roots_of", {"seconds": 5}).structured["answer"]["roots"]
        assert [one["uri"] for one in roots] == ["file:///here"]
