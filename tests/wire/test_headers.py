"""The rules that go with the headers: session ids, connection fields, media types."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.errors import HeaderMismatch
from mcp_proxy.wire import headers
from mcp_proxy.wire.headers import EVENT_STREAM, JSON

# --- session ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a", "!", "~", "0-9_./:{}*", "x" * headers.MAX_SESSION_ID])
def test_a_session_id_is_visible_ascii(value: str) -> None:
    assert headers.is_session_id(value)


@pytest.mark.parametrize(
    "value", ["", " ", "a b", "a\n", "\ta", "\x7f", "\x1f", "é", "\u00ad", "\0", "🙂"]
)
def test_anything_else_is_no_session_id(value: str) -> None:
    assert not headers.is_session_id(value)


def test_a_session_id_has_so_many_characters_and_no_more() -> None:
    assert not headers.is_session_id("x" * (headers.MAX_SESSION_ID + 1))


@given(st.text(max_size=20))
def test_a_session_id_has_only_characters_from_21_to_7e(value: str) -> None:
    expected = bool(value) and all("\x21" <= character <= "\x7e" for character in value)
    assert headers.is_session_id(value) == expected


# --- media types ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept",
    [
        "application/json",
        "application/json, text/event-stream",
        "text/event-stream,application/json",
        "Application/JSON",
        " application/json ; charset=utf-8",
        "application/json;q=0.001",
        "application/json;q=1",
        "application/json;Q=0.5",
        "application/*",
        "*/*",
        "text/html, */*;q=0.1",
        "application/json;q=0.0, application/json",
    ],
)
def test_json_is_accepted_by_name_and_by_range(accept: str) -> None:
    assert headers.accepts(accept, JSON)


@pytest.mark.parametrize(
    "accept",
    [
        "",
        ",",
        "text/event-stream",
        "text/*",
        "application/jsonp",
        "application/json-seq",
        "xapplication/json",
        "json",
        "application/json;q=0",
        "application/json; q=0.0",
        "application/json;q=0.000",
        "application/json;charset=utf-8;Q=0.",
        "*/*;q=0",
    ],
)
def test_json_is_not_accepted_where_it_is_not_named_or_has_no_quality(accept: str) -> None:
    assert not headers.accepts(accept, JSON)


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "application/json, TEXT/Event-Stream;q=0.2", "text/*"]
)
def test_event_streams_are_accepted_by_name_and_by_their_own_range(accept: str) -> None:
    assert headers.accepts(accept, EVENT_STREAM)


@pytest.mark.parametrize("accept", ["*/*", "application/json, */*", "application/*", "text/html"])
def test_a_range_over_everything_does_not_ask_for_event_streams(accept: str) -> None:
    assert not headers.accepts(accept, EVENT_STREAM)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("text/event-stream;q=0, text/*", EVENT_STREAM),
        ("text/*, text/event-stream;q=0", EVENT_STREAM),
        ("application/json;q=0, */*", JSON),
        ("application/*;q=0, */*;q=0.5", JSON),
    ],
)
def test_the_most_specific_range_decides(accept: str, media_type: str) -> None:
    assert not headers.accepts(accept, media_type)


_ranges = st.sampled_from(
    ["application/json", "text/event-stream", "text/*", "application/*", "*/*", "text/html", ""]
)
_parts = st.lists(st.tuples(_ranges, st.sampled_from(["", ";q=0.5", "; q=1", ";v=1"])), max_size=5)


@given(_parts, st.randoms(), st.sampled_from([JSON, EVENT_STREAM]))
def test_neither_order_nor_case_nor_space_changes_what_is_accepted(
    parts: list[tuple[str, str]], random: Random, media_type: str
) -> None:
    plain = [name + parameters for name, parameters in parts]
    shuffled = list(plain)
    random.shuffle(shuffled)
    expected = headers.accepts(",".join(plain), media_type)
    assert headers.accepts(" ,\t".join(shuffled).upper(), media_type) == expected


@given(st.text(max_size=40), st.sampled_from([JSON, EVENT_STREAM]))
def test_any_accept_header_has_an_answer(accept: str, media_type: str) -> None:
    assert headers.accepts(accept, media_type) in (True, False)


@pytest.mark.parametrize(
    "value",
    [JSON, "application/json; charset=utf-8", "Application/JSON ;x", " application/json"],
)
def test_json_is_json_whatever_its_parameters(value: str) -> None:
    assert headers.is_json(value)


@pytest.mark.parametrize(
    "value", ["", ";", "text/plain", "application/json-rpc", "json", "a/b;application/json"]
)
def test_other_content_is_not_json(value: str) -> None:
    assert not headers.is_json(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" Text/Event-Stream ; charset=utf-8", EVENT_STREAM),
        ("application/json;a;b", JSON),
        ("", ""),
        (";", ""),
    ],
)
def test_a_media_type_is_without_parameters_and_in_lower_case(value: str, expected: str) -> None:
    assert headers.media_type(value) == expected


# --- values that mirror the body -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("us-west1", "us-west1"),
        ("a  b", "a  b"),
        ("", "=?base64??="),
        (" a", "=?base64?IGE=?="),
        ("a ", "=?base64?YSA=?="),
        ("a\tb", "=?base64?YQli?="),
        ("é", "=?base64?w6k=?="),
        ("=?base64?YQ==?=", "=?base64?PT9iYXNlNjQ/WVE9PT89?="),
        ("=?BASE64?YQ==?=", "=?BASE64?YQ==?="),
        ("=?base64?", "=?base64?"),
        ("=?base64?=", "=?base64?="),
    ],
)
def test_a_text_that_no_header_can_carry_is_encoded(text: str, value: str) -> None:
    assert headers.encode_value(text) == value
    assert headers.decode_value(value) == text


@pytest.mark.parametrize("value", [" a", "a\t", "\t a ", "a"])
def test_white_space_around_a_value_is_none_of_it(value: str) -> None:
    assert headers.decode_value(value) == "a"


def test_a_tab_within_a_value_is_read() -> None:
    assert headers.decode_value("a\tb") == "a\tb"


@pytest.mark.parametrize("inner", ["YQ", "YQ=", "Y", "YQ==YQ==", "Y Q=", "YQ_-", "w6", "/w==", "="])
def test_what_is_not_the_base64_of_a_text_is_refused(inner: str) -> None:
    with pytest.raises(HeaderMismatch):
        headers.decode_value(f"=?base64?{inner}?=")


@pytest.mark.parametrize("value", ["é", "\x7f", "a\x00b", "a\nb", "\udcff", "\u4e16"])
def test_characters_that_no_header_may_have_are_refused(value: str) -> None:
    with pytest.raises(HeaderMismatch):
        headers.decode_value(value)


@given(st.text())
def test_every_text_comes_through_a_header(text: str) -> None:
    value = headers.encode_value(text)
    assert headers.is_printable(value)
    assert headers.decode_value(f" {value}\t") == text
