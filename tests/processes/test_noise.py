"""Noise of a server: what of it is logged, and how fast it is taken."""

from __future__ import annotations

import time

import pytest

from mcp_proxy.processes import noise
from mcp_proxy.processes.noise import Brake, NoiseLog


def test_the_first_are_logged_then_so_many_a_second_and_the_others_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    log = NoiseLog("test", "lines were left out", 3, 2.0, lambda: now)
    assert [log.allows() for _ in range(5)] == [True, True, True, False, False]
    now += 1
    assert [log.allows() for _ in range(3)] == [True, True, False]
    assert caplog.records == []
    now += noise.NOISE_INTERVAL
    log.leave_out(4)
    assert [record.getMessage() for record in caplog.records] == [
        "[test] 7 more lines were left out"
    ]
    log.flush()
    assert len(caplog.records) == 1


def test_lines_that_are_few_or_far_between_are_not_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    brake = Brake()
    for _ in range(256):
        brake.slow()
    assert pauses == []
    for _ in range(64):
        brake.slow()
    assert len(pauses) == 2
    brake.lines = 0
    for _ in range(256):
        brake.slow()
    assert len(pauses) == 2
