"""Questions of a server to a client that is waiting for its answer, as modern revisions ask them.

MCP 2026-07-28, "Multi Round-Trip Requests": the result of a call is `input_required` and has the
questions; the client calls again, with the answers and with the state that came with the questions.
Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import INVALID_PARAMS, InvalidParams, RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request

INPUT_REQUIRED = "input_required"

_RESPONSES = "inputResponses"
#: The field in which a server keeps what it wants to find again in the retry.
STATE = "requestState"

_ANSWERS_KEY, _STATE_KEY = _RESPONSES.encode(), STATE.encode()

_INVALID_STATE = "The question is no longer open; the tool may have acted; call it anew"

#: The method of a question, and its params.
Question = tuple[str, Raw | UnsetType]


class Retry(NamedTuple):
    """What a call brings of an earlier round: the answers by the keys of the questions, the state.

    Both are None in a call that is no retry.
    """

    responses: dict[str, Raw] | None
    state: str | None


_FIRST = Retry(None, None)


class InputRequired(NamedTuple):
    """The questions of a result by their keys, and the state that belongs to them.

    Without questions the call is to be repeated with the state. Without either nothing can be done:
    so reads what breaks the rules, lest it is taken for the result of the call.
    """

    requests: dict[str, Question]
    state: str | None


_anything = msgspec.json.Decoder()
_sorted = msgspec.json.Encoder(order="sorted")

_MALFORMED = InputRequired({}, None)


# --- a client's side ------------------------------------------------------------------------------


def input_required_of(result: Raw | UnsetType) -> InputRequired | None:
    """The questions of a result; None where it is of another type."""
    fields = jsonrpc.fields_of(result)
    if jsonrpc.text_of(fields.get("resultType", UNSET)) != INPUT_REQUIRED:
        return None
    given, encoded = jsonrpc.member(fields, "inputRequests"), jsonrpc.member(fields, STATE)
    state = jsonrpc.text_of(encoded)
    if (given and not jsonrpc.is_object(given)) or (encoded and state is None):
        return _MALFORMED
    asked: dict[str, Question] = {}
    for key, each in jsonrpc.fields_of(given).items():
        parts = jsonrpc.fields_of(each)
        method, params = (
            jsonrpc.text_of(parts.get("method", UNSET)),
            jsonrpc.member(parts, "params"),
        )
        if method is None or (params and not jsonrpc.is_object(params)):
            return _MALFORMED
        asked[key] = (method, params)
    return InputRequired(asked, state)


def with_retry(params: Raw | UnsetType, retry: Retry) -> Raw:
    """Params with the answers and the state of a retry in place of those that they have."""

    def add(fields: dict[str, Raw]) -> None:
        _drop_retry(fields)
        if retry.responses is not None:
            fields[_RESPONSES] = jsonrpc.as_payload(retry.responses)
        if retry.state is not None:
            fields[STATE] = jsonrpc.as_payload(retry.state)

    return jsonrpc.edited(params, add)


# --- a server's side ------------------------------------------------------------------------------


def input_required(questions: Mapping[str, Question], state: str) -> Raw:
    """The result that asks these questions."""
    asked = {
        # Some clients break where params are absent, which the schema allows.
        key: {"method": method, "params": Raw(b"{}") if params is UNSET else params}
        for key, (method, params) in questions.items()
    }
    return jsonrpc.as_payload({"resultType": INPUT_REQUIRED, "inputRequests": asked, STATE: state})


def retry_of(params: Raw | UnsetType) -> Retry:
    """The answers and the state that params have; null is none.

    Raises InvalidParams where the answers or one of them is no object, or the state no string.
    """
    if not _may_be_retry(params):
        return _FIRST
    fields = jsonrpc.fields_of(params)
    given, encoded = jsonrpc.member(fields, _RESPONSES), jsonrpc.member(fields, STATE)
    state = jsonrpc.text_of(encoded)
    if encoded is not UNSET and state is None:
        raise InvalidParams(f"params.{STATE} must be a string")
    if given is UNSET:
        return Retry(None, state)
    responses = jsonrpc.fields_of(given)
    if not jsonrpc.is_object(given) or not all(map(jsonrpc.is_object, responses.values())):
        raise InvalidParams(f"params.{_RESPONSES} must be an object of objects")
    return Retry(responses, state)


def without_retry(params: Raw | UnsetType) -> Raw | UnsetType:
    """Params as they were in the first round: without answers and state."""
    if not _may_be_retry(params):
        return params
    return jsonrpc.edited(params, _drop_retry)


def _may_be_retry(params: Raw | UnsetType) -> bool:
    """Whether params may have answers or a state; nearly all have none, and are not decoded."""
    encoded = bytes(params or b"")
    is_suspect = b"\\" in encoded or _ANSWERS_KEY in encoded or _STATE_KEY in encoded
    return is_suspect and jsonrpc.is_object(params)


def _drop_retry(fields: dict[str, Raw]) -> None:
    fields.pop(_RESPONSES, None)
    fields.pop(STATE, None)


def digest(request: Request) -> bytes:
    """What a retry has in common with the call that it repeats: method, target and arguments.

    How the arguments are spelled does not matter, nor what else the params have. Numbers that no
    machine has, and texts with half of a character, count as they are spelled.
    """
    fields = jsonrpc.fields_of(request.params)
    given = [jsonrpc.member(fields, name) for name in ("name", "uri", "arguments")]
    parts = [request.method, *(None if each is UNSET else _canonical(each) for each in given)]
    return hashlib.sha256(jsonrpc.as_payload(parts)).digest()


def _canonical(payload: Raw) -> Raw:
    try:
        return Raw(_sorted.encode(_anything.decode(payload)))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError):
        return payload


def invalid_state(request_id: RequestId) -> bytes:
    """The answer to a retry whose state is used, expired, foreign, or was never given."""
    data = {"reason": "invalid_request_state"}
    return jsonrpc.encode_error(INVALID_PARAMS, _INVALID_STATE, request_id, data)
