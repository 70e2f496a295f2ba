"""Token buckets: how many tokens there are, whose they are, and what several processes share."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy import rate_buckets
from mcp_proxy.rate_buckets import Rate, RateBuckets, key_of, rate_of

NOW = 1_000_000.0

RATES = st.builds(
    lambda count, seconds, burst: Rate(count / seconds, burst),
    st.integers(1, 1000),
    st.sampled_from([1, 60]),
    st.integers(1, 1000),
)

#: Seconds until each request, and how many tokens it wants.
STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=60)

# Rounding, in tokens: a clock that has run for months tells microseconds.
_ROUNDING = 0.01


# --- how a limit is written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20/second", Rate(20, 20)),
        ("20/second:5", Rate(20, 5)),
        ("600/minute", Rate(10, 600, 60)),
        ("600/minute:50", Rate(10, 50, 60)),
        ("off", None),
    ],
)
def test_a_limit_says_how_many_and_how_many_at_once(text: str, rate: Rate | None) -> None:
    assert rate_of(text) == rate


@pytest.mark.parametrize(
    "text",
    ["", "20", "0/second", "20/hour", "20/second:", "20/second:0", "-1/second", "1.5/second"],
)
def test_anything_else_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match="expected N/second or N/minute, also with :BURST, or off"):
        rate_of(text)


# --- one bucket ----------------------------------------------------------------------------------


class Bucket:
    """The same as words say it: tokens that are counted, and come back with time."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.tokens = float(rate.burst)

    def after(self, seconds: float) -> None:
        self.tokens = min(self.rate.burst, self.tokens + seconds * self.rate.per_second)


@given(RATES, STEPS)
def test_a_bucket_is_what_tokens_that_are_counted_would_be(
    rate: Rate, steps: list[tuple[float, int]]
) -> None:
    bucket, full_at, now = Bucket(rate), 0.0, NOW
    for seconds, count in steps:
        now += seconds
        bucket.after(seconds)
        full_at, wait = rate.taken(full_at, count, now)
        if wait == 0:
            assert bucket.tokens >= count - _ROUNDING
            bucket.tokens = max(0.0, bucket.tokens - count)
        else:
            missing = count - bucket.tokens
            assert wait * rate.per_second == pytest.approx(missing, abs=_ROUNDING * len(steps))


@given(RATES, STEPS)
def test_no_more_is_had_than_the_rate_and_the_burst(
    rate: Rate, steps: list[tuple[float, int]]
) -> None:
    full_at, now, had = 0.0, NOW, 0
    for seconds, count in steps:
        now += seconds
        full_at, wait = rate.taken(full_at, count, now)
        had += count if wait == 0 else 0
        allowed = rate.burst + (now - NOW) * rate.per_second
        assert had <= allowed + _ROUNDING * len(steps)


@given(RATES, STEPS)
def test_who_waits_as_long_as_is_said_gets_what_was_refused(
    rate: Rate, steps: list[tuple[float, int]]
) -> None:
    full_at, now = 0.0, NOW
    for seconds, count in steps:
        now += seconds
        before = full_at
        full_at, wait = rate.taken(full_at, count, now)
        if wait and count <= rate.burst:
            assert full_at == max(before, now)
            assert rate.taken(full_at, count, now + wait)[1] == 0


@given(RATES, RATES)
def test_what_another_rate_has_left_is_over_in_the_time_of_this_one(old: Rate, new: Rate) -> None:
    buckets, key = RateBuckets(), key_of("a")
    assert buckets.take(key, old, old.burst, NOW) == 0
    wait = buckets.take(key, new, 1, NOW)
    assert wait <= 1 / new.per_second + 1 + _ROUNDING
    if wait:  # else it was the last one that there was, perhaps
        assert buckets.take(key, new, 1, NOW + wait + _ROUNDING) == 0


# --- many buckets --------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcde"), max_size=60))
def test_each_key_has_a_bucket_of_its_own(names: list[str]) -> None:
    buckets, rate = RateBuckets(), Rate(1 / 60, 5)
    allowed = [name for name in names if not buckets.take(key_of(name), rate, 1, NOW)]
    for name in set(names):
        assert allowed.count(name) == min(5, names.count(name))


def test_a_flood_of_keys_frees_nobody_who_is_at_the_limit() -> None:
    """Each of 100,000 strangers calls once, 24 of them for each row that there is."""
    buckets, rate, key = RateBuckets(), Rate(1, 50), key_of("busy")
    allowed = 0
    for number in range(100_000):
        if number % 100 == 0:
            allowed += not buckets.take(key, rate, 1, NOW + number / 1e6)
        buckets.take(key_of("stranger", str(number)), rate, 1, NOW + number / 1e6)
    assert allowed in (50, 51)


def test_of_a_full_set_the_bucket_goes_that_is_full_soonest() -> None:
    buckets, rate = RateBuckets(), Rate(1, 10)
    keys = [(7, number) for number in range(1, 6)]
    for count, key in zip([3, 1, 4, 5], keys, strict=False):
        assert buckets.take(key, rate, count, NOW) == 0
    assert buckets.take(keys[4], rate, 2, NOW) == 0  # in place of the second
    for count, key in zip([3, 4, 5, 2], [keys[0], *keys[2:]], strict=True):
        assert buckets.take(key, rate, 10, NOW) == pytest.approx(count)
    assert buckets.take(keys[1], rate, 10, NOW) == 0


def test_keys_are_told_apart_by_128_bits() -> None:
    keys = {key_of("server", str(number)) for number in range(10_000)}
    assert len(keys) == 10_000
    assert all(0 <= half < 2**64 for key in keys for half in key)
    assert key_of("a", "bc") != key_of("ab", "c")


# --- several processes ---------------------------------------------------------------------------


def _take_for(seconds: float, pause: float, told: Any) -> None:
    rate, key = Rate(200, 20), key_of("shared")
    until, allowed = time.monotonic() + seconds, 0
    while (now := time.monotonic()) < until:
        allowed += not rate_buckets.current().take(key, rate, 1, now)
        if pause:
            time.sleep(pause)
    told.put(allowed)


@pytest.mark.parametrize(("pause", "more"), [(0.0005, 1.05), (0.0, 1.25)])
def test_processes_share_what_was_there_before_their_fork(pause: float, more: float) -> None:
    """Also where they do nothing else, and interrupt each other all the time."""
    rate_buckets.share()
    forked = multiprocessing.get_context("fork")
    told = forked.SimpleQueue()
    began = time.monotonic()
    each = [forked.Process(target=_take_for, args=(2.0, pause, told)) for _ in range(4)]
    for process in each:
        process.start()
    allowed = sum(told.get() for _ in each)
    lasted = time.monotonic() - began
    for process in each:
        process.join(10)
        assert process.exitcode == 0
    assert 0.9 * (20 + 200 * 2.0) <= allowed <= more * (20 + 200 * lasted)


def test_without_sharing_a_process_has_buckets_of_its_own() -> None:
    buckets = rate_buckets.current()
    assert rate_buckets.current() is buckets
    rate_buckets.share()
    assert rate_buckets.current() is not buckets
    assert repr(rate_buckets.current()) == "<RateBuckets 0/4096>"
    rate_buckets.current().take(key_of("a"), Rate(1, 1), 1, NOW)
    assert repr(rate_buckets.current()) == "<RateBuckets 1/4096>"
