"""Bytes and JSON that are almost right, made from right ones and a seed."""

from __future__ import annotations

import json
import random
from typing import Any

#: What programs trip over.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**40, 1e308),
    *(
        0.5,
        -0.0,
        float("nan"),
        float("inf"),
        "",
        " ",
        "0",
        "1",
        "a",
        "\0",
        "\n",
        "\r\n",
        "é",
        "\u2028",
    ),
    *("\ud800", "\U0001f600", "x" * 2000, "../..", "%00", "2.0", "1.0", "null", [], {}, [[]]),
    *([None], {"": None}, {"a": {"b": []}}, [{}] * 50, {str(n): n for n in range(50)}),
    *("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28", "1999-01-01"),
    *("ping", "initialize", "notifications/cancelled", "notifications/initialized", "tools/call"),
)

_TOKENS = (
    *(
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\t",
        b" ",
        b",",
        b":",
        b";",
        b"=",
        b"{",
        b"}",
        b"[",
    ),
    *(b"]", b'"', b"\\", b"\\u", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\xc3", b"%00", b"%", b"/"),
    *(
        b"//",
        b"?",
        b"#",
        b"@",
        b"..",
        b"-1",
        b"0",
        b"9" * 30,
        b"NaN",
        b"Infinity",
        b"null",
        b"1e999",
    ),
    *(
        b"[" * 2000,
        b'{"a":' * 2000,
        b"x" * 5000,
        b"chunked",
        b"Content-Length: 3\r\n",
        b"id",
        b"2.0",
    ),
)


def changed_value(chance: random.Random, value: Any) -> Any:
    """`value` with one to three things changed, deep inside or at the top."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(chance, value)
    return value


def _changed(chance: random.Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.15:
        return chance.choice(VALUES)
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.choice(list(keys))
    what = chance.random()
    if what < 0.15:
        del changed[key]
    elif what < 0.3 and isinstance(changed, dict):
        changed[str(chance.choice(VALUES))] = changed.pop(key)
    elif what < 0.4 and isinstance(changed, dict):
        changed[chance.choice(("id", "method", "params", "result", "error", "_meta"))] = (
            chance.choice(VALUES)
        )
    else:
        changed[key] = _changed(chance, changed[key])
    return changed


def changed_json(chance: random.Random, value: Any) -> bytes:
    """A JSON text of a changed value, in one case of three broken as bytes, too."""
    if chance.random() < 0.8:
        value = changed_value(chance, value)
    spaces = chance.choice(((",", ":"), (", ", ": "), (" ,\t", "\n:\r")))
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5, separators=spaces)
    data = text.encode("utf-8", "surrogatepass")
    return changed_bytes(chance, data) if chance.random() < 0.33 else data


def changed_bytes(chance: random.Random, data: bytes) -> bytes:
    """`data` with one to four pieces changed, left out, doubled or put in."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 1, 2, 8, 64)))
        what = chance.randrange(5)
        if what == 0:
            data = data[:at] + data[end:]
        elif what == 1:
            data = data[:at] + chance.choice(_TOKENS) + data[at:]
        elif what == 2:
            data = data[:at] + chance.choice(_TOKENS) + data[end:]
        elif what == 3:
            data = data[:end] + data[at:]
        else:
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    return data
