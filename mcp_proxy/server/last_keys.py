"""The last good keys, for workers that start while the file of keys has a mistake.

A worker that cannot read the file could let nobody in, and one that cannot start ends gunicorn. So
the master reads the file too, once in each turn of its loop, and keeps what it could read in memory
that its workers inherit. A worker reads that copy only where it cannot read the file itself.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from mcp_proxy.auth.keys import parse, stamp_of
from mcp_proxy.errors import ConfigError

log = logging.getLogger(__name__)


class LastKeys:
    """A copy of the file as it was when it was good. For the master alone.

    The constructor raises OSError, or ConfigError where the file is not good.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp = stamp_of(path)
        self._copy = os.memfd_create("mcp-keys")
        self._write(_good_text(path))

    def __repr__(self) -> str:
        return f"<LastKeys of {self._path}>"

    @property
    def path(self) -> str:
        """Where a worker, which has inherited it, finds the copy."""
        return f"/proc/self/fd/{self._copy}"

    def look(self) -> None:
        """Copies the file if it has changed and is good; the workers say in the log if not."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._write(_good_text(self._path))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            log.debug("the keys are not copied: %s", error)

    def look_each_turn(self, server: Any) -> None:
        """Has the master look in each turn of its loop, which takes a second at most."""
        in_each_turn = server.maybe_promote_master

        def turn() -> None:
            self.look()
            in_each_turn()

        server.maybe_promote_master = turn

    def _write(self, text: bytes) -> None:
        os.pwrite(self._copy, text, 0)
        os.ftruncate(self._copy, len(text))


def _good_text(path: str) -> bytes:
    """What is in the file; raises ConfigError, OSError or UnicodeDecodeError unless it is good."""
    text = Path(path).read_bytes()
    parse(text.decode("utf-8"))
    return text
