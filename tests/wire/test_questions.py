"""Questions to a client: what asks them, what answers them, and which call a retry repeats."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import InvalidParams
from mcp_proxy.wire import jsonrpc, questions
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.questions import InputRequired, Retry
from tests.support import json_values

#: Retries and interim results as hypothesis makes them.
FIELDS = st.dictionaries(
    st.sampled_from(["inputResponses", "requestState", "inputRequests", "resultType", "x"]),
    json_values.values
    | st.just("input_required")
    | st.dictionaries(st.text(), st.dictionaries(st.sampled_from(["method", "params"]), st.text())),
)


def call(method: str = "tools/call", **params: Any) -> Request:
    return Request(1, method, jsonrpc.as_payload(params))


def spelled(params: str, method: str = "tools/call") -> bytes:
    return questions.digest(Request(1, method, Raw(params.encode())))


def retry(**params: Any) -> Retry:
    return questions.retry_of(jsonrpc.as_payload(params))


def asked(**result: Any) -> InputRequired | None:
    return questions.input_required_of(jsonrpc.as_payload(result))


# --- asking --------------------------------------------------------------------------------------


def test_questions_are_a_result() -> None:
    payload = questions.input_required(
        {"a": ("roots/list", UNSET), "b": ("elicitation/create", Raw(b'{"message": "?"}'))}, "s.1"
    )
    assert json.loads(bytes(payload)) == {
        "resultType": "input_required",
        "inputRequests": {
            "a": {"method": "roots/list", "params": {}},
            "b": {"method": "elicitation/create", "params": {"message": "?"}},
        },
        "requestState": "s.1",
    }


PARAMS = json_values.objects.map(jsonrpc.as_payload)


@given(st.dictionaries(st.text(), st.tuples(st.text(), PARAMS)), st.text())
def test_questions_that_are_asked_are_read(asking: dict[str, Any], state: str) -> None:
    payload = questions.input_required(asking, state)
    assert questions.input_required_of(payload) == InputRequired(asking, state)


@pytest.mark.parametrize("result", [{}, {"resultType": "complete"}, {"resultType": ["x"]}])
def test_another_result_asks_nothing(result: Any) -> None:
    assert asked(**result, inputRequests={"a": {"method": "roots/list"}}) is None


@pytest.mark.parametrize("result", [UNSET, Raw(b"null"), Raw(b"[]"), Raw(b'"input_required"')])
def test_what_is_no_object_asks_nothing(result: Any) -> None:
    assert questions.input_required_of(result) is None


def test_a_state_alone_means_try_again() -> None:
    assert asked(resultType="input_required", requestState="s") == InputRequired({}, "s")
    assert asked(resultType="input_required", inputRequests=None, requestState="") == ({}, "")


def test_questions_need_no_state() -> None:
    found = asked(resultType="input_required", inputRequests={"a": {"method": "m", "params": None}})
    assert found == InputRequired({"a": ("m", UNSET)}, None)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"requestState": 5},
        {"inputRequests": []},
        {"inputRequests": {"a": "roots/list"}},
        {"inputRequests": {"a": {}}},
        {"inputRequests": {"a": {"method": 5}}},
        {"inputRequests": {"a": {"method": "m", "params": []}}},
        {"inputRequests": {"a": {"method": "m"}, "b": None}, "requestState": "s"},
        {"inputRequests": {"a": {"method": "m"}}, "requestState": {}},
    ],
)
def test_questions_that_break_the_rules_are_no_result_and_ask_nothing(result: Any) -> None:
    assert asked(resultType="input_required", **result) == InputRequired({}, None)


# --- answering -----------------------------------------------------------------------------------


def test_a_first_call_brings_no_answers() -> None:
    assert questions.retry_of(UNSET) == Retry(None, None)
    assert retry(name="t", inputResponses=None, requestState=None) == Retry(None, None)


def test_answers_keep_their_bytes() -> None:
    params = Raw(b'{"inputResponses": {"a":{"x": 1.0},"b":{}},"requestState":"s"}')
    assert questions.retry_of(params) == Retry({"a": Raw(b'{"x": 1.0}'), "b": Raw(b"{}")}, "s")


def test_answers_and_state_come_alone_too() -> None:
    assert retry(inputResponses={}) == Retry({}, None)
    assert retry(requestState="") == Retry(None, "")


@pytest.mark.parametrize(
    "params",
    [
        {"inputResponses": []},
        {"inputResponses": "x"},
        {"inputResponses": {"a": None}},
        {"inputResponses": {"a": {}, "b": [1]}},
        {"requestState": 5},
        {"requestState": {}},
        {"inputResponses": {}, "requestState": False},
    ],
)
def test_answers_and_states_of_wrong_types_are_invalid(params: Any) -> None:
    with pytest.raises(InvalidParams):
        retry(**params)


def test_the_first_call_is_found_in_its_retry() -> None:
    first = Raw(b'{"name":"t","arguments":{"a": 1.0}}')
    again = questions.with_retry(first, Retry({"a": Raw(b"{}")}, "s"))
    assert questions.retry_of(again) == Retry({"a": Raw(b"{}")}, "s")
    assert questions.without_retry(again) == first
    assert questions.without_retry(UNSET) is UNSET
    assert questions.with_retry(again, Retry(None, None)) == first


@given(FIELDS)
def test_no_json_breaks_a_round(fields: dict[str, Any]) -> None:
    payload = jsonrpc.as_payload(fields)
    found = questions.input_required_of(payload)
    assert (found is None) == (fields.get("resultType") != "input_required")
    with contextlib.suppress(InvalidParams):
        read = questions.retry_of(payload)
        first = questions.without_retry(payload)
        assert questions.retry_of(first) == Retry(None, None)
        assert questions.retry_of(questions.with_retry(first, read)) == read


@given(json_values.values)
def test_no_params_break_the_reading_of_a_retry(value: Any) -> None:
    payload = jsonrpc.as_payload(value)
    with contextlib.suppress(InvalidParams):
        questions.retry_of(payload)
    questions.without_retry(payload)
    questions.with_retry(payload, Retry({}, "s"))
    questions.input_required_of(payload)
    questions.digest(Request(1, "tools/call", payload))


# --- which call is repeated ----------------------------------------------------------------------


def test_a_retry_is_known_by_what_it_calls() -> None:
    first = questions.digest(call(name="t", arguments={"a": 1}))
    again = call(
        name="t",
        arguments={"a": 1},
        _meta={"progressToken": 2},
        inputResponses={},
        requestState="s",
    )
    assert questions.digest(again) == first
    assert len(first) == 32


@pytest.mark.parametrize(
    "other",
    [
        call("prompts/get", name="t", arguments={"a": 1}),
        call(name="T", arguments={"a": 1}),
        call(uri="t", arguments={"a": 1}),
        call(name="t", arguments={"a": 2}),
        call(name="t", arguments={"a": "1"}),
        call(name="t", arguments={"a": [1]}),
        call(name="t", arguments={"b": 1}),
        call(name="t", arguments={}),
        call(name="t"),
    ],
)
def test_another_call_is_another(other: Request) -> None:
    assert questions.digest(other) != questions.digest(call(name="t", arguments={"a": 1}))


def test_how_arguments_are_spelled_does_not_matter() -> None:
    first = spelled('{"name":"t","arguments":{"a":"é","b":[1,{"c":1.5,"d":null}]}}')
    again = '{"arguments": {"b":[1, {"d":null,"c":15e-1}],\n"a":"\\u00e9"} , "name":"\\u0074"}'
    assert spelled(again) == first


def test_the_order_of_a_list_matters() -> None:
    assert spelled('{"arguments":[1,2]}') != spelled('{"arguments":[2,1]}')


@pytest.mark.parametrize("value", ["1e999", "1" * 5000, '"\\ud83d"', "[" * 500 + "]" * 500])
def test_values_that_no_machine_has_count_as_they_are_spelled(value: str) -> None:
    first = spelled(f'{{"arguments":{{"a":{value}}}}}')
    assert spelled(f'{{ "arguments":{{"a":{value}}}}}') == first
    assert spelled('{"arguments":{"a":1}}') != first


@given(json_values.values, st.data())
def test_no_spelling_changes_the_digest(value: Any, data: st.DataObject) -> None:
    one, other = (data.draw(json_values.spelled(value)).decode() for _ in range(2))
    assert spelled(f'{{"arguments":{one}}}') == spelled(f'{{"arguments":{other}}}')


@given(json_values.values, json_values.values)
def test_other_arguments_have_another_digest(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (
        questions.digest(call(arguments=one)) == questions.digest(call(arguments=other))
    ) == same
