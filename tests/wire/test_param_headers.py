"""Arguments that are mirrored in headers: which tools ask for it, and whether both agree."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import HeaderMismatch
from mcp_proxy.wire import jsonrpc, param_headers
from tests.support import json_values

STRING = {"type": "string", "x-mcp-header": "Region"}


def listed(*tools: Any) -> Raw:
    return jsonrpc.as_payload({"tools": list(tools)})


def annotated(properties: Any, **schema: Any) -> Any:
    tool = {"name": "t", "inputSchema": {"type": "object", "properties": properties, **schema}}
    return param_headers.annotated([listed(tool)]).get("t")


def match(arguments: Any, **sent: str) -> None:
    """Checks one argument `a`, whose header is `Mcp-Param-a`."""
    given = {f"Mcp-Param-{name}": value for name, value in sent.items()}
    payload = Raw(arguments) if isinstance(arguments, bytes) else jsonrpc.as_payload(arguments)
    param_headers.require_matching({"a": ("a",)}, payload, given.get)


def refuse(arguments: Any, **sent: str) -> None:
    with pytest.raises(HeaderMismatch) as caught:
        match(arguments, **sent)
    assert (caught.value.status, caught.value.code) == (400, -32020)


# --- what tools ask for --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "integer", "boolean"])
def test_a_tool_names_the_arguments_that_are_mirrored(kind: str) -> None:
    properties = {"r": {"type": kind, "x-mcp-header": "My-Region"}, "q": {"type": "string"}}
    assert annotated(properties) == {"my-region": ("r",)}


def test_an_argument_may_lie_in_objects() -> None:
    inner = {"type": "object", "properties": {"c": STRING}}
    outer = {"type": "object", "properties": {"b": inner, "x-mcp-header": {"type": "string"}}}
    assert annotated({"a": outer}) == {"region": ("a", "b", "c")}


def test_a_tool_without_annotations_is_known_all_the_same() -> None:
    tools = [{"name": "a", "inputSchema": {"type": "object"}}, {"name": "b"}]
    assert param_headers.annotated([listed(*tools), listed({"name": "c"})]) == {
        "a": {},
        "b": {},
        "c": {},
    }


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:b", "é", "a\n", "a\r\nb", "(a)", None, 5, True, ["a"], {}]
)
def test_a_header_that_cannot_be_named_so_leaves_the_tool_out(name: Any) -> None:
    assert annotated({"r": {"type": "string", "x-mcp-header": name}}) is None


@pytest.mark.parametrize("kind", ["number", "object", "array", "null", None, ["string", "null"], 5])
def test_an_argument_that_no_header_can_carry_leaves_the_tool_out(kind: Any) -> None:
    assert annotated({"r": {"type": kind, "x-mcp-header": "R"}}) is None


def test_a_name_for_two_arguments_leaves_the_tool_out() -> None:
    other = {"type": "object", "properties": {"s": {"type": "string", "x-mcp-header": "REGION"}}}
    assert annotated({"r": STRING, "o": other}) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"items": STRING},
        {"properties": {"a": {"type": "array", "items": STRING}}},
        {"properties": {"a": {"type": "array", "items": {"properties": {"b": STRING}}}}},
        {"properties": {"a": {"anyOf": [STRING, {"type": "null"}]}}},
        {"allOf": [{"properties": {"a": STRING}}]},
        {"if": {"properties": {"a": STRING}}},
        {"$defs": {"a": STRING}},
        {"$defs": {"const": STRING}},
        {"patternProperties": {"default": STRING}},
        {"additionalProperties": STRING},
        {"x-mcp-header": "R"},
    ],
)
def test_an_annotation_where_nobody_finds_its_value_leaves_the_tool_out(schema: Any) -> None:
    assert param_headers.annotated([listed({"name": "t", "inputSchema": schema})]) == {}


def test_data_in_a_schema_annotate_nothing() -> None:
    data = {"type": "object", "default": STRING, "enum": [STRING], "examples": [STRING]}
    assert annotated({"a": data, "r": STRING}) == {"region": ("r",)}


def test_the_last_tool_of_a_name_counts() -> None:
    good = {"name": "t", "inputSchema": {"properties": {"r": STRING}}}
    bad = {"name": "t", "inputSchema": {"properties": {"r": {"x-mcp-header": "R"}}}}
    assert param_headers.annotated([listed(bad, good)]) == {"t": {"region": ("r",)}}
    assert param_headers.annotated([listed(good), listed(bad)]) == {}


def test_half_of_a_character_in_a_description_hides_no_tool() -> None:
    tool = {"name": "t", "description": "HALF", "inputSchema": {"properties": {"r": STRING}}}
    payload = Raw(bytes(listed(tool)).replace(b"HALF", b"\\ud83d"))
    assert param_headers.annotated([payload]) == {"t": {"region": ("r",)}}


@pytest.mark.parametrize(
    "result", [b"null", b"[]", b"{}", b'{"tools":5}', b'{"tools":[5,{"name":1},{}]}', b"{1}"]
)
def test_what_lists_no_tools_annotates_nothing(result: bytes) -> None:
    assert param_headers.annotated([Raw(result)]) == {}


def test_a_number_that_no_machine_has_leaves_the_tool_out() -> None:
    tool = {"name": "t", "inputSchema": {"maximum": "BIG", "properties": {"r": STRING}}}
    payload = Raw(bytes(listed(tool)).replace(b'"BIG"', b"1e999"))
    assert param_headers.annotated([payload]) == {}


SCHEMAS = st.recursive(
    json_values.scalars | st.just(STRING),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["properties", "items", "$defs", "type", "x-mcp-header", "const", "a"]),
            inner,
            max_size=4,
        )
    ),
)


@given(SCHEMAS)
def test_no_schema_breaks_the_reading_of_tools(schema: Any) -> None:
    found = param_headers.annotated([listed({"name": "t", "inputSchema": schema}), listed(schema)])
    for paths in found.values():
        assert all(name == name.lower() and path for name, path in paths.items())


# --- whether both agree --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "header"),
    [
        ("us-west1", "us-west1"),
        ("us-west1", "=?base64?dXMtd2VzdDE=?="),
        ("é", "=?base64?w6k=?="),
        ("a", " a\t"),
        ("", ""),
        ("true", "true"),
        (True, "true"),
        (False, "false"),
        (42, "42"),
        (42, "42.0"),
        (42, "4.2e1"),
        (42.0, "42"),
        (-7, "-7"),
        (0, "-0"),
        (2**80, str(2**80)),
        (1.5, "1.5"),
    ],
)
def test_a_header_that_says_what_the_argument_says_is_right(value: Any, header: str) -> None:
    match({"a": value}, a=header)


@pytest.mark.parametrize(
    ("value", "header"),
    [
        ("us-west1", "US-WEST1"),
        ("us-west1", "us-west2"),
        ("us-west1", ""),
        ("a", "=?base64?YQ?="),
        ("é", "é"),
        ("42", "42.0"),
        (True, "True"),
        (True, "1"),
        (1, "true"),
        (42, "43"),
        (42, "42a"),
        (42, "0x2a"),
        (42, "+42"),
        (42, "4_2"),
        (42, "\u0664\u0662"),
        (42, ""),
        (42, "nan"),
        (1, "1e9999"),
    ],
)
def test_a_header_that_says_something_else_is_a_mismatch(value: Any, header: str) -> None:
    refuse({"a": value}, a=header)


@pytest.mark.parametrize("arguments", [{}, {"a": None}, {"b": 1}, [], None, {"a": {}}, {"a": [1]}])
def test_an_argument_without_a_value_has_no_header(arguments: Any) -> None:
    match(arguments)
    refuse(arguments, a="")
    refuse(arguments, a="null")


def test_a_call_without_arguments_has_no_headers() -> None:
    param_headers.require_matching({"a": ("a",)}, UNSET, {}.get)


@pytest.mark.parametrize("value", ["", "x", 0, False])
def test_a_value_without_its_header_is_a_mismatch(value: Any) -> None:
    refuse({"a": value})


@pytest.mark.parametrize("name", ["a_b", "a.b", "a~"])
def test_a_header_that_proxies_drop_for_its_name_may_be_missing(name: str) -> None:
    arguments = Raw(b'{"a":1}')
    param_headers.require_matching({name: ("a",)}, arguments, {}.get)
    with pytest.raises(HeaderMismatch):
        param_headers.require_matching({name: ("a",)}, arguments, {f"Mcp-Param-{name}": "2"}.get)


def test_numbers_that_nobody_computes_with_are_compared_as_they_are_spelled() -> None:
    number = "1" * 1000
    match(f'{{"a":{number}}}'.encode(), a=number)
    refuse(f'{{"a":{number}}}'.encode(), a=f"{number}.0")
    match(b'{"a":1E+1000}', a="1E+1000")


def test_half_of_a_character_has_no_header() -> None:
    match(b'{"a":"\\ud83d"}')
    refuse(b'{"a":"\\ud83d"}', a="x")


def test_an_argument_in_objects_is_found() -> None:
    header = {"Mcp-Param-c": "x"}.get
    param_headers.require_matching({"c": ("a", "b")}, Raw(b'{"a":{"b":"x"}}'), header)
    for arguments in (b'{"a":"x"}', b'{"a":{"b":"y"}}', b'{"b":"x"}'):
        with pytest.raises(HeaderMismatch):
            param_headers.require_matching({"c": ("a", "b")}, Raw(arguments), header)


# --- what a client sends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "header"),
    [
        ("us-west1", "us-west1"),
        (" x", "=?base64?IHg=?="),
        ("", "=?base64??="),
        (True, "true"),
        (False, "false"),
        (42, "42"),
        (42.0, "42"),
        (1e3, "1000"),
        (-1.5, "-1.5"),
    ],
)
def test_a_client_sends_what_the_argument_says(value: Any, header: str) -> None:
    arguments = jsonrpc.as_payload({"a": value})
    assert param_headers.headers_for({"x": ("a",)}, arguments) == [("Mcp-Param-x", header)]


@pytest.mark.parametrize("arguments", [b"{}", b'{"a":null}', b'{"a":{}}', b'{"a":[]}', b"[]"])
def test_a_client_sends_nothing_without_a_value(arguments: bytes) -> None:
    assert param_headers.headers_for({"x": ("a",)}, Raw(arguments)) == []


@given(json_values.scalars | json_values.values, st.data())
def test_what_a_client_sends_agrees(value: Any, data: st.DataObject) -> None:
    arguments = Raw(data.draw(json_values.spelled({"a": value})).strip())
    sent = dict(param_headers.headers_for({"a": ("a",)}, arguments))
    param_headers.require_matching({"a": ("a",)}, arguments, sent.get)
    assert bool(sent) == (value is not None and not isinstance(value, (dict, list)))


@given(json_values.values, st.none() | st.text())
def test_no_json_breaks_the_check(value: Any, header: str | None) -> None:
    arguments = jsonrpc.as_payload(value)
    annotations = {"a": ("a", "b"), "c": ("c",)}
    param_headers.headers_for(annotations, arguments)
    with contextlib.suppress(HeaderMismatch):
        param_headers.require_matching(annotations, arguments, lambda name: header)
