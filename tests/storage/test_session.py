"""The session record and its form in a store."""

from __future__ import annotations

import json
import time
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.errors import StorageError
from mcp_proxy.storage import session
from mcp_proxy.storage.session import BACKEND_URL, MAX_RECORD, Session
from tests.storage.stores import record


def test_a_new_session_begins_now() -> None:
    before = time.time()
    made = session.new_session("s", "streamable", backend_url="worker://a/b")
    assert (made.id, made.type) == ("s", "streamable")
    assert before <= made.created_at == made.updated_at <= time.time()
    assert made.metadata == {BACKEND_URL: "worker://a/b"}


def test_the_backend_url_is_metadata() -> None:
    assert record(backend_url="http://h:1").backend_url == "http://h:1"
    assert record().backend_url is None


def test_a_change_is_a_new_record_and_the_old_one_stays() -> None:
    old = record(a="1", b="2", c="3")
    new = old.with_metadata(b="changed", c=None, d="new", absent=None)
    assert new.metadata == {"a": "1", "b": "changed", "d": "new"}
    assert old == record(a="1", b="2", c="3")


def test_a_change_says_when_it_was() -> None:
    old = record()
    new = old.with_metadata()
    assert (new.id, new.type, new.created_at) == (old.id, old.type, old.created_at)
    assert new.updated_at > old.updated_at


def test_a_record_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        record().id = "t"  # type: ignore[misc]


def test_a_record_is_stored_as_json() -> None:
    assert json.loads(session.encode(record(a="1"))) == {
        "id": "s",
        "type": "mcp",
        "created_at": 1.5,
        "updated_at": 2.5,
        "metadata": {"a": "1"},
    }


_metadata = st.dictionaries(st.text(), st.text(), max_size=5)
_times = st.floats(0, 2**40)


@given(st.text(), st.text(), _times, _times, _metadata)
def test_every_record_comes_back_from_its_bytes(
    session_id: str, kind: str, created: float, updated: float, metadata: dict[str, str]
) -> None:
    made = Session(
        id=session_id, type=kind, created_at=created, updated_at=updated, metadata=metadata
    )
    assert session.decode(session.encode(made)) == made


@given(_metadata, st.randoms())
def test_equal_records_give_equal_bytes(metadata: dict[str, str], random: Random) -> None:
    pairs = list(metadata.items())
    random.shuffle(pairs)
    one, other = record(), record()
    one.metadata.update(metadata)
    other.metadata.update(pairs)
    assert one == other
    assert session.encode(one) == session.encode(other)


def test_whole_seconds_give_the_same_bytes_as_numbers_of_either_kind() -> None:
    whole = Session(id="s", type="mcp", created_at=1, updated_at=2, metadata={})
    exact = Session(id="s", type="mcp", created_at=1.0, updated_at=2.0, metadata={})
    assert session.encode(whole) == session.encode(exact)


def test_the_size_of_a_record_is_counted_in_bytes() -> None:
    characters = (MAX_RECORD - 200) // 2
    session.encode(record(a="é" * characters))
    with pytest.raises(StorageError):
        session.encode(record(a="é" * (characters + 200)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b'{"id":1,"type":"mcp","created_at":1,"updated_at":1,"metadata":{}}',
        b'{"id":"s","type":"mcp","created_at":"now","updated_at":1,"metadata":{}}',
        b'{"id":"s","type":"mcp","created_at":1e999,"updated_at":1,"metadata":{}}',
        b'{"id":"s","type":"mcp","created_at":1,"updated_at":1,"metadata":{"a":1}}',
        b'{"id":"\xff","type":"mcp","created_at":1,"updated_at":1,"metadata":{}}',
        b'{"id":"s","more":' + b"[" * 100_000,
        b"\x80\x04not json at all",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_bytes_that_are_no_record_are_a_storage_error(data: bytes) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        session.decode(data)


@given(st.binary())
def test_any_bytes_are_a_record_or_a_storage_error(data: bytes) -> None:
    with pytest.raises(StorageError):
        session.decode(data)


def test_fields_of_a_later_version_are_left_alone() -> None:
    data = session.encode(record(a="1"))[:-1] + b',"later":[1]}'
    assert session.decode(data) == record(a="1")


def test_what_a_newer_version_added_is_kept_when_the_record_changes() -> None:
    data = json.dumps({**json.loads(session.encode(record(a="1"))), "z": {"n": [1]}, "b": None})
    read = session.decode(data.encode())
    assert read == record(a="1")
    changed = read.with_metadata(a="2").with_metadata(c="3")
    again = json.loads(session.encode(changed))
    assert (again["z"], again["b"]) == ({"n": [1]}, None)
    assert again["metadata"] == {"a": "2", "c": "3"}
    assert session.decode(session.encode(changed)).others.keys() == {"b", "z"}


_NAMES = st.text(max_size=8).filter(lambda name: name not in {*Session.__struct_fields__, "signed"})
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(others=st.dictionaries(_NAMES, _VALUES, max_size=4), seed=st.integers(0, 99))
def test_any_record_that_reads_well_keeps_its_members_in_any_order(
    others: dict[str, object], seed: int
) -> None:
    members = list({**json.loads(session.encode(record(a="1"))), **others}.items())
    Random(seed).shuffle(members)
    read = session.decode(json.dumps(dict(members)).encode())
    assert read == record(a="1")
    encoded = session.encode(read)
    assert json.loads(encoded) == dict(members)
    assert session.encode(session.decode(encoded)) == encoded
