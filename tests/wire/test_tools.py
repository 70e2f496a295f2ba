"""Hidden tools: what of a list is seen, and what of a call goes on."""

from __future__ import annotations

import fnmatch
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from mcp_proxy.errors import BadAnswer, ConfigError, InvalidParams, UnknownTool
from mcp_proxy.wire import jsonrpc, sse
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.tool_lists import ToolLists
from mcp_proxy.wire.tools import CALL, LIST, ToolFilter
from tests.support.json_values import values as JSON

NAMES = st.text(alphabet="abAB_./*?[]é\n", max_size=6)
PATTERNS = st.lists(NAMES, max_size=4).map(tuple)
FILTERS = st.builds(ToolFilter, allow=st.none() | PATTERNS, deny=PATTERNS)


def call(params: Any, key: int = 1) -> Request:
    return Request(
        key, CALL, Raw(params if isinstance(params, bytes) else json.dumps(params).encode())
    )


# --- names ---------------------------------------------------------------------------------------


@given(FILTERS, NAMES)
def test_a_tool_is_shown_that_is_allowed_and_not_denied(tools: ToolFilter, name: str) -> None:
    is_allowed = tools.allow is None or any(fnmatch.fnmatchcase(name, each) for each in tools.allow)
    is_denied = any(fnmatch.fnmatchcase(name, each) for each in tools.deny)
    assert tools.shows(name) is (is_allowed and not is_denied)


@pytest.mark.parametrize(
    ("tools", "shown"),
    [
        (ToolFilter(), ["read", "write", "Read"]),
        (ToolFilter(allow=("read",)), ["read"]),
        (ToolFilter(allow=()), []),
        (ToolFilter(deny=("wr*",)), ["read", "Read"]),
        (ToolFilter(allow=("*",), deny=("[rR]ead",)), ["write"]),
    ],
)
def test_names_and_patterns_are_told_apart_by_case(tools: ToolFilter, shown: list[str]) -> None:
    assert [name for name in ("read", "write", "Read") if tools.shows(name)] == shown


@pytest.mark.parametrize("names", ["read", [1], {"read": 1}, None])
def test_what_is_no_list_of_texts_is_refused(names: Any) -> None:
    with pytest.raises(ConfigError, match="ToolFilter: deny: expected a list of texts"):
        ToolFilter(deny=names)
    if names is not None:
        with pytest.raises(ConfigError, match="ToolFilter: allow: expected a list of texts"):
            ToolFilter(allow=names)


# --- lists ---------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.fixed_dictionaries({"name": NAMES}, optional={"description": JSON, "inputSchema": JSON})
)


@given(FILTERS, ENTRIES, st.dictionaries(st.sampled_from(["nextCursor", "_meta", "x"]), JSON))
def test_a_list_keeps_the_bytes_of_what_is_shown(
    tools: ToolFilter, entries: list[dict[str, Any]], rest: dict[str, Any]
) -> None:
    texts = [json.dumps(entry, indent=1, ensure_ascii=False) for entry in entries]
    kept = [t for t, entry in zip(texts, entries, strict=True) if tools.shows(entry["name"])]
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in rest.items())
    whole = f'{{{head}"tools": [{", ".join(texts)}]}}'
    shown = tools.visible(Response(1, Raw(whole.encode())))
    fields = jsonrpc.fields_of(shown.result)
    assert bytes(fields["tools"]) == f"[{','.join(kept)}]".encode()
    others = {key: json.loads(bytes(value)) for key, value in fields.items() if key != "tools"}
    assert others == rest


@pytest.mark.parametrize(
    "result", [b"null", b"[]", b"{}", b'{"tools":null}', b'{"tools":{"name":"a"}}', b'"tools"']
)
def test_what_is_no_list_stays(result: bytes) -> None:
    shown = ToolFilter(deny=("*",)).visible(Response(1, Raw(result)))
    assert json.loads(bytes(shown.result)) == json.loads(result)  # type: ignore[arg-type]


def test_an_entry_without_a_name_is_not_shown() -> None:
    listed = Response(1, Raw(b'{"tools":[{"Name":"a"},{"name":1},7,{"name":"b"}]}'))
    assert ToolFilter(deny=("x",)).visible(listed).result == Raw(b'{"tools":[{"name":"b"}]}')


# --- calls ---------------------------------------------------------------------------------------


@given(FILTERS, NAMES, JSON, JSON)
def test_a_call_goes_on_where_its_tool_is_shown(
    tools: ToolFilter, name: str, arguments: Any, extra: Any
) -> None:
    request = call({"arguments": arguments, "name": name, "extra": extra})
    if tools.shows(name):
        admitted = tools.admitted(request)
        assert (admitted.id, admitted.method) == (1, CALL)
        assert json.loads(bytes(admitted.params)) == json.loads(bytes(request.params))  # type: ignore[arg-type]
    else:
        with pytest.raises(UnknownTool) as caught:
            tools.admitted(request)
        assert (caught.value.code, str(caught.value)) == (-32602, f"Unknown tool: {name}")


@pytest.mark.parametrize(
    "key", ["Name", "NAME", "nAme", "Arguments", "argument\u017f", "_META", "Task"]
)
def test_what_another_reader_would_take_for_a_field_is_left_out(key: str) -> None:
    tools = ToolFilter(deny=("hidden",))
    admitted = tools.admitted(call({"name": "a", key: "hidden", "other": 1}))
    assert json.loads(bytes(admitted.params)) == {"name": "a", "other": 1}  # type: ignore[arg-type]


