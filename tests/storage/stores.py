"""Stores to try the contract on, each with a way to let time pass without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import redis

from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.storage.session import Session

#: Clients of the same Redis that answer in different ways.
CLIENTS: dict[str, dict[str, object]] = {
    "redis": {},
    "redis with decode_responses": {"decode_responses": True},
    "redis with protocol 3": {"protocol": 3},
    "redis with protocol 3 and decode_responses": {"protocol": 3, "decode_responses": True},
}

#: The time to live in every house, in seconds.
TTL = 1000.0


def record(session_id: str = "s", **metadata: str) -> Session:
    """A session record with fixed times."""
    return Session(id=session_id, type="mcp", created_at=1.5, updated_at=2.5, metadata=metadata)


class House(Protocol):
    """A store and its clock."""

    storage: Storage

    def pass_time(self, seconds: float) -> None:
        """Makes everything in the store so much older."""


class LocalHouse:
    """LocalStorage with a clock of our own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.storage: Storage = LocalStorage(TTL, clock=lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class RedisHouse:
    """RedisStorage; time passes by taking it from what each key has left."""

    def __init__(self, client_or_url: redis.Redis | str, admin: redis.Redis, prefix: str) -> None:
        self.prefix = prefix
        self.admin = admin
        self.storage: Storage = RedisStorage(client_or_url, ttl=TTL, prefix=prefix)

    def pass_time(self, seconds: float) -> None:
        for key in self.keys():
            self.admin.pexpire(key, self.admin.pttl(key) - round(seconds * 1000))

    def keys(self) -> Iterator[bytes]:
        """The keys of this house."""
        return iter(list(self.admin.scan_iter(f"{self.prefix}*", count=1000)))
