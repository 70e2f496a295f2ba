"""Session records in Redis.

Each command names one key, so that a Cluster can serve it, and sets the time to live with the
value. redis-py may repeat a command whose answer was lost, so `create` and `swap` add a nonce of
their call to the record: it tells their own earlier success from another caller's write of an equal
record. The nonce is the last member of the record's JSON object.

`swap` compares the very bytes that were read, whoever wrote them; for a record that was not read
but made, all but the nonce.
"""

from __future__ import annotations

import math
import secrets

from mcp_proxy.config import require_seconds
from mcp_proxy.errors import ConfigError, SessionExists, SessionNotFound
from mcp_proxy.rate_buckets import CountEverywhere, require_library
from mcp_proxy.redis.client import Client, Connection, Use, as_bytes
from mcp_proxy.redis.event_log import RedisEventLog
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.storage.event_log import KEPT, EventLog
from mcp_proxy.storage.mailboxes import Mailboxes
from mcp_proxy.storage.records import ISSUED_TTL, Storage, require_name
from mcp_proxy.storage.session import SIGNED, Session, decode, encode, minted_by

_SIGNED = f',"{SIGNED}":"'.encode()
_SIGNATURE_BYTES = len(_SIGNED) + 32 + len(b'"}')

# The time to live of the key that `check` writes.
_CHECK_MS = 60_000

