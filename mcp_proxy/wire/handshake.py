"""The state that a server must be told when it replaces a lost one. Pure.

That is the handshake of legacy revisions (MCP 2025-11-25, lifecycle, "Initialization"), the log
level and the resource subscriptions.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request

INITIALIZE = "initialize"
INITIALIZED = "notifications/initialized"

_SET_LEVEL = "logging/setLevel"
_SUBSCRIBE = "resources/subscribe"
_UNSUBSCRIBE = "resources/unsubscribe"

#: The methods that change the log level or the subscriptions.
CHANGES = frozenset({_SET_LEVEL, _SUBSCRIBE, _UNSUBSCRIBE})

# Bounded, since the session's record holds the subscriptions.
_MAX_SUBSCRIPTIONS = 256


class Change(NamedTuple):
    """A request that changes the server's state: its method, and its log level or URI."""

    method: str
    argument: str


class _Level(msgspec.Struct):
    level: str


class _Uri(msgspec.Struct):
    uri: str


class Resume(msgspec.Struct):
    """The log level and the subscriptions that a server is told after the handshake."""

    level: str | None = None
    subscriptions: list[str] = []

    def after(self, change: Change) -> Resume:
        """A copy with one more change."""
        if change.method == _SET_LEVEL:
            return Resume(change.argument, self.subscriptions)
        others = [uri for uri in self.subscriptions if uri != change.argument]
        added = [change.argument] if change.method == _SUBSCRIBE else []
        return Resume(self.level, [*others, *added][-_MAX_SUBSCRIPTIONS:])

    def requests(self) -> list[Request]:
        """The requests for the server, under ids of our own."""
        found = []
        if self.level is not None:
            params = jsonrpc.as_payload({"level": self.level})
            found.append(Request("mcp-proxy-level", _SET_LEVEL, params))
        for number, uri in enumerate(self.subscriptions):
            params = jsonrpc.as_payload({"uri": uri})
            found.append(Request(f"mcp-proxy-subscribe-{number}", _SUBSCRIBE, params))
        return found

    def encode(self) -> str:
        """The text that `decode_resume` reads."""
        return msgspec.json.encode(self).decode()


def decode_resume(text: str | None) -> Resume:
    """The Resume in a text of `Resume.encode`, empty for None; raises msgspec.DecodeError."""
    return Resume() if text is None else msgspec.json.decode(text, type=Resume)


def change_of(request: Request) -> Change | None:
    """The change that `request` makes in the server if it succeeds.

    None for a request that changes nothing, or whose params the server will refuse.
    """
    if request.method not in CHANGES:
        return None
    try:
        if request.method == _SET_LEVEL:
            level = msgspec.json.decode(request.params or b"{}", type=_Level).level
            return Change(request.method, level)
        uri = msgspec.json.decode(request.params or b"{}", type=_Uri).uri
        return Change(request.method, uri)
    except msgspec.DecodeError:
        return None
