"""The file of API keys: its form, and what follows when it changes."""

from __future__ import annotations

import hashlib
import logging
import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.auth.key_file import line_of
from mcp_proxy.auth.keys import ApiKeys, Key, digest_of, new_key, parse, parse_line, read
from mcp_proxy.errors import ConfigError, NotPermitted
from tests.support.callers import KeyFile
from tests.support.waiting import eventually

HEX = "ab" * 32

names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=64)
words = st.frozensets(names, min_size=1, max_size=4)
keys = st.builds(
    Key,
    name=names,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    servers=st.none() | words,
    scopes=st.just(frozenset[str]()) | words,
)


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys")


@pytest.fixture
def looking(file: KeyFile) -> Iterator[ApiKeys]:
    """Keys whose file is looked at."""
    keys = ApiKeys(file.text)
    keys.start()
    yield keys
    keys.stop()


# --- its form ------------------------------------------------------------------------------------


def test_a_line_says_whose_key_it_is_and_what_for() -> None:
    key = parse_line(f"alice sha256:{HEX.upper()} server=a,b scope=admin expires=2027-01-31 # note")
    assert key == Key(
        "alice", HEX, frozenset({"a", "b"}), frozenset({"admin"}), expires=1801353600.0
    )
    assert key.principal.name == "key:alice"
    assert key.principal.scopes == {"admin"}
    assert parse_line(f"bob sha256:{HEX}") == Key("bob", HEX)


@pytest.mark.parametrize("line", ["", "   ", "# alice sha256:", "\t#"])
def test_comments_and_empty_lines_are_no_keys(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize("date", ["2027-01-31T00:00Z", "2027-01-31T01:00+01:00", "2027-01-31"])
def test_a_date_is_in_utc_unless_it_names_a_zone(date: str) -> None:
    key = parse_line(f"a sha256:{HEX} expires={date}")
    assert key is not None
    assert key.expires == 1801353600.0


@given(keys)
def test_a_key_is_what_its_line_says(key: Key) -> None:
    assert parse_line(line_of(key, None)) == key


@given(st.text())
def test_any_text_is_keys_or_a_sentence(text: str) -> None:
    complaint = ""
    try:
        parse(text)
    except ConfigError as error:
        complaint = str(error)
    assert not complaint or complaint.startswith("line ")


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice mcpk_secret",
        f"alice md5:{HEX}",
        f"alice sha256:{HEX[1:]}",
        f"a/b sha256:{HEX}",
        f"alice sha256:{HEX} secret",
        f"alice sha256:{HEX} servers=a",
        f"alice sha256:{HEX} server=",
        f"alice sha256:{HEX} server=a,,b",
        f"alice sha256:{HEX} server=a server=b",
        f"alice sha256:{HEX} expires=secret",
        f"alice sha256:{HEX} expires=",
    ],
)
def test_what_is_no_key_is_refused_by_its_number_and_not_shown(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^line 2: ") as caught:
        parse(f"# keys\n{line}")
    assert "secret" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 3: the same key is in line 1"):
        parse(f"a sha256:{HEX}\n\nb sha256:{HEX}")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Some editors write one."""
    path = tmp_path / "keys"
    path.write_text(f"\ufeffa sha256:{HEX}\r\nb sha256:{'cd' * 32}\r\n")
    assert [key.name for key in read(str(path))] == ["a", "b"]


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^api_keys {path}: "):
        ApiKeys(str(path))


def test_a_key_has_256_random_bits_and_its_line_a_plain_digest() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert {len(key) for key in made} == {len("mcpk_") + 43}
    key = made.pop()
    assert digest_of(key) == hashlib.sha256(key.encode()).hexdigest()


# --- who has a key -------------------------------------------------------------------------------


def test_several_keys_of_a_name_are_one_principal(file: KeyFile) -> None:
    old, new = file.add("alice"), file.add("alice")
    keys = ApiKeys(file.text)
    callers = [keys.caller(key, "default") for key in (old, new)]
    assert [caller and caller.principal.name for caller in callers] == ["key:alice"] * 2


@pytest.mark.parametrize("shown", ["", "x", "mcpk_", "\u00e4", "x" * 10_000])
def test_a_key_that_nobody_has_is_nobodys(file: KeyFile, shown: str) -> None:
    file.add("alice")
    assert ApiKeys(file.text).caller(shown, "default") is None


def test_a_key_is_for_its_servers_alone(file: KeyFile) -> None:
    key = file.add("alice", servers=frozenset({"a", "b"}))
    keys = ApiKeys(file.text)
    assert keys.caller(key, "a") is not None
    for other in ("c", None):
        with pytest.raises(NotPermitted, match="not for this server"):
            keys.caller(key, other)


def test_a_key_that_has_expired_is_nobodys(file: KeyFile) -> None:
    assert ApiKeys(file.text).caller(file.add("alice", expires="2020-01-01"), None) is None


# --- when the file changes -----------------------------------------------------------------------


def test_changes_are_noticed_within_a_second(file: KeyFile, looking: ApiKeys) -> None:
    key = file.add("alice")
    began = time.monotonic()
    eventually(lambda: looking.caller(key, None), 2)
    assert time.monotonic() - began < 1
    caller = looking.caller(key, None)
    assert caller is not None
    assert caller.is_known()
    file.remove("alice")
    eventually(lambda: not caller.is_known(), 1)
    assert looking.caller(key, None) is None


def test_a_key_that_becomes_somebody_elses_is_known_no_longer(file: KeyFile) -> None:
    key = file.add("alice")
    keys = ApiKeys(file.text)
    caller = keys.caller(key, "a")
    assert caller is not None
    keys.use([Key("alice", digest_of(key), frozenset({"a"}))])
    assert caller.is_known()
    keys.use([Key("alice", digest_of(key), frozenset({"b"}))])
    assert not caller.is_known()
    keys.use([Key("bob", digest_of(key))])
    assert not caller.is_known()


@pytest.mark.parametrize("broken", ["alice hunter2", "\0"])
def test_a_file_with_a_mistake_changes_nothing_and_is_in_the_log(
    file: KeyFile, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = file.add("alice")
    keys = ApiKeys(file.text)
    with caplog.at_level(logging.ERROR):
        file.write(broken)
        keys.look()
        keys.look()
    (record,) = caplog.records
    assert record.getMessage().endswith("the keys stay as they were")
    assert "hunter2" not in record.getMessage()
    assert keys.caller(key, None) is not None
    file.write("")
    keys.look()
    assert keys.caller(key, None) is None


def test_a_file_that_is_gone_changes_nothing(
    file: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    key = file.add("alice")
    keys = ApiKeys(file.text)
    file.path.unlink()
    keys.look()
    assert "No such file" in caplog.text
    assert keys.caller(key, None) is not None


def test_nothing_is_read_again_while_nothing_changes(file: KeyFile) -> None:
    keys = ApiKeys(file.text)
    keys.use([Key("alice", digest_of("x"))])
    keys.look()
    assert keys.caller("x", None) is not None
    assert read(file.text) == []
