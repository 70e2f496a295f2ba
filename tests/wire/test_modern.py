"""Modern requests: which fault of several is named, and what a request says of itself."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import (
    HeaderMismatch,
    InvalidParams,
    UnsupportedRevision,
)
from mcp_proxy.wire import headers, jsonrpc, modern
from mcp_proxy.wire.jsonrpc import Request
from tests.support import json_values

VERSION = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"
INFO = "io.modelcontextprotocol/clientInfo"
LEVEL = "io.modelcontextprotocol/logLevel"

META: dict[str, Any] = {VERSION: "2026-07-28", CAPABILITIES: {}}
SENT = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/list"}

#: The names of the metadata and of the headers, as hypothesis may put anything under them.
KEYS = st.sampled_from([VERSION, CAPABILITIES, INFO, LEVEL, "progressToken", "x"])
FIELDS = st.sampled_from(["MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"])


def request(method: str = "tools/list", meta: Any = META, **params: Any) -> Request:
    return Request(1, method, jsonrpc.as_payload({**params, "_meta": meta}))


def check(message: Request, **sent: str | None) -> modern.ModernMeta:
    """Checks a message with its right headers, but for those that are given (`_` for `-`)."""
    given = {**SENT, "Mcp-Method": message.method}
    given |= {name.replace("_", "-"): value for name, value in sent.items()}  # type: ignore[misc]
    return modern.require_valid(message, given.get)


def named(method: str, **params: Any) -> Request:
    return request(method, **params)


# --- what a request says of itself ---------------------------------------------------------------


def test_the_metadata_are_read() -> None:
    meta = {**META, INFO: {"name": "c"}, LEVEL: "debug", "progressToken": 7}
    found = check(request(meta={**meta, CAPABILITIES: {"roots": {}}}))
    assert found == modern.ModernMeta(
        "2026-07-28", Raw(b'{"roots":{}}'), Raw(b'{"name":"c"}'), "debug", 7
    )


def test_what_is_optional_may_be_absent_or_null() -> None:
    expected = modern.ModernMeta("2026-07-28", Raw(b"{}"))
    assert check(request()) == expected
    assert check(request(meta={**META, INFO: None, LEVEL: None, "progressToken": None})) == expected


@pytest.mark.parametrize("level", sorted(modern.LOG_LEVELS))
def test_every_log_level_may_be_asked_for(level: str) -> None:
    assert check(request(meta={**META, LEVEL: level})).log_level == level


def test_a_text_with_half_of_a_character_hinders_nothing() -> None:
    params = Raw(request("tools/call", name="t", arguments="HALF").params or b"")
    params = Raw(bytes(params).replace(b"HALF", b"\\ud83d"))
    assert check(Request(1, "tools/call", params), Mcp_Name="t").capabilities == Raw(b"{}")


# --- the revision --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v999.0.0", "2099-01-01", "2025-11-25", "é"])
def test_a_revision_that_is_not_served_is_refused_with_those_that_are(version: str) -> None:
    with pytest.raises(UnsupportedRevision) as caught:
        check(request(meta={**META, VERSION: version}), MCP_Protocol_Version=version)
    error = caught.value
    assert (error.status, error.code) == (400, -32022)
    assert error.data == {"supported": ["2026-07-28"], "requested": version}


@pytest.mark.parametrize("meta", [META, {}, {VERSION: 5}, None])
def test_an_unknown_revision_in_the_header_is_named_before_anything_else(meta: Any) -> None:
    with pytest.raises(UnsupportedRevision):
        check(request(meta=meta), MCP_Protocol_Version="2099-01-01", Mcp_Method=None)


def test_a_header_that_the_body_contradicts_is_a_mismatch() -> None:
    with pytest.raises(HeaderMismatch) as caught:
        check(request(meta={**META, VERSION: "v999.0.0"}))
    assert (caught.value.status, caught.value.code) == (400, -32020)


def test_a_legacy_revision_in_the_header_of_a_modern_body_is_a_mismatch() -> None:
    with pytest.raises(HeaderMismatch):
        check(request(), MCP_Protocol_Version="2025-11-25")


@pytest.mark.parametrize("value", [None, "", " "])
@pytest.mark.parametrize("meta", [META, {}, {**META, VERSION: "v999.0.0"}])
def test_a_missing_revision_in_the_header_is_a_mismatch(value: str | None, meta: Any) -> None:
    with pytest.raises(HeaderMismatch):
        check(request(meta=meta), MCP_Protocol_Version=value)


# --- the rest of the metadata --------------------------------------------------------------------


@pytest.mark.parametrize(
    "meta",
    [
        None,
        5,
        [],
        {},
        {CAPABILITIES: {}},
        {VERSION: "2026-07-28"},
        {**META, VERSION: None},
        {**META, VERSION: 20260728},
        {**META, CAPABILITIES: None},
        {**META, CAPABILITIES: []},
        {**META, INFO: "client"},
        {**META, LEVEL: "loud"},
        {**META, LEVEL: 5},
        {**META, "progressToken": 1.5},
        {**META, "progressToken": {}},
    ],
)
def test_metadata_that_are_missing_or_wrong_are_invalid_params(meta: Any) -> None:
    with pytest.raises(InvalidParams) as caught:
        check(request(meta=meta))
    assert (caught.value.status, caught.value.code) == (400, -32602)


@pytest.mark.parametrize("params", [UNSET, Raw(b"[]"), Raw(b"{}")])
def test_params_without_metadata_are_invalid(params: Any) -> None:
    with pytest.raises(InvalidParams):
        check(Request(1, "tools/list", params))


def test_missing_metadata_are_named_before_a_missing_method() -> None:
    with pytest.raises(InvalidParams):
        check(request(meta={}), Mcp_Method=None)


# --- the method and the name ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "TOOLS/LIST", "tools/call", "tools/list, tools/list"])
def test_the_method_in_the_header_is_that_of_the_body(value: str | None) -> None:
    with pytest.raises(HeaderMismatch):
        check(request(), Mcp_Method=value)


def test_the_method_in_the_header_is_never_encoded() -> None:
    with pytest.raises(HeaderMismatch):
        check(request(), Mcp_Method="=?base64?dG9vbHMvbGlzdA==?=")


def test_white_space_around_values_means_nothing() -> None:
    message = named("tools/call", name="t")
    sent = {
        "MCP_Protocol_Version": " 2026-07-28\t",
        "Mcp_Method": " tools/call ",
        "Mcp_Name": "\tt",
    }
    assert check(message, **sent).protocol_version == "2026-07-28"


NAMED = [
    ("tools/call", "name"),
    ("prompts/get", "name"),
    ("resources/read", "uri"),
    ("tasks/get", "taskId"),
    ("tasks/update", "taskId"),
    ("tasks/cancel", "taskId"),
]


@pytest.mark.parametrize(("method", "key"), NAMED)
def test_the_name_in_the_header_is_that_of_the_body(method: str, key: str) -> None:
    message = named(method, **{key: "a b"})
    check(message, Mcp_Name="a b")
    check(message, Mcp_Name="=?base64?YSBi?=")
    for wrong in (None, "", "A b", "a  b", "=?base64?YSB?=", "=?BASE64?YSBi?=", "a b é"):
        with pytest.raises(HeaderMismatch):
            check(message, Mcp_Name=wrong)


@pytest.mark.parametrize(("method", "key"), NAMED)
def test_a_request_without_its_name_is_the_servers_to_refuse(method: str, key: str) -> None:
    for params in ({}, {key: None}, {key: 5}):
        check(named(method, **params))
        with pytest.raises(HeaderMismatch):
            check(named(method, **params), Mcp_Name="5")


def test_methods_without_a_name_need_no_header_for_it() -> None:
    check(request("tools/list", name="x"), Mcp_Name="y")


# --- the tables ----------------------------------------------------------------------------------


def test_what_the_revision_took_away_is_removed_and_nothing_else() -> None:
    gone = {"initialize", "ping", "logging/setLevel", "tasks/list", "tasks/result"}
    assert gone < modern.REMOVED
    assert {"resources/subscribe", "resources/unsubscribe"} < modern.REMOVED
    kept = {"tools/call", "tasks/get", "completion/complete", modern.DISCOVER, modern.LISTEN}
    assert not modern.REMOVED & (kept | modern.MAY_ASK)


@pytest.mark.parametrize(
    ("code", "status"),
    [(-32601, 404), (-32020, 400), (-32021, 400), (-32022, 400), (-32602, 200), (-32603, 200)],
)
def test_the_status_goes_with_the_code(code: int, status: int) -> None:
    assert modern.status_of(code) == status


# --- sending -------------------------------------------------------------------------------------


def test_a_client_sends_what_the_body_says() -> None:
    assert modern.headers_of(named("resources/read", uri="file:///é")) == [
        ("MCP-Protocol-Version", "2026-07-28"),
        ("Mcp-Method", "resources/read"),
        ("Mcp-Name", "=?base64?ZmlsZTovLy/DqQ==?="),
    ]
    assert len(modern.headers_of(request())) == 2
    assert len(modern.headers_of(Request(1, "tools/call"))) == 2


@given(st.sampled_from(NAMED), st.text())
def test_what_a_client_sends_is_valid(kind: tuple[str, str], name: str) -> None:
    method, key = kind
    message = named(method, **{key: name})
    assert modern.require_valid(message, dict(modern.headers_of(message)).get)


# --- metadata of any message ---------------------------------------------------------------------


def test_metadata_of_the_protocol_are_taken_out_and_the_others_stay() -> None:
    params = jsonrpc.as_payload({"a": 1, "_meta": {**META, "progressToken": 1, "traceparent": "t"}})
    expected = {"a": 1, "_meta": {"progressToken": 1, "traceparent": "t"}}
    assert json.loads(bytes(modern.without_meta(params) or b"")) == expected


def test_metadata_with_nothing_left_are_taken_out_whole() -> None:
    assert modern.without_meta(request().params) == Raw(b"{}")
    assert modern.without_meta(Raw(b'{"_meta":{},"a": 1.0}')) == Raw(b'{"a":1.0}')


@pytest.mark.parametrize("params", [UNSET, Raw(b"[1]")])
def test_params_that_are_no_object_have_no_metadata(params: Any) -> None:
    assert modern.without_meta(params) == params
    assert modern.meta_of(params) == {}


@pytest.mark.parametrize("params", [UNSET, Raw(b"[1]"), Raw(b"{}"), Raw(b'{"_meta":5}')])
def test_metadata_are_added(params: Any) -> None:
    assert modern.with_meta(params, {"k": Raw(b"1.0")}) == Raw(b'{"_meta":{"k":1.0}}')


def test_added_metadata_replace_those_of_the_same_name() -> None:
    params = Raw(b'{"x": 2e1,"_meta":{"a":1,"b": 2}}')
    assert modern.with_meta(params, {"b": "new"}) == Raw(b'{"x":2e1,"_meta":{"a":1,"b":"new"}}')


def test_half_of_a_character_survives_a_change_of_the_metadata() -> None:
    params = Raw(b'{"x":"\\ud83d","_meta":{"a":"\\udE00"}}')
    changed = modern.with_meta(params, {"b": 1})
    assert changed == Raw(b'{"x":"\\ud83d","_meta":{"a":"\\udE00","b":1}}')


@given(json_values.objects, st.dictionaries(KEYS, json_values.values))
def test_metadata_that_are_added_are_taken_out_again(
    fields: dict[str, Any], meta: dict[str, Any]
) -> None:
    fields.pop("_meta", None)
    own = {name: value for name, value in meta.items() if name.startswith(modern.PREFIX)}
    others = {name: value for name, value in meta.items() if name not in own}
    params = jsonrpc.as_payload({**fields, "_meta": others} if others else fields)
    added = modern.with_meta(params, own)
    assert set(modern.meta_of(added)) == set(meta)
    assert json.loads(bytes(modern.without_meta(added) or b"")) == json.loads(bytes(params))


@given(
    json_values.values
    | st.dictionaries(st.just("_meta"), st.dictionaries(KEYS, json_values.values)),
    st.dictionaries(FIELDS, st.text() | st.sampled_from(["2026-07-28", "tools/call", "x"])),
)
def test_no_request_leads_to_anything_but_an_answer(params: Any, sent: dict[str, str]) -> None:
    message = Request(1, "tools/call", jsonrpc.as_payload(params))
    with contextlib.suppress(UnsupportedRevision, HeaderMismatch, InvalidParams):
        found = modern.require_valid(message, sent.get)
        assert found.protocol_version == sent[headers.PROTOCOL_VERSION] == modern.REVISION
    modern.without_meta(message.params)
    modern.with_meta(message.params, {"a": 1})
    modern.headers_of(message)
