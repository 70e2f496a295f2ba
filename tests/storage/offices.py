"""Mailboxes to try the contract on, each with a way to let time pass without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import redis

from mcp_proxy.errors import StorageUnavailable
from mcp_proxy.redis.client import Connection
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.relay import protocol
from mcp_proxy.relay.protocol import Frame
from mcp_proxy.storage.mailboxes import Envelope, LocalMailboxes, Mailboxes

#: The lease in every office, in seconds.
LEASE = 100.0


class Office(Protocol):
    """Mailboxes and their clock."""

    mailboxes: Mailboxes

    def pass_time(self, seconds: float) -> None:
        """Makes everything in the store so much older."""


class LocalOffice:
    """LocalMailboxes with a clock of our own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.mailboxes: Mailboxes = LocalMailboxes(LEASE, clock=lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class RedisOffice:
    """RedisMailboxes; time passes by taking it from what each key has left."""

    def __init__(self, client: redis.Redis, admin: redis.Redis, prefix: str) -> None:
        self.prefix = prefix
        self.admin = admin
        self.mailboxes: Mailboxes = RedisMailboxes(Connection(client), prefix, LEASE)

    def pass_time(self, seconds: float) -> None:
        for key in self.admin.scan_iter(f"{self.prefix}*", count=1000):
            self.admin.pexpire(key, self.admin.pttl(key) - round(seconds * 1000))


class FickleMailboxes(LocalMailboxes):
    """Mailboxes in memory that can be away, lose answers, and remember what was posted."""

    def __init__(self, lease: float) -> None:
        super().__init__(lease)
        self.is_away = False
        self.loses_answers = False
        self.has_just_started = False
        self.attempts = 0
        self.posted: list[Frame] = []

    def _require(self) -> None:
        if self.is_away:
            raise StorageUnavailable

    def renew(self, replica: str) -> bool:
        self._require()
        return super().renew(replica)

    def is_open(self, replica: str) -> bool:
        self._require()
        return super().is_open(replica)

    def post(self, envelopes: Sequence[Envelope]) -> list[bool]:
        self.attempts += 1
        self._require()
        accepted = super().post(envelopes)
        taken = [envelope for envelope, ok in zip(envelopes, accepted, strict=True) if ok]
        self.posted.extend(
            protocol.decode_frame(envelope.data) for envelope in taken if envelope.data
        )
        if self.loses_answers:
            raise StorageUnavailable
        return accepted

    def collect(self, replica: str, timeout: float) -> list[bytes]:
        self._require()
        return super().collect(replica, timeout)

    def uptime(self) -> float:
        self._require()
        return 0.0 if self.has_just_started else 3600.0
