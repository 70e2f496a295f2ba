"""What is made of JSON that strict readers refuse."""

from __future__ import annotations

import json
import math
import re
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import ParseError, RequestId
from mcp_proxy.wire import jsonrpc, mending
from mcp_proxy.wire.jsonrpc import Response
from tests.support import json_values

MEBIBYTE = 1024 * 1024

# --- repair --------------------------------------------------------------------------------------

REPAIRS = {
    "plain text stays": (b'{"a":"b"}', b'{"a":"b"}'),
    "valid UTF-8 stays": ('"é 😀"'.encode(), '"é 😀"'.encode()),
    "a valid pair stays": (rb'"\ud83d\ude00"', rb'"\ud83d\ude00"'),
    "a valid pair in capitals stays": (rb'"\uD83D\uDE00"', rb'"\uD83D\uDE00"'),
    "other escapes stay": (rb'"\n\\\"\/\u00e9"', rb'"\n\\\"\/\u00e9"'),
    "a lone first half": (rb'"\ud83d"', rb'"\ufffd"'),
    "a lone second half": (rb'"\ude00"', rb'"\ufffd"'),
    "a lone half in capitals": (rb'"\uDBFFx"', rb'"\ufffdx"'),
    "halves in the wrong order": (rb'"\ude00\ud83d"', rb'"\ufffd\ufffd"'),
    "a half before a whole pair": (rb'"\ud83d\ud83d\ude00"', rb'"\ufffd\ud83d\ude00"'),
    "a half before another escape": (rb'"\ud83d\n"', rb'"\ufffd\n"'),
    "a half before another character": (rb'"\ud83d\u0041"', rb'"\ufffd\u0041"'),
    "an escaped backslash before u": (rb'"\\ud83d"', rb'"\\ud83d"'),
    "an escaped backslash before a half": (rb'"\\\ud83d"', rb'"\\\ufffd"'),
    "two escaped backslashes before u": (rb'"\\\\ude00"', rb'"\\\\ude00"'),
    "a byte that is no UTF-8": (b'"\xff"', b'"\xef\xbf\xbd"'),
    "a character cut off": (b'"\xf0\x9f\x98"', b'"\xef\xbf\xbd"'),
    "a surrogate in UTF-8": (b'"\xed\xa0\xbd"', b'"' + b"\xef\xbf\xbd" * 3 + b'"'),
    "a backslash at the very end": (b'"\\', b'"\\'),
}


@pytest.mark.parametrize(("line", "expected"), REPAIRS.values(), ids=REPAIRS.keys())
def test_repair_replaces_what_is_not_unicode_and_nothing_else(line: bytes, expected: bytes) -> None:
    assert mending.repair(line) == expected


@pytest.mark.parametrize("spell", ["\\u{:04x}", "\\u{:04X}", "\\uD{:03x}", "\\ud{:03X}"])
def test_repair_tells_every_half_from_every_other_character(spell: str) -> None:
    digits = range(0x1000) if "{:03" in spell else range(0x10000)
    for number in digits:
        line = f'"{spell.format(number)}"'.encode()
        is_half = 0xD800 <= (number if len(digits) > 0x1000 else 0xD000 + number) <= 0xDFFF
        assert mending.repair(line) == (rb'"\ufffd"' if is_half else line)


@pytest.mark.parametrize("first", [r"\ud800", r"\uD8FF", r"\udaBc", r"\uDBFF"])
@pytest.mark.parametrize("second", [r"\udc00", r"\uDCFF", r"\udeAd", r"\uDFFF"])
def test_repair_leaves_every_pair_alone(first: str, second: str) -> None:
    line = f'"{first}{second}"'.encode()
    assert mending.repair(line) == line


def test_a_repaired_line_parses() -> None:
    line = b'{"jsonrpc":"2.0","id":1,"result":{"text":"half \\ud83d and \xff"}}'
    with pytest.raises(ParseError):
        jsonrpc.parse(line)
    answer = jsonrpc.parse(mending.repair(line))
    assert isinstance(answer, Response)
    assert isinstance(answer.result, Raw)
    assert json.loads(bytes(answer.result)) == {"text": "half \N{REPLACEMENT CHARACTER} and \ufffd"}


