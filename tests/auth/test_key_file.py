"""Changes of the file of keys: nothing of others is lost, and no reader sees half of one."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from mcp_proxy.auth.key_file import Unwritable, add, line_numbers, line_of, remove
from mcp_proxy.auth.keys import Key, digest_of, new_key, read
from mcp_proxy.errors import ConfigError
from tests.support.threads import run_together

HEX = "ab" * 32
OTHERS = f"# ours\n\nalice sha256:{HEX}   server=a  # first\nbroken line of somebody\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(OTHERS)
    return path


def test_a_line_is_added_at_the_end_and_the_rest_stays(file: Path) -> None:
    line = f"bob sha256:{'cd' * 32}"
    add(str(file), line)
    assert file.read_text() == f"{OTHERS}{line}\n"


def test_a_last_line_without_an_end_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# keys")
    add(str(path), f"bob sha256:{HEX}")
    assert path.read_text() == f"# keys\nbob sha256:{HEX}\n"


def test_the_lines_of_a_name_are_removed_and_the_rest_stays(file: Path) -> None:
    add(str(file), f"alice sha256:{'cd' * 32}")
    assert line_numbers(str(file), "alice") == [3, 5]
    assert remove(str(file), "alice") == 2
    assert file.read_text() == "# ours\n\nbroken line of somebody\n"
    assert remove(str(file), "alice") == 0


def test_a_line_behind_a_byte_order_mark_is_removed_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"\ufeffbob sha256:{HEX}\n# ours\n")
    assert line_numbers(str(path), "bob") == [1]
    assert remove(str(path), "bob") == 1
    assert path.read_text() == "# ours\n"


def test_a_new_file_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add(str(path), f"bob sha256:{HEX}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_keeps_its_mode_and_its_place_behind_a_link(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    add(str(link), f"bob sha256:{'cd' * 32}")
    assert link.is_symlink()
    assert "bob" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_changes_at_once_are_all_there_and_every_reader_sees_a_whole_file(tmp_path: Path) -> None:
    path = str(tmp_path / "keys")
    is_over = threading.Event()
    counts = [0]

    def add_one(number: int) -> None:
        add(path, line_of(Key(f"n{number}", digest_of(new_key())), None))

    def look() -> None:
        while not is_over.is_set():
            counts.append(len(read(path)) if os.path.exists(path) else 0)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        run_together([lambda number=number: add_one(number) for number in range(20)])
    finally:
        is_over.set()
        reader.join()
    assert counts == sorted(counts)
    assert {key.name for key in read(path)} == {f"n{number}" for number in range(20)}
    assert sorted(os.listdir(tmp_path)) == ["keys", "keys.lock"]


def test_a_line_that_no_reader_would_take_is_not_written(file: Path) -> None:
    with pytest.raises(ConfigError):
        add(str(file), "bob hunter2")
    assert file.read_text() == OTHERS


def test_a_place_where_nothing_can_be_written_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(Unwritable, match="cannot be written: No such file or directory"):
        add(str(tmp_path / "missing" / "keys"), f"bob sha256:{HEX}")


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.mkdir()
    with pytest.raises(ConfigError):
        add(str(path), f"bob sha256:{HEX}")
    assert sorted(os.listdir(tmp_path)) == ["keys", "keys.lock"]
