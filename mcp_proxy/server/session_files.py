"""Sessions that outlive a restart: each slot's in a file, from the end of one worker to the next.

Ids are credentials, so nobody but the proxy's user may read the directory. A file is there as a
whole or not at all, and is removed when it is read: no two workers have the same sessions. What
binds sessions to their callers outlives a restart with them: a key, in a file of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mcp_proxy.errors import ConfigError
from mcp_proxy.sessions.facts import KEY_BYTES

log = logging.getLogger(__name__)

_SUFFIX = ".sessions"

# Seconds for which a worker that begins waits for others to have their sessions.
_LONGEST_WAIT = 5.0
_POLL = 0.01


def require_private(directory: str) -> None:
    """Makes the directory where it is missing, for this user alone.

    Raises ConfigError where others can read it, or nothing can be written there.
    """
    path = Path(directory)
    with contextlib.suppress(OSError):  # then the next lines say what is wrong
        path.mkdir(mode=0o700)
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"session_dir {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"session_dir {directory} is no directory")
    if found.st_uid != os.getuid():
        raise ConfigError(
            f"session_dir {directory} belongs to another user (uid {found.st_uid}): whoever can "
            "write there could bring sessions in"
        )
    if found.st_mode & 0o077:
        raise ConfigError(
            f"session_dir {directory} can be read by others, and ids of sessions are credentials: "
            f"chmod 700 {directory}"
        )
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\n")
    except OSError as error:
        raise ConfigError(f"session_dir {directory}: {error.strerror}") from error


def caller_key(directory: str) -> bytes:
    """The key of the digests that stand for callers in these sessions, made where there is none.

    Raises ConfigError where it can be neither read nor kept.
    """
    path = Path(directory, "caller.key")
    unfinished = path.with_suffix(".unfinished")
    try:
        with contextlib.suppress(FileNotFoundError):
            found = path.read_bytes()
            if len(found) == KEY_BYTES:
                return found
        key = secrets.token_bytes(KEY_BYTES)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        raise ConfigError(f"session_dir {directory}: {error.strerror}") from error
    return key


def store(directory: str, slot: int, records: bytes) -> None:
    """Keeps records until a worker of this slot, or of the first one, begins; beside what is kept.

    What cannot be written is lost, and the log says so.
    """
    path = Path(directory, f"{slot}-{os.getpid()}{_SUFFIX}")
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(records)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        count = records.count(b"\n")
        log.error("%d sessions are lost, session_dir %s: %s", count, directory, error.strerror)
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def take(directory: str, slot: int, worker_count: int) -> Iterator[bytes]:
    """The records that were kept for a slot; the first one has those beyond that many workers.

    At the end of the block they are kept no longer. What cannot be read stays where it is, and the
    log says so.
    """
    found: dict[Path, bytes] = {}
    for path in _files(directory):
        if slot == _slot_of(path, worker_count):
            try:
                found[path] = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                log.error("sessions in %s cannot be read: %s", path, error.strerror)
    yield b"".join(found.values())
    for path in found:
        path.unlink(missing_ok=True)


def wait_for_others(directory: str, slot: int, worker_count: int) -> None:
    """Returns when the sessions of other slots have been taken, or nobody has for some seconds.

    A request for one of them would otherwise be told that its session is over.
    """
    until = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < until:
        if all(_slot_of(path, worker_count) == slot for path in _files(directory)):
            return
        time.sleep(_POLL)


def _files(directory: str) -> list[Path]:
    return sorted(Path(directory).glob(f"*{_SUFFIX}"))


def _slot_of(path: Path, worker_count: int) -> int:
    """The slot whose worker takes a file."""
    number = path.name.partition("-")[0]
    owner = int(number) if number.isdecimal() else 0
    return owner if owner < worker_count else 0
