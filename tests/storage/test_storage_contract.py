"""What every store promises, tried on memory and on Redis alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.errors import ProxyError, SessionExists, SessionNotFound, StorageError
from mcp_proxy.storage.records import ISSUED_TTL, Storage
from mcp_proxy.storage.session import MAX_RECORD, Session, encode
from tests.storage.stores import TTL, House, LocalHouse, RedisHouse, record
from tests.support.redis_server import RedisServer
from tests.support.threads import run_together

#: An id as `SessionManager.mint_id` makes it.
MINTED = "mcp-0123abcd-" + "0123456789abcdef" * 2

THREADS = 16
ROUNDS = 10


@pytest.fixture(params=["local", "redis", "redis with decode_responses"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """Each kind of store in turn."""
    if request.param == "local":
        yield LocalHouse()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    prefix: str = request.getfixturevalue("redis_prefix")
    with server.client() as admin, server.client(decode_responses=True) as texts:
        client = server.url if request.param == "redis" else texts
        house = RedisHouse(client, admin, prefix)
        yield house
        house.storage.close()


@pytest.fixture
def storage(house: House) -> Storage:
    """The store of the house."""
    return house.storage


def filled(size: int) -> Session:
    """A record of exactly `size` bytes."""
    return record(big="x" * (size - len(encode(record(big="")))))


class TestCreate:
    """`create` stores a new record, at once and only once."""

    def test_a_created_record_is_loaded_as_it_was(self, storage: Storage) -> None:
        session = record(backend_url="worker://a/b", note='é 😀 "\\\n\0')
        storage.create(session)
        assert storage.load("s") == session

    def test_a_record_without_metadata_is_a_record(self, storage: Storage) -> None:
        storage.create(record())
        assert storage.load("s") == record()

    def test_times_keep_every_digit(self, storage: Storage) -> None:
        session = Session(
            id="s", type="sse", created_at=1765432109.1234567, updated_at=0.1 + 0.2, metadata={}
        )
        storage.create(session)
        assert storage.load("s") == session

    @pytest.mark.parametrize("session_id", ["*", "a:b", "{a}b", "[x]?", "%s", '"', "x" * 1024])
    def test_any_id_that_the_wire_allows_is_a_key(self, storage: Storage, session_id: str) -> None:
        storage.create(record(session_id))
        assert storage.load(session_id) == record(session_id)
        assert not storage.exists("other")

    def test_an_id_that_is_taken_is_refused_and_its_record_stays(self, storage: Storage) -> None:
        storage.create(record(a="first"))
        with pytest.raises(SessionExists):
            storage.create(record(a="second"))
        assert storage.load("s") == record(a="first")

    def test_a_refused_create_does_not_prolong_the_record(self, house: House) -> None:
        house.storage.create(record(a="first"))
        house.pass_time(TTL * 0.9)
        with pytest.raises(SessionExists):
            house.storage.create(record(a="second"))
        house.pass_time(TTL * 0.2)
        assert not house.storage.exists("s")

    def test_an_id_is_free_again_after_delete(self, storage: Storage) -> None:
        storage.create(record(a="first"))
        storage.delete("s")
        storage.create(record(a="second"))
        assert storage.load("s") == record(a="second")

    def test_an_id_is_free_again_after_its_record_expired(self, house: House) -> None:
        house.storage.create(record(a="first"))
        house.pass_time(TTL + 1)
        house.storage.create(record(a="second"))
        assert house.storage.load("s") == record(a="second")

    def test_the_largest_record_fits(self, storage: Storage) -> None:
        storage.create(filled(MAX_RECORD))
        assert storage.load("s") == filled(MAX_RECORD)

    def test_a_record_that_is_too_large_is_refused_and_leaves_nothing(
        self, storage: Storage
    ) -> None:
        with pytest.raises(StorageError, match=str(MAX_RECORD)):
            storage.create(filled(MAX_RECORD + 1))
        assert not storage.exists("s")
        assert not storage.issued("s")

    def test_one_of_many_threads_creates(self, storage: Storage) -> None:
        for number in range(ROUNDS):
            records = [record(f"s{number}", thread=str(thread)) for thread in range(THREADS)]
            outcomes = run_together([_creating(storage, session) for session in records])
            (winner,) = itertools.compress(records, outcomes)
            assert storage.load(winner.id) == winner

    def test_threads_with_ids_of_their_own_all_create(self, storage: Storage) -> None:
        records = [record(f"s{thread}") for thread in range(THREADS)]
        assert all(run_together([_creating(storage, session) for session in records]))
        assert [storage.load(session.id) for session in records] == records


class TestLoad:
    """`load` gives the record and starts its time to live anew."""

    def test_what_was_never_created_is_not_found(self, storage: Storage) -> None:
        with pytest.raises(SessionNotFound):
            storage.load("s")

    def test_a_record_expires_when_nobody_asks_for_it(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(TTL + 1)
        with pytest.raises(SessionNotFound):
            house.storage.load("s")

    def test_a_record_lives_until_then(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(TTL - 30)
        assert house.storage.load("s") == record()

    def test_load_starts_the_time_to_live_anew(self, house: House) -> None:
        house.storage.create(record())
        for _ in range(3):
            house.pass_time(TTL * 0.9)
            house.storage.load("s")
        house.pass_time(TTL + 1)
        assert not house.storage.exists("s")


class TestExists:
    """`exists` looks and touches nothing."""

    def test_it_tells_what_is_there(self, storage: Storage) -> None:
        assert storage.exists("s") is False
        storage.create(record())
        assert storage.exists("s") is True

    def test_the_time_to_live_runs_on(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(TTL * 0.9)
        assert house.storage.exists("s")
        house.pass_time(TTL * 0.2)
        assert not house.storage.exists("s")


class TestPeek:
    """`peek` gives the record and touches nothing."""

    def test_it_gives_what_is_stored(self, storage: Storage) -> None:
        assert storage.peek("s") is None
        storage.create(record(a="1"))
        assert storage.peek("s") == record(a="1")
        assert storage.swap(record(a="1"), record(a="2"))
        assert storage.peek("s") == record(a="2")
        storage.delete("s")
        assert storage.peek("s") is None

    def test_the_time_to_live_runs_on(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(TTL * 0.9)
        assert house.storage.peek("s") == record()
        house.pass_time(TTL * 0.2)
        assert house.storage.peek("s") is None

    def test_it_creates_nothing(self, storage: Storage) -> None:
        assert storage.peek("s") is None
        assert not storage.exists("s")
        assert not storage.issued("s")


class TestSwap:
    """`swap` is a compare-and-set of the whole record."""

    def test_it_replaces_what_is_stored(self, storage: Storage) -> None:
        storage.create(record(a="1"))
        assert storage.swap(record(a="1"), record(b="2")) is True
        assert storage.load("s") == record(b="2")

    def test_a_loaded_record_can_be_swapped(self, storage: Storage) -> None:
        storage.create(record(z="1", a="2"))
        loaded = storage.load("s")
        assert storage.swap(loaded, loaded.with_metadata(m="3", z=None))
        assert storage.load("s").metadata == {"a": "2", "m": "3"}

    @pytest.mark.parametrize(
        "stored",
        [
            record(a="2"),
            record(a="1", b="2"),
            record(),
            msgspec.structs.replace(record(a="1"), updated_at=3.5),
            msgspec.structs.replace(record(a="1"), type="sse"),
        ],
    )
    def test_any_difference_from_what_is_stored_loses(
        self, storage: Storage, stored: Session
    ) -> None:
        storage.create(stored)
        assert storage.swap(record(a="1"), record(a="new")) is False
        assert storage.load("s") == stored

    def test_the_second_with_the_same_old_record_loses(self, storage: Storage) -> None:
        storage.create(record(a="1"))
        assert storage.swap(record(a="1"), record(a="2"))
        assert not storage.swap(record(a="1"), record(a="3"))
        assert storage.load("s") == record(a="2")

    def test_records_that_are_equal_are_the_same_record(self, storage: Storage) -> None:
        storage.create(record(a="1", b="2"))
        assert storage.swap(record(b="2", a="1"), record(a="new"))

    def test_times_that_are_equal_are_the_same_time(self, storage: Storage) -> None:
        storage.create(Session(id="s", type="mcp", created_at=1, updated_at=2, metadata={}))
        assert storage.swap(storage.load("s"), record(a="new"))

    def test_it_starts_the_time_to_live_anew(self, house: House) -> None:
        house.storage.create(record(a="1"))
        house.pass_time(TTL * 0.9)
        assert house.storage.swap(record(a="1"), record(a="2"))
        house.pass_time(TTL * 0.9)
        assert house.storage.exists("s")
        house.pass_time(TTL * 0.2)
        assert not house.storage.exists("s")

    def test_a_lost_swap_does_not_prolong_the_record(self, house: House) -> None:
        house.storage.create(record(a="1"))
        house.pass_time(TTL * 0.9)
        assert not house.storage.swap(record(a="0"), record(a="2"))
        house.pass_time(TTL * 0.2)
        assert not house.storage.exists("s")

    def test_it_creates_nothing(self, storage: Storage) -> None:
        assert storage.swap(record(a="1"), record(a="2")) is False
        assert not storage.exists("s")
        assert not storage.issued("s")

    def test_it_never_brings_back_what_was_deleted(self, storage: Storage) -> None:
        storage.create(record(a="1"))
        storage.delete("s")
        assert storage.swap(record(a="1"), record(a="2")) is False
        assert not storage.exists("s")

    def test_it_never_brings_back_what_has_expired(self, house: House) -> None:
        house.storage.create(record(a="1"))
        house.pass_time(TTL + 1)
        assert house.storage.swap(record(a="1"), record(a="2")) is False
        assert not house.storage.exists("s")

    def test_a_record_that_is_too_large_is_refused_and_the_old_one_stays(
        self, storage: Storage
    ) -> None:
        storage.create(record(a="1"))
        with pytest.raises(StorageError, match=str(MAX_RECORD)):
            storage.swap(record(a="1"), filled(MAX_RECORD + 1))
        assert storage.load("s") == record(a="1")

    def test_one_of_many_threads_swaps(self, storage: Storage) -> None:
        storage.create(record(a="start"))
        for number in range(ROUNDS):
            old = storage.load("s")
            new = [record(a=f"{number} {thread}") for thread in range(THREADS)]
            outcomes = run_together([_swapping(storage, old, session) for session in new])
            (winner,) = itertools.compress(new, outcomes)
            assert storage.load("s") == winner

    def test_no_change_is_lost_among_many_threads(self, storage: Storage) -> None:
        def add_one(thread: str) -> None:
            while True:
                old = storage.load("s")
                count = int(old.metadata["count"]) + 1
                if storage.swap(old, record(count=str(count), by=thread)):
                    return

        def adding(thread: str) -> Callable[[], None]:
            def add_many() -> None:
                for _ in range(50):
                    add_one(thread)

            return add_many

        storage.create(record(count="0"))
        run_together([adding(str(number)) for number in range(8)])
        assert storage.load("s").metadata["count"] == "400"

    def test_a_delete_among_swaps_is_final(self, storage: Storage) -> None:
        def deleting() -> bool:
            storage.delete("s")
            return False

        for number in range(ROUNDS):
            old = record(a=str(number))
            storage.create(old)
            new = [record(a=f"{number} {thread}") for thread in range(THREADS - 1)]
            swaps = [_swapping(storage, old, session) for session in new]
            outcomes = run_together([*swaps[:8], deleting, *swaps[8:]])
            assert sum(outcomes) <= 1
            assert not storage.exists("s")


class TestDelete:
    """`delete` is final and may be repeated."""

    def test_a_deleted_record_is_gone(self, storage: Storage) -> None:
        storage.create(record())
        storage.delete("s")
        assert not storage.exists("s")
        with pytest.raises(SessionNotFound):
            storage.load("s")

    def test_it_may_be_absent(self, storage: Storage) -> None:
        storage.delete("s")
        storage.create(record())
        storage.delete("s")
        storage.delete("s")
        assert not storage.exists("s")

    def test_others_stay(self, storage: Storage) -> None:
        storage.create(record("s"))
        storage.create(record("t"))
        storage.delete("s")
        assert storage.load("t") == record("t")


class TestIssued:
    """`issued` remembers what `create` was called with."""

    def test_an_id_is_issued_from_create_on(self, storage: Storage) -> None:
        assert storage.issued("s") is False
        storage.create(record())
        assert storage.issued("s") is True
        assert storage.issued("t") is False

    def test_it_outlives_delete(self, storage: Storage) -> None:
        storage.create(record())
        storage.delete("s")
        assert storage.issued("s")

    def test_it_outlives_the_record_for_seven_days(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(ISSUED_TTL - 60)
        assert not house.storage.exists("s")
        assert house.storage.issued("s")
        house.pass_time(120)
        assert not house.storage.issued("s")

    def test_asking_does_not_prolong_anything(self, house: House) -> None:
        house.storage.create(record())
        house.pass_time(TTL * 0.9)
        assert house.storage.issued("s")
        house.pass_time(TTL * 0.2)
        assert not house.storage.exists("s")

    def test_an_id_of_our_own_form_leaves_no_marker(self, storage: Storage) -> None:
        storage.create(record(MINTED))
        assert storage.load(MINTED) == record(MINTED)
        assert not storage.issued(MINTED)

    @pytest.mark.parametrize(
        "session_id",
        [MINTED + "0", MINTED[:-1], MINTED.upper(), "x" + MINTED, MINTED.replace("-", "_")],
        ids=["longer", "shorter", "upper case", "with a prefix", "other dashes"],
    )
    def test_an_id_of_almost_that_form_leaves_one(self, storage: Storage, session_id: str) -> None:
        storage.create(record(session_id))
        assert storage.issued(session_id)


class TestTheStoreItself:
    """`check` and `close`."""

    def test_a_store_that_works_passes_its_check(self, storage: Storage) -> None:
        storage.check()

    def test_it_may_be_closed_more_than_once(self, storage: Storage) -> None:
        storage.close()
        storage.close()

    def test_it_says_what_it_is(self, storage: Storage) -> None:
        assert type(storage).__name__ in repr(storage)


def _creating(storage: Storage, session: Session) -> Callable[[], bool]:
    def create() -> bool:
        try:
            storage.create(session)
        except SessionExists:
            return False
        return True

    return create


def _swapping(storage: Storage, old: Session, new: Session) -> Callable[[], bool]:
    return lambda: storage.swap(old, new)


# --- the twins -----------------------------------------------------------------------------------

_steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["create", "load", "exists", "peek", "delete", "issued"]), st.just(0)
        ),
        st.tuples(st.just("swap"), st.integers(0, 4)),
        st.tuples(st.just("wait"), st.sampled_from([TTL * 0.4, TTL * 0.7, TTL + 1, ISSUED_TTL])),
    ).flatmap(lambda step: st.tuples(st.just(step), st.sampled_from(["s", "t"]))),
    max_size=25,
)
_numbers = itertools.count()


class _Walk:
    """Takes the same steps in any house; every record that is written is a new one."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.written = {"s": [record("s")], "t": [record("t")]}

    def take(self, action: str, detail: float, session_id: str) -> object:
        """What came of a step: its value, or the kind of its error."""
        try:
            return self._take(action, detail, session_id)
        except ProxyError as error:
            return type(error)

    def _take(self, action: str, detail: float, session_id: str) -> object:
        storage = self.house.storage
        if action == "wait":
            self.house.pass_time(detail)
            return None
        if action == "create":
            storage.create(self._write(session_id))
            return None
        if action == "swap":
            old = self.written[session_id][-1 - min(int(detail), len(self.written[session_id]) - 1)]
            return storage.swap(old, self._write(session_id))
        return getattr(storage, action)(session_id)

    def _write(self, session_id: str) -> Session:
        written = self.written[session_id]
        written.append(record(session_id, number=str(len(written))))
        return written[-1]


