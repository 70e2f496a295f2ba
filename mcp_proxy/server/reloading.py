"""The file of servers as gunicorn's master serves it: read when it starts and at each SIGHUP.

The master alone reads the file, and what that names, and checks it. It publishes the servers to all
workers (`shared_text`), also to those that start later: a mistake in the file is no worker's end.
No worker is replaced. The master reads the file, too, when an operator has told a worker that it is
to, and with `reload_on_change` when it has changed: it looks once a second, in a turn of gunicorn's
own loop, since a thread of ours in the master would be there when it forks.

It relies on this in gunicorn, 27.0 or later: the arbiter's loop calls `maybe_promote_master` once a
turn, a turn takes about a second at most, and a signal is answered by the method `handle_<name>` in
the loop. `handle_usr1` has all processes open their log files anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mcp_proxy.config import ProxyConfig, files_named_in
from mcp_proxy.errors import ConfigError
from mcp_proxy.server_table import ServerTable, encode
from mcp_proxy.servers import Server
from mcp_proxy.shared_text import SharedText, set_current

log = logging.getLogger(__name__)

# Seconds between two looks at the files.
_LOOK = 1.0


class Reloading:
    """The servers of `config`, which has a file of them, for the workers of one master.

    Used by the master's own thread. The constructor publishes what is in the file; it raises
    ConfigError.
    """

    def __init__(self, config: ProxyConfig, arbiter: Any) -> None:
        assert config.config is not None
        self._config = config
        self._arbiter = arbiter
        self._table = ServerTable(config.config, config.servers())
        self._text = SharedText()
        self._text.publish(encode(self._table))
        set_current(self._text)
        self._files = _Files(Path(config.config))
        self._next_look = time.monotonic() + _LOOK
        self._in_each_turn: Callable[[], object] = arbiter.maybe_promote_master

    def __repr__(self) -> str:
        return f"<Reloading {self._table.path} {self._text!r}>"

    @property
    def servers(self) -> list[Server]:
        """The servers that are served now."""
        return self._table.servers

    def begin(self) -> None:
        """Answers SIGHUP from now on, and whatever else has the file read."""
        self._arbiter.handle_hup = self._on_hup
        self._in_each_turn = self._arbiter.maybe_promote_master
        self._arbiter.maybe_promote_master = self._take_turn

    def _on_hup(self) -> None:
        if _has_log_files(self._arbiter.log):
            self._arbiter.handle_usr1()
        self.reload()

    def _take_turn(self) -> None:
        """What the loop does once a turn, what an operator wants, and a look at the files."""
        self._in_each_turn()
        if self._text.is_wanted:
            self._on_hup()
        now = time.monotonic()
        if self._config.reload_on_change and now >= self._next_look:
            self._next_look = now + _LOOK
            if self._files.have_changed():
                log.info("the file of servers has changed")
                self.reload()

    def reload(self) -> None:
        """Has the workers serve what is in the file now.

        Where that cannot be read everything stays as it is, but for the reason why.
        """
        began = time.monotonic()
        try:
            self._read_and_publish()
        finally:
            self._text.note_look(began)

    def _read_and_publish(self) -> None:
        self._files.look()
        before = self._table
        try:
            for sentence in self._config.ignored():
                log.warning("%s", sentence)
            after = before.renewed(self._read())
            self._publish(after)
        except ConfigError as error:
            self._stay(error)
        except Exception as error:  # whatever is in the file, the master goes on
            log.exception("the file of servers cannot be read")
            self._stay(error)
        else:
            log.info("the file of servers was read again: %s", before.changes_to(after))
            if after.failure is not None:
                log.error("the file of servers has mistakes: %s", after.failure)

    def _stay(self, error: Exception) -> None:
        log.error("nothing is reloaded, and everything goes on as before: %s", error)
        try:
            self._publish(self._table.failed(error))
        except ConfigError as too_large:
            log.error("/readyz does not say so: %s", too_large)

    def _publish(self, table: ServerTable) -> None:
        self._text.publish(encode(table))
        self._table = table

    def _read(self) -> list[Server]:
        """The servers in the file, for as many workers as there are; raises ConfigError."""
        workers = self._arbiter.num_workers
        return msgspec.structs.replace(self._config, workers=workers).listed()


class _Look(NamedTuple):
    """How a file was: when it was last changed, its bytes, and its number in the file system."""

    changed: int
    size: int
    number: int


class _Files:
    """The file of servers, and those that it names as values. One that is not there is `None`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named: list[Path] = []
        self.look()

    def look(self) -> None:
        """What is there now is known."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it is being replaced, perhaps
            text = ""
        if text:
            self._named = [Path(name) for name in files_named_in(text)]
        self._known = self._last = self._looks()

    def have_changed(self) -> bool:
        """Whether something else is there than is known, and was at the look before this one.

        Who writes a file in several steps is not disturbed by that.
        """
        now, before = self._looks(), self._last
        self._last = now
        return now == before != self._known

    def _looks(self) -> list[_Look | None]:
        return [_look_at(path) for path in (self._path, *self._named)]


def _look_at(path: Path) -> _Look | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Look(found.st_mtime_ns, found.st_size, found.st_ino)


def _has_log_files(logger: Any) -> bool:
    """Whether gunicorn writes its log to files that somebody may have moved away."""
    loggers = (logger.error_log, logger.access_log)
    handlers = [handler for each in loggers for handler in each.handlers]
    return any(isinstance(handler, logging.FileHandler) for handler in handlers)
