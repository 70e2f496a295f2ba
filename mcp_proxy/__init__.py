"""A plain WSGI application that puts MCP servers on the network."""

from mcp_proxy.app import Application, create_app
from mcp_proxy.config import ProxyConfig
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.servers import HttpServer, StdioServer, demo_server
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.records import LocalStorage, Storage
from mcp_proxy.storage.session import Session
from mcp_proxy.transparent.proxy import TransparentProxy
from mcp_proxy.transports.sse import SSEProxy
from mcp_proxy.transports.streamable import StreamableProxy

__version__ = "0.1.0"

__all__ = [
    "Application",
    "HttpServer",
    "LocalStorage",
    "ProxyConfig",
    "RedisStorage",
    "SSEProxy",
    "Session",
    "SessionManager",
    "StdioServer",
    "Storage",
    "StreamableProxy",
    "TransparentProxy",
    "create_app",
    "demo_server",
]