# One key. ARGV: the old record, the new one signed, the time to live in milliseconds, the number of
# bytes at the end that are not compared. A repeated swap that finds its own value has succeeded.
_SWAP = """
local current = redis.call('GET', KEYS[1])
if not current then return 0 end
if current == ARGV[2] then return 1 end
if string.sub(current, 1, -1 - tonumber(ARGV[4])) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""


class RedisStorage(Storage):
    """Records at `<prefix>session:<id>`, markers of issued ids at `<prefix>issued:<id>`, texts that
    are kept at `<prefix>kept:<name>`; `check` writes `<prefix>check`.

    `client` is a redis-py client, a URL, or a Connection to share; `close` leaves a client that was
    passed in open. `ttl` and `timeout` in seconds. The mailboxes are at `<prefix>mailbox:<replica>`
    of the unscoped store: each replica has one for all scopes. The constructor raises ConfigError.
    """

    def __init__(
        self,
        client: Client | str | Connection,
        ttl: float = 7200,
        prefix: str = "mcp-proxy:",
        timeout: float = 5,
    ) -> None:
        require_seconds("ttl", ttl)
        require_seconds("timeout", timeout)
        if not isinstance(prefix, str):
            raise ConfigError(f"prefix must be a text, not {prefix!r}")
        self.connection = client if isinstance(client, Connection) else Connection(client, timeout)
        self._ttl_ms = max(1, math.ceil(ttl * 1000))
        self.ttl = ttl
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"<RedisStorage prefix={self.prefix!r} ttl={self.ttl}>"

    def create(self, session: Session) -> None:
        data = _signed(session)
        key = self._session_key(session.id)
        with self.connection.mapped_errors(Use.GROW):
            if not self.connection.has_getex:
                # Else sessions would begin, children and all, that nobody can load.
                self._require_getex(key)
            if minted_by(session.id) is None:
                self.connection.client.set(self._issued_key(session.id), b"1", ex=ISSUED_TTL)
            if self.connection.client.set(key, data, nx=True, px=self._ttl_ms):
                return
            if as_bytes(self.connection.client.get(key) or b"") == data:
                return  # the answer to our own first attempt was lost
        raise SessionExists(f"Session {session.id} exists already")

    def load(self, session_id: str) -> Session:
        with self.connection.mapped_errors(Use.WRITE):
            command = ("GETEX", self._session_key(session_id), "PX", self._ttl_ms)
            data = self.connection.ask([command])[0]
        if data is None:
            raise SessionNotFound
        return _read(data)

    def exists(self, session_id: str) -> bool:
        with self.connection.mapped_errors():
            return bool(self.connection.client.exists(self._session_key(session_id)))

    def peek(self, session_id: str) -> Session | None:
        with self.connection.mapped_errors():
            data = self.connection.client.get(self._session_key(session_id))
        return None if data is None else _read(as_bytes(data))

    def swap(self, old: Session, new: Session) -> bool:
        before, uncompared = old.stored, 0
        if before is None:
            before, uncompared = encode(old).removesuffix(b"}"), _SIGNATURE_BYTES
        arguments: list[bytes | int] = [before, _signed(new), self._ttl_ms, uncompared]
        with self.connection.mapped_errors():
            has_won = bool(self.connection.run(_SWAP, self._session_key(old.id), arguments))
        if has_won:
            self.connection.succeeded(Use.GROW)
        return has_won

    def delete(self, session_id: str) -> None:
        with self.connection.mapped_errors(Use.WRITE):
            self.connection.client.delete(self._session_key(session_id))

    def issued(self, session_id: str) -> bool:
        with self.connection.mapped_errors():
            return bool(self.connection.client.exists(self._issued_key(session_id)))

    def keep(self, name: str, value: str, ttl: float) -> str:
        key, milliseconds = f"{self.prefix}kept:{name}", max(1, math.ceil(ttl * 1000))
        with self.connection.mapped_errors(Use.GROW):
            if self.connection.client.set(key, value.encode(), nx=True, px=milliseconds):
                return value
            found = self.connection.client.get(key)
        return value if found is None else as_bytes(found).decode()

    def kept(self, name: str) -> str | None:
        with self.connection.mapped_errors():
            found = self.connection.client.get(f"{self.prefix}kept:{name}")
        return None if found is None else as_bytes(found).decode()

    def put(self, name: str, value: str, ttl: float) -> str:
        milliseconds = max(1, math.ceil(ttl * 1000))
        with self.connection.mapped_errors(Use.GROW):
            self.connection.client.set(f"{self.prefix}kept:{name}", value.encode(), px=milliseconds)
        return value

    def check(self) -> None:
        key = f"{self.prefix}check"
        with self.connection.mapped_errors(Use.GROW):
            self.connection.ping()
            self.connection.client.set(key, b"1", px=_CHECK_MS)
            self._require_getex(key)

    def _require_getex(self, key: str) -> None:
        self.connection.client.getex(key, px=_CHECK_MS)
        self.connection.has_getex = True

    def version(self) -> tuple[int, ...]:
        """The server's version; GETEX needs (6, 2). Raises StorageUnavailable."""
        with self.connection.mapped_errors():
            text = self.connection.client.info("server")["redis_version"]
        return tuple(int(part) for part in text.split(".")[:3])

    def eviction(self) -> str:
        """By which policy a server whose memory is full drops records; empty where by none.

        That is the first such policy of the servers of a Cluster. Raises StorageUnavailable.
        """
        with self.connection.mapped_errors():
            sections = self.connection.info("memory")
        limited = (memory for memory in sections if memory.get("maxmemory"))
        policies = (str(memory.get("maxmemory_policy", "")) for memory in limited)
        return next((policy for policy in policies if policy not in ("", "noeviction")), "")

    def scoped(self, name: str) -> RedisStorage:
        require_name(name)
        return RedisStorage(self.connection, self.ttl, f"{self.prefix}{name}:")

    def mailboxes(self) -> Mailboxes:
        return RedisMailboxes(self.connection, self.prefix)

    def rate_counter(self) -> CountEverywhere:
        require_library()
        from mcp_proxy.redis.rate_counter import RateCounter

        return RateCounter(self.connection, f"{self.prefix}rate")

    def event_log(self) -> EventLog:
        return RedisEventLog(self.connection, self.prefix, min(self.ttl, KEPT))

    def close(self) -> None:
        self.connection.close()

    def _session_key(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}"

    def _issued_key(self, session_id: str) -> str:
        return f"{self.prefix}issued:{session_id}"


def _read(stored: bytes) -> Session:
    """The record that is stored; without our signature it is read fastest."""
    end = len(stored) - _SIGNATURE_BYTES
    is_signed = end > 0 and stored.startswith(_SIGNED, end)
    return decode(stored[:end] + b"}" if is_signed else stored, stored)


def _signed(session: Session) -> bytes:
    """The record's JSON with a nonce of this one write as its last member."""
    nonce = secrets.token_hex(16).encode()
    return encode(session).removesuffix(b"}") + _SIGNED + nonce + b'"}'
