"""A server of a group: its children are started by the owner of its sessions, and lent.

So what holds for the server alone holds in a group, too: its environment, its pauses after exits,
the tools that are hidden, the processes that a worker may have, and what a reload replaces.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec

from mcp_proxy.auth import caller_env
from mcp_proxy.auth.caller_env import Values
from mcp_proxy.auth.group_env import of_server
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.group_server import Started, Wanted
from mcp_proxy.backends.owned import CREDENTIALS, OwnedBackend, called_by
from mcp_proxy.errors import BackendError, BackendNotStarted
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.servers import GroupMember, Served


class OwnedMember:
    """A server of a group whose sessions `owner` has. Thread-safe.

    `headers_of` says which of a client's headers the server gets, and which of its own.
    """

    def __init__(
        self,
        member: GroupMember,
        owner: Owner,
        headers_of: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None,
    ) -> None:
        self.name = member.server
        self.prefix = member.prefix
        self.tools = member.tools
        self.schemes = frozenset(member.schemes)
        self._owner = owner
        self._headers_of = headers_of
        self._form: tuple[Served | None, bytes] = (None, b"")

    def __repr__(self) -> str:
        return f"<OwnedMember {self.name} as {self.prefix!r}>"

    @property
    def timeout(self) -> float:
        """Seconds that a call of the server may take."""
        return self._owner.options.request_timeout

    def key(self, declared: bytes, values: Values | None, headers: Mapping[str, str]) -> str:
        """What its lists are known by: the same for what starts the same process for a caller, or
        shows an HTTP server the same caller.
        """
        own = of_server(values, self.name)
        shown = {**own.values, "": own.lacks or ""}
        if self._headers_of is not None:
            shown |= {
                f"{name}:": value
                for name, value in self._headers_of(headers).items()
                if name.title() in CREDENTIALS or headers.get(name) != value
            }
        return _key(self.name, self._encoded(), declared, caller_env.as_text(shown))

    def _encoded(self) -> bytes:
        """What starts the process; encoded once for each form of the server."""
        server, encoded = self._form
        if server is not self._owner.server:
            server = self._owner.server
            encoded = msgspec.json.encode(server)
            self._form = (server, encoded)
        return encoded

    def headers_for(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers of a client's request that the server gets."""
        return headers if self._headers_of is None else self._headers_of(headers)

    def start(self, wanted: Wanted) -> Started:
        """A child that has answered initialize and knows that it is initialized.

        Raises ProxyError where it cannot be started.
        """
        owner, of_caller = self._owner, of_server(wanted.values, self.name)
        if of_caller.lacks is not None:
            raise BackendNotStarted(of_caller.lacks)
        owner.backoff.require_over(wanted.session)
        owner.reserve()
        try:
            with (
                called_by(self.headers_for(wanted.headers)),
                caller_env.on_behalf_of(of_caller.values),
                owner.turns.take(owner.options.request_timeout, wanted.has_left),
            ):
                return self._started(wanted)
        except BackendError as error:
            owner.backoff.note_failure(error)
            owner.backoff.note_exit(wanted.session, lifetime=0)
            raise
        finally:
            owner.unreserve()

    def _started(self, wanted: Wanted) -> Started:
        owner = self._owner

        def note_lost(backend: OwnedBackend) -> None:
            owner.count_lost(backend)
            owner.backoff.note_exit(wanted.session, time.monotonic() - backend.started)
            wanted.on_lost(backend)

        bridge: Bridge = owner.spawn(on_lost=note_lost)
        try:
            timeout = owner.options.request_timeout
            result = handshake.initialized(bridge, wanted.initialize, timeout, wanted.has_left)
        except BaseException:
            bridge.close()
            raise
        owner.lend(bridge, wanted.is_needed)
        owner.backoff.note_success()
        return Started(bridge, result)


@lru_cache(maxsize=1024)
def _key(name: str, server: bytes, declared: bytes, of_caller: bytes) -> str:
    digest = hashlib.sha256(b"\0".join((server, declared, of_caller))).hexdigest()[:32]
    return f"{name}/{digest}"


#: Seconds for a call of a server that is not served: it fails at once.
NOT_SERVED = 1.0


class AbsentMember:
    """A server of a group that is not served, for a reason."""

    def __init__(self, member: GroupMember, reason: str) -> None:
        self.name = member.server
        self.prefix = member.prefix
        self.tools = member.tools
        self.schemes = frozenset(member.schemes)
        self._reason = reason
        self.timeout = NOT_SERVED

    def key(self, declared: bytes, values: Values | None, headers: Mapping[str, str]) -> str:
        """What is known of it: why it is not served."""
        return f"{self.name}/{self._reason}"

    def headers_for(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """It gets nothing."""
        return headers

    def start(self, wanted: Wanted) -> Started:
        """Raises BackendNotStarted."""
        raise BackendNotStarted(f"The server is not served: {self._reason}")
