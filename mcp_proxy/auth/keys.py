"""API keys: a file with a digest a line, and who has the key that a request carries.

A key is 256 random bits, so its SHA-256 needs no salt and no slow hash: nobody guesses a digest's
origin. What is compared is the digest of what was sent, by a table and then in constant time; how
long that takes says nothing of any key.

The file is looked at twice a second by a thread, and read again when it has changed. One that
cannot be read, or has a line that cannot, changes nothing: the last good one holds, and the log
says so. A worker of gunicorn also starts meanwhile, with the copy that its master has (`use_copy`).
No message repeats what stands in the file: a key may stand there by mistake.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from mcp_proxy import metrics
from mcp_proxy.auth.principal import Caller, Principal
from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import ConfigError, NotPermitted

log = logging.getLogger(__name__)

# Seconds between two looks at the file: streams end within two of the removal of their key, and the
# thread that ends them looks once in one.
_LOOK = 0.5

_DOUBT = "their file cannot be read; those from before count"

_PREFIX = "mcpk_"
_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_WORDS = re.compile(r"@?[A-Za-z0-9_.:/-]+(,@?[A-Za-z0-9_.:/-]+)*")


class Key(msgspec.Struct, frozen=True):
    """A line of the file: whose key has which digest, in hexadecimal digits.

    `servers` are those that it is for, None for all. `expires` is in seconds since the epoch.
    """

    name: str
    digest: str
    servers: frozenset[str] | None = None
    scopes: frozenset[str] = frozenset()
    expires: float | None = None

    @property
    def principal(self) -> Principal:
        """Whom the key stands for; the keys of one name stand for the same."""
        return Principal(f"key:{self.name}", self.scopes, {}, self.expires, self.servers)


def new_key() -> str:
    """A key that nobody has."""
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def digest_of(key: str) -> str:
    """What stands in the file for a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def require_name(name: str) -> None:
    """Raises ConfigError for what no caller can be named."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "expected a NAME of letters, digits and _.@+- that begins with one of the former two, "
            f"at most 64 characters, got {name!r}"
        )


# --- the form of the file ------------------------------------------------------------------------


def parse_line(line: str) -> Key | None:
    """The key of a line; None for an empty one or a comment. Raises ConfigError.

    The form is `NAME sha256:HEX [server=A,B] [scope=admin] [expires=DATE]`.
    """
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ConfigError("expected NAME sha256:HEX, where the name has letters, digits and _.@+-")
    digest = _DIGEST.fullmatch(words[1])
    if digest is None:
        raise ConfigError(
            "expected sha256: and 64 hexadecimal digits behind the name; "
            "mcp-wsgi-proxy key add makes such a line"
        )
    given: dict[str, str] = {}
    for word in words[2:]:
        if word.startswith("#"):
            break
        name, equals, value = word.partition("=")
        if name not in ("server", "scope", "expires") or not equals or name in given:
            raise ConfigError("expected server=A,B, scope=A,B and expires=DATE, each at most once")
        given[name] = value
    expires = given.get("expires")
    return Key(
        words[0],
        digest[1].lower(),
        _listed(given, "server"),
        _listed(given, "scope") or frozenset(),
        None if expires is None else seconds_of(expires),
    )


def _listed(given: Mapping[str, str], name: str) -> frozenset[str] | None:
    value = given.get(name)
    if value is None:
        return None
    if not _WORDS.fullmatch(value):
        raise ConfigError(f"{name}= takes names with commas between them, and no blanks")
    return frozenset(value.split(","))


def seconds_of(date: str) -> float:
    """A date or a time of ISO 8601, in UTC unless it names a zone, in seconds since the epoch.

    A date alone is its first moment. Raises ConfigError.
    """
    try:
        moment = datetime.datetime.fromisoformat(date)
    except ValueError:
        raise ConfigError(
            "expires= takes a date such as 2027-01-31, or 2027-01-31T12:00Z"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return moment.timestamp()


def parse(text: str) -> list[Key]:
    """The keys in the text of a file; raises ConfigError, which names the line."""
    keys: list[Key] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            key = parse_line(line)
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None
        if key is None:
            continue
        if key.digest in lines:
            raise ConfigError(f"line {number}: the same key is in line {lines[key.digest]}")
        lines[key.digest] = number
        keys.append(key)
    return keys


def read(path: str) -> list[Key]:
    """The keys in a file; raises ConfigError where it cannot be read."""
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except ConfigError as error:
        raise ConfigError(f"api_keys {path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"api_keys {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys {path}: it is no text in UTF-8") from None


# --- the last good keys ---------------------------------------------------------------------------


class _Process:
    """What a worker has of the master's."""

    copy: str | None = None


