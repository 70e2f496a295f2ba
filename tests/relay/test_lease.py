"""The lease: how long a replica counts as alive, and when it may judge others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from mcp_proxy import replica as naming
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.relay.lease import Lease
from mcp_proxy.replica import Replica, has_ended
from tests.storage.offices import FickleMailboxes
from tests.support.waiting import eventually

LEASE = 0.6

#: A replica whose process nobody here can look for.
ELSEWHERE = "other-machine-00000000-1234-567-0a0b0c0d"


class Scene:
    """A lease and what happened to it."""

    def __init__(self, lease: float = LEASE) -> None:
        self.mailboxes = FickleMailboxes(lease)
        self.looks = 0
        self.lapses = 0
        self.lease = Lease(self.mailboxes, "own", self._look, self._lapse)

    def _look(self) -> None:
        self.looks += 1

    def _lapse(self) -> None:
        self.lapses += 1


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A lease that runs."""
    made = Scene()
    made.lease.start()
    yield made
    made.mailboxes.is_away = False
    made.lease.end()


def judgement(lease: Lease, replica: str) -> bool | None:
    """Whether a replica is gone, None while nobody can know."""
    try:
        return lease.is_gone(replica)
    except StorageUnavailable:
        return None


# --- one's own -----------------------------------------------------------------------------------


def test_a_lease_is_relied_upon_for_less_time_than_the_store_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("mcp_proxy.relay.lease.boottime", lambda: now)
    mailboxes = FickleMailboxes(100.0)
    lease = Lease(mailboxes, "own", lambda: None, lambda: None)
    lease.look()
    now = 1097.0
    assert lease.is_held
    now = 1099.0
    assert not lease.is_held
    assert mailboxes.is_open("own")


def test_what_is_read_may_be_acted_upon_while_the_lease_is_held(scene: Scene) -> None:
    is_fresh, end = scene.lease.freshness(), time.monotonic() + 2 * LEASE
    eventually(lambda: time.monotonic() > end)  # renewed meanwhile, however long it takes
    assert is_fresh()


def test_what_was_read_before_a_lapse_may_not_be_acted_upon(scene: Scene) -> None:
    before = scene.lease.freshness()
    scene.mailboxes.is_away = True
    eventually(lambda: not scene.lease.is_held)
    assert not before()
    during = scene.lease.freshness()
    assert not during()
    scene.mailboxes.is_away = False
    eventually(lambda: scene.lease.is_held)
    assert not before()
    assert during()  # what came since then was sent to the new mailbox
    assert scene.lease.freshness()()


def test_the_lease_is_renewed_for_as_long_as_it_runs(scene: Scene) -> None:
    until = time.monotonic() + 2 * LEASE
    while time.monotonic() < until:
        assert scene.mailboxes.is_open("own")
        assert scene.lease.is_held
    assert scene.lapses == 0
    assert scene.looks > 2


def test_stop_ends_the_mailbox_at_once(scene: Scene) -> None:
    scene.lease.end()
    assert not scene.mailboxes.is_open("own")


def test_stop_while_the_store_is_away_leaves_it_to_expire(scene: Scene) -> None:
    scene.mailboxes.is_away = True
    scene.lease.end()
    scene.mailboxes.is_away = False
    eventually(lambda: not scene.mailboxes.is_open("own"))


def test_a_start_without_the_store_says_so_and_can_be_stopped() -> None:
    scene = Scene()
    scene.mailboxes.is_away = True
    with pytest.raises(StorageUnavailable):
        scene.lease.start()
    assert not scene.lease.is_held
    scene.lease.end()


def test_a_mailbox_that_had_gone_is_opened_again_and_reported(scene: Scene) -> None:
    scene.mailboxes.remove("own")
    eventually(lambda: scene.lapses == 1)
    assert scene.mailboxes.is_open("own")
    assert scene.lease.is_held


def test_the_lease_is_not_held_when_it_could_not_be_renewed_in_time(scene: Scene) -> None:
    scene.mailboxes.is_away = True
    eventually(lambda: not scene.lease.is_held)
    scene.mailboxes.is_away = False
    eventually(lambda: scene.lease.is_held)
    eventually(lambda: scene.lapses == 1)


def test_a_short_absence_of_the_store_is_no_lapse(scene: Scene) -> None:
    seen = scene.mailboxes.renew("own")
    scene.mailboxes.is_away = True
    eventually(lambda: not scene.lease.is_in_contact)
    scene.mailboxes.renew = lambda replica: True  # type: ignore[method-assign]  # it was in time
    scene.mailboxes.is_away = False
    eventually(lambda: scene.lease.is_in_contact)
    assert seen
    assert scene.lapses == 0


def test_a_look_that_fails_does_not_end_the_lease() -> None:
    mailboxes = FickleMailboxes(LEASE)
    looks: list[int] = []

    def fail() -> None:
        looks.append(1)
        raise RuntimeError("this look is broken")

    lease = Lease(mailboxes, "own", fail, lambda: None)
    lease.start()
    eventually(lambda: len(looks) > 20)
    assert lease.is_held
    assert mailboxes.is_open("own")
    lease.end()


# --- others --------------------------------------------------------------------------------------


def test_a_replica_with_a_mailbox_is_not_gone(scene: Scene) -> None:
    scene.mailboxes.renew(ELSEWHERE)
    assert scene.lease.is_gone(ELSEWHERE) is False


