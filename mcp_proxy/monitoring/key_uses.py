"""When API keys were last used on any of the hosts that share a store.

Each keeps the minute of a key in memory (`last_uses.py`). One worker of each gunicorn writes what
is new there into the store, under a name for each key, once a minute; no request waits for that.
The latest minute counts, whoever writes last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

from mcp_proxy import metrics
from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import StorageError
from mcp_proxy.last_uses import LastUses, short
from mcp_proxy.storage.records import Storage

log = logging.getLogger(__name__)

#: Seconds for which the last use of a key is kept: a year.
KEPT = 366 * 86_400.0

# Seconds between two turns.
_INTERVAL = 60.0


class KeyUses(Periodic):
    """The thread of one worker that writes last uses into the store. Thread-safe.

    `digests` are those of the keys that there are, in hexadecimal digits.
    """

    is_essential = False

    def __init__(
        self,
        storage: Storage,
        digests: Callable[[], Iterable[str]],
        workers: Workers | None = None,
    ) -> None:
        super().__init__("mcp-key-uses", _INTERVAL, self.share, workers)
        self._storage = storage
        self._digests = digests
        self._written: dict[str, float] = {}  # what the store has at least; of our thread alone

    def share(self) -> None:
        """Writes what is new, in the first worker of a gunicorn."""
        counters = metrics.current()
        if counters is not None and counters.is_first:
            self._write(counters.page.key_uses)

    def finish(self) -> None:
        """Writes what is new since the last turn: another worker, or none, does it from now on."""
        counters = metrics.current()
        if counters is not None:
            self._write(counters.page.key_uses)

    def _write(self, uses: LastUses) -> None:
        try:
            for key, used in uses.read().items():
                if used > self._written.get(key, 0.0):
                    if used > self._read(key):
                        self._storage.put(_name(key), f"{used:.0f}", KEPT)
                    self._written[key] = used
        except StorageError as error:
            log.debug("other hosts do not see when keys were used: %s", error)

    def read(self, here: LastUses) -> Mapping[str, float]:
        """The last uses on this host and, as far as the store can be asked, on all of them."""
        found = dict(here.read())
        with contextlib.suppress(StorageError):
            for key in map(short, self._digests()):
                if (used := max(found.get(key, 0.0), self._read(key))) > 0.0:
                    found[key] = used
        return found

    def _read(self, key: str) -> float:
        """The last use that the store knows of; 0 where it knows none."""
        return float(self._storage.kept(_name(key)) or 0.0)


def _name(key: str) -> str:
    return f"key use {key}"
