"""Variables that the servers of a group get of a caller, and which of them that may use.

Both belong to a session of a group, as the variables of a caller do to one of a single server: they
travel in the same way, each with the server's name before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mcp_proxy.auth.caller_env import CallerEnv, Values
from mcp_proxy.auth.principal import Principal
from mcp_proxy.errors import InvalidRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# Between a server's name, which has none, and a variable. Without a variable: what the caller lacks
# for the server.
_SEPARATOR = "/"

# What has no server's name: those that the caller may use, with commas, where it may not use all.
_PERMITTED = ""


class EnvOfServer(NamedTuple):
    """A server of a group, and what it gets of its caller; None: nothing."""

    name: str
    env: CallerEnv | None


class OfServer(NamedTuple):
    """What one server gets; what the caller `lacks` for it, and whether it `is_hidden` from it."""

    values: Values
    lacks: str | None = None
    is_hidden: bool = False


class GroupEnv:
    """What the servers of a group get of their caller. Immutable, so thread-safe."""

    def __init__(self, group: str, servers: Sequence[EnvOfServer]) -> None:
        self._group = group
        self._servers = servers

    def __repr__(self) -> str:
        return f"<GroupEnv {self._group}>"

    def values_of(self, environ: WSGIEnvironment, principal: Principal | None) -> Values:
        """The variables of who has sent a request; `of_server` takes them apart.

        Raises ConfigError where `env_for` returns no such mapping.
        """
        found: dict[str, str] = {}
        if principal is not None and not principal.may_use_whole(self._group):
            found[_PERMITTED] = ",".join(sorted(principal.servers or ()))
        for name, env in self._servers:
            if env is not None and not _is_hidden(found, name):
                try:
                    values = env.values_of(environ, principal)
                except InvalidRequest as error:
                    found[f"{name}{_SEPARATOR}"] = error.message
                else:
                    found |= {f"{name}{_SEPARATOR}{key}": value for key, value in values.items()}
        return found


def of_server(values: Values | None, name: str) -> OfServer:
    """What one server of a group gets of these variables."""
    prefix = f"{name}{_SEPARATOR}"
    own = {key[len(prefix) :]: one for key, one in (values or {}).items() if key.startswith(prefix)}
    lacks = own.pop("", None)
    return OfServer(own, lacks, _is_hidden(values or {}, name))


def _is_hidden(values: Values, name: str) -> bool:
    return _PERMITTED in values and name not in values[_PERMITTED].split(",")
