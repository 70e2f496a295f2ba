"""How many requests a caller may have: `rate_limit`, by principal and server.

Callers that nobody knows are told apart by their addresses. The host counts, and where
`rate_limit_scope` says so the deployment, too: who has no more of the host is refused by that
alone, and while Redis is away the host's count is what holds.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Self

from mcp_proxy import rate_buckets
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.forwarded import client_address
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import ConfigError, RateLimited, StorageUnavailable, in_seconds
from mcp_proxy.rate_buckets import CountEverywhere, Key, Rate, key_of, rate_of
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Batch, Message, Request

# The bits of an IPv6 address that one customer has for itself (RFC 6177 section 2).
_IPV6_PREFIX = 64


class CallerLimit:
    """The limit of each caller of one server, `text` as the setting has it. Thread-safe.

    `server` is where that is: it tells servers of one name from each other. `everywhere` counts for
    the whole deployment, None: for this host alone.
    """

    def __init__(
        self,
        text: str,
        rate: Rate,
        server: str,
        trusted: tuple[str, ...],
        everywhere: CountEverywhere | None,
    ) -> None:
        self._text = text
        self._rate = rate
        self._server = server
        self._trusted = trusted
        self._everywhere = everywhere

    def __repr__(self) -> str:
        return f"<CallerLimit {self._text}>"

    @classmethod
    def of(
        cls,
        options: ProxyOptions,
        server: str,
        counter: Callable[[], CountEverywhere | None],
    ) -> Self | None:
        """The limit that the settings say; None where there is none.

        `counter` makes what counts for a deployment, None where nothing does. Raises ConfigError.
        """
        text = options.rate_limit
        rate = None if text is None else rate_of(text)
        if text is None or rate is None:
            return None
        everywhere = counter() if options.rate_limit_scope == "deployment" else None
        if everywhere is None and options.rate_limit_scope == "deployment":
            raise ConfigError("rate_limit_scope=deployment needs sessions in Redis")
        return cls(text, rate, server, options.trusted_proxies, everywhere)

    def count(self, name: str, request: ClientRequest, message: Message | Batch) -> None:
        """Counts the requests in what a POST carries to the server of this name; raises RateLimited
        where its caller may have no more of them.

        Notifications and responses are free. Of a batch all are counted, or none. Who has read a
        request before, as another worker that has passed it, has counted it.
        """
        if isinstance(message, Request):
            self.take(name, request, 1)
        elif isinstance(message, list):
            count = sum(isinstance(part, Request) for part in message)
            if count:
                self.take(name, request, count)

    def take(self, name: str, request: ClientRequest, count: int) -> None:
        """As `count`, for so many requests."""
        if request.is_counted:
            return
        rate = self._rate
        if count > rate.burst:
            raise RateLimited(
                f"A batch of {count} requests is too large: {rate.burst} may come at once"
            )
        caller = self._caller_of(request)
        key = key_of(name, self._server, caller)
        wait = rate_buckets.current().take(key, rate, count, time.monotonic())
        if not wait and self._everywhere is not None:
            wait = self._counted_everywhere(self._everywhere, key_of(name, caller), count)
        if wait:
            seconds = math.ceil(wait)
            raise RateLimited(
                f"Too many requests: {self._text.partition(':')[0]} are allowed; try again in "
                f"{in_seconds(seconds)}",
                seconds,
            )
        request.is_counted = True

    def _counted_everywhere(self, everywhere: CountEverywhere, key: Key, count: int) -> float:
        """How long to wait by the deployment's count, in seconds; 0 while Redis is away."""
        try:
            return everywhere(key, self._rate, count)
        except StorageUnavailable:
            return 0.0

    def _caller_of(self, request: ClientRequest) -> str:
        if request.principal_name is not None:
            return f"principal {request.principal_name}"
        return f"address {_network_of(client_address(request.environ, self._trusted))}"


class MembersLimit:
    """The limits of the servers of a group, each as at the server's own endpoint. Thread-safe.

    `member_of` says whose the tool or prompt of this name is, None for nobody's: the server's name,
    and its limit. What is for no single server counts for the group, by its `own` limit.
    """

    def __init__(
        self,
        own: CallerLimit | None,
        member_of: Callable[[str], tuple[str, CallerLimit | None] | None],
    ) -> None:
        self._own = own
        self._member_of = member_of

    def __repr__(self) -> str:
        return f"<MembersLimit own={self._own!r}>"

    def count(self, name: str, request: ClientRequest, message: Message | Batch) -> None:
        """Counts as each limit does, and has metrics know which server a call is for.

        Raises RateLimited where the caller may have no more of one of the requests in a batch.
        """
        was_counted = request.is_counted
        if isinstance(message, Request):
            server, limit = self._whose(name, message)
            request.server = server
            if limit is not None and not was_counted:
                limit.take(server, request, 1)
            return
        parts = message if isinstance(message, list) else []
        whose = [self._whose(name, part) for part in parts if isinstance(part, Request)]
        for (server, limit), count in Counter(whose).items():
            if limit is not None and not was_counted:
                request.is_counted = False
                limit.take(server, request, count)

    def _whose(self, name: str, request: Request) -> tuple[str, CallerLimit | None]:
        """Whose a request is, and the limit that it counts for."""
        is_named = request.method in ("tools/call", "prompts/get")
        member = self._member_of(jsonrpc.names_in(request.params)[0]) if is_named else None
        return (name, self._own) if member is None else member


@lru_cache(maxsize=1024)
def _network_of(address: str) -> str:
    """What stands for everybody at an address: the /64 of one of IPv6.

    Where the server knows no address, as on a unix socket, all are the same.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), _IPV6_PREFIX), strict=False))
