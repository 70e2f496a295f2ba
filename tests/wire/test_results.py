"""Results and errors of one era as the other knows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from mcp_proxy.wire import jsonrpc, results
from tests.support import json_values

SERVER = "io.modelcontextprotocol/serverInfo"
TASKS = "io.modelcontextprotocol/tasks"
INFO = Raw(b'{"name":"s", "version":"1"}')
STRING = {"type": "string"}

CACHEABLE = [
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
    "resources/directory/read",
    "skills/list",
    "skills/get",
]

#: Results as hypothesis makes them, with the names that count among others.
RESULTS = json_values.values | st.dictionaries(
    st.sampled_from(
        [
            *("resultType", "ttlMs", "cacheScope", "_meta", "x", "capabilities"),
            *("tools", "structuredContent"),
        ]
    ),
    json_values.values | st.just("complete") | st.dictionaries(st.just(SERVER), json_values.values),
)


def upgraded(method: str, result: Any, info: Raw | None = None) -> Any:
    return json.loads(bytes(results.upgraded_result(method, jsonrpc.as_payload(result), info)))


def downgraded(result: Any, method: str = "tools/list") -> Any:
    return json.loads(bytes(results.downgraded_result(method, jsonrpc.as_payload(result))))


def error(code: Any) -> Raw:
    return jsonrpc.as_payload({"code": code, "message": "m", "data": {"a": 1}})


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CACHEABLE)
def test_what_could_be_cached_says_that_it_must_not_be(method: str) -> None:
    assert upgraded(method, {"tools": []}) == {
        "tools": [],
        "resultType": "complete",
        "ttlMs": 0,
        "cacheScope": "private",
    }


@pytest.mark.parametrize("method", ["tools/call", "prompts/get", "completion/complete", "skillset"])
def test_other_results_are_complete_and_nothing_more(method: str) -> None:
    assert upgraded(method, {"content": []}) == {"content": [], "resultType": "complete"}


def test_what_a_result_says_itself_stays() -> None:
    given = {"resultType": "complete", "ttlMs": 5, "cacheScope": "public", "_meta": {SERVER: {}}}
    assert upgraded("tools/list", given, INFO) == given
    assert upgraded("tools/call", {"resultType": "task"}) == {"resultType": "task"}


def test_questions_are_never_cacheable() -> None:
    given = {"resultType": "input_required", "requestState": "s"}
    assert upgraded("resources/read", given) == given


@pytest.mark.parametrize("value", [None, 5, {}])
def test_a_type_that_is_none_gives_way(value: Any) -> None:
    assert upgraded("tools/call", {"resultType": value}) == {"resultType": "complete"}


def test_a_result_names_its_server() -> None:
    found = upgraded("tools/call", {"_meta": {"a": 1}}, INFO)
    assert found["_meta"] == {"a": 1, SERVER: {"name": "s", "version": "1"}}
    assert upgraded("tools/call", {}, INFO)["_meta"] == {SERVER: {"name": "s", "version": "1"}}


@pytest.mark.parametrize("result", [b"null", b"5", b'"x"', b"[ {} ]", b"{1}"])
def test_what_is_no_object_is_left_alone(result: bytes) -> None:
    assert results.upgraded_result("tools/list", Raw(result), INFO) == Raw(result)
    assert results.downgraded_result("tools/call", Raw(result)) == Raw(result)


def test_the_content_of_a_result_keeps_its_bytes() -> None:
    given = Raw(b'{"content":[ 1.0,"\\u00e9\\ud83d" ]}')
    found = results.upgraded_result("tools/call", given, None)
    assert found == Raw(b'{"content":[ 1.0,"\\u00e9\\ud83d" ],"resultType":"complete"}')
    assert results.downgraded_result("tools/call", found) == given


def test_a_legacy_client_sees_nothing_of_the_modern_era() -> None:
    given = {"a": 1, "resultType": "complete", "ttlMs": 5, "cacheScope": "public"}
    assert downgraded({**given, "_meta": {SERVER: {}}}) == {"a": 1}
    assert downgraded({**given, "_meta": {SERVER: {}, "b": 2}}) == {"a": 1, "_meta": {"b": 2}}


@pytest.mark.parametrize("value", [[1, 2], "s", 5, True, None])
def test_structured_content_is_an_object_for_a_legacy_client(value: Any) -> None:
    given = {"content": [], "structuredContent": value}
    wrapped = {"content": [], "structuredContent": {"result": value}}
    assert downgraded(given, "tools/call") == wrapped
    assert downgraded(wrapped, "tools/call") == wrapped
    assert downgraded(given, "prompts/get") == given


DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
REFERRING = {"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "legacy"),
    [
        ({"type": "array", "items": {"type": "string"}}, {"type": "array", "items": STRING}),
        ({**DIALECT, "type": "string"}, STRING),
        ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
        (REFERRING, {}),
        ({"type": "string", "enum": ["\u00e9"]}, {"type": "string", "enum": ["\u00e9"]}),
    ],
)
def test_an_output_schema_is_that_of_the_object(schema: Any, legacy: Any) -> None:
    tool = {"name": "t", "outputSchema": schema}
    wrapped = {"type": "object", "properties": {"result": legacy}, "required": ["result"]}
    dialect = DIALECT if "$schema" in schema else {}
    found = downgraded({"tools": [tool]})
    assert found == {"tools": [{"name": "t", "outputSchema": {**dialect, **wrapped}}]}
    assert downgraded(found) == found


@pytest.mark.parametrize(
    "schema",
    [{}, {"anyOf": [{"type": "object"}]}, {"type": ["object", "null"]}, {"type": []}, True],
)
def test_a_schema_of_objects_and_others_says_less(schema: Any) -> None:
    tool = {"name": "t", "outputSchema": schema}
    assert downgraded({"tools": [tool]}) == {
        "tools": [{"name": "t", "outputSchema": {"type": "object"}}]
    }


def test_tools_whose_output_is_an_object_keep_their_bytes() -> None:
    given = Raw(b'{"tools":[ {"name":"a"}, {"outputSchema": {"type" : "object"}, "x":1.0} ]}')
    assert results.downgraded_result("tools/list", given) == given


@given(st.sampled_from([*CACHEABLE, "tools/call"]), RESULTS)
def test_any_result_can_be_said_in_the_other_era(method: str, result: Any) -> None:
    found = upgraded(method, result, INFO)
    if not isinstance(result, dict):
        assert found == result
        return
    assert isinstance(found["resultType"], str)
    assert SERVER in found["_meta"]
    back = downgraded(found, method)
    assert downgraded(back, method) == back
    assert {"resultType", "ttlMs", "cacheScope"}.isdisjoint(back)
    assert SERVER not in back.get("_meta", {})
    assert back.get("x") == result.get("x")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "modern", "legacy"),
    [
        (-32002, -32602, -32002),
        (-32042, -32603, -32603),
        (-32020, -32603, -32603),
        (-32022, -32603, -32603),
        (-32023, -32603, -32603),
        (-32099, -32603, -32603),
        (-32019, -32019, -32019),
        (-32100, -32100, -32100),
        (-32601, -32601, -32601),
        (-32602, -32602, -32602),
        (-32000, -32000, -32000),
        (0, 0, 0),
        (2**70, 2**70, 2**70),
    ],
)
def test_codes_are_those_of_the_clients_era(code: int, modern: int, legacy: int) -> None:
    assert json.loads(bytes(results.upgraded_error(error(code)))) == {
        "code": modern,
        "message": "m",
        "data": {"a": 1},
    }
    assert json.loads(bytes(results.downgraded_error(error(code)))) == {
        "code": legacy,
        "message": "m",
        "data": {"a": 1},
    }


@pytest.mark.parametrize("code", [None, "x", "-32002", 1.5, True, [], {}])
def test_an_error_without_a_code_stays(code: Any) -> None:
    assert results.code_of(error(code)) is None
    assert results.upgraded_error(error(code)) == error(code)
    assert results.downgraded_error(error(code)) == error(code)


@given(json_values.values)
def test_no_json_breaks_the_reading_of_errors(value: Any) -> None:
    payload = jsonrpc.as_payload(value)
    assert results.upgraded_error(payload) == results.downgraded_error(payload) == payload


def test_what_is_not_json_is_no_error() -> None:
    assert results.code_of(Raw(b"{1}")) is None
    assert results.upgraded_error(Raw(b"{1}")) == Raw(b"{1}")


# --- the first answer of a server ----------------------------------------------------------------


INITIALIZE_RESULT = {
    "protocolVersion": "2025-11-25",
    "capabilities": {
        "tools": {"listChanged": True},
        "tasks": {},
        "extensions": {TASKS: {}, "x": {}},
    },
    "serverInfo": {"name": "s", "version": "1", "title": "S"},
    "instructions": "Be kind",
    "_meta": {"a": 1},
}


def test_a_legacy_server_is_discovered() -> None:
    found = results.discover_result(jsonrpc.as_payload(INITIALIZE_RESULT))
    assert json.loads(bytes(found)) == {
        "resultType": "complete",
        "supportedVersions": ["2026-07-28"],
        "capabilities": {"tools": {"listChanged": True}, "extensions": {"x": {}}},
        "instructions": "Be kind",
        "ttlMs": 0,
        "cacheScope": "private",
        "_meta": {SERVER: {"name": "s", "version": "1", "title": "S"}},
    }


def test_other_versions_can_be_named() -> None:
    found = results.discover_result(Raw(b"{}"), ("2026-07-28", "2025-11-25"))
    assert json.loads(bytes(found))["supportedVersions"] == ["2026-07-28", "2025-11-25"]


def test_a_modern_server_is_initialized() -> None:
    discovered = results.discover_result(jsonrpc.as_payload(INITIALIZE_RESULT))
    found = results.initialize_result(discovered, "2025-06-18")
    assert json.loads(bytes(found)) == {
        "protocolVersion": "2025-06-18",
        "capabilities": {"tools": {"listChanged": True}, "extensions": {"x": {}}},
        "serverInfo": {"name": "s", "version": "1", "title": "S"},
        "instructions": "Be kind",
    }


def test_metadata_of_others_go_to_the_legacy_client() -> None:
    given = {"_meta": {"a": 1, "io.modelcontextprotocol/x": 2}}
    found = results.initialize_result(jsonrpc.as_payload(given), "2025-11-25")
    assert json.loads(bytes(found))["_meta"] == {"a": 1}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (None, {"name": "unnamed", "version": "0"}),
        ("s", {"name": "unnamed", "version": "0"}),
        ({"name": "s"}, {"name": "s", "version": "0"}),
        ({"version": 1, "title": "S"}, {"name": "unnamed", "version": "0", "title": "S"}),
    ],
)
def test_a_server_without_a_name_gets_one(info: Any, expected: dict[str, str]) -> None:
    found = results.initialize_result(jsonrpc.as_payload({"_meta": {SERVER: info}}), "2025-11-25")
    assert json.loads(bytes(found))["serverInfo"] == expected


@given(RESULTS)
def test_any_first_answer_becomes_one_of_the_other_era(value: Any) -> None:
    discovered = json.loads(bytes(results.discover_result(jsonrpc.as_payload(value))))
    assert isinstance(discovered["capabilities"], dict)
    assert isinstance(discovered.get("_meta", {}).get(SERVER, {}), dict)
    initialized = json.loads(
        bytes(results.initialize_result(jsonrpc.as_payload(value), "2025-11-25"))
    )
    assert isinstance(initialized["capabilities"], dict)
    assert {"name", "version"} <= initialized["serverInfo"].keys()
