"""What the gunicorns that share a store show each other of themselves, while somebody looks.

Each keeps one text in the store for fifteen seconds, at one of sixteen places: the place where its
text is already, else one that is free. Two that take the same one in the same moment see that at
their next turn, and one of them moves. Who finds no free place is not seen by the others. One
worker of each gunicorn writes and reads for all of its workers.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from mcp_proxy import metrics
from mcp_proxy.background import Periodic, Workers
from mcp_proxy.errors import StorageError
from mcp_proxy.monitoring import status
from mcp_proxy.storage.records import Storage

log = logging.getLogger(__name__)

#: Gunicorns that are seen at the most.
MAX_HOSTS = 16

#: Seconds for which a text is kept.
KEPT = 15.0

# Seconds between two turns, and the name of what says that somebody looks.
_INTERVAL = 2.0
_LOOKED_AT = "looked at"


class Hosts(Periodic):
    """The thread of one worker that exchanges texts with other gunicorns. Thread-safe.

    `describe` makes the text of this one.
    """

    is_essential = False

    def __init__(
        self, storage: Storage, describe: Callable[[], bytes], workers: Workers | None = None
    ) -> None:
        super().__init__("mcp-hosts", _INTERVAL, self.exchange, workers)
        self._storage = storage
        self._describe = describe

    def exchange(self) -> None:
        """Shows what this gunicorn does and sees what others do, if anybody looks anywhere."""
        counters = metrics.current()
        if counters is None or not counters.is_first:
            return
        page, now = counters.page, time.monotonic()
        is_seen_here = now - page.looked_at() < status.LOOKED
        try:
            if is_seen_here:
                self._storage.keep(_LOOKED_AT, "1", status.LOOKED)
            elif self._storage.kept(_LOOKED_AT) is None:
                return
            page.look_from_afar(now)
            others = self._exchanged(page.id)
        except StorageError as error:
            log.debug("other hosts are not seen: %s", error)
            return
        if is_seen_here:
            status.note_others(page, counters.number, others)

    def _exchanged(self, own_id: str) -> list[str]:
        """The texts of the others, once our own is in its place."""
        texts = [self._storage.kept(_name(number)) for number in range(MAX_HOSTS)]
        ours = [number for number, text in enumerate(texts) if text and text.startswith(own_id)]
        free = [number for number, text in enumerate(texts) if text is None]
        if ours or free:
            number = ours[0] if ours else random.choice(free)
            text = f"{own_id} {self._describe().decode()}"
            self._storage.put(_name(number), text, KEPT)
        found = [text for number, text in enumerate(texts) if text and number not in ours]
        return [text.partition(" ")[2] for text in found]


def _name(number: int) -> str:
    return f"host {number}"
