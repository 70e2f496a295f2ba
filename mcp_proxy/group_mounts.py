"""What stands in front of groups: the transports of several servers together, as these change.

A group has its servers from what is mounted for each of them alone: their owners, their fronts for
modern requests, their limits and what they get of a caller are the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version

from msgspec.structs import replace

from mcp_proxy.auth import caller_env
from mcp_proxy.auth.caller_env import CallerEnv
from mcp_proxy.auth.group_env import EnvOfServer, GroupEnv
from mcp_proxy.backends.catalogue import GATHER_TIMEOUT, Catalogue
from mcp_proxy.backends.group import Group, Settings
from mcp_proxy.backends.group_server import Member
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.caller_limit import CallerLimit, MembersLimit
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.ownership.members import AbsentMember, OwnedMember
from mcp_proxy.ownership.owner import Owner, ReplicaParts
from mcp_proxy.servers import GroupMember, Served, Server, ServerGroup, UnservedServer
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.transparent.proxy import TransparentProxy
from mcp_proxy.transports.base import Transport
from mcp_proxy.transports.stateless_group import FrontedMember, StatelessGroup
from mcp_proxy.transports.stdio import StdioTransport
from mcp_proxy.transports.streamable import StreamableProxy
from mcp_proxy.wire import naming

_Transports = Mapping[str, Mapping[str, Transport]]


class GroupMounts:
    """The groups of an application. Thread-safe."""

    def __init__(self, config: ProxyConfig, parts: ReplicaParts, edge: Edge) -> None:
        self._config = config
        self._parts = parts
        self._edge = edge
        # By the names of groups; what is under a name is replaced, never changed.
        self._members: dict[str, Sequence[Member]] = {}
        self._fronted: dict[str, Sequence[FrontedMember]] = {}
        #: What the servers of groups list.
        self._catalogue = Catalogue(parts.timer, max(4, 2 * (os.cpu_count() or 1)))

    def __repr__(self) -> str:
        return f"<GroupMounts {self._catalogue!r}>"

    def close(self) -> None:
        """Asks no server for its lists any more."""
        self._catalogue.close()

    # --- making ----------------------------------------------------------------------------------

    def owner(self, group: ServerGroup, manager: SessionManager) -> Owner:
        """Who has the sessions of a group."""
        settings = self._settings_of(group.name)

        def make() -> Group:
            members, values = partial(self._members_of, group.name), caller_env.current_values()
            return Group(members, self._catalogue, settings, values)

        return Owner(group, manager, self._parts, self._config, make=make)

    def front(self, name: str) -> StatelessGroup:
        """What answers the modern requests for a group."""
        return StatelessGroup(
            partial(self._fronted_of, name),
            self._catalogue,
            self._settings_of(name),
            self._edge,
            self._config,
        )

    def _settings_of(self, name: str) -> Settings:
        own = version("mcp-wsgi-proxy")
        return Settings(name, own, self._config.request_timeout, GATHER_TIMEOUT)

    def fit(
        self, group: ServerGroup, servers: Mapping[str, Server], transports: _Transports
    ) -> None:
        """Has a group have these servers, and its transports know what they ask for."""
        fronted = [
            _fronted(member, servers, transports.get(member.server, {})) for member in group.members
        ]
        self._members[group.name] = [one.member for one in fronted]
        self._fronted[group.name] = fronted
        firsts = {
            member.server: next(iter(transports.get(member.server, {}).values()), None)
            for member in group.members
        }
        envs = [EnvOfServer(name, _env_of(one)) for name, one in firsts.items()]
        is_env_needed = self._edge.authenticator is not None or any(each.env for each in envs)
        env = GroupEnv(group.name, envs) if is_env_needed else None
        over_http = [one for one in firsts.values() if isinstance(one, TransparentProxy)]
        timeouts = [one.options.request_timeout for one in firsts.values() if one is not None]
        longest = max(timeouts, default=self._config.request_timeout)
        scopes = {name: _scopes_of(servers.get(name)) for name in firsts}
        for transport in transports[group.name].values():
            assert isinstance(transport, StdioTransport)
            transport.owner.caller_env = env
            transport.headers_of = partial(_client_headers, over_http) if over_http else None
            transport.options = replace(transport.options, request_timeout=longest)
            transport.members = scopes
            transport.scopes = tuple(dict.fromkeys(s for of in scopes.values() for s in of))
            own = CallerLimit.of(self._config, group.name, transport.manager.storage.rate_counter)
            by_prefix = {member.prefix: member.server for member in group.members}
            transport.rate_limit = MembersLimit(own, partial(_limit_of, by_prefix, firsts))

    # --- the servers of a group ------------------------------------------------------------------

    def _members_of(self, name: str) -> Sequence[Member]:
        return self._members.get(name, ())

    def _fronted_of(self, name: str, request: ClientRequest) -> Sequence[FrontedMember]:
        """The servers of a group that the caller may use, as they are now."""
        caller, fronted = request.principal, self._fronted.get(name, ())
        if caller is None or caller.servers is None:
            return fronted
        return [one for one in fronted if caller.may_use_member(name, one.member.name)]


def _fronted(
    member: GroupMember, servers: Mapping[str, Server], transports: Mapping[str, Transport]
) -> FrontedMember:
    """A server of a group, and what answers the modern requests for it."""
    for transport in transports.values():
        if isinstance(transport, StreamableProxy):
            found = OwnedMember(member, transport.owner)
            return FrontedMember(found, transport.stateless, transport.on_behalf_of)
        if isinstance(transport, TransparentProxy) and transport.bridge is not None:
            front = transport.bridge.front
            over_http = OwnedMember(member, front.owner, transport.own_headers)
            return FrontedMember(over_http, front.stateless, transport.bridge.on_behalf_of)
        if isinstance(transport, StdioTransport):
            return FrontedMember(OwnedMember(member, transport.owner), None, _for_nobody)
    server = servers.get(member.server)
    reason = server.reason if isinstance(server, UnservedServer) else "it is not served"
    return FrontedMember(AbsentMember(member, reason), None, _for_nobody, reason)


def _for_nobody(request: ClientRequest) -> AbstractContextManager[None]:
    return nullcontext()


def _env_of(transport: Transport | None) -> CallerEnv | None:
    """What the server behind a transport gets of its caller."""
    env = transport.owner.caller_env if isinstance(transport, StdioTransport) else None
    return env if isinstance(env, CallerEnv) else None


def _scopes_of(server: Server | None) -> tuple[str, ...]:
    """The scopes that an access token must have for a server, beside those of the settings."""
    return server.jwt_scopes if isinstance(server, Served) else ()


def _client_headers(
    over_http: Sequence[TransparentProxy], request: ClientRequest
) -> Mapping[str, str]:
    """The headers of a client's request that one of these servers gets."""
    found: dict[str, str] = {}
    for transport in over_http:
        found |= transport.client_headers(request)
    return found


def _limit_of(
    servers: Mapping[str, str], transports: Mapping[str, Transport | None], public: str
) -> tuple[str, CallerLimit | None] | None:
    """Whose a tool or prompt of a group is, by the prefixes of its `servers`, and the limit of that
    server.

    What has none of these prefixes is of the server without one, if there is such a server.
    """
    server = servers.get(naming.split_name(public)[0]) or servers.get("")
    if server is None:
        return None
    transport = transports[server]
    limit = None if transport is None else transport.rate_limit
    return server, limit if isinstance(limit, CallerLimit) else None
