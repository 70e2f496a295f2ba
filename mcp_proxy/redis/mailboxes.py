"""Mailboxes in Redis: one Stream for each replica."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from mcp_proxy.redis.client import Access, mapped_errors
from mcp_proxy.redis.event_log import entries_of
from mcp_proxy.storage.mailboxes import LEASE, Letter, Mailboxes

_MAX_LETTERS = 256  # that one look takes out

# One key. ARGV: the lease in milliseconds. A Stream without entries exists; its time to live comes
# in the same script, so that no mailbox outlives a replica that dies in between.
_RENEW = """
if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 1 then return 1 end
redis.call('XADD', KEYS[1], 'MAXLEN', 0, '*', 'l', '')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 0
"""


class RedisMailboxes(Mailboxes):
    """Mailboxes under `<prefix>mailbox:<replica>`. `lease` in seconds."""

    def __init__(self, access: Access, prefix: str, lease: float = LEASE) -> None:
        self.lease = lease
        self._access = access
        self._prefix = prefix
        self._lock = threading.Lock()  # guards _read
        self._read: dict[str, list[bytes]] = {}  # entries that were taken and are to be deleted

    def __repr__(self) -> str:
        return f"<RedisMailboxes prefix={self._prefix!r} lease={self.lease}>"

    def renew(self, replica: str) -> bool:
        with mapped_errors():
            return bool(self._access.run(_RENEW, self._key(replica), [int(self.lease * 1000)]))

    def is_open(self, replica: str) -> bool:
        with mapped_errors():
            return bool(self._access.client.exists(self._key(replica)))

    def post(self, letters: Sequence[Letter]) -> list[bool]:
        with mapped_errors():
            if len(letters) == 1:
                return [self._add(self._access.client, letters[0]) is not None]
            pipeline = self._access.client.pipeline(transaction=False)
            for letter in letters:
                self._add(pipeline, letter)
            return [entry is not None for entry in pipeline.execute()]

    def _add(self, target: Any, letter: Letter) -> Any:
        return target.xadd(self._key(letter.to), {b"l": letter.data}, nomkstream=True)

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        key = self._key(replica)
        block = max(1, int(min(timeout, self._access.patience) * 1000))
        with self._lock:
            read = self._read.pop(replica, [])
        with mapped_errors():
            pipeline = self._access.client.pipeline(transaction=False)
            if read:
                pipeline.xdel(key, *read)
            # Letters are bytes, also for a client that decodes everything else.
            pipeline.execute_command(
                "XREAD", "COUNT", _MAX_LETTERS, "BLOCK", block, "STREAMS", key, "0-0",
                NEVER_DECODE=True,
            )  # fmt: skip
            entries = entries_of(pipeline.execute()[-1])
        with self._lock:
            self._read[replica] = [entry_id for entry_id, _ in entries]
        return [next(iter(fields.values())) for _, fields in entries]

    def remove(self, replica: str) -> None:
        with mapped_errors():
            self._access.client.delete(self._key(replica))

    def uptime(self) -> float:
        with mapped_errors():
            info = self._access.client.info("server")
        nodes = [info] if "uptime_in_seconds" in info else list(info.values())
        return float(min(node["uptime_in_seconds"] for node in nodes))

    def close(self) -> None:
        with self._lock:
            self._read.clear()

    def _key(self, replica: str) -> str:
        return f"{self._prefix}mailbox:{replica}"
