"""The last good form of a file that a worker needs to start.

A worker that cannot read the keys could let nobody in, one without certificates could reach nobody,
and one that cannot start ends gunicorn. So the master reads such a file too, once in each turn of
its loop, and keeps what was good in memory that its workers inherit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcp_proxy.auth.keys import stamp_of
from mcp_proxy.errors import ConfigError

log = logging.getLogger(__name__)


class LastGood:
    """A copy of a file as it was when `require` found nothing wrong. For the master alone.

    `require` gets a path, and raises ConfigError; `name` is what the system calls the copy. The
    constructor raises OSError or ConfigError.
    """

    def __init__(self, path: str, require: Callable[[str], object], name: str) -> None:
        self._path = path
        self._require = require
        self._name = name
        self._stamp = stamp_of(path)
        self._copy = os.memfd_create(name)
        self._take()

    def __repr__(self) -> str:
        return f"<LastGood {self._path}>"

    @property
    def path(self) -> str:
        """Where a worker, which has inherited it, finds the copy."""
        return _path_of(self._copy)

    def look(self) -> None:
        """Copies the file if it has changed and is good; the workers say in the log if not."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take()
        except (ConfigError, OSError) as error:
            log.debug("%s is not copied: %s", self._path, error)

    def look_each_turn(self, server: Any) -> None:
        """Has the master look in each turn of its loop, which takes a second at most."""
        in_each_turn = server.maybe_promote_master

        def turn() -> None:
            self.look()
            in_each_turn()

        server.maybe_promote_master = turn

    def _take(self) -> None:
        """Copies the file, unless what was read is not good."""
        data = Path(self._path).read_bytes()
        candidate = os.memfd_create(self._name)
        try:
            _write(candidate, data)
            self._require(_path_of(candidate))
        finally:
            os.close(candidate)
        _write(self._copy, data)


def _write(file: int, data: bytes) -> None:
    os.pwrite(file, data, 0)
    os.ftruncate(file, len(data))


def _path_of(file: int) -> str:
    return f"/proc/self/fd/{file}"
