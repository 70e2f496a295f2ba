"""What /readyz says, and that nobody waits for what hangs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_proxy.edge.readiness import FIRST_WAIT, Part, Readiness, State, Weight, state_of
from tests.support.waiting import eventually


def essential(reason: str | None) -> Part:
    return Part("store", reason, Weight.ESSENTIAL)


def server(name: str, reason: str | None) -> Part:
    return Part(name, reason, Weight.ONE_OF_MANY)


def doubtful(name: str) -> Part:
    return Part(name, "crashed", Weight.USABLE)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], (200, "ready")),
        ([essential(None), server("a", None)], (200, "ready")),
        ([essential("away"), server("a", None)], (503, "not ready")),
        ([essential(None), server("a", "gone"), server("b", None)], (200, "degraded")),
        ([essential(None), server("a", "gone"), server("b", "gone")], (503, "not ready")),
        ([essential(None), doubtful("a")], (200, "degraded")),
        ([essential(None), doubtful("a"), server("b", "gone")], (200, "degraded")),
        ([Part("sweeper", "ended", Weight.USEFUL), server("a", None)], (200, "degraded")),
    ],
)
def test_what_follows_from_the_parts(parts: list[Part], expected: tuple[int, str]) -> None:
    state = state_of(parts)
    assert (state.status, state.summary) == expected


def test_reasons_are_shown_only_where_they_may_be() -> None:
    state = state_of([essential("10.0.0.1:6379: refused"), server("a", None)])
    checks = {
        "store": {"state": "failed", "reason": "10.0.0.1:6379: refused"},
        "a": {"state": "ok"},
    }
    assert json.loads(state.body(True)) == {"status": "not ready", "checks": checks}
    assert b"10.0.0.1" not in state.body(False)
    assert json.loads(state.body(False))["checks"]["store"] == {"state": "failed"}


class Scene:
    """A readiness whose parts, and whose clock, are in the test's hands."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reason: str | None = None
        self.looks = 0
        self.is_draining = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.readiness = Readiness(self.look, lambda: self.is_draining, lambda: self.now)

    def look(self) -> list[Part]:
        self.looks += 1
        self.goes_on.wait(30)
        return [essential(self.reason)]

    def said(self) -> Any:
        state: State | None = self.readiness.current()
        return state and (state.status, state.summary, json.loads(state.document)["checks"])


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.goes_on.set()
    made.readiness.stop(10)


def test_the_first_question_waits_for_the_first_look(scene: Scene) -> None:
    assert scene.readiness.wait_for_current().summary == "ready"


def test_the_first_question_does_not_wait_for_what_hangs(scene: Scene) -> None:
    scene.goes_on.clear()
    assert scene.said() is None
    scene.now += FIRST_WAIT
    assert scene.readiness.wait_for_current().status == 503
    scene.goes_on.set()
    eventually(lambda: scene.said()[0] == 200)


def test_an_old_look_is_not_believed(scene: Scene) -> None:
    scene.readiness.wait_for_current()
    eventually(lambda: scene.looks > 1)
    scene.goes_on.clear()
    scene.now += 6
    assert scene.said()[:2] == (503, "not ready")
    scene.goes_on.set()
    eventually(lambda: scene.said()[0] == 200)


def test_the_thread_looks_as_long_as_somebody_asks(scene: Scene) -> None:
    scene.readiness.wait_for_current()
    eventually(lambda: scene.looks > 2)
    scene.now += 61
    time.sleep(1.5)  # a look that was under way
    looks = scene.looks
    time.sleep(1.5)
    assert scene.looks == looks
    scene.reason = "away"
    assert scene.said() is None, "what was found a minute ago is not believed"
    assert scene.readiness.wait_for_current().summary == "not ready"


def test_draining_is_read_directly(scene: Scene) -> None:
    scene.goes_on.clear()
    scene.is_draining = True
    assert scene.said()[:2] == (503, "draining")
    assert scene.looks == 0
