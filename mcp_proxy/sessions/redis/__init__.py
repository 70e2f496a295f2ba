"""Sessions in Redis, shared by every replica that uses the same server and prefix.

The only package of the session layer that knows redis-py.
"""

from mcp_proxy.sessions.redis.client import Access, Client
from mcp_proxy.sessions.redis.events import RedisEventLog
from mcp_proxy.sessions.redis.storage import RedisStorage

__all__ = ["Access", "Client", "RedisEventLog", "RedisStorage"]
