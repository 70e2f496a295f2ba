"""The mending of JSON that strict readers refuse: what servers write, and half a character.

Bytes in, bytes out; `misanswer_of` tells which call something belongs to that stays unreadable.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.errors import PROXY_ERROR, RequestId

_PIECE = 1024 * 1024

_fields = msgspec.json.Decoder(dict[str, Raw])


# --- half a character ----------------------------------------------------------------------------

# An escape of half a UTF-16 pair, whether the other half is beside it or not. JavaScript writes it
# alone where it has cut an emoji in two, and strict readers refuse that.
_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

_FIRST_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")

# Escaped backslashes, since what follows them is no escape; pairs; halves.
_ESCAPES = re.compile(
    rb"(?:\\\\)+"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)

# A pair cut in two has at most so many bytes before the cut.
_LONGEST_ESCAPE = 12


def has_halves(text: bytes) -> bool:
    """Whether there is an escape of half a UTF-16 pair, lone or not."""
    return _HALF.search(text) is not None


def _replace_lone(text: bytes, replace: Callable[[bytes], bytes]) -> bytes:
    """`text` with each lone half replaced by what `replace` makes of it, piece by piece."""

    def one(match: re.Match[bytes]) -> bytes:
        return replace(match[0]) if match["lone"] else match[0]

    if len(text) <= _PIECE:
        return _ESCAPES.sub(one, text)
    result, rest = bytearray(), b""
    for start in range(0, len(text), _PIECE):
        piece = rest + text[start : start + _PIECE]
        cut = _cut(piece) if start + _PIECE < len(text) else len(piece)
        result += _ESCAPES.sub(one, piece[:cut])
        rest = piece[cut:]
    return bytes(result)


def _cut(piece: bytes) -> int:
    """A place near the end of `piece` that lies in no escape and between no two halves."""
    first = piece.find(b"\\", len(piece) - _LONGEST_ESCAPE)
    if first < 0:
        return len(piece)
    cut = len(piece[:first].rstrip(b"\\"))
    if _FIRST_HALF.fullmatch(piece[max(0, cut - 6) : cut]):
        cut = len(piece[: cut - 6].rstrip(b"\\"))
    return cut


class Masked(NamedTuple):
    """JSON whose lone halves are written as `mark` and four digits, which strict readers take."""

    text: bytes
    mark: bytes

    def original(self, payload: Raw | UnsetType) -> Raw:
        """A part of the JSON as it came."""
        return Raw(bytes(payload or b"").replace(self.mark, b"\\u"))


def masked(text: bytes) -> Masked | None:
    """None where there is no half, or every mark that could be used is in the text."""
    if not has_halves(text):
        return None
    for number in range(0xFDD0, 0xFDF0):  # characters that mean nothing in any text
        if (mark := b"\\u%x" % number) not in text:
            return Masked(_replace_lone(text, partial(_under_mark, mark)), mark)
    return None


def _under_mark(mark: bytes, half: bytes) -> bytes:
    return mark + half[2:]


# --- repair ---------------------------------------------------------------------------------------


def repair(line: bytes) -> bytes:
    """`line` with invalid UTF-8 and lone halves replaced by U+FFFD."""
    text = _as_utf8(line)
    return _replace_lone(text, lambda half: rb"\ufffd") if has_halves(text) else text


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


_STRING_OR_NAN = re.compile(rb'"|NaN|-?Infinity')


def _without_nan(text: bytes) -> bytes:
    result, done, start = bytearray(), 0, 0
    while (match := _STRING_OR_NAN.search(text, start)) is not None:
        start = match.end()
        if match[0] == b'"':
            start = _end_of_string(text, start)
        else:
            result += text[done : match.start()] + b"null"
            done = start
    return bytes(result + text[done:])


def _end_of_string(text: bytes, start: int) -> int:
    """The place after the quote that ends a string whose first character is at `start`."""
    while (end := text.find(b'"', start)) >= 0:
        backslashes = end
        while text[backslashes - 1] == 0x5C:
            backslashes -= 1
        if (end - backslashes) % 2 == 0:
            return end + 1
        start = end + 1
    return len(text)


# --- what stays unreadable ------------------------------------------------------------------------


class Misanswer(NamedTuple):
    """What a server wrote that is no message but is about a call: `id`, None if it names none.

    `error` is a JSON-RPC error object, UNSET where the server told none.
    """

    id: RequestId | None
    error: Raw | UnsetType


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
    if error is not UNSET and bytes(memoryview(error)[:1]) != b"{":
        told = bytes(error)[:_ENDS].decode("utf-8", "replace")
        error = Raw(msgspec.json.encode({"code": PROXY_ERROR, "message": told}))
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