MENDED = {
    b'{"a":NaN}': b'{"a":null}',
    b'[NaN,-Infinity, Infinity ,"NaN"]': b'[null,null, null ,"NaN"]',
    b'{"NaN":"\\"Infinity","b":-Infinity}': b'{"NaN":"\\"Infinity","b":null}',
    b'"\\\\",NaN,"\\\\\\"NaN"': b'"\\\\",null,"\\\\\\"NaN"',
    b'"NaN': b'"NaN',
    b'NaN"\xff': b'null"\xef\xbf\xbd',
}


@pytest.mark.parametrize(("line", "expected"), MENDED.items())
def test_what_is_no_number_becomes_null(line: bytes, expected: bytes) -> None:
    assert mending.mended(line) == expected


@given(st.recursive(st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=8))
def test_what_python_writes_of_any_floats_is_mended(value: Any) -> None:
    def finite(part: Any) -> Any:
        if isinstance(part, list):
            return [finite(one) for one in part]
        return part if isinstance(part, str) or math.isfinite(part) else None

    assert json.loads(mending.mended(json.dumps(value).encode())) == finite(value)


_ERROR = b'{"code":1,"message":"m"}'


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (b'{"code":1,"message":"m"}', {"code": 1, "message": "m"}),
        (b'{"code":1,"message":"m","data":[1]}', {"code": 1, "message": "m", "data": [1]}),
        (b'{"message":"m","data":[1]}', {"code": -32000, "message": "m", "data": [1]}),
        (b'{"code":"E","message":"m"}', {"code": -32000, "message": "m"}),
        (b'{"code":-32602.0,"message":"m"}', {"code": -32602, "message": "m"}),
        (b'{"code":-3.2602e4,"message":"m","data":1}', {"code": -32602, "message": "m", "data": 1}),
        (b'{"code":-32602.5,"message":"m"}', {"code": -32000, "message": "m"}),
        (b'{"code":1e999,"message":"m"}', {"code": -32000, "message": "m"}),
        (b'{"code":null,"message":null}', {"code": -32000, "message": "null"}),
        (b'{"code":5}', {"code": 5, "message": '{"code":5}'}),
        (b'{"code":5,"message":{"a":1}}', {"code": 5, "message": '{"a":1}'}),
        (b'"boom"', {"code": -32000, "message": '"boom"'}),
        (b"[]", {"code": -32000, "message": "[]"}),
    ],
)
def test_an_error_has_a_code_and_a_message(told: bytes, error: Any) -> None:
    assert json.loads(bytes(mending.error_of(Raw(told)))) == error


@pytest.mark.parametrize(
    ("line", "request_id", "error"),
    [
        (b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"m"}}', None, _ERROR),
        (b'{"jsonrpc":"2.0","error":{"code":1,"message":"m"}}', None, _ERROR),
        (b'{"id":3,"error":{"code":1,"message":"m"}}', 3, _ERROR),
        (b'{"jsonrpc":"2.0","id":3,"error":"no"}', 3, b'{"code":-32000,"message":"\\"no\\""}'),
        (b'{"jsonrpc":"2.0","id":3}', 3, None),
        (b'{"id":"3","result":{},"error":{"code":1,"message":"m"}}', "3", _ERROR),
        (b'{"jsonrpc":"1.0","id":3.0,"result":{}}', 3, None),
        (b'{"jsonrpc":"2.0","id":3,"error":null}', 3, None),
        (b'{"jsonrpc":"2.0","id":3,"result":{"a":"b', 3, None),
        (b'{"result":{"a":,}, "jsonrpc":"2.0", "id" : 3 }', 3, None),
    ],
)
def test_what_cannot_be_read_still_names_its_call(
    line: bytes, request_id: RequestId | None, error: bytes | None
) -> None:
    found = mending.misanswer_of(line)
    assert found is not None
    assert found.id == request_id
    assert (None if found.error is UNSET else bytes(found.error)) == error


