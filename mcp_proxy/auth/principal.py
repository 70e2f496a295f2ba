"""The principal: who calls, as everything that is bound to a caller knows it.

Sessions, homes, event streams and `requestState` belong to the principal that began them. The name
alone decides: whoever has it gets what is bound to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Principal(msgspec.Struct, frozen=True):
    """Who calls: `name` is what things are bound to and what logs show (`key:NAME`, or the issuer
    and the subject of a token). It is no secret.

    `scopes` are what the caller may do beyond calling, `claims` what an issuer says of it.
    `expires` ends the standing streams of the caller, in seconds since the epoch; None: never.
    `servers` are the names of those that the caller may use, `@` and a name for a group; None: all.
    """

    name: str
    scopes: frozenset[str] = frozenset()
    claims: dict[str, Any] = {}
    expires: float | None = None  # seconds since the epoch
    servers: frozenset[str] | None = None

    def may_use(self, server: str | None, members: Collection[str] = ()) -> bool:
        """Whether the caller may use a server, or a group or at least one of its `members`."""
        return (
            self.servers is None or server in self.servers or not self.servers.isdisjoint(members)
        )

    def may_use_whole(self, group: str) -> bool:
        """Whether the caller may use all servers of a group."""
        return self.servers is None or group in self.servers

    def may_use_member(self, group: str, server: str) -> bool:
        """Whether the caller may use a server of a group there: it, or all of the group."""
        return self.may_use_whole(group) or server in (self.servers or ())


#: The servers of a group, and the scopes that each needs: none, of what is no group.
NO_MEMBERS: Mapping[str, tuple[str, ...]] = MappingProxyType({})

#: An embedder's own authentication: who calls, None where nobody is known.
Authenticate = Callable[["WSGIEnvironment"], Principal | None]


class Caller(NamedTuple):
    """A principal, and whether what it has shown still counts: that may end during a stream.

    `is_known` is quick and may be called by any thread.
    """

    principal: Principal
    is_known: Callable[[], bool]


def until_expiry(principal: Principal) -> Caller:
    """A caller who is known until the principal expires."""
    expires = principal.expires
    return Caller(principal, lambda: expires is None or time.time() < expires)


def bearer_token(environ: WSGIEnvironment) -> str | None:
    """The token of `Authorization: Bearer` (RFC 6750 section 2.1); None where there is none."""
    given: str = environ.get("HTTP_AUTHORIZATION", "")
    scheme, _, token = given.strip().partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None
