"""What the replicas of a deployment share, as the configuration says: sessions, and a relay."""

from __future__ import annotations

from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import ConfigError
from mcp_proxy.redis.client import Access
from mcp_proxy.redis.mailboxes import RedisMailboxes
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica
from mcp_proxy.storage.records import LocalStorage, Storage


class Sharing:
    """The stores of one application, over one Redis client; nothing is sent before their first use.

    Raises ConfigError where `redis_url` cannot be read.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._access: Access | None = None
        if config.redis_url is not None:
            try:
                self._access = Access(config.redis_url, config.connect_timeout)
            except ValueError as error:
                raise ConfigError(f"redis_url {error}") from None

    def storage(self, server: str) -> Storage:
        """The store of one server's sessions."""
        if self._access is None:
            return LocalStorage(self._config.session_ttl)
        prefix = f"{self._config.redis_prefix}{server}:"
        return RedisStorage(self._access, ttl=self._config.session_ttl, prefix=prefix)

    def relay(self, replica: Replica) -> Relay | None:
        """What carries messages to other replicas; None where there can be none."""
        if self._access is None:
            return None
        return Relay(RedisMailboxes(self._access, self._config.redis_prefix), replica)

    def close(self) -> None:
        """Closes the connections."""
        if self._access is not None:
            self._access.close()
