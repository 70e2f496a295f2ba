"""Mailboxes in Redis: one Stream per replica."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mcp_proxy.redis.client import Command, Connection, Use, entries_of, field_of
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
        with self._connection.mapped_errors(Use.WRITE):
            return bool(self._connection.run(_RENEW, self._key(replica), [int(self.lease * 1000)]))

    def is_open(self, replica: str) -> bool:
        return self.are_open([replica])[0]

    def are_open(self, replicas: Sequence[str]) -> list[bool]:
        with self._connection.mapped_errors():
            commands = [("EXISTS", self._key(replica)) for replica in replicas]
            return list(map(bool, self._connection.ask(commands)))

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        with self._connection.mapped_errors(Use.GROW):
            commands = [
                ("XADD", self._key(to), "NOMKSTREAM", "*", b"l", data) for to, data in envelopes
            ]
            return [entry is not None for entry in self._connection.ask(commands)]

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        key = self._key(replica)
        if self._block_time is None:
            self._block_time = self._connection.block_time
        block = max(1, int(min(timeout, self._block_time) * 1000))
        with self._lock:
            read = self._read.pop(replica, [])
        with self._connection.mapped_errors():
            commands: list[Command] = [("XDEL", key, *read)] if read else []
            commands.append(
                ("XREAD", "COUNT", _MAX_COLLECTED, "BLOCK", block, "STREAMS", key, "0-0")
            )
            entries = entries_of(self._connection.ask(commands)[-1])
        with self._lock:
            self._read[replica] = [entry_id for entry_id, _ in entries]
        return [field_of(fields) for _, fields in entries]

    def remove(self, replica: str) -> list[bytes]:
        with self._connection.mapped_errors(Use.WRITE):
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
