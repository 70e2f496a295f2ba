"""How requests have ended, as their answers say: read from bytes that are about to leave. Pure."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import RequestId

#: What stands for an error where a tool says that it has failed, as OpenTelemetry has it.
TOOL_ERROR = "tool_error"

#: What stands for an error where nobody was there any more to be answered.
CLIENT_LEFT = "client-left"

#: What stands for an error whose code is no number.
OTHER_ERROR = "other"

# Bytes of an answer beyond which it is not looked at: it counts as a good one.
_MAX_LOOK = 1024 * 1024

# A text within a text has a backslash before its quotes, so this is a member of some object.
_MAY_HAVE_FAILED = re.compile(rb'"error"\s*:|"isError"\s*:\s*true')


class Outcome(NamedTuple):
    """How one request has ended. `error_type` is empty for what went well; otherwise it is the code
    of the JSON-RPC error as a text, or that of a tool.
    """

    id: RequestId | None = None
    error_type: str = ""
    code: int | None = None


class _Error(msgspec.Struct):
    code: Any = None


class _Result(msgspec.Struct):
    is_error: bool | None = msgspec.field(default=None, name="isError")


class _Answer(msgspec.Struct):
    """What tells how a request has ended; every other member may be anything."""

    id: Raw | UnsetType = UNSET
    error: _Error | None = None
    result: _Result | None = None


_answers = msgspec.json.Decoder(_Answer | list[_Answer])

_GOOD = [Outcome()]


def outcomes_in(data: bytes, needs_id: bool = False) -> list[Outcome]:
    """The outcome that each response in `data` tells of, which is one response or an array of them.

    Unless `needs_id`, the id of one that has not failed is None. What cannot be read, or is very
    long, counts as one that went well.
    """
    if not needs_id and (len(data) > _MAX_LOOK or _MAY_HAVE_FAILED.search(data) is None):
        return _GOOD
    try:
        found = _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _GOOD
    return [_outcome_of(answer) for answer in (found if isinstance(found, list) else [found])]


def _outcome_of(answer: _Answer) -> Outcome:
    if answer.error is None:
        has_failed = answer.result is not None and bool(answer.result.is_error)
        return Outcome(_id_of(answer), TOOL_ERROR if has_failed else "")
    code = answer.error.code
    if isinstance(code, int):
        return Outcome(_id_of(answer), str(code), code)
    return Outcome(_id_of(answer), OTHER_ERROR)


def _id_of(answer: _Answer) -> RequestId | None:
    if answer.id is UNSET:
        return None
    found = msgspec.json.decode(answer.id)
    return found if isinstance(found, int | str) else None
