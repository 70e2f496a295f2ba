"""When API keys were last used on any of the hosts that share a store.

Each keeps the minute of a key in memory (`last_uses.py`). One worker of each gunicorn compares that
with the store, which has a name for each key, once a minute, and writes what is later; no request
waits for that. So the latest minute counts, also after the store has lost what it had. Of two hosts
that write in the same moment the earlier use may stand until the other one's next turn.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter

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

# How often one use is written in a turn, where others write an earlier one at the same time.
_ATTEMPTS = 3


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

    def share(self) -> None:
        """Writes what the store does not know, in the first worker of a gunicorn."""
        counters = metrics.current()
        if counters is not None and counters.is_first:
            self._write(counters.page.key_uses)

    def finish(self) -> None:
        """Writes what the store does not know: another worker, or none, does it from now on."""
        counters = metrics.current()
        if counters is not None:
            self._write(counters.page.key_uses)

    def _write(self, uses: LastUses) -> None:
        found = sorted(uses.read().items(), key=itemgetter(1), reverse=True)  # what is new first
        try:
            for key, used in found:
                self._put_latest(key, used)
        except StorageError as error:
            log.debug("other hosts do not see when keys were used: %s", error)

    def _put_latest(self, key: str, used: float) -> None:
        """Has the store know this use of a key, or a later one."""
        for _ in range(_ATTEMPTS):
            if self._read(key) >= used:
                return
            self._storage.put(_name(key), f"{used:.0f}", KEPT)

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
