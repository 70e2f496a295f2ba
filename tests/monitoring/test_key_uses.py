"""When API keys were last used is known on every host that shares the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mcp_proxy import metrics
from mcp_proxy.auth.keys import digest_of
from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.last_uses import last_use_of, short
from mcp_proxy.metrics import Health, MetricsPage
from mcp_proxy.monitoring.key_uses import KEPT, KeyUses
from mcp_proxy.storage.records import LocalStorage

_KEYS = tuple(map(digest_of, ("alice", "bob", "carol")))
_ALICE, _BOB, _CAROL = _KEYS


class Counting(LocalStorage):
    """Remembers what was written, and is out of reach where that is asked for."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 0.0)
        self.written: list[tuple[str, float]] = []
        self.is_away = False
        #: What another host does at the moment after this one has written.
        self.meanwhile: list[Callable[[str], object]] = []

    def put(self, name: str, value: str, ttl: float) -> str:
        self.written.append((value, ttl))
        result = super().put(name, value, ttl)
        if self.meanwhile:
            self.meanwhile.pop()(name)
        return result

    def lose(self) -> None:
        """As Redis loses what it had, where it is restarted without a copy on disk."""
        self._kept.clear()

    def kept(self, name: str) -> str | None:
        if self.is_away:
            raise StorageUnavailable
        return super().kept(name)


class Host:
    """A gunicorn of two workers, of which the first one writes."""

    def __init__(self, storage: LocalStorage) -> None:
        self.page = MetricsPage(2)
        self.counters = [self.page.take(number) for number in range(2)]
        self.uses = [KeyUses(storage, lambda: _KEYS) for _ in range(2)]

    def note(self, digest: str, now: float) -> None:
        self.page.key_uses.note(digest, now)

    def turn(self, worker: int = 0) -> None:
        """What a worker does once a minute."""
        metrics.use(self.counters[worker])
        self.uses[worker].share()

    def last_use(self, digest: str) -> float | None:
        return last_use_of(digest, self.uses[1].read(self.page.key_uses))


@pytest.fixture
def storage() -> Iterator[Counting]:
    yield Counting()
    metrics.use(None)


def test_the_latest_use_on_any_host_counts(storage: Counting) -> None:
    one, other = Host(storage), Host(storage)
    one.note(_ALICE, 6_000.0)
    one.note(_BOB, 6_120.0)
    other.note(_ALICE, 6_060.0)
    other.turn()
    one.turn()
    for host in (one, other):
        assert [host.last_use(each) for each in _KEYS] == [6_060.0, 6_120.0, None]
    assert Host(storage).last_use(_BOB) == 6_120.0, "a host that has just begun knows nothing"


def test_a_use_is_written_once_by_one_worker(storage: Counting) -> None:
    host = Host(storage)
    host.note(_ALICE, 6_001.0)
    host.turn(worker=1)
    assert storage.written == []
    for _ in range(3):
        host.note(_ALICE, 6_002.0)
        host.turn()
    host.note(_ALICE, 6_061.0)
    host.turn()
    assert storage.written == [("6000", KEPT), ("6060", KEPT)]
    host.counters[0].say(Health.DRAINING)
    host.turn(worker=1)
    assert len(storage.written) == 2, "another worker has written what was there"


def test_an_earlier_use_that_another_host_writes_at_the_same_time_does_not_stay(
    storage: Counting,
) -> None:
    host = Host(storage)
    host.note(_ALICE, 12_000.0)
    storage.meanwhile.append(lambda name: storage.put(name, "6000", KEPT))
    host.turn()
    assert Host(storage).last_use(_ALICE) == 12_000.0


def test_a_use_that_another_host_has_overwritten_is_written_at_the_next_turn(
    storage: Counting,
) -> None:
    host = Host(storage)
    host.note(_ALICE, 12_000.0)
    host.turn()
    storage.put(f"key use {short(_ALICE)}", "6000", KEPT)
    host.turn()
    assert Host(storage).last_use(_ALICE) == 12_000.0


def test_a_store_that_has_lost_everything_knows_again_at_the_next_turn(storage: Counting) -> None:
    host = Host(storage)
    host.note(_ALICE, 6_000.0)
    host.turn()
    storage.lose()
    host.turn()
    assert Host(storage).last_use(_ALICE) == 6_000.0


def test_a_worker_that_leaves_writes_what_is_new(storage: Counting) -> None:
    host = Host(storage)
    host.note(_ALICE, 6_000.0)
    metrics.use(host.counters[0])
    host.counters[0].say(Health.DRAINING)
    host.uses[0].finish()
    assert Host(storage).last_use(_ALICE) == 6_000.0


def test_without_the_store_a_host_knows_its_own(storage: Counting) -> None:
    host = Host(storage)
    host.note(_ALICE, 6_000.0)
    storage.is_away = True
    host.turn()
    assert host.last_use(_ALICE) == 6_000.0
    storage.is_away = False
    host.turn()
    assert Host(storage).last_use(_ALICE) == 6_000.0
