"""What is known of a server that keeps exiting: pauses, and whether sessions can begin."""

from __future__ import annotations

import pytest

from mcp_proxy.errors import BackendDraining, BackendLost
from mcp_proxy.ownership.backoff import Backoff

EXITED = BackendLost("The server exited (exit code 1)")
NEVER = "The server exited (exit code 1); no start has succeeded so far"


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backoff(clock: Clock) -> Backoff:
    return Backoff(clock)


def test_a_server_that_was_never_started_is_not_known_to_be_broken(backoff: Backoff) -> None:
    assert backoff.not_ready_reason() is None


def test_a_server_that_has_exited_at_every_start_is_not_ready_until_one_succeeds(
    backoff: Backoff, clock: Clock
) -> None:
    backoff.note_failure(EXITED)
    backoff.note_failure(EXITED)
    for _ in range(3):
        assert backoff.not_ready_reason() == NEVER
        clock.now += 3600
    backoff.note_success()
    assert backoff.not_ready_reason() is backoff.doubt() is None


def test_one_failed_start_is_told_and_makes_nobody_stay_away(
    backoff: Backoff, clock: Clock
) -> None:
    """The client may be the reason."""
    backoff.note_failure(EXITED)
    assert backoff.not_ready_reason() is None
    assert backoff.doubt() == NEVER
    backoff.note_success()
    assert backoff.doubt() is None
    backoff.note_failure(EXITED)
    assert backoff.not_ready_reason() is None
    assert backoff.doubt() == "The server exited (exit code 1)"
    clock.now += 31
    assert backoff.doubt() is None


def test_a_server_that_has_started_once_is_not_ready_for_half_a_minute_after_a_failure(
    backoff: Backoff, clock: Clock
) -> None:
    backoff.note_success()
    backoff.note_failure(EXITED)
    backoff.note_failure(EXITED)
    assert backoff.not_ready_reason() == "The server exited (exit code 1)"
    clock.now += 31
    assert backoff.not_ready_reason() is None


def test_that_a_replica_stops_is_no_failure_of_the_server(backoff: Backoff) -> None:
    backoff.note_failure(BackendDraining())
    backoff.note_failure(BackendDraining())
    assert backoff.doubt() is None
    assert backoff.not_ready_reason() is None


def test_of_another_server_nothing_is_known(backoff: Backoff) -> None:
    backoff.note_failure(EXITED)
    backoff.note_failure(EXITED)
    for _ in range(3):
        backoff.note_exit("a", lifetime=0)
    backoff.forget_all()
    backoff.require_over("a")
    assert backoff.not_ready_reason() is backoff.doubt() is None
