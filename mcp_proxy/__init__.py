"""A plain WSGI application that puts MCP servers on the network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcp_proxy.app import Application, create_app
    from mcp_proxy.auth.principal import Principal
    from mcp_proxy.config import ProxyConfig, ProxyOptions
    from mcp_proxy.errors import (
        BackendDraining,
        BackendError,
        BackendExited,
        BackendLost,
        BackendNotStarted,
        BackendTimeout,
        BackendUnavailable,
        BackendUnreached,
        BadAnswer,
        ClientError,
        ConfigError,
        ConnectionBroken,
        Draining,
        NotPermitted,
        Overloaded,
        ProxyError,
        SessionEnded,
        SessionExists,
        SessionNotFound,
        SessionUnknown,
        StorageError,
        StorageUnavailable,
        Unauthenticated,
    )
    from mcp_proxy.redis.storage import RedisStorage
    from mcp_proxy.servers import HttpServer, StdioServer, UnservedServer, demo_server
    from mcp_proxy.sessions.manager import SessionManager
    from mcp_proxy.storage.event_log import EventLog, LoggedEvent
    from mcp_proxy.storage.mailboxes import Envelope, Mailboxes
    from mcp_proxy.storage.records import LocalStorage, Storage
    from mcp_proxy.storage.session import Session
    from mcp_proxy.transparent.proxy import TransparentProxy
    from mcp_proxy.transports.sse import SSEProxy
    from mcp_proxy.transports.streamable import StreamableProxy
    from mcp_proxy.wire.tools import ToolFilter

__version__ = "0.1.0"

_ERRORS = (
    "BackendDraining",
    "BackendError",
    "BackendExited",
    "BackendLost",
    "BackendNotStarted",
    "BackendTimeout",
    "BackendUnavailable",
    "BackendUnreached",
    "BadAnswer",
    "ClientError",
    "ConfigError",
    "ConnectionBroken",
    "Draining",
    "NotPermitted",
    "Overloaded",
    "ProxyError",
    "SessionEnded",
    "SessionExists",
    "SessionNotFound",
    "SessionUnknown",
    "StorageError",
    "StorageUnavailable",
    "Unauthenticated",
)

# Where each public name is defined: it is imported when it is first asked for (PEP 562), so that
# neither redis nor requests is loaded by who does not use them, nor before gevent has patched.
_HOMES = {
    "Application": "app",
    "Envelope": "storage.mailboxes",
    "EventLog": "storage.event_log",
    "HttpServer": "servers",
    "LocalStorage": "storage.records",
    "LoggedEvent": "storage.event_log",
    "Mailboxes": "storage.mailboxes",
    "Principal": "auth.principal",
    "ProxyConfig": "config",
    "ProxyOptions": "config",
    "RedisStorage": "redis.storage",
    "SSEProxy": "transports.sse",
    "Session": "storage.session",
    "SessionManager": "sessions.manager",
    "StdioServer": "servers",
    "Storage": "storage.records",
    "StreamableProxy": "transports.streamable",
    "ToolFilter": "wire.tools",
    "TransparentProxy": "transparent.proxy",
    "UnservedServer": "servers",
    "create_app": "app",
    "demo_server": "servers",
    **dict.fromkeys(_ERRORS, "errors"),
}

__all__ = [
    "Application",
    "BackendDraining",
    "BackendError",
    "BackendExited",
    "BackendLost",
    "BackendNotStarted",
    "BackendTimeout",
    "BackendUnavailable",
    "BackendUnreached",
    "BadAnswer",
    "ClientError",
    "ConfigError",
    "ConnectionBroken",
    "Draining",
    "Envelope",
    "EventLog",
    "HttpServer",
    "LocalStorage",
    "LoggedEvent",
    "Mailboxes",
    "NotPermitted",
    "Overloaded",
    "Principal",
    "ProxyConfig",
    "ProxyError",
    "ProxyOptions",
    "RedisStorage",
    "SSEProxy",
    "Session",
    "SessionEnded",
    "SessionExists",
    "SessionManager",
    "SessionNotFound",
    "SessionUnknown",
    "StdioServer",
    "Storage",
    "StorageError",
    "StorageUnavailable",
    "StreamableProxy",
    "ToolFilter",
    "TransparentProxy",
    "Unauthenticated",
    "UnservedServer",
    "__version__",
    "create_app",
    "demo_server",
]


if not TYPE_CHECKING:  # else a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
