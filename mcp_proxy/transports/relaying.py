"""The relay that belongs to a store: replicas that share the one reach each other by the other."""

from __future__ import annotations

from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica
from mcp_proxy.storage.records import Storage


def relay_for(storage: Storage, replica: Replica, prefix: str | None = None) -> Relay | None:
    """A relay over the same Redis as `storage`; None for a store of one process.

    `prefix` is what the keys of mailboxes begin with: that of the store, unless several stores
    share the mailboxes. A relay of one's own kind is given to the transport.
    """
    if not isinstance(storage, RedisStorage):
        return None
    return Relay(RedisMailboxes(storage.access, prefix or storage.prefix), replica)
