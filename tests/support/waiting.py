"""Waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")

_POLL = 0.01


def eventually(
    condition: Callable[[], T],
    timeout: float = 10,
    message: str = "the condition did not come true in time",
) -> T:
    """The first truthy value of `condition`; fails the test when `timeout` seconds brought none."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{message} (waited {timeout:g} seconds)")
        time.sleep(_POLL)
    return value
