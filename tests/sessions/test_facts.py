"""What replicas tell each other beside their sessions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec
import pytest

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.sessions import facts
from mcp_proxy.sessions.facts import ERA_TIME, CallerKey, SharedEra
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.storage.session import Session
from mcp_proxy.wire.headers import is_session_id
from tests.support.threads import run_together


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(facts, "time", self)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest, redis_url: str, redis_prefix: str) -> Iterator[Storage]:
    """A store of each kind."""
    if request.param == "memory":
        yield Everybody()
        return
    found = RedisStorage(redis_url, prefix=redis_prefix)
    yield found
    found.close()


class Everybody(LocalStorage):
    """A store that counts as shared, and can be away."""

    is_shared = True
    is_away = False

    def load(self, session_id: str) -> Session:
        if self.is_away:
            raise StorageUnavailable
        return super().load(session_id)


# --- the key of callers --------------------------------------------------------------------------


def test_the_digest_of_a_caller_is_the_same_at_every_replica(storage: Storage) -> None:
    keys = [CallerKey(storage) for _ in range(8)]
    digests = run_together([lambda key=key: key.digest(b"Bearer me") for key in keys])
    assert len(set(digests)) == 1
    assert keys[0].digest(b"Bearer you") != digests[0]
    assert len(digests[0]) == 64


def test_the_digest_of_a_caller_cannot_be_made_without_the_key(storage: Storage) -> None:
    assert CallerKey(storage).digest(b"me") != hashlib.sha256(b"me").hexdigest()


def test_in_memory_the_key_is_that_of_the_process_and_no_record() -> None:
    storage = LocalStorage()
    assert CallerKey(storage).digest(b"me") == CallerKey(LocalStorage()).digest(b"me")
    assert storage.count == 0


def test_the_key_outlives_the_time_of_its_record(clock: Clock) -> None:
    now = 0.0
    storage = Everybody(ttl=100, clock=lambda: now)
    key = CallerKey(storage)
    digest = key.digest(b"me")
    for _ in range(10):
        now += 30
        clock.now += 30
        assert key.digest(b"me") == digest
    assert CallerKey(storage).digest(b"me") == digest


def test_a_key_that_the_store_has_lost_is_written_anew(clock: Clock) -> None:
    storage = Everybody()
    key = CallerKey(storage)
    digest = key.digest(b"me")
    storage.delete("caller key")
    clock.now += 61
    assert key.digest(b"me") == digest
    assert CallerKey(storage).digest(b"me") == digest


def test_the_first_key_in_the_store_is_everybody_s(clock: Clock) -> None:
    storage = Everybody()
    one = CallerKey(storage)
    before = one.digest(b"me")
    storage.delete("caller key")
    facts.use_key(bytes(facts.KEY_BYTES))  # as in another process
    other = CallerKey(storage).digest(b"me")
    assert one.digest(b"me") == before != other
    clock.now += 61
    assert one.digest(b"me") == other


def test_a_key_that_is_known_serves_while_the_store_is_away(clock: Clock) -> None:
    storage = Everybody()
    key, late = CallerKey(storage), CallerKey(storage)
    digest = key.digest(b"me")
    storage.is_away = True
    clock.now += 61
    assert key.digest(b"me") == digest
    with pytest.raises(StorageUnavailable):
        late.digest(b"me")
    storage.is_away = False
    assert late.digest(b"me") == digest


def test_no_client_can_name_the_key() -> None:
    storage = Everybody()
    CallerKey(storage).digest(b"me")
    assert storage.exists("caller key")
    assert not is_session_id("caller key")


# --- the era of a server -------------------------------------------------------------------------


def test_the_era_of_a_server_is_told_to_every_replica(storage: Storage) -> None:
    one, other = (SharedEra(storage, ["npx", "server"]) for _ in range(2))
    assert one.is_modern() is None
    for is_modern in (True, False, True):
        one.note(is_modern)
        assert other.is_modern() is is_modern
    assert SharedEra(storage, ["npx", "another"]).is_modern() is None


def test_an_era_is_told_by_several_at_once(storage: Storage) -> None:
    eras = [SharedEra(storage, ["server"]) for _ in range(6)]
    run_together([lambda era=era: era.note(True) for era in eras])
    assert {era.is_modern() for era in eras} == {True}


@pytest.mark.parametrize(("seconds", "is_known"), [(ERA_TIME - 1, True), (ERA_TIME + 1, False)])
def test_an_era_is_told_for_a_while(seconds: float, is_known: bool) -> None:
    storage = Everybody()
    era = SharedEra(storage, ["server"])
    era.note(True)
    record = storage.peek(era.record_id)
    assert record is not None
    older = msgspec.structs.replace(record, created_at=record.created_at - seconds)
    assert storage.swap(record, older)
    assert (era.is_modern() is not None) is is_known