@given(_steps)
def test_redis_does_whatever_memory_does(
    redis_server: RedisServer, steps: list[tuple[tuple[str, float], str]]
) -> None:
    with redis_server.client() as admin, redis_server.client() as client:
        prefix = f"twin-{next(_numbers)}:"
        walks = [_Walk(LocalHouse()), _Walk(RedisHouse(client, admin, prefix))]
        for (action, detail), session_id in steps:
            local, remote = (walk.take(action, detail, session_id) for walk in walks)
            assert local == remote, (action, detail, session_id)
        _forget(admin, prefix)


def _forget(admin: redis.Redis, prefix: str) -> None:
    for key in admin.scan_iter(f"{prefix}*"):
        admin.delete(key)


class TestKeep:
    """`keep` has the first writer's text stand for its time."""

    def test_what_is_kept_is_found_for_its_time(self, house: House) -> None:
        assert house.storage.kept("n") is None
        assert house.storage.keep("n", "é 1", 10) == "é 1"
        assert house.storage.kept("n") == "é 1"
        house.pass_time(9)
        assert house.storage.kept("n") == "é 1"
        house.pass_time(2)
        assert house.storage.kept("n") is None

    def test_the_first_writers_text_stands(self, house: House) -> None:
        assert house.storage.keep("n", "first", 10) == "first"
        assert house.storage.keep("n", "second", 1000) == "first"
        house.pass_time(11)
        assert house.storage.keep("n", "third", 10) == "third"
        assert house.storage.kept("n") == "third"

    def test_what_is_put_stands_in_place_of_what_was_kept(self, house: House) -> None:
        assert house.storage.keep("n", "first", 10) == "first"
        assert house.storage.put("n", "é 2", 20) == "é 2"
        house.pass_time(11)
        assert house.storage.kept("n") == "é 2"
        house.pass_time(10)
        assert house.storage.kept("n") is None

    def test_of_many_at_once_one_stands(self, storage: Storage) -> None:
        values = [str(number) for number in range(THREADS)]
        found = run_together([partial(storage.keep, "n", value, 60.0) for value in values])
        assert set(found) == {storage.kept("n")}

    def test_names_of_scopes_do_not_meet(self, storage: Storage) -> None:
        one, other = storage.scoped("one"), storage.scoped("other")
        assert one.keep("n", "a", 60) == "a"
        assert (other.kept("n"), storage.kept("n")) == (None, None)
        assert other.keep("n", "b", 60) == "b"
        assert one.kept("n") == "a"

    def test_a_text_is_no_session(self, storage: Storage) -> None:
        storage.keep("s", "text", 60)
        assert not storage.exists("s")
        storage.create(record("t"))
        assert storage.kept("t") is None
