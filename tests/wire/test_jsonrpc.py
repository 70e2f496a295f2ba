"""What counts as a JSON-RPC message; what a proxy does not look at keeps its bytes."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from mcp_proxy.errors import (
    INVALID_REQUEST,
    PARSE_ERROR,
    EncodedBody,
    InvalidRequest,
    ParseError,
    RequestId,
)
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Message, Meta, Notification, Request, Response
from tests.support import json_values

PING = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'


def request_body(request_id: str = "1", params: str = "{}") -> bytes:
    return f'{{"jsonrpc":"2.0","id":{request_id},"method":"m","params":{params}}}'.encode()


def request(params: str, request_id: str = "1") -> Request:
    message = jsonrpc.parse_message(request_body(request_id, params))
    assert isinstance(message, Request)
    return message


def notification(params: str) -> Notification:
    return Notification("m", Raw(params.encode()))


# --- the kinds of message ------------------------------------------------------------------------


def test_an_object_with_method_and_id_is_a_request() -> None:
    assert jsonrpc.parse(PING) == Request(1, "ping")


def test_an_object_with_method_and_no_id_is_a_notification() -> None:
    assert jsonrpc.parse(b'{"jsonrpc":"2.0","method":"m"}') == Notification("m")


@pytest.mark.parametrize("result", ["{}", "null", "0", '"text"', "[1, 2]"])
def test_an_object_with_a_result_is_a_response(result: str) -> None:
    body = f'{{"jsonrpc":"2.0","id":"a","result":{result}}}'.encode()
    assert jsonrpc.parse(body) == Response("a", result=Raw(result.encode()))


def test_an_object_with_an_error_is_a_response() -> None:
    body = b'{"jsonrpc":"2.0","id":7,"error":{"code": -1,"message":"no"}}'
    assert jsonrpc.parse(body) == Response(7, error=Raw(b'{"code": -1,"message":"no"}'))


def test_fields_that_json_rpc_does_not_know_are_left_alone() -> None:
    assert jsonrpc.parse(b'{"x":[1],"jsonrpc":"2.0","method":"m","y":null}') == Notification("m")


@pytest.mark.parametrize("space", [b" ", b"\t", b"\r\n", b"\n\n  "])
def test_white_space_around_a_message_means_nothing(space: bytes) -> None:
    assert jsonrpc.parse(space + PING + space) == Request(1, "ping")


def test_an_array_is_a_batch_in_its_order() -> None:
    body = b' [%s, {"jsonrpc":"2.0","method":"n"}, {"jsonrpc":"2.0","id":"r","result":1} ]' % PING
    assert jsonrpc.parse(body) == [
        Request(1, "ping"),
        Notification("n"),
        Response("r", result=Raw(b"1")),
    ]


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_id",
    [0, 1, -1, 2**53 + 1, 2**60, 2**63, 2**64 + 1, -(2**70), 10**400, "", "0", "1", "é"],
)
def test_ids_come_back_exactly_as_they_were(request_id: RequestId) -> None:
    message = jsonrpc.parse_message(request_body(json.dumps(request_id)))
    assert isinstance(message, Request)
    assert (type(message.id), message.id) == (type(request_id), request_id)
    assert json.loads(jsonrpc.encode(message))["id"] == request_id


def test_the_number_1_and_the_text_1_are_different_ids() -> None:
    number, text = request("{}", "1"), request("{}", '"1"')
    assert number.id != text.id
    assert number != text


@pytest.mark.parametrize(
    "request_id",
    ["null", "1.0", "1.5", "1e0", "1e400", "9007199254740993.0", "true", "false", "[]", "{}"],
)
@pytest.mark.parametrize("rest", ['"method":"m"', '"result":{}', '"error":{}'])
def test_ids_that_are_neither_text_nor_integer_are_refused(request_id: str, rest: str) -> None:
    body = f'{{"jsonrpc":"2.0","id":{request_id},{rest}}}'.encode()
    with pytest.raises(InvalidRequest):
        jsonrpc.parse(body)


def test_an_id_of_more_digits_than_python_converts_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        jsonrpc.parse(request_body("9" * 5000))


# --- what is taken all the same ------------------------------------------------------------------


@pytest.mark.parametrize("body", [PING, b"[" + PING + b"]"])
def test_a_byte_order_mark_is_skipped(body: bytes) -> None:
    assert jsonrpc.parse(b"\xef\xbb\xbf" + body) == jsonrpc.parse(body)


def test_a_compressed_body_is_told_so() -> None:
    with pytest.raises(EncodedBody) as caught:
        jsonrpc.parse(gzip.compress(PING))
    assert caught.value.status == 415


NULLS = {
    '"id":1,"method":"m","params":null': '"id":1,"method":"m"',
    '"method":"m","params":null': '"method":"m"',
    '"id":1,"method":"m","result":null,"error":null': '"id":1,"method":"m"',
    '"id":1,"method":"m","params":{"_meta":null}': '"id":1,"method":"m","params":{}',
    '"id":1,"method":"m","params":{"a": 1.0,"_meta":null,"b":[ ]}': (
        '"id":1,"method":"m","params":{"a":1.0,"b":[ ]}'
    ),
    '"method":"m","params":{"_meta":{"progressToken":null,"x":null}}': (
        '"method":"m","params":{"_meta":{"x":null}}'
    ),
    '"id":1,"result":{"a":null},"error":null': '"id":1,"result":{"a":null}',
    '"id":1,"result":null,"error":{}': '"id":1,"error":{}',
    '"id":1,"result":null,"error":null': '"id":1,"result":null',
    '"id":1,"method":null,"params":null,"result":{},"error":null': '"id":1,"result":{}',
    '"id":1,"result":{"_meta":null}': '"id":1,"result":{"_meta":null}',
    '"id":1,"method":"m","params":{"arguments":{"_meta":null}}': (
        '"id":1,"method":"m","params":{"arguments":{"_meta":null}}'
    ),
    '"id":1,"method":"m","params":[{"_meta":null}]': (
        '"id":1,"method":"m","params":[{"_meta":null}]'
    ),
}


@pytest.mark.parametrize(("given", "kept"), NULLS.items())
def test_nulls_that_mean_nothing_are_taken_out(given: str, kept: str) -> None:
    body = f'{{"jsonrpc":"2.0",{given}}}'.encode()
    expected = f'{{"jsonrpc":"2.0",{kept}}}'.encode()
    assert jsonrpc.encode(jsonrpc.parse_message(body)) == expected
    (one,) = jsonrpc.parse(b"[" + body + b"]")  # type: ignore[misc]
    assert jsonrpc.encode(one) == expected


def test_nulls_that_mean_something_stay() -> None:
    with pytest.raises(InvalidRequest):
        jsonrpc.parse(b'{"jsonrpc":"2.0","id":null,"method":"m"}')
    with pytest.raises(InvalidRequest):
        jsonrpc.parse(b'{"jsonrpc":"2.0","id":1,"error":null}')


HALVES = [
    r'{"a":"\ud83d"}',
    r'{"a":"\uDE00 \ud83d\ude00","n":1.0e2,"_meta":{"progressToken":7,"x":"\uDBFF"}}',
    r'{"\udead":["\\\ud800","\\ud800","\ufdd0d83d"]}',
]


@pytest.mark.parametrize("params", HALVES)
@pytest.mark.parametrize("form", ['"id":1,"method":"m","params":{}', '"id":1,"result":{}'])
def test_half_a_character_in_an_escape_passes_as_it_came(params: str, form: str) -> None:
    body = f'{{"jsonrpc":"2.0",{form.replace("{}", params)}}}'.encode()
    message = jsonrpc.parse_message(body)
    assert jsonrpc.encode(message) == body
    (one,) = jsonrpc.parse(b"[" + body + b"]")  # type: ignore[misc]
    assert one == message
    with pytest.raises(ParseError):
        jsonrpc.parse(body, keeps_halves=False)


def test_fields_beside_half_a_character_are_found_and_replaced() -> None:
    asked = request(HALVES[1])
    assert asked.meta.progress_token == 7
    replaced = bytes(jsonrpc.replace_field(asked.params, ("_meta", "progressToken"), "new"))
    assert replaced == HALVES[1].replace("7", '"new"').encode()
    cancel = notification(r'{"reason":"\ud83d","requestId":3}')
    assert jsonrpc.cancelled_id_of(cancel) == 3


@pytest.mark.parametrize("field", [r'"id":"\ud83d","method":"m"', r'"id":1,"method":"\ude00"'])
def test_names_must_be_whole(field: str) -> None:
    with pytest.raises(ParseError):
        jsonrpc.parse(f'{{"jsonrpc":"2.0",{field}}}'.encode())


def test_half_a_character_does_not_excuse_what_else_is_wrong() -> None:
    for params in (r'{"a":"\ud83d",}', r'{"a":"\ud83d\q"}', r'{"a":"\ud83d"'):
        with pytest.raises(ParseError):
            jsonrpc.parse(request_body("1", params))


def test_a_body_with_every_mark_is_refused() -> None:
    marks = "".join(rf"\u{number:x}" for number in range(0xFDD0, 0xFDF0))
    with pytest.raises(ParseError):
        jsonrpc.parse(request_body("1", rf'{{"a":"\ud83d{marks}"}}'))


# --- what is refused -----------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "white space": b" \r\n\t",
    "an object cut off": b'{"jsonrpc":"2.0","method":"m"',
    "an array cut off": b"[" + PING,
    "a trailing comma": b'{"jsonrpc":"2.0","method":"m",}',
    "a trailing comma in a batch": b"[" + PING + b",]",
    "two objects": PING + PING,
    "two objects on two lines": PING + b"\n" + PING,
    "an object and rubbish": PING + b"x",
    "a zero byte at the end": PING + b"\0",
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf" + PING,
    "a vertical tab before a batch": b"\x0b[" + PING + b"]",
    "UTF-16": PING.decode().encode("utf-16"),
    "invalid UTF-8": b'{"jsonrpc":"2.0","method":"\xff"}',
    "invalid UTF-8 where nobody looks": b'{"jsonrpc":"2.0","method":"m","params":{"a":"\xc3("}}',
    "a surrogate in UTF-8": b'{"jsonrpc":"2.0","method":"m","x":"\xed\xa0\x80"}',
    "an overlong form in UTF-8": b'{"jsonrpc":"2.0","method":"m","x":"\xc0\xaf"}',
    "single quotes": b"{'jsonrpc':'2.0','method':'m'}",
    "a comment": b"/* */" + PING,
    "a name without quotes": b'{jsonrpc:"2.0","method":"m"}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_a_parse_error(body: bytes) -> None:
    with pytest.raises(ParseError) as caught:
        jsonrpc.parse(body)
    assert (caught.value.status, caught.value.code) == (400, PARSE_ERROR)


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_a_body_with_nothing_in_it_is_said_to_be_empty(body: bytes) -> None:
    with pytest.raises(ParseError, match="The body is not JSON: it is empty"):
        jsonrpc.parse(body)


@pytest.mark.parametrize(
    "value",
    [
        *("01", "1.", ".5", "+1", "-", "1e", "NaN", "Infinity", "nul", "truex", "undefined"),
        *('"a\nb"', '"a\tb"', r'"\q"', r'"\u12G4"', "[1,]", '{"b" 1}', "{'b':1}"),
    ],
)
def test_payloads_that_are_not_json_are_parse_errors_too(value: str) -> None:
    with pytest.raises(ParseError):
        jsonrpc.parse(request_body(params=f'{{"a":{value}}}'))


MEBIBYTE = 1024 * 1024


@pytest.mark.parametrize("place", [MEBIBYTE - 3, MEBIBYTE - 1, MEBIBYTE, 2 * MEBIBYTE - 2])
def test_characters_of_a_large_body_may_lie_anywhere(place: int) -> None:
    before = len(request_body(params='{"a":""}')) - 3
    payload = f'{{"a":"{"x" * (place - before)}😀é"}}'
    assert request(payload).params == Raw(payload.encode())


@pytest.mark.parametrize("wrong", [b"\xff", b"\xf0\x9f\x98x", b"\xed\xa0\xbd", b"\xc3"])
@pytest.mark.parametrize("place", [MEBIBYTE - 3, MEBIBYTE - 1, MEBIBYTE, 2 * MEBIBYTE - 2])
def test_a_large_body_that_is_not_utf8_is_a_parse_error(place: int, wrong: bytes) -> None:
    start = b'{"jsonrpc":"2.0","method":"m","params":{"a":"'
    with pytest.raises(ParseError):
        jsonrpc.parse(start.ljust(place, b"x") + wrong + b'"}}')
    with pytest.raises(ParseError):
        jsonrpc.parse(start.ljust(place, b"x") + wrong)


@pytest.mark.parametrize("opening", ["[", '{"a":'], ids=["arrays", "objects"])
@pytest.mark.parametrize("where", ["alone", "in params", "in a batch"])
def test_a_hundred_thousand_brackets_are_a_parse_error(opening: str, where: str) -> None:
    deep = opening * 100_000
    bodies = {
        "alone": deep.encode(),
        "in params": request_body(params=deep),
        "in a batch": f"[{deep}".encode(),
    }
    with pytest.raises(ParseError):
        jsonrpc.parse(bodies[where])


NO_MESSAGE = {
    "null": b"null",
    "a number": b"1",
    "a text": b'"ping"',
    "an empty object": b"{}",
    "no version": b'{"id":1,"method":"m"}',
    "another version": b'{"jsonrpc":"1.0","id":1,"method":"m"}',
    "a version that is a number": b'{"jsonrpc":2.0,"id":1,"method":"m"}',
    "a method that is a number": b'{"jsonrpc":"2.0","id":1,"method":1}',
    "a method that is null": b'{"jsonrpc":"2.0","id":1,"method":null}',
    "an id alone": b'{"jsonrpc":"2.0","id":1}',
    "a method and a result": b'{"jsonrpc":"2.0","id":1,"method":"m","result":{}}',
    "a method and an error": b'{"jsonrpc":"2.0","id":1,"method":"m","error":{}}',
    "a result and an error": b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}',
    "a result without an id": b'{"jsonrpc":"2.0","result":{}}',
    "an error without an id": b'{"jsonrpc":"2.0","error":{"code":1,"message":"m"}}',
    "an empty batch": b"[ ]",
    "a batch of a number": b"[1]",
    "a batch in a batch": b"[[" + PING + b"]]",
    "a batch with one bad element": b"[" + PING + b',{"jsonrpc":"2.0"}]',
}


@pytest.mark.parametrize("body", NO_MESSAGE.values(), ids=NO_MESSAGE.keys())
def test_json_that_is_no_message_is_an_invalid_request(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        jsonrpc.parse(body)
    assert (caught.value.status, caught.value.code) == (400, INVALID_REQUEST)


@pytest.mark.parametrize("params", ["0", "1.5", "true", '"x"'])
@pytest.mark.parametrize("head", ['"id":1,', ""], ids=["request", "notification"])
def test_params_are_an_object_or_an_array(params: str, head: str) -> None:
    with pytest.raises(InvalidRequest, match="params"):
        jsonrpc.parse(f'{{"jsonrpc":"2.0",{head}"method":"m","params":{params}}}'.encode())


def test_a_batch_holds_so_many_messages_and_no_more() -> None:
    full = jsonrpc.parse(b"[" + b",".join([PING] * jsonrpc.MAX_BATCH) + b"]")
    assert full == [Request(1, "ping")] * jsonrpc.MAX_BATCH
    with pytest.raises(InvalidRequest, match=str(jsonrpc.MAX_BATCH)):
        jsonrpc.parse(b"[" + b",".join([PING] * (jsonrpc.MAX_BATCH + 1)) + b"]")


def test_a_batch_is_refused_where_one_message_is_expected() -> None:
    assert jsonrpc.parse_message(PING) == Request(1, "ping")
    with pytest.raises(InvalidRequest, match="batch"):
        jsonrpc.parse_message(b"[" + PING + b"]")


# --- payloads keep their bytes -------------------------------------------------------------------

SPELLINGS = [
    "{}",
    '{ "a" : 1 }',
    '{"a":1.0}',
    '{"a":1e2,"b":1E+2,"c":-0,"d":-0.0}',
    '{"a":123456789012345678901234567890.123456789012345678901234567890}',
    '{"a":1e999999}',
    '{"a":"\\u00e9 é \\/ \\ud83d\\ude00 😀"}',
    '{"a":1,"a":2}',
    '{"z":1,"a":2}',
    '[1,\t2 , "three" ]',
]


@pytest.mark.parametrize("payload", SPELLINGS)
def test_params_keep_the_bytes_they_came_with(payload: str) -> None:
    assert request(payload).params == Raw(payload.encode())
    assert jsonrpc.encode(request(payload)) == request_body("1", payload)


@pytest.mark.parametrize("field", ["result", "error"])
@pytest.mark.parametrize("payload", SPELLINGS)
def test_results_and_errors_keep_the_bytes_they_came_with(field: str, payload: str) -> None:
    body = f'{{"jsonrpc":"2.0","id":1,"{field}":{payload}}}'.encode()
    assert jsonrpc.encode(jsonrpc.parse_message(body)) == body


def test_elements_of_a_batch_keep_the_bytes_they_came_with() -> None:
    (message,) = jsonrpc.parse(b"[" + request_body("1", '{ "a" : 1.0 }') + b"]")  # type: ignore[misc]
    assert message == Request(1, "m", Raw(b'{ "a" : 1.0 }'))


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_a_message_printed_over_several_lines_is_encoded_as_one(line_break: str) -> None:
    body = json.dumps(json.loads(request_body(params='{"a": ["x\\ny"]}')), indent=2)
    message = jsonrpc.parse_message(body.replace("\n", line_break).encode())
    encoded = jsonrpc.encode(message)
    assert not re.search(rb"[\r\n]", encoded)
    assert json.loads(encoded) == json.loads(body)


# --- the few fields that routing needs -----------------------------------------------------------


def test_meta_gives_the_progress_token_and_the_protocol_version() -> None:
    params = (
        '{"_meta":{"progressToken":0,"io.modelcontextprotocol/protocolVersion":"2026-07-28","x":1}}'
    )
    assert request(params).meta == Meta(0, "2026-07-28")


@pytest.mark.parametrize("token", [0, 2**60, "", "1"])
def test_progress_tokens_are_as_exact_as_ids(token: RequestId) -> None:
    params = json.dumps({"_meta": {"progressToken": token}, "progressToken": token})
    assert request(params).meta.progress_token == token
    found = jsonrpc.progress_token_of(notification(params))
    assert (type(found), found) == (type(token), token)


@pytest.mark.parametrize("params", ["{}", '{"_meta":{}}', '{"progressToken":1}', "[]", "[{}]"])
def test_a_request_may_go_without_meta(params: str) -> None:
    assert request(params).meta == Meta()
    assert Request(1, "m").meta == Meta()


@pytest.mark.parametrize(
    "meta",
    [
        "[]",
        '"x"',
        '{"progressToken":1.5}',
        '{"progressToken":{}}',
        '{"io.modelcontextprotocol/protocolVersion":20260728}',
    ],
)
def test_meta_of_the_wrong_type_is_an_invalid_request(meta: str) -> None:
    with pytest.raises(InvalidRequest, match="_meta"):
        _ = request(f'{{"_meta":{meta}}}').meta


@pytest.mark.parametrize("params", ["{}", "[]", '{"other":1}'])
def test_notifications_that_name_no_token_and_no_request_give_none(params: str) -> None:
    assert jsonrpc.progress_token_of(notification(params)) is None
    assert jsonrpc.cancelled_id_of(notification(params)) is None
    assert jsonrpc.protocol_version_of(Raw(params.encode())) is None


def test_notifications_without_params_give_none() -> None:
    assert jsonrpc.progress_token_of(Notification("m")) is None
    assert jsonrpc.cancelled_id_of(Notification("m")) is None
    assert jsonrpc.protocol_version_of(UNSET) is None


@pytest.mark.parametrize("value", ["null", "1.5", "true", "[]", "{}", r'"\ud800"'])
def test_names_of_the_wrong_type_name_nothing(value: str) -> None:
    params = f'{{"progressToken":{value},"requestId":{value},"protocolVersion":{value}}}'
    assert jsonrpc.progress_token_of(notification(params)) is None
    assert jsonrpc.cancelled_id_of(notification(params)) is None
    assert jsonrpc.protocol_version_of(Raw(params.encode())) is None


@pytest.mark.parametrize("request_id", [0, 1, "1", "", 2**60])
def test_a_cancellation_names_its_request_exactly(request_id: RequestId) -> None:
    params = json.dumps({"requestId": request_id, "reason": "enough"})
    found = jsonrpc.cancelled_id_of(notification(params))
    assert (type(found), found) == (type(request_id), request_id)


def test_the_protocol_version_is_read_from_params_and_from_results() -> None:
    payload = Raw(b'{"protocolVersion":"2025-06-18","capabilities":{}}')
    assert jsonrpc.protocol_version_of(payload) == "2025-06-18"


def _deepest_that_parses() -> Notification:
    """A notification nested just as deeply as the parser accepts here."""

    def parsed(depth: int) -> Notification | None:
        params = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        try:
            message = jsonrpc.parse(b'{"jsonrpc":"2.0","method":"m","params":' + params + b"}")
        except ParseError:
            return None
        assert isinstance(message, Notification)
        return message

    low, high = 1, 1_000_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parsed(middle) else (low, middle)
    deepest = parsed(low)
    assert deepest is not None
    return deepest


def _further_down(frames: int, function: Callable[[], object]) -> object:
    return _further_down(frames - 1, function) if frames else function()


def test_fields_of_a_message_at_the_limit_of_nesting_can_be_asked_from_anywhere() -> None:
    message = _deepest_that_parses()
    ask = [
        lambda: jsonrpc.progress_token_of(message),
        lambda: jsonrpc.cancelled_id_of(message),
        lambda: jsonrpc.protocol_version_of(message.params),
    ]
    for function in ask:
        assert _further_down(50, function) is None


def test_a_field_at_the_limit_of_nesting_is_replaced_or_refused_in_our_words() -> None:
    message = _deepest_that_parses()
    with contextlib.suppress(ParseError):
        _further_down(50, lambda: jsonrpc.replace_field(message.params, ["b"], 1))


# --- writing -------------------------------------------------------------------------------------


def test_a_message_is_encoded_with_the_fields_it_has_and_no_others() -> None:
    assert jsonrpc.encode(Request("a", "m")) == b'{"jsonrpc":"2.0","id":"a","method":"m"}'
    assert jsonrpc.encode(Notification("n")) == b'{"jsonrpc":"2.0","method":"n"}'
    assert jsonrpc.encode(Response(1, result=Raw(b"null"))) == (
        b'{"jsonrpc":"2.0","id":1,"result":null}'
    )
    assert jsonrpc.encode(Response(1, error=Raw(b"{ }"))) == b'{"jsonrpc":"2.0","id":1,"error":{ }}'


@pytest.mark.parametrize("other", [0, "", "x", 2**60])
def test_a_call_and_its_answer_can_be_sent_under_another_id(other: RequestId) -> None:
    for message in (Request(1, "m"), Response(1, result=Raw(b"{}"))):
        assert json.loads(jsonrpc.encode(message, other))["id"] == other
    assert "id" not in json.loads(jsonrpc.encode(Notification("m"), other))


def test_messages_that_are_encoded_make_an_array() -> None:
    assert jsonrpc.encode_batch([]) == b"[]"
    assert jsonrpc.encode_batch([b'{"a": 1}']) == b'[{"a": 1}]'
    assert jsonrpc.encode_batch([b"1", b"2"]) == b"[1,2]"


@pytest.mark.parametrize("request_id", [0, "", "1", 2**60])
def test_an_error_carries_the_id_of_its_request(request_id: RequestId) -> None:
    assert json.loads(jsonrpc.encode_error(-32000, 'no "luck"\n', request_id)) == {
        "jsonrpc": "2.0",
        "id": request_id,
        "error": {"code": -32000, "message": 'no "luck"\n'},
    }


def test_an_error_that_answers_no_request_has_no_id_at_all() -> None:
    assert "id" not in json.loads(jsonrpc.encode_error(-32600, "no", None))


def test_an_error_object_has_code_and_message() -> None:
    assert jsonrpc.error_payload(-32000, "é") == Raw('{"code":-32000,"message":"é"}'.encode())


@pytest.mark.parametrize("data", [{"a": [1]}, [], "", 0, False, Raw(b'{"b": 1.0}')])
def test_an_error_says_more_where_there_is_more(data: Any) -> None:
    found = json.loads(jsonrpc.encode_error(-32021, "no", 1, data))["error"]
    assert found["data"] == (json.loads(bytes(data)) if isinstance(data, Raw) else data)


def test_an_error_without_data_has_no_such_field() -> None:
    assert "data" not in json.loads(jsonrpc.encode_error(-32021, "no", 1, None))["error"]


def test_a_value_becomes_a_payload() -> None:
    assert jsonrpc.as_payload({"a": [1, None]}) == Raw(b'{"a":[1,null]}')


def test_a_replaced_field_leaves_the_bytes_of_all_others() -> None:
    payload = Raw(b'{ "x" : [1.0, 2e1 ] ,\n"requestId":7, "y":"\\u00e9" }')
    replaced = jsonrpc.replace_field(payload, ["requestId"], "new")
    assert bytes(replaced) == b'{"x":[1.0, 2e1 ],"requestId":"new","y":"\\u00e9"}'


def test_a_nested_field_is_replaced_where_it_is() -> None:
    payload = Raw(b'{"name":"t","_meta":{"a":1.0,"progressToken":"p"},"arguments":{"b":[ ]}}')
    replaced = jsonrpc.replace_field(payload, ("_meta", "progressToken"), 2**60)
    assert bytes(replaced) == (
        b'{"name":"t","_meta":{"a":1.0,"progressToken":1152921504606846976},"arguments":{"b":[ ]}}'
    )


def test_a_field_is_replaced_in_params_that_are_left_out() -> None:
    assert bytes(jsonrpc.replace_field(UNSET, ["a"], 0)) == b'{"a":0}'


def test_what_stands_on_one_line_already_is_the_same_object() -> None:
    assert jsonrpc.one_line(PING) is PING


# --- properties ----------------------------------------------------------------------------------


def _parse_or_none(body: bytes) -> list[Message] | None:
    """What `parse` returns, None where it raises one of the two errors that it may raise."""
    try:
        parsed = jsonrpc.parse(body)
    except (ParseError, InvalidRequest, EncodedBody):
        return None
    return parsed if isinstance(parsed, list) else [parsed]


_fragments = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b"1", b"null", b"1.5", b'"', b"\\", b"-", b"\xff"),
        *(b'"jsonrpc"', b'"2.0"', b'"id"', b'"method"', b'"params"', b'"result"', b'"error"'),
    ]
)


@given(st.binary() | st.lists(_fragments).map(b"".join))
def test_any_bytes_are_messages_or_one_of_the_two_errors(body: bytes) -> None:
    _parse_or_none(body)


@given(st.data())
def test_any_json_is_messages_or_one_of_the_two_errors(data: st.DataObject) -> None:
    value = data.draw(json_values.values)
    _parse_or_none(data.draw(json_values.spelled(value)))


_envelopes = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | json_values.scalars,
        "id": json_values.ids | json_values.scalars,
        "method": st.text() | json_values.scalars,
        "params": json_values.objects | json_values.values,
        "result": json_values.values,
        "error": json_values.values,
        "other": json_values.values,
    },
)


@given(st.data())
def test_anything_like_a_message_is_one_or_one_of_the_two_errors(data: st.DataObject) -> None:
    value = data.draw(_envelopes | st.lists(_envelopes, max_size=3))
    messages = _parse_or_none(data.draw(json_values.spelled(value)))
    if messages is not None:
        envelopes = value if isinstance(value, list) else [value]
        assert [json.loads(jsonrpc.encode(message)) for message in messages] == [
            _known_fields(envelope) for envelope in envelopes
        ]


def _known_fields(envelope: dict[str, Any]) -> dict[str, Any]:
    """What is left of a message: a null where it means nothing counts as absent."""
    kept = {name: value for name, value in envelope.items() if name != "other"}
    for name in ("method", "params", "error"):
        if kept.get(name, "") is None:
            del kept[name]
    if ("method" in kept or "error" in kept) and kept.get("result", "") is None:
        del kept["result"]
    if "method" not in kept:
        kept.pop("params", None)
    return kept


_calls = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": st.text()},
    optional={"id": json_values.ids, "params": json_values.objects | st.lists(json_values.values)},
)
_answers = st.sampled_from(["result", "error"]).flatmap(
    lambda field: st.fixed_dictionaries(
        {
            "jsonrpc": st.just("2.0"),
            "id": json_values.ids,
            field: json_values.values.filter(lambda value: field == "result" or value is not None),
        }
    )
)


@given(st.data())
def test_a_message_says_the_same_after_parsing_and_encoding(data: st.DataObject) -> None:
    value = data.draw(_calls | _answers)
    message = jsonrpc.parse_message(data.draw(json_values.spelled(value)))
    encoded = jsonrpc.encode(message)
    assert json.loads(encoded) == value
    assert jsonrpc.encode(jsonrpc.parse_message(encoded)) == encoded
    assert not re.search(rb"[\r\n]", encoded)


@given(st.data())
def test_one_line_never_changes_what_json_says(data: st.DataObject) -> None:
    value = data.draw(json_values.values)
    line = jsonrpc.one_line(data.draw(json_values.spelled(value)))
    assert json.loads(line) == value
    assert not re.search(rb"[\r\n]", line)


@given(json_values.objects, json_values.ids, json_values.ids)
def test_replacing_a_field_changes_that_field_only(
    params: dict[str, Any], old: RequestId, new: RequestId
) -> None:
    def with_token(token: RequestId) -> dict[str, Any]:
        return {**params, "_meta": {"progressToken": token, "more": params}}

    payload = Raw(json.dumps(with_token(old)).encode())
    replaced = jsonrpc.replace_field(payload, ("_meta", "progressToken"), new)
    assert json.loads(bytes(replaced)) == with_token(new)


# --- one level of a payload ----------------------------------------------------------------------


def test_the_fields_of_an_object_keep_their_bytes() -> None:
    fields = jsonrpc.fields_of(Raw(b'{"a": 1.0,"b":{"c" : [ ]},"d":"\\u00e9"}'))
    assert {name: bytes(value) for name, value in fields.items()} == {
        "a": b"1.0",
        "b": b'{"c" : [ ]}',
        "d": b'"\\u00e9"',
    }


def test_half_of_a_character_keeps_its_bytes_too() -> None:
    fields = jsonrpc.fields_of(Raw(b'{"a":"\\uD83d","b":1}'))
    assert [bytes(value) for value in fields.values()] == [b'"\\uD83d"', b"1"]


@pytest.mark.parametrize("payload", [UNSET, Raw(b"[1]"), Raw(b'"{}"'), Raw(b"null"), Raw(b"1")])
def test_nothing_but_an_object_has_fields(payload: Any) -> None:
    assert not jsonrpc.is_object(payload)
    assert jsonrpc.fields_of(payload) == {}
    assert jsonrpc.edited(payload, lambda fields: fields.update(a=Raw(b"1.0"))) == Raw(b'{"a":1.0}')


def test_a_change_of_fields_leaves_the_bytes_of_the_others() -> None:
    payload = Raw(b'{ "x" : [1.0, 2e1 ] ,"y":"\\u00e9\\ud83d","z":1}')
    edited = jsonrpc.edited(payload, lambda fields: fields.pop("z"))
    assert bytes(edited) == b'{"x":[1.0, 2e1 ],"y":"\\u00e9\\ud83d"}'


def test_a_payload_that_is_not_json_cannot_be_read() -> None:
    with pytest.raises(ParseError):
        jsonrpc.fields_of(Raw(b"{1}"))
    with pytest.raises(ParseError):
        jsonrpc.edited(Raw(b"{1}"), dict.clear)


@pytest.mark.parametrize(
    ("payload", "text", "number"),
    [
        (UNSET, None, None),
        (Raw(b'"a"'), "a", "a"),
        (Raw(b'""'), "", ""),
        (Raw(b'"\\ud83d"'), None, None),
        (Raw(b"5"), None, 5),
        (Raw(b"5.5"), None, None),
        (Raw(b"true"), None, None),
        (Raw(b"null"), None, None),
        (Raw(b'{"a":1}'), None, None),
    ],
)
def test_a_payload_may_be_a_text_or_an_id(payload: Any, text: Any, number: Any) -> None:
    assert jsonrpc.text_of(payload) == text
    assert jsonrpc.id_of(payload) == number


def test_a_member_that_is_null_is_none() -> None:
    fields = jsonrpc.fields_of(Raw(b'{"a":null,"b":"null","c":1}'))
    found = [jsonrpc.member(fields, name) for name in "abcd"]
    assert found == [UNSET, Raw(b'"null"'), Raw(b"1"), UNSET]
