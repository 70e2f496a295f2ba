"""How an orderly end waits for what is running."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from mcp_proxy.transports.base import drain


class Scripted:
    """A transport that is busy as a script says, look by look, and then no more."""

    def __init__(self, looks: Iterable[bool]) -> None:
        self.edge: Any = SimpleNamespace(is_draining=False)
        self._looks = iter(looks)
        self.seen: list[bool] = []
        self.handed_over = 0

    @property
    def is_busy(self) -> bool:
        assert self.edge.is_draining, "new work is still taken"
        self.seen.append(next(self._looks, False))
        return self.seen[-1]

    def end_streams(self) -> None: ...

    def hand_over(self) -> None:
        self.handed_over += 1


@pytest.mark.parametrize(
    ("looks", "seen"),
    [
        ([], [False, False]),
        # A request that was let in just before the end reaches its server a moment later.
        ([False, True], [False, True, False, False]),
        ([True], [True, False, False]),
    ],
)
def test_nobody_must_be_busy_at_two_looks_running(looks: list[bool], seen: list[bool]) -> None:
    transport: Any = Scripted(looks)
    drain(lambda: [transport], 60)
    assert transport.seen == seen
    assert transport.handed_over == len(seen)


def test_what_takes_too_long_is_not_waited_for() -> None:
    transport: Any = Scripted([True] * 1000)
    drain(lambda: [transport], 0.3)
    assert len(transport.seen) < 20