@pytest.mark.parametrize(
    "line",
    [
        b"hello",
        b'{"level":"info","id":3}',
        b'{"jsonrpc":"2.0","id":3,"method":7}',
        b'{"jsonrpc":"2.0","id":3,"method":"m","params":{',
        b'{"jsonrpc":"2.0","result":{}}',
        b'{"jsonrpc":"2.0","id":[3],"result":{}}',
        b'{"id":3,"result":',
        b'[{"jsonrpc":"2.0","id":3}]',
        b'"id":3,"jsonrpc"',
        b"",
    ],
)
def test_what_is_about_no_call_fails_none(line: bytes) -> None:
    assert mending.misanswer_of(line) is None


@given(st.binary() | st.lists(st.sampled_from([b"{", b"}", b'"id":1', b'"jsonrpc":', b",", b"1"])))
def test_any_line_is_about_a_call_or_not(line: bytes | list[bytes]) -> None:
    mending.misanswer_of(line if isinstance(line, bytes) else b"".join(line))


@given(
    st.lists(
        st.sampled_from(
            [b"\\ud83d", b"\\ude00", b"\\", b"\\\\", b"u", b"d83d", b"x" * 5, b"\xff", "é".encode()]
        ),
        max_size=60,
    ).map(b"".join),
    st.integers(13, 40),
)
def test_a_line_is_repaired_the_same_in_pieces_of_any_size(line: bytes, size: int) -> None:
    whole = mending.repair(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mending, "_PIECE", size)
        assert mending.repair(line) == whole


@pytest.mark.parametrize(
    "content",
    [rb"\n\ud83d", b"\xffabc", rb"\\", rb"\ud83d", rb"\udc00", b"NaN,", b'",NaN,"', b'"NaN,'],
)
def test_the_repair_of_a_long_line_takes_a_small_multiple_of_it(content: bytes) -> None:
    line = b'{"a":"' + content * (8 * MEBIBYTE // len(content)) + b'\xff"}'
    tracemalloc.start()
    try:
        mending.mended(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * len(line) + 16 * MEBIBYTE


def test_halves_take_a_small_multiple_of_the_time_of_a_plain_line() -> None:
    def mending_time(content: bytes) -> float:
        line = b'{"a":"' + content * (16 * MEBIBYTE // len(content)) + b'\xff"}'
        begun = time.thread_time()
        mending.mended(line)
        return time.thread_time() - begun

    plain = mending_time(b"a")
    assert mending_time(rb"\ud83d") < 20 * plain  # it was 60 times
    assert mending_time(rb"\ude00\n") < 20 * plain


_pieces = st.lists(
    st.sampled_from(
        [r"\ud83d", r"\ude00", r"\uDBFF", r"\\", r"\n", r"\u0041", "a", "u", "d83d", "é"]
    )
)


@given(_pieces)
@example([r"\\", r"\ud83d", r"\\", r"\ude00"])
def test_repair_does_to_escapes_what_a_lenient_reader_would_do(pieces: list[str]) -> None:
    text = '"' + "".join(pieces) + '"'
    lenient = re.sub("[\ud800-\udfff]", "\ufffd", json.loads(text))
    assert json.loads(mending.repair(text.encode())) == lenient


@given(st.binary() | _pieces.map(lambda pieces: "".join(pieces).encode()))
def test_repair_gives_utf8_and_has_nothing_left_to_do(line: bytes) -> None:
    repaired = mending.repair(line)
    repaired.decode("utf-8")
    assert mending.repair(repaired) == repaired


@given(st.data())
def test_repair_leaves_valid_json_alone(data: st.DataObject) -> None:
    line = data.draw(json_values.spelled(data.draw(json_values.values)))
    assert mending.repair(line) == line