def test_a_new_replica_judges_at_once_where_the_store_has_been_up(scene: Scene) -> None:
    assert scene.lease.is_gone(ELSEWHERE) is True


def test_a_new_replica_waits_a_lease_where_the_store_has_just_started() -> None:
    scene = Scene()
    scene.mailboxes.has_just_started = True
    scene.lease.start()
    assert judgement(scene.lease, ELSEWHERE) is None
    scene.mailboxes.has_just_started = False
    assert judgement(scene.lease, ELSEWHERE)
    scene.lease.end()


def test_nobody_is_judged_before_a_lease_has_passed_since_the_own_reconnect(scene: Scene) -> None:
    assert scene.lease.is_gone(ELSEWHERE)
    scene.mailboxes.is_away = True
    eventually(lambda: not scene.lease.is_in_contact)
    assert judgement(scene.lease, ELSEWHERE) is None
    back = time.monotonic()
    scene.mailboxes.is_away = False
    eventually(lambda: scene.lease.is_in_contact)
    assert judgement(scene.lease, ELSEWHERE) is None
    assert eventually(lambda: judgement(scene.lease, ELSEWHERE))
    assert time.monotonic() - back >= LEASE


def test_nobody_is_judged_before_a_lease_has_passed_since_the_own_mailbox_had_gone(
    scene: Scene,
) -> None:
    scene.mailboxes.remove("own")
    eventually(lambda: scene.lapses)
    assert judgement(scene.lease, ELSEWHERE) is None
    assert eventually(lambda: judgement(scene.lease, ELSEWHERE))


def test_who_comes_back_within_that_lease_is_never_judged(scene: Scene) -> None:
    scene.mailboxes.remove("own")
    eventually(lambda: scene.lapses)
    verdicts = [judgement(scene.lease, ELSEWHERE)]
    scene.mailboxes.renew(ELSEWHERE)
    verdicts.append(judgement(scene.lease, ELSEWHERE))
    assert verdicts == [None, False]


def test_a_neighbour_whose_process_has_ended_is_judged_even_without_the_store(
    scene: Scene, child: Child
) -> None:
    neighbour = child.replica_id
    scene.mailboxes.renew(neighbour)
    assert scene.lease.is_gone(neighbour) is False
    child.process.kill()
    child.process.wait(10)
    scene.mailboxes.is_away = True
    assert scene.lease.is_gone(neighbour) is True


# --- whether a process has ended -----------------------------------------------------------------


class Child:
    """A process that is a replica, and does nothing."""

    def __init__(self) -> None:
        script = (
            "import sys; from mcp_proxy.replica import Replica; "
            "print(Replica().id, flush=True); sys.stdin.read()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.replica_id = self.process.stdout.readline().strip()


@pytest.fixture
def child() -> Iterator[Child]:
    """A child that is ended when the test is over."""
    made = Child()
    yield made
    made.process.kill()
    made.process.communicate()


def changed(replica_id: str, part: int, change: Callable[[str], str]) -> str:
    """A replica's id with one of its last four parts changed."""
    parts = replica_id.rsplit("-", 4)
    parts[part] = change(parts[part])
    return "-".join(parts)


def test_this_process_has_not_ended() -> None:
    assert has_ended(Replica().id) is False


def test_a_process_that_runs_has_not_ended(child: Child) -> None:
    assert has_ended(child.replica_id) is False


def test_a_process_that_was_killed_and_reaped_has_ended(child: Child) -> None:
    child.process.kill()
    child.process.wait(10)
    assert has_ended(child.replica_id) is True


def test_a_zombie_has_ended(child: Child) -> None:
    child.process.kill()
    os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(child.replica_id) is True


def test_a_process_that_proc_does_not_show_has_not_ended(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "_start_of", lambda pid: None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert has_ended(child.replica_id) is False
    child.process.kill()
    child.process.wait(10)
    assert has_ended(child.replica_id) is True


def test_another_process_with_the_same_number_is_not_the_replica(child: Child) -> None:
    earlier = changed(child.replica_id, -2, lambda start: str(int(start) - 1))
    assert has_ended(earlier) is True
    assert has_ended(child.replica_id) is False


def test_of_another_machine_or_container_nothing_is_known(child: Child) -> None:
    child.process.kill()
    child.process.wait(10)
    elsewhere = changed(child.replica_id, -4, lambda space: space[::-1] + "x")
    assert has_ended(elsewhere) is False


def test_of_a_process_whose_start_is_not_known_nothing_is_known(child: Child) -> None:
    child.process.kill()
    child.process.wait(10)
    assert has_ended(changed(child.replica_id, -2, lambda start: "0")) is False


def test_a_host_may_have_any_name() -> None:
    assert has_ended("a-b-c-" + ELSEWHERE) is False


@pytest.mark.parametrize("replica_id", ["", "x", "a-b-c", "a-b-c-d", "a-b-c-d-e", "é"])
def test_of_what_is_no_replica_id_nothing_is_known(replica_id: str) -> None:
    assert has_ended(replica_id) is False


def test_the_number_of_a_process_may_be_anything() -> None:
    own = Replica().id
    assert has_ended(changed(own, -3, lambda pid: "x")) is False
