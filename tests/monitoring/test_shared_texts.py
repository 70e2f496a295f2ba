"""Texts that one process writes and others read: each reads a whole one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.shared_texts import LONGEST, SharedTexts


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=2000)), max_size=30))
def test_what_was_written_last_is_read(written: list[tuple[int, bytes]]) -> None:
    texts, expected = SharedTexts(3), {0: b"", 1: b"", 2: b""}
    for slot, text in written:
        texts.write(slot, text)
        expected[slot] = text
        assert {slot: texts.read(slot) for slot in range(3)} == expected
    texts.clear(1)
    assert texts.read(1) == b""


def test_the_longest_text_fits_and_one_more_byte_does_not() -> None:
    texts = SharedTexts(2)
    for slot in range(2):
        texts.write(slot, bytes([slot]) * LONGEST)
    assert [texts.read(slot) for slot in range(2)] == [bytes([n]) * LONGEST for n in range(2)]
    with pytest.raises(ValueError, match="is too long"):
        texts.write(0, b"x" * (LONGEST + 1))


def test_nobody_reads_half_of_a_text() -> None:
    """A process writes texts of one letter each as fast as it can; another one reads."""
    code = """
import os, signal
from mcp_proxy.shared_texts import LONGEST, SharedTexts
texts = SharedTexts(1)
texts.write(0, b"a" * LONGEST)
child = os.fork()
if not child:
    turn = 0
    while True:
        turn += 1
        texts.write(0, bytes([97 + turn % 26]) * (LONGEST - turn % 1000))
seen, torn = set(), 0
for _ in range(5000):
    text = texts.read(0)
    torn += len(set(text)) > 1
    seen.add(text[:1])
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(torn, len(seen) > 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]
