"""Sessions in a directory, from the end of one worker to the start of the next."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from mcp_proxy.errors import ConfigError
from mcp_proxy.server.session_files import require_private, store, take, wait_for_others


def taken(directory: Path, slot: int, worker_count: int) -> bytes:
    """What a worker has, which begins."""
    with take(str(directory), slot, worker_count) as records:
        return records


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    directory = tmp_path / "sessions"
    require_private(str(directory))
    return directory


def test_a_missing_directory_is_made_for_this_user_alone(kept: Path) -> None:
    assert kept.stat().st_mode & 0o777 == 0o700
    require_private(str(kept))
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_directory_that_others_can_enter_is_refused(kept: Path, mode: int) -> None:
    kept.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 700 {kept}"):
        require_private(str(kept))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is no directory"):
        require_private(str(file))
    with pytest.raises(ConfigError, match="No such file or directory"):
        require_private(str(tmp_path / "a" / "b"))


def test_a_directory_of_somebody_else_is_refused(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: kept.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        require_private(str(kept))


def test_a_directory_that_cannot_be_written_to_is_refused(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mcp_proxy.server.session_files.tempfile.TemporaryFile", full)
    with pytest.raises(ConfigError, match=f"session_dir {kept}: No space left on device"):
        require_private(str(kept))


def test_each_slot_has_its_own_and_the_first_one_the_rest(kept: Path) -> None:
    for slot in range(4):
        store(str(kept), slot, f"{slot}\n".encode())
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in kept.iterdir())
    assert taken(kept, 1, 2) == b"1\n"
    assert taken(kept, 0, 2) == b"0\n2\n3\n"
    assert taken(kept, 0, 2) == b""
    assert list(kept.iterdir()) == []


def test_a_worker_that_begins_waits_until_the_sessions_of_others_are_there(kept: Path) -> None:
    """Else it would tell their clients that they are over."""
    store(str(kept), 0, b"mine\n")
    store(str(kept), 1, b"another's\n")
    has_waited = threading.Event()

    def wait() -> None:
        wait_for_others(str(kept), 0, 2)
        has_waited.set()

    with take(str(kept), 1, 2):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not has_waited.wait(0.1)
    assert has_waited.wait(10)
    waiting.join()
    assert taken(kept, 0, 2) == b"mine\n"


def test_nobody_waits_for_ever(kept: Path) -> None:
    store(str(kept), 1, b"of a worker that does not begin\n")
    began = time.monotonic()
    wait_for_others(str(kept), 0, 2)
    assert 4 < time.monotonic() - began < 10


def test_what_cannot_be_kept_is_said(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.rmdir()
    store(str(kept), 0, b"a\nb\n")
    assert f"2 sessions are lost, session_dir {kept}: No such file or directory" in caplog.text


def test_other_files_stay(kept: Path) -> None:
    (kept / "README").write_text("mine")
    assert taken(kept, 0, 1) == b""
    assert (kept / "README").read_text() == "mine"


def test_what_cannot_be_read_is_said_and_stays(
    kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (kept / "0-1.sessions").mkdir()
    assert taken(kept, 0, 1) == b""
    assert "cannot be read: Is a directory" in caplog.text
    assert (kept / "0-1.sessions").is_dir()
