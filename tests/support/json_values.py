"""Hypothesis strategies for JSON: values, and the many ways to spell one."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)

values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

objects = st.dictionaries(st.text(), values, max_size=4)

ids = st.integers(-(2**80), 2**80) | st.text()


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> bytes:
    """`value` as JSON with drawn white space, line breaks and escapes."""
    text = json.dumps(
        value,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 0, 2, "\t"])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")])),
    )
    line_break = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    lead = draw(st.sampled_from(["", " ", "\r\n\t"]))
    return (lead + text.replace("\n", line_break)).encode()
