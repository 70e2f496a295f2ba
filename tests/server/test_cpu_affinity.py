"""Which workers get a CPU of their own, and which one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.config import ProxyConfig
from mcp_proxy.server import machine as affinity
from mcp_proxy.server.machine import cpus_to_share, least_used

# --- least_used ----------------------------------------------------------------------------------


def test_the_first_worker_gets_the_cpu_at_the_offset() -> None:
    assert [least_used((0, 1, 2), [], offset) for offset in range(4)] == [0, 1, 2, 0]


def test_the_cpu_with_the_fewest_workers_is_next() -> None:
    assert least_used((0, 1, 2), [0, 1], 0) == 2
    assert least_used((0, 1, 2), [0, 0, 1, 2, 2], 0) == 1


def test_among_equals_the_first_after_the_offset_is_next() -> None:
    assert least_used((0, 1, 2, 3), [2], 2) == 3
    assert least_used((0, 1, 2, 3), [2, 3], 2) == 0


def test_cpus_that_are_not_ours_do_not_count() -> None:
    assert least_used((4, 6), [0, 1, 4], 0) == 6


@given(st.sets(st.integers(0, 63), min_size=1), st.integers(0, 40), st.integers(0, 1023))
def test_workers_are_spread_evenly(cpus: set[int], workers: int, offset: int) -> None:
    taken: list[int] = []
    for _ in range(workers):
        taken.append(least_used(tuple(sorted(cpus)), taken, offset))
    counts = Counter(dict.fromkeys(cpus, 0))
    counts.update(taken)
    assert set(counts) == cpus
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.sets(st.integers(0, 7), min_size=1), st.lists(st.integers(0, 7)), st.integers(0, 1023))
def test_a_worker_that_died_is_replaced_where_it_was(
    cpus: set[int], others: list[int], offset: int
) -> None:
    ours = tuple(sorted(cpus))
    chosen = least_used(ours, others, offset)
    assert chosen in cpus
    assert all(others.count(chosen) <= others.count(cpu) for cpu in cpus)


# --- cpus_to_share -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with CPUs 0, 1, 2 and 5; where its quota stands, if it has one."""
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(affinity, "_QUOTA_FILE", str(file))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 0, 2, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None, raising=False)
    return file


ALL = (0, 1, 2, 5)


@pytest.mark.parametrize("workers", [1, 4])
def test_auto_shares_all_cpus_while_each_worker_can_have_one(workers: int) -> None:
    assert cpus_to_share(ProxyConfig(), workers) == ALL


def test_auto_leaves_more_workers_than_cpus_alone() -> None:
    assert cpus_to_share(ProxyConfig(), 5) == ()


@pytest.mark.parametrize("text", ["400000 100000", "max 100000", "800000 100000\n", "", "nonsense"])
def test_auto_shares_under_a_quota_that_takes_nothing_away(quota: Path, text: str) -> None:
    quota.write_text(text)
    assert cpus_to_share(ProxyConfig(), 1) == ALL


@pytest.mark.parametrize("text", ["399999 100000", "50000 100000\n"])
def test_auto_leaves_workers_alone_under_a_smaller_quota(quota: Path, text: str) -> None:
    quota.write_text(text)
    assert cpus_to_share(ProxyConfig(), 1) == ()


def test_off_is_off() -> None:
    assert cpus_to_share(ProxyConfig(cpu_affinity="off"), 1) == ()


def test_only_gthread_workers_are_pinned() -> None:
    for choice in ("auto", "0,1"):
        config = ProxyConfig(worker_class="gevent", cpu_affinity=choice)
        assert cpus_to_share(config, 1) == ()


def test_a_list_is_taken_as_it_is(quota: Path) -> None:
    quota.write_text("50000 100000")
    assert cpus_to_share(ProxyConfig(cpu_affinity="5,1"), 9) == (5, 1)


@pytest.mark.parametrize("choice", ["auto", "0,1"])
def test_a_system_without_affinity_is_left_alone(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    assert cpus_to_share(ProxyConfig(cpu_affinity=choice), 1) == ()
