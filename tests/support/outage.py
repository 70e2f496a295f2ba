"""What every call of a store has to say while its server is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import pytest

from mcp_proxy.errors import StorageUnavailable

T = TypeVar("T")


def assert_unavailable(store: T, calls: Mapping[str, Callable[[T], object]], within: float) -> None:
    """Each of the calls says in time, in seconds, that the store cannot be reached."""
    for name, call in calls.items():
        began = time.monotonic()
        with pytest.raises(StorageUnavailable) as caught:
            call(store)
        assert time.monotonic() - began < within, name
        assert caught.value.status == 503
        assert ("Retry-After", "1") in caught.value.headers
