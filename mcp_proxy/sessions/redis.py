"""Sessions in Redis, shared by every replica that uses the same server and prefix.

The only module of the session layer that knows redis-py. Each command names one key, so that a
Cluster can serve it; a time to live travels in the command that writes. redis-py may repeat a
command whose answer was lost, so the two commands that must not lie when repeated, `create` and
`swap`, sign what they write with a nonce of their call: by it they know their own earlier success
from that of somebody else who wrote the very same record. The signature is a last member of the
record's JSON object, which readers pass over.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mcp_proxy.errors import SessionExists, SessionNotFound, StorageError, StorageUnavailable
from mcp_proxy.sessions.session import Session, decode, encode
from mcp_proxy.sessions.storage import ISSUED_TTL, Storage

# As many as there are threads: each asks one thing at a time.
_CONNECTIONS = 1 << 20

#: A client of redis-py, as `connect` makes it or as a user hands it in.
Client = redis.Redis

_SIGNED = b',"signed":"'
_SIGNATURE_BYTES = len(_SIGNED) + 32 + len(b'"}')

# One key. ARGV: the old record without its closing brace, the new one signed, the time to live in
# milliseconds, the length of a signature. A repeated swap finds its own value: it won.
_SWAP = """
local current = redis.call('GET', KEYS[1])
if not current then return 0 end
if current == ARGV[2] then return 1 end
if string.sub(current, 1, -1 - tonumber(ARGV[4])) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""


def connect(url: str, timeout: float) -> Client:
    """A client for `redis://`, `rediss://` or `unix://`; nothing is sent yet. `timeout` in seconds.

    Raises ValueError when the URL cannot be read; its message does not show the URL.
    """
    try:
        return Client.from_url(
            url,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            max_connections=_CONNECTIONS,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except ValueError:
        # Without its cause: that one may show a part of the password.
        raise ValueError(
            "cannot be read; it has the form redis://USER:PASSWORD@HOST:PORT/DB, rediss://... or "
            "unix://PATH, with special characters in the password percent-encoded"
        ) from None


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """The seam where redis-py's errors become ours."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StorageUnavailable from error
    except UnicodeDecodeError as error:  # a client that decodes, and what is no text
        raise StorageError(f"The session record cannot be read: {error}") from error


class RedisStorage(Storage):
    """Records under `<prefix>session:<id>`, markers of issued ids under `<prefix>issued:<id>`.

    `client` is a redis-py client or a URL; a client that was handed in is left open by `close`.
    """

    def __init__(
        self,
        client: Client | str,
        ttl: float = 7200,
        prefix: str = "mcp-proxy:",
        timeout: float = 5,
    ) -> None:
        self._owns_client = isinstance(client, str)
        self._client: Any = connect(client, timeout) if isinstance(client, str) else client
        self._ttl_ms = max(1, math.ceil(ttl * 1000))
        self.ttl = ttl
        self.prefix = prefix
        self._swap_script = self._client.register_script(_SWAP)

    def __repr__(self) -> str:
        return f"<RedisStorage prefix={self.prefix!r} ttl={self.ttl}>"

    def create(self, session: Session) -> None:
        data = _signed(session)
        key = self._session_key(session.id)
        with _mapped_errors():
            self._client.set(self._issued_key(session.id), b"1", ex=ISSUED_TTL)
            if self._client.set(key, data, nx=True, px=self._ttl_ms):
                return
            if _as_bytes(self._client.get(key) or b"") == data:
                return  # the answer to our own first attempt was lost
        raise SessionExists(f"Session {session.id} exists already")

    def load(self, session_id: str) -> Session:
        with _mapped_errors():
            data = self._client.getex(self._session_key(session_id), px=self._ttl_ms)
        if data is None:
            raise SessionNotFound
        return decode(_as_bytes(data))

    def exists(self, session_id: str) -> bool:
        with _mapped_errors():
            return bool(self._client.exists(self._session_key(session_id)))

    def swap(self, old: Session, new: Session) -> bool:
        before = encode(old).removesuffix(b"}")
        arguments: list[bytes | int] = [before, _signed(new), self._ttl_ms, _SIGNATURE_BYTES]
        with _mapped_errors():
            return bool(self._swap_script(keys=[self._session_key(old.id)], args=arguments))

    def delete(self, session_id: str) -> None:
        with _mapped_errors():
            self._client.delete(self._session_key(session_id))

    def issued(self, session_id: str) -> bool:
        with _mapped_errors():
            return bool(self._client.exists(self._issued_key(session_id)))

    def check(self) -> None:
        with _mapped_errors():
            self._client.ping()

    def version(self) -> tuple[int, ...]:
        """The server's version; GETEX needs (6, 2). Raises StorageUnavailable."""
        with _mapped_errors():
            text = self._client.info("server")["redis_version"]
        return tuple(int(part) for part in text.split(".")[:3])

    def close(self) -> None:
        if self._owns_client:
            # Calls that are under way keep their connections and get their answers.
            self._client.connection_pool.disconnect(inuse_connections=False)

    def _session_key(self, session_id: str) -> str:
        return f"{self.prefix}session:{session_id}"

    def _issued_key(self, session_id: str) -> str:
        return f"{self.prefix}issued:{session_id}"


def _signed(session: Session) -> bytes:
    """The record's JSON with a nonce of this one write as its last member."""
    nonce = secrets.token_hex(16).encode()
    return encode(session).removesuffix(b"}") + _SIGNED + nonce + b'"}'


def _as_bytes(value: bytes | str) -> bytes:
    """What a client with `decode_responses=True` returns, as the bytes it was."""
    return value.encode() if isinstance(value, str) else value
