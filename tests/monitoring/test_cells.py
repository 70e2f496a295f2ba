"""The cells that workers count in: nothing is lost, nothing is counted twice, nothing overflows."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import metrics
from mcp_proxy.metrics import (
    BOUNDS,
    CALLS,
    CHILDREN,
    MAX_CLIENTS,
    MAX_TOOLS,
    OPERATIONS,
    OTHER,
    SESSIONS_STARTED,
    Health,
    Key,
    MetricsPage,
)

LABELS = st.text(max_size=90)


@pytest.fixture(autouse=True)
def nothing_is_counted_elsewhere() -> Iterator[None]:
    """This process counts nowhere before and after a test."""
    metrics.use(None)
    yield
    metrics.use(None)


def numbers(page: MetricsPage, *labels: str) -> list[float]:
    return page.read()[Key(CALLS, labels)]


# --- what is read is what was counted ------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.sampled_from(["local", "relayed"]))
    ),
    st.sets(st.integers(0, 40)),
)
def test_workers_and_their_successors_add_up(
    counted: list[tuple[int, str, str]], replaced: set[int]
) -> None:
    """At some steps the worker of a slot is replaced by another one."""
    page, expected = MetricsPage(4), Counter[tuple[str, str]]()
    all_counters = {slot: page.take(slot) for slot in range(4)}
    for step, (slot, server, way) in enumerate(counted):
        if step in replaced:
            page.free(slot)
            all_counters[slot] = page.take(slot)
        all_counters[slot].count(CALLS, server, way)
        expected[server, way] += 1
    found = {key.labels: value for key, value in page.read().items() if key.metric is CALLS}
    assert found == {labels: [float(count)] for labels, count in expected.items()}


@given(st.lists(st.floats(0, 1000)))
def test_a_time_is_in_the_first_bucket_whose_bound_it_does_not_exceed(times: list[float]) -> None:
    page = MetricsPage(1)
    counters = page.take(0)
    for seconds in times:
        counters.observe(OPERATIONS, seconds, "s", "ping", "", "")
    found = page.read().get(Key(OPERATIONS, ("s", "ping", "", "")), [0.0] * (len(BOUNDS) + 2))
    buckets = [0.0] * (len(BOUNDS) + 1)
    for seconds in times:
        buckets[next((n for n, bound in enumerate(BOUNDS) if seconds <= bound), -1)] += 1
    assert found[:-1] == buckets
    assert found[-1] == pytest.approx(sum(times))


@given(st.lists(st.tuples(LABELS, LABELS), max_size=20))
def test_any_text_may_be_a_label(labels: list[tuple[str, str]]) -> None:
    page = MetricsPage(1)
    counters = page.take(0)
    for pair in labels:
        counters.count(CALLS, *pair)
    found = {key: value for key, value in page.read().items() if key.metric is CALLS}
    assert all(len(key.labels) == 2 for key in found)
    assert sum(value[0] for value in found.values()) == len(labels)
    assert page.take(0).page.read() == page.read()


def test_threads_of_a_worker_lose_nothing() -> None:
    page = MetricsPage(1)
    counters = page.take(0)

    def count() -> None:
        for _ in range(10_000):
            counters.count(CALLS, "s", "local")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(page, "s", "local") == [80_000.0]


def test_forked_processes_lose_nothing_and_a_killed_one_what_it_did_not_count() -> None:
    code = """
import os, signal
from mcp_proxy.metrics import CALLS, Key, MetricsPage
page = MetricsPage(4)
for turn in range(3):  # each is a successor in the same slots
    children = []
    for slot in range(4):
        child = os.fork()
        if not child:
            counters = page.take(slot)
            for _ in range(1000):
                counters.count(CALLS, "s", "local")
            os.kill(os.getpid(), signal.SIGKILL)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
print(page.read()[Key(CALLS, ("s", "local"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[12000.0]"


# --- gauges --------------------------------------------------------------------------------------


def test_gauges_are_cleared_for_a_successor_and_hidden_without_a_worker() -> None:
    page = MetricsPage(2)
    first = page.take(0)
    first.set(CHILDREN, 3)
    first.count(CALLS, "s", "local")
    assert page.read()[Key(CHILDREN, (), 0)] == [3.0]
    page.free(0)
    assert Key(CHILDREN, (), 0) not in page.read()
    assert page.health() == {}
    page.take(0)
    assert page.read()[Key(CHILDREN, (), 0)] == [0.0]
    assert page.health() == {0: Health.UNKNOWN}
    assert numbers(page, "s", "local") == [1.0]


# --- bounds --------------------------------------------------------------------------------------


def test_a_full_table_counts_the_rest_as_other() -> None:
    page = MetricsPage(1)
    counters = page.take(0)
    for number in range(3000):
        counters.count(CALLS, f"server {number}", "local")
    found = {key.labels: value[0] for key, value in page.read().items() if key.metric is CALLS}
    assert sum(found.values()) == 3000
    assert found[(OTHER, OTHER)] == 3000 - (len(found) - 1)
    assert 900 < len(found) <= 1024


def test_labels_that_do_not_fit_count_as_other() -> None:
    page = MetricsPage(1)
    page.take(0).count(CALLS, "s" * 300, "local")
    assert numbers(page, OTHER, OTHER) == [1.0]


def test_a_tool_has_a_label_once_its_server_has_answered_and_at_most_a_hundred_do() -> None:
    page = MetricsPage(1)
    counters = page.take(0)
    assert counters.tool("s", "guessed", is_proven=False) == ""
    for number in range(MAX_TOOLS):
        assert counters.tool("s", f"tool {number}", is_proven=True) == f"tool {number}"
    assert counters.tool("s", "one more", is_proven=True) == OTHER
    assert counters.tool("s", "tool 7", is_proven=False) == "tool 7"
    assert counters.tool("t", "one more", is_proven=True) == "one more", "each server has its own"


def test_a_successor_knows_the_tools_and_clients_that_have_series() -> None:
    page = MetricsPage(1)
    first = page.take(0)
    first.observe(OPERATIONS, 0.1, "s", "tools/call", first.tool("s", "echo", is_proven=True), "")
    first.count(SESSIONS_STARTED, "s", first.client("a client"))
    second = page.take(0)
    assert second.tool("s", "echo", is_proven=False) == "echo"
    for number in range(MAX_CLIENTS - 1):
        assert second.client(f"{number}") == f"{number}"
    assert second.client("one more") == OTHER
    assert second.client("a client") == "a client"


# --- where a process counts ----------------------------------------------------------------------


def test_a_process_counts_nowhere_until_it_is_told() -> None:
    assert metrics.current() is None
    own = metrics.use_own()
    assert metrics.current() is own is metrics.use_own()


def test_a_forked_process_begins_at_zero_where_the_memory_is_its_own() -> None:
    code = """
import os
from mcp_proxy import metrics
metrics.use_own().count(metrics.CALLS, "s", "local")
child = os.fork()
if not child:
    metrics.current().count(metrics.CALLS, "s", "local")
found = metrics.current().page.read()[metrics.Key(metrics.CALLS, ("s", "local"))]
os.write(1, f"{found} ".encode())
if child:
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[1.0]", "[1.0]"]
