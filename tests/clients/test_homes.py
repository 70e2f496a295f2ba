"""The proofs of who shares a server, made short."""

from __future__ import annotations

import time

import pytest

from tests.proofs import homes
from tests.proofs.questions import scene_of
from tests.proofs.wires import Modern
from tests.support.monitor import recorded_commands


def test_callers_who_say_who_they_are_share_no_process() -> None:
    homes.strangers_never_share(rounds=2)


def test_nobody_shares_a_legacy_server_unasked_with_strangers() -> None:
    homes.anonymous_strangers_are_refused()


def test_calls_that_overlap_are_counted_by_one_process_where_that_is_wanted() -> None:
    homes.counted_by_one(counts=10)


def test_after_calls_that_overlap_all_go_to_the_first_process() -> None:
    homes.counted_by_several(counts=50)


def test_roots_reach_official_servers_behind_the_bridge() -> None:
    homes.roots_cross()


@pytest.mark.parametrize("server", ["legacy", "modern"])
def test_calls_at_the_worker_that_has_their_home_cost_redis_a_command_a_second(server: str) -> None:
    with scene_of(server, workers=1) as scene:
        client = Modern(scene.proxy.port, capabilities={})
        client.call("echo", {"text": "first"})
        began = time.monotonic()
        with recorded_commands(scene.redis) as commands:
            for number in range(10):
                client.call("echo", {"text": str(number)})
        seconds = time.monotonic() - began
        about_homes = [words for words in commands if "home-" in " ".join(words)]
        assert len(about_homes) <= 1 + seconds, about_homes
