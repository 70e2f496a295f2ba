"""What clients declare: which kinds of questions that means, and how the other era says it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire import capabilities, jsonrpc
from mcp_proxy.wire.capabilities import (
    FORM,
    KINDS,
    ROOTS,
    SAMPLING,
    SAMPLING_CONTEXT,
    SAMPLING_TOOLS,
    UI,
    URL,
)
from tests.support import json_values

UI_NAME = "io.modelcontextprotocol/ui"
TASKS_NAME = "io.modelcontextprotocol/tasks"
PAGES = {"mimeTypes": ["text/plain", "text/html;profile=mcp-app"]}

#: Capabilities as hypothesis makes them: known names with anything below.
DECLARED = st.dictionaries(
    st.sampled_from(["elicitation", "sampling", "roots", "tasks", "extensions", "x"]),
    json_values.values
    | st.dictionaries(
        st.sampled_from(["form", "url", "tools", "context", "listChanged", UI_NAME, TASKS_NAME]),
        json_values.values | st.just(PAGES),
    ),
)


def kinds(declared: Any) -> set[str]:
    return set(capabilities.kinds_of(jsonrpc.as_payload(declared)))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({}, set()),
        ({"elicitation": {}}, {FORM}),
        ({"elicitation": {"form": {}}}, {FORM}),
        ({"elicitation": {"url": {}}}, {URL}),
        ({"elicitation": {"form": {}, "url": {}}}, {FORM, URL}),
        ({"elicitation": {"schemaValidation": True}}, {FORM}),
        ({"sampling": {}}, {SAMPLING}),
        ({"sampling": {"tools": {}}}, {SAMPLING, SAMPLING_TOOLS}),
        ({"sampling": {"tools": {}, "context": {}}}, {SAMPLING, SAMPLING_TOOLS, SAMPLING_CONTEXT}),
        ({"roots": {}}, {ROOTS}),
        ({"roots": {"listChanged": True}}, {ROOTS}),
        ({"extensions": {UI_NAME: PAGES}}, {UI}),
        ({"experimental": {}, "tasks": {}, "extensions": {TASKS_NAME: {}}}, set()),
    ],
)
def test_what_is_declared_is_a_set_of_kinds(declared: Any, expected: set[str]) -> None:
    assert kinds(declared) == expected


@pytest.mark.parametrize(
    "declared",
    [
        None,
        [],
        "roots",
        {"elicitation": True, "sampling": None, "roots": []},
        {"elicitation": {"form": True, "url": None}},
        {"extensions": [UI_NAME]},
        {"extensions": {UI_NAME: {}}},
        {"extensions": {UI_NAME: {"mimeTypes": "text/html;profile=mcp-app"}}},
        {"extensions": {UI_NAME: {"mimeTypes": ["text/html"]}}},
        {"extensions": {UI_NAME: {"mimeTypes": ["text/html;profile=mcp-app", 5]}}},
    ],
)
def test_what_has_a_wrong_type_is_not_declared(declared: Any) -> None:
    assert kinds(declared) == set()


def test_a_part_with_a_wrong_type_leaves_the_whole() -> None:
    assert kinds({"sampling": {"tools": True, "context": 1}}) == {SAMPLING}


def test_a_legacy_server_is_told_the_kinds() -> None:
    assert json.loads(bytes(capabilities.capabilities_of(KINDS))) == {
        "elicitation": {"form": {}, "url": {}},
        "sampling": {"tools": {}, "context": {}},
        "roots": {},
        "extensions": {UI_NAME: {"mimeTypes": ["text/html;profile=mcp-app"]}},
    }
    assert bytes(capabilities.capabilities_of(frozenset())) == b"{}"
    assert bytes(capabilities.capabilities_of({URL})) == b'{"elicitation":{"url":{}}}'
    assert bytes(capabilities.capabilities_of({SAMPLING})) == b'{"sampling":{}}'


@given(st.sets(st.sampled_from(sorted(KINDS))))
def test_kinds_that_are_declared_are_read_again(chosen: set[str]) -> None:
    implied = {SAMPLING} if chosen & {SAMPLING_TOOLS, SAMPLING_CONTEXT} else set()
    assert capabilities.kinds_of(capabilities.capabilities_of(chosen)) == chosen | implied


def test_a_modern_server_is_told_what_a_legacy_client_declared() -> None:
    declared = {
        "roots": {"listChanged": True},
        "sampling": {"tools": {}},
        "elicitation": {},
        "tasks": {"list": {}},
        "extensions": {TASKS_NAME: {}, UI_NAME: PAGES},
        "experimental": {"a": {}},
    }
    found = capabilities.modern_capabilities_of(jsonrpc.as_payload(declared))
    assert json.loads(bytes(found)) == {
        "roots": {},
        "sampling": {"tools": {}},
        "elicitation": {},
        "extensions": {UI_NAME: PAGES},
        "experimental": {"a": {}},
    }


@pytest.mark.parametrize(
    "declared", [None, [], {}, {"roots": True}, {"tasks": {}}, {"extensions": {TASKS_NAME: {}}}]
)
def test_what_says_nothing_to_a_modern_server_is_empty(declared: Any) -> None:
    found = capabilities.modern_capabilities_of(jsonrpc.as_payload(declared))
    assert bytes(found) == b"{}"


def test_tasks_are_taken_out_and_everything_else_stays() -> None:
    declared = {"tools": {"listChanged": True}, "tasks": {}, "extensions": {TASKS_NAME: {}, "x": 1}}
    found = capabilities.without_tasks(jsonrpc.as_payload(declared))
    assert json.loads(bytes(found)) == {"tools": {"listChanged": True}, "extensions": {"x": 1}}


@given(DECLARED)
def test_any_capabilities_can_be_said_in_the_other_era(declared: dict[str, Any]) -> None:
    payload = jsonrpc.as_payload(declared)
    found = capabilities.kinds_of(payload)
    assert found <= KINDS
    modern = capabilities.modern_capabilities_of(payload)
    assert capabilities.kinds_of(modern) == found
    assert all(isinstance(value, dict) for value in json.loads(bytes(modern)).values())
    assert "tasks" not in json.loads(bytes(capabilities.without_tasks(payload)))


@given(json_values.values)
def test_no_json_breaks_the_reading_of_capabilities(value: Any) -> None:
    payload = jsonrpc.as_payload(value)
    capabilities.kinds_of(payload)
    capabilities.modern_capabilities_of(payload)
    capabilities.without_tasks(payload)
