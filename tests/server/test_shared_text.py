"""A text that one process publishes and others read, whole."""

from __future__ import annotations

import os
import time

import pytest

from mcp_proxy import ConfigError, shared_text
from mcp_proxy.shared_text import MAX_BYTES, SharedText


def test_each_text_has_the_next_number() -> None:
    text = SharedText()
    assert text.read() == (0, b"")
    for number, data in enumerate((b"one", b"", b"three" * 1000, b"4"), 1):
        text.publish(data)
        assert text.read() == (number, data)
        assert text.generation == number


def test_what_is_too_large_changes_nothing() -> None:
    text = SharedText()
    text.publish(b"x" * MAX_BYTES)
    with pytest.raises(ConfigError, match="workers can be told"):
        text.publish(b"y" * (MAX_BYTES + 1))
    assert text.read() == (1, b"x" * MAX_BYTES)


def test_nobody_reads_half_of_one_text_and_half_of_another() -> None:
    """A child publishes texts of one letter each; memory that is shared is all that it shares."""
    text = SharedText()
    pid = os.fork()
    if pid == 0:
        until = time.monotonic() + 1.0
        number = 0
        while time.monotonic() < until:
            number += 1
            text.publish(bytes([number % 251]) * (200_000 + number % 1000))
        os._exit(0)
    reads = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        generation, data = text.read()
        reads += 1
        assert data == bytes([generation % 251]) * len(data)
        assert len(data) == (200_000 + generation % 1000 if generation else 0)
    assert reads > 10
    assert text.generation > 10


def test_there_is_none_unless_one_is_set() -> None:
    assert shared_text.current() is None
    text = SharedText()
    shared_text.set_current(text)
    try:
        assert shared_text.current() is text
    finally:
        shared_text.set_current(None)


def test_what_was_wanted_before_the_master_began_to_look_has_been_done() -> None:
    text = SharedText()
    assert not text.is_wanted
    text.want(5.0)
    text.want(4.0)
    assert text.is_wanted
    text.note_look(4.5)
    assert text.is_wanted
    text.note_look(5.5)
    assert not text.is_wanted
    assert text.looked_at() == 5.5
    text.want(5.2)  # somebody was slow to say so
    assert not text.is_wanted