_process = _Process()


def use_copy(path: str) -> None:
    """Has this process begin with the keys there, where it finds a mistake in the file."""
    _process.copy = path


# --- the keys of a running proxy -----------------------------------------------------------------


class ApiKeys:
    """The keys of a file. Thread-safe; the constructor raises ConfigError.

    `start` has a thread look at the file from then on; it is missed by `workers` when it has ended.
    """

    def __init__(self, path: str, workers: Workers | None = None) -> None:
        self._path = path
        self._seen = stamp_of(path)
        self._keys: Mapping[str, Key] = {}  # by the digest; replaced as a whole
        #: What is wrong with the file, None where nothing is; the keys are those from before.
        self.doubt: str | None = None
        self._look = Periodic("mcp-keys", _LOOK, self.look, workers)
        self.use(self._first())

    def __repr__(self) -> str:
        return f"<ApiKeys {len(self._keys)}>"

    def _first(self) -> list[Key]:
        """What is in the file, or was when it was good last; raises ConfigError."""
        try:
            return read(self._path)
        except ConfigError as error:
            if _process.copy is None:
                raise
            self.doubt = _DOUBT
            log.error("%s; this worker starts with the keys that were there before", error)
            return read(_process.copy)

    def start(self) -> None:
        """Has changes of the file noticed; harmless when repeated, and quick."""
        self._look.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._look.stop()

    def use(self, keys: Iterable[Key]) -> None:
        """From now on these are the keys."""
        self._keys = {key.digest: key for key in keys}

    def digests(self) -> Collection[str]:
        """The digests of the keys, those included that have expired."""
        return self._keys.keys()

    def look(self) -> None:
        """Reads the file again if it has changed."""
        stamp = stamp_of(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self.use(read(self._path))
        except ConfigError as error:
            self.doubt = _DOUBT
            log.error("%s; the keys stay as they were", error)
        else:
            self.doubt = None
            log.info("api_keys: %d keys from now on", len(self._keys))

    def caller(self, key: str, server: str | None, members: Collection[str] = ()) -> Caller | None:
        """Who has a key, for a request to `server`; None where nobody has it, or it has expired.

        Raises NotPermitted where the key is not for that server, nor for one of its `members` where
        that is a group.
        """
        digest = digest_of(key)
        if (found := self._found(digest)) is None:
            return None
        if not found.principal.may_use(server, members):
            raise NotPermitted("The API key is not for this server")
        counters = metrics.current()
        if counters is not None:
            counters.page.key_uses.note(digest, time.time())
        return Caller(found.principal, lambda: self._still_has(digest, found, server, members))

    def _found(self, digest: str) -> Key | None:
        found = self._keys.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            return None
        return found if found.expires is None or time.time() < found.expires else None

    def _still_has(
        self, digest: str, began_as: Key, server: str | None, members: Collection[str]
    ) -> bool:
        """Whether a key is the same principal's, and still for the server."""
        found = self._found(digest)
        if found is None or found.name != began_as.name:
            return False
        is_as_it_was = not members or found.servers == began_as.servers
        return is_as_it_was and found.principal.may_use(server, members)


def stamp_of(path: str) -> object:
    """What changes when a file does; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
