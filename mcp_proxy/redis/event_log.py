"""The event log in Redis: one Stream per session, whose entry ids are the event ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mcp_proxy.redis.client import Connection, Use, as_bytes, entries_of
from mcp_proxy.storage.event_log import KEPT, MAX_BYTES, MAX_EVENTS, EventLog, LoggedEvent

# The form of an entry's id. XRANGE has wildcards (`-`, `+`) and refuses most other texts.
_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")

# Entries that one XREAD returns; their data is at most that of a whole log, MAX_BYTES.
_COUNT = 256

# One key. Each entry holds the bytes logged up to it, so a subtraction gives the size of the log.
# ARGV: stream; whether the last event is the stream's; the limits in events, bytes and
# milliseconds; the data of each event. Returns the new ids.
_APPEND = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local total = last and tonumber(last[2][2]) or 0
local ids = {}
for number = 6, #ARGV do
  local ends = number == #ARGV and ARGV[2] or '0'
  total = total + #ARGV[number]
  ids[number - 5] = redis.call(
    'XADD', KEYS[1], '*', 't', total, 's', ARGV[1], 'd', ARGV[number], 'l', ends)
end
redis.call('XTRIM', KEYS[1], 'MAXLEN', ARGV[3])
while true do
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  local before = tonumber(first[2][2]) - #first[2][6]
  if first[1] == ids[#ids] or total - before <= tonumber(ARGV[4]) then break end
  redis.call('XDEL', KEYS[1], first[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return ids
"""


class RedisEventLog(EventLog):
    """Events at `<prefix>events:<session id>`, for `kept` seconds after the session's last one."""

    def __init__(self, connection: Connection, prefix: str, kept: float = KEPT) -> None:
        self._kept_ms = max(1, int(kept * 1000))
        self._connection = connection
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"<RedisEventLog prefix={self._prefix!r}>"

    def append(self, session_id: str, stream: str, data: bytes, is_last: bool) -> str:
        return self.append_all(session_id, stream, [data], is_last)[0]

    def append_all(
        self, session_id: str, stream: str, events: Sequence[bytes], is_last: bool
    ) -> list[str]:
        bounds = (MAX_EVENTS, MAX_BYTES, self._kept_ms)
        arguments: list[bytes | str | int] = [stream, int(is_last), *bounds, *events]
        with self._connection.mapped_errors(Use.GROW):
            ids = self._connection.run(_APPEND, self._key(session_id), arguments)
        return [str(event_id, "ascii") for event_id in ids]

    def find(self, session_id: str, event_id: str) -> LoggedEvent | None:
        if not _ID.fullmatch(event_id):
            return None
        with self._connection.mapped_errors():
            entries = self._connection.client.xrange(self._key(session_id), event_id, event_id)
        return _event(*entries[0]) if entries else None

    def read(self, session_id: str, after: str | None, timeout: float) -> list[LoggedEvent]:
        key = self._key(session_id)
        limit = min(timeout, self._connection.block_time)
        block = max(1, int(limit * 1000)) if limit > 0 else None
        with self._connection.mapped_errors():
            answer = self._connection.client.xread({key: after or "0-0"}, count=_COUNT, block=block)
        return [_event(*entry) for entry in entries_of(answer)]

    def forget(self, session_id: str) -> None:
        with self._connection.mapped_errors(Use.WRITE):
            self._connection.client.delete(self._key(session_id))

    def _key(self, session_id: str) -> str:
        return f"{self._prefix}events:{session_id}"


def _event(entry_id: bytes | str, fields: dict[bytes | str, bytes | str]) -> LoggedEvent:
    by_name = {as_bytes(name): as_bytes(value) for name, value in fields.items()}
    return LoggedEvent(
        as_bytes(entry_id).decode(), by_name[b"s"].decode(), by_name[b"d"], by_name[b"l"] == b"1"
    )
