"""Mailboxes in Redis: one Stream per replica."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from mcp_proxy.redis.client import Connection, entries_of
from mcp_proxy.storage.mailboxes import LEASE, Envelope, Mailboxes

_MAX_COLLECTED = 256  # envelopes

# One key. ARGV: the lease in milliseconds. A Stream exists even without entries; its time to live
# is set in the same script, so that no mailbox outlives a replica that is killed in between.
_RENEW = """
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then return 1 end
redis.call('XADD', KEYS[1], 'MAXLEN', 0, '*', 'l', '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 0
"""

# One key. Returns the entries that were left.
_REMOVE = """
local left = redis.call('XRANGE', KEYS[1], '-', '+')
redis.call('DEL', KEYS[1])
return left
"""


class RedisMailboxes(Mailboxes):
    """Mailboxes at `<prefix>mailbox:<replica>`. `lease` in seconds."""

    def __init__(self, connection: Connection, prefix: str, lease: float = LEASE) -> None:
        self.lease = lease
        self._connection = connection
        self._prefix = prefix
        self._lock = threading.Lock()  # guards _read
        self._block_time: float | None = None
        self._read: dict[str, list[bytes]] = {}  # entries that the next `collect` deletes

    def __repr__(self) -> str:
        return f"<RedisMailboxes prefix={self._prefix!r} lease={self.lease}>"

    def renew(self, replica: str) -> bool:
        with self._connection.mapped_errors():
            return bool(self._connection.run(_RENEW, self._key(replica), [int(self.lease * 1000)]))

    def is_open(self, replica: str) -> bool:
        with self._connection.mapped_errors():
            return bool(self._connection.client.exists(self._key(replica)))

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        with self._connection.mapped_errors():
            client: Any = self._connection.client
            target = client if len(envelopes) == 1 else client.pipeline(transaction=False)
            for to, data in envelopes:
                entry = target.xadd(self._key(to), {b"l": data}, nomkstream=True)
            entries = [entry] if target is client else target.execute()
            return [entry is not None for entry in entries]

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        key = self._key(replica)
        if self._block_time is None:
            self._block_time = self._connection.block_time
        block = max(1, int(min(timeout, self._block_time) * 1000))
        with self._lock:
            read = self._read.pop(replica, [])
        with self._connection.mapped_errors():
            pipeline = self._connection.client.pipeline(transaction=False)
            if read:
                pipeline.xdel(key, *read)
            # Envelopes are bytes, even with a client that decodes its other responses.
            pipeline.execute_command(
                "XREAD", "COUNT", _MAX_COLLECTED, "BLOCK", block, "STREAMS", key, "0-0",
                NEVER_DECODE=True,
            )  # fmt: skip
            entries = entries_of(pipeline.execute()[-1])
        ids, envelopes = [], []
        for entry_id, fields in entries:
            ids.append(entry_id)
            envelopes.append(next(iter(fields.values())))
        with self._lock:
            self._read[replica] = ids
        return envelopes

    def remove(self, replica: str) -> list[bytes]:
        with self._connection.mapped_errors():
            left = self._connection.run(_REMOVE, self._key(replica), [])
        with self._lock:
            read = self._read.pop(replica, [])
        return [fields[1] for entry_id, fields in left if entry_id not in read]

    def uptime(self) -> float:
        with self._connection.mapped_errors():
            info = self._connection.client.info("server")
        nodes = [info] if "uptime_in_seconds" in info else list(info.values())
        return float(min(node["uptime_in_seconds"] for node in nodes))

    def close(self) -> None:
        with self._lock:
            self._read.clear()

    def _key(self, replica: str) -> str:
        return f"{self._prefix}mailbox:{replica}"
