"""The mending of JSON that strict readers refuse: what servers write, and half a character.

Bytes in, bytes out; `misanswer_of` tells which call something belongs to that stays unreadable.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import PROXY_ERROR, RequestId

_PIECE = 1024 * 1024

_elements = msgspec.json.Decoder(list[Raw])
_fields = msgspec.json.Decoder(dict[str, Raw])


# --- half a character ----------------------------------------------------------------------------

# An escape of half a UTF-16 pair, whether the other half is beside it or not. JavaScript writes it
# alone where it has cut an emoji in two, and strict readers refuse that.
_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

_FIRST = rb"[dD][89abAB][0-9a-fA-F]{2}"
_SECOND = rb"[dD][c-fC-F][0-9a-fA-F]{2}"
_FIRST_HALF = re.compile(rb"\\u" + _FIRST)

# Half a pair whose other half is not beside it, in a text without escaped backslashes: as a whole,
# and what stands before its digits. With fixed replacements `re` calls no Python for each of them.
_LONE = re.compile(rb"\\u%b(?!\\u%b)|(?<!\\u%b)\\u%b" % (_FIRST, _SECOND, _FIRST, _SECOND))
_LONE_HEAD = re.compile(
    rb"\\u(?=%b(?!\\u%b))|(?<!\\u%b)\\u(?=%b)" % (_FIRST, _SECOND, _FIRST, _SECOND)
)

# In place of an escaped backslash: no byte of UTF-8.
_BACKSLASH = b"\xff"

# A pair cut in two has at most so many bytes before the cut.
_LONGEST_ESCAPE = 12


def has_halves(text: bytes) -> bool:
    """Whether there is an escape of half a UTF-16 pair, lone or not."""
    return _HALF.search(text) is not None


def _replace_lone(text: bytes, pattern: re.Pattern[bytes], replacement: bytes) -> bytes:
    """`text`, which is UTF-8, with `pattern` in each lone half replaced, piece by piece."""
    has_backslashes = b"\\\\" in text
    if has_backslashes:
        text = text.replace(b"\\\\", _BACKSLASH)
    fixed = replacement.replace(b"\\", b"\\\\")
    result, rest = bytearray(), b""
    for start in range(0, len(text), _PIECE):
        piece = rest + text[start : start + _PIECE]
        cut = _cut(piece) if start + _PIECE < len(text) else len(piece)
        result += pattern.sub(fixed, piece[:cut])
        rest = piece[cut:]
    return bytes(result.replace(_BACKSLASH, b"\\\\") if has_backslashes else result)


def _cut(piece: bytes) -> int:
    """A place near the end of `piece` that lies in no escape and between no two halves."""
    first = piece.find(b"\\", len(piece) - _LONGEST_ESCAPE)
    if first < 0:
        return len(piece)
    return first - 6 if _FIRST_HALF.fullmatch(piece[max(0, first - 6) : first]) else first


class Masked(NamedTuple):
    """JSON whose lone halves are a `placeholder` and four digits, which strict readers take."""

    text: bytes
    placeholder: bytes

    def original(self, payload: Raw | UnsetType) -> Raw:
        """A part of the JSON as it came."""
        return Raw(bytes(payload or b"").replace(self.placeholder, b"\\u"))


def masked(text: bytes) -> Masked | None:
    """None where there is no half, or every placeholder that could be used is in the text."""
    if not has_halves(text):
        return None
    for number in range(0xFDD0, 0xFDF0):  # characters that mean nothing in any text
        if (placeholder := b"\\u%x" % number) not in text:
            return Masked(_replace_lone(text, _LONE_HEAD, placeholder), placeholder)
    return None


# --- repair ---------------------------------------------------------------------------------------


def repair(line: bytes) -> bytes:
    """`line` with invalid UTF-8 and lone halves replaced by U+FFFD."""
    text = _as_utf8(line)
    return _replace_lone(text, _LONE, rb"\ufffd") if has_halves(text) else text


def mended(line: bytes) -> bytes:
    """`line` as strict readers take it: repaired, and null for NaN and the infinities."""
    text = repair(line)
    return _without_nan(text) if b"NaN" in text or b"Infinity" in text else text


def _as_utf8(line: bytes) -> bytes:
    if line.isascii():
        return line
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = bytearray()
    for start in range(0, len(line), _PIECE):
        text += decoder.decode(line[start : start + _PIECE]).encode()
    text += decoder.decode(b"", final=True).encode()
    return bytes(text)


_NAN = re.compile(rb"NaN|-?Infinity")


def _without_nan(text: bytes) -> bytes:
    # Of the same length, with those quotes alone that begin or end a string.
    quoted = text.replace(b"\\\\", b"\xff\xff").replace(b'\\"', b"\xff\xff")
    result, done, at, quotes = bytearray(), 0, 0, 0
    while (match := _NAN.search(quoted, at)) is not None:
        start = match.start()
        quotes += quoted.count(b'"', at, start)
        at = quoted.find(b'"', start)
        if at < 0:
            at = len(text)
        if quotes % 2 == 0:  # outside of strings, and so is all up to the next quote
            if at - start > _PIECE:
                at = max(match.end(), quoted.rfind(b",", start, start + _PIECE))
            result += text[done:start] + _NAN.sub(b"null", text[start:at])
            done = at
    return bytes(result + text[done:])


# --- errors ---------------------------------------------------------------------------------------


class _Error(msgspec.Struct):
    code: int
    message: str


_error = msgspec.json.Decoder(_Error)


def error_of(told: Raw) -> Raw:
    """What a server tells as an error, as the object that it has to be (JSON-RPC 2.0 section 5.1).

    An error without a number as its code, or without a message, is none to clients, which wait on.
    An integer that is written as `-32602.0` is one to JSON and to few readers.
    """
    try:
        _error.decode(told)
        return told
    except msgspec.ValidationError:
        pass
    if bytes(memoryview(told)[:1]) != b"{":
        return Raw(msgspec.json.encode(_Error(PROXY_ERROR, _start_of(told))))
    fields = _fields.decode(told)
    for name, kind, value in (
        ("code", int, _integer_in(fields.get("code", b"null"), PROXY_ERROR)),
        ("message", str, _start_of(fields.get("message", told))),
    ):
        try:
            msgspec.json.decode(fields.get(name, b"null"), type=kind)
        except msgspec.ValidationError:
            fields[name] = Raw(msgspec.json.encode(value))
    return Raw(msgspec.json.encode(fields))


def _integer_in(payload: Raw | bytes, default: int) -> int:
    """The value of a number that has no fraction, as JSON Schema sees integers."""
    try:
        value = msgspec.json.decode(payload, type=float)
    except msgspec.ValidationError:
        return default
    return int(value) if value.is_integer() else default


def _start_of(payload: Raw) -> str:
    return bytes(payload)[:_ENDS].decode("utf-8", "replace")


# --- what stays unreadable ------------------------------------------------------------------------


class Misanswer(NamedTuple):
    """What a server wrote that is no message but is about a call: `id`, None if it names none.

    `error` is a JSON-RPC error object, UNSET where the server told none.
    """

    id: RequestId | None
    error: Raw | UnsetType


def elements_of(line: bytes) -> list[bytes]:
    """The elements of an array, as which a server sends several messages; none of anything else."""
    if not line.lstrip().startswith(b"["):
        return []
    try:
        return [bytes(element) for element in _elements.decode(line)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]{0,64})"|-?[0-9]{1,18}(?:\.0+)?(?![0-9.eE]))')
_ENDS = 4096  # where a cut or broken line is searched for its id


def misanswer_of(line: bytes) -> Misanswer | None:
    """What a line that `parse` refuses says of a call; None where it is about none.

    That is a line that looks like a response: an object with `jsonrpc`, a result or an error, and
    without a method. Whether there is such a call the caller has to see.
    """
    try:
        fields = _fields.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _misanswer_in_broken(line)
    is_answer = fields.keys() & {"jsonrpc", "result", "error"} and "method" not in fields
    if not is_answer:
        return None
    error = fields.get("error", UNSET)
    if error is not UNSET and bytes(memoryview(error)[:5]) == b"null":
        error = UNSET
    if error is not UNSET:
        error = error_of(error)
    match = _ID.fullmatch(b'"id":' + bytes(fields.get("id", b"null")))
    found = None if match is None else _id_of(match)
    return None if found is None and error is UNSET else Misanswer(found, error)


def _misanswer_in_broken(line: bytes) -> Misanswer | None:
    if not line.lstrip().startswith(b"{"):
        return None
    looked_at = line if len(line) <= 2 * _ENDS else line[:_ENDS] + b" " + line[-_ENDS:]
    if b'"jsonrpc"' not in looked_at or b'"method"' in looked_at:
        return None
    match = _ID.search(looked_at)
    return None if match is None else Misanswer(_id_of(match), UNSET)


def _id_of(match: re.Match[bytes]) -> RequestId:
    text = match[1]
    return text[1:-1].decode("utf-8", "replace") if text[:1] == b'"' else int(text.split(b".")[0])