def test_of_a_name_that_is_there_twice_the_one_that_was_checked_goes_on() -> None:
    tools = ToolFilter(deny=("hidden",))
    admitted = tools.admitted(call(b'{"name":"hidden","name":"a","arguments":{"x": 1.0}}'))
    assert bytes(admitted.params) == b'{"name":"a","arguments":{"x": 1.0}}'  # type: ignore[arg-type]
    with pytest.raises(UnknownTool):
        tools.admitted(call(b'{"name":"a","n\\u0061me":"hidd\\u0065n"}'))


@pytest.mark.parametrize(
    "params", [b"{}", b'{"name":1}', b'{"name":null}', b'["a"]', b'{"Name":"a"}', b'{"name":["a"]}']
)
def test_a_call_without_a_name_is_refused(params: bytes) -> None:
    with pytest.raises(InvalidParams):
        ToolFilter(deny=("hidden",)).admitted(call(params))
    with pytest.raises(InvalidParams):
        ToolFilter(deny=("hidden",)).admitted(Request(1, CALL))


def test_other_requests_are_the_same_object() -> None:
    request = Request(1, LIST, Raw(b'{"cursor":"x"}'))
    assert ToolFilter(deny=("*",)).admitted(request) is request


def test_a_notification_calls_nothing() -> None:
    tools = ToolFilter(deny=("hidden",))
    assert not tools.admits(Notification(CALL, Raw(b'{"name":"a"}')))
    assert tools.admits(Notification("notifications/initialized"))


# --- answers that are forwarded ------------------------------------------------------------------

HIDES = ToolFilter(deny=("hidden*",))
LISTED = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"},{"name":"hidden1"}]}}'
SHOWN = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"a"}]}}'
OTHERS = (
    b'{"jsonrpc":"2.0","method":"notifications/tools/list_changed"}',
    b'{"jsonrpc": "2.0", "id": 8, "result": {"content": [{"type":"text","text":"tools"}]}}',
    b'{"jsonrpc":"2.0","id":"x","error":{"code":-32602,"message":"Unknown tool: hidden"}}',
    b'{"jsonrpc":"2.0","id":null,"error":{"code":-32602,"message":"no tools, \\u00e9"}}',
)


def passed(reader: ToolLists, body: bytes, cuts: list[int]) -> bytes:
    """What a reader makes of a body that comes in pieces."""
    at = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(at)]
    return b"".join(reader.feed(piece) for piece in pieces if piece) + reader.feed(b"")


CUTS = st.lists(st.integers(min_value=0, max_value=2000), max_size=8)


@given(CUTS)
def test_a_document_is_without_hidden_tools_in_any_pieces(cuts: list[int]) -> None:
    assert passed(ToolLists(HIDES, False), LISTED, cuts) == SHOWN


@pytest.mark.parametrize("body", [*OTHERS, b"", b"<html>", b" "])
def test_another_document_keeps_its_bytes(body: bytes) -> None:
    assert passed(ToolLists(HIDES, False), body, []) == body


def test_a_batch_of_answers_is_without_hidden_tools() -> None:
    body = b"[" + OTHERS[1] + b", " + LISTED + b"]"
    shown = json.loads(passed(ToolLists(HIDES, False), body, []))
    assert shown == [json.loads(OTHERS[1]), json.loads(SHOWN)]


@given(
    st.lists(st.sampled_from([LISTED, *OTHERS]), max_size=4),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
    CUTS,
)
def test_a_stream_is_without_hidden_tools_in_any_pieces(
    messages: list[bytes], end: bytes, has_mark: bool, cuts: list[int]
) -> None:
    def stream(of: list[bytes]) -> bytes:
        lines = [[b": x", b"id: 1", b"data: " + data, b""] for data in of]
        return (sse.BOM if has_mark else b"") + b"".join(
            line + end for block in lines for line in block
        )

    wanted = stream([SHOWN if data == LISTED else data for data in messages])
    assert passed(ToolLists(HIDES, True), stream(messages), cuts) == wanted


def test_an_event_in_several_lines_is_without_hidden_tools() -> None:
    lines = json.dumps(json.loads(LISTED), indent=1).split("\n")
    stream = "".join(f"data: {line}\n" for line in lines) + "\n"
    (event,) = sse.Decoder().feed(passed(ToolLists(HIDES, True), stream.encode(), []))
    assert json.loads(event.data or b"") == json.loads(SHOWN)


def test_an_event_that_the_end_cuts_off_is_without_hidden_tools() -> None:
    assert b"hidden" not in passed(ToolLists(HIDES, True), b"data: " + LISTED, [])


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "data",
    [LISTED[:-1], LISTED.replace(b'"2.0"', b'"1.0"'), LISTED.replace(b"tools", b"\\u0074ools")],
)
def test_a_list_that_cannot_be_read_is_not_passed(is_stream: bool, data: bytes) -> None:
    body = b"data: " + data + b"\n\n" if is_stream else data
    try:
        shown = passed(ToolLists(HIDES, is_stream), body, [])
    except BadAnswer:
        return
    assert b"hidden" not in shown
