"""Changes of the file of API keys, by which nothing is lost that others have written there.

Lines that are not concerned stay as they are, comments included. Whoever changes the file has a
lock beside it, and writes it whole: a reader sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mcp_proxy.auth.keys import Key, parse_line
from mcp_proxy.errors import ConfigError

# Whoever reads the file may not forge a key from it, but nobody else has to know who has one.
_MODE = 0o600

# What some editors write before the first line.
_BOM = "\ufeff"


class Unwritable(ConfigError):
    """The file cannot be replaced here: a bind mount, say, or a file system that is read only."""


def add(path: str, line: str) -> None:
    """Adds a line at the end, to a new file where there is none.

    Raises Unwritable, and ConfigError for a line that no reader would take.
    """
    parse_line(line)

    def added(text: str) -> str:
        end = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{end}{line}\n"

    _change(path, added)


def remove(path: str, name: str) -> int:
    """Removes the lines of a name; returns how many there were. Raises Unwritable, ConfigError."""
    count = 0

    def rest(text: str) -> str:
        nonlocal count
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if not _is_of(line, name)]
        count = len(lines) - len(kept)
        return "".join(kept)

    _change(path, rest)
    return count


def line_numbers(path: str, name: str) -> list[int]:
    """The numbers of the lines of a name; raises ConfigError where the file cannot be read."""
    lines = _read(path).splitlines()
    return [number for number, line in enumerate(lines, 1) if _is_of(line, name)]


def line_of(key: Key, expires: str | None) -> str:
    """A key as a line of the file; `expires` is the date as it is to stand there."""
    words = [key.name, f"sha256:{key.digest}"]
    if key.servers is not None:
        words.append(f"server={','.join(sorted(key.servers))}")
    if key.scopes:
        words.append(f"scope={','.join(sorted(key.scopes))}")
    if expires is not None:
        words.append(f"expires={expires}")
    return " ".join(words)


def _is_of(line: str, name: str) -> bool:
    """Whether a line is that of a name, even if the rest of it cannot be read."""
    words = line.removeprefix(_BOM).split()
    return bool(words) and words[0] == name


def _change(path: str, change: Callable[[str], str]) -> None:
    """Replaces the text of the file, under the lock, unless it stays the same."""
    target = os.path.realpath(path)
    try:
        with _locked(target):
            before = _read(target)
            after = change(before)
            if after != before or not os.path.exists(target):
                _replace(target, after)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {error.strerror}") from error


def _read(path: str) -> str:
    """The text, empty where there is no file; raises ConfigError where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Waits until nobody else changes the file. The lock is a file beside it, which stays."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(path: str, text: str) -> None:
    """Writes the file whole, with the owner and the mode that it had."""
    directory = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}-")
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                before = os.stat(path)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
                if (before.st_uid, before.st_gid) != (os.getuid(), os.getgid()):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    """Has the new name outlive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
