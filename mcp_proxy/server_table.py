"""The table of servers of a file: what is served of it, and what becomes of it at a reload.

gunicorn's master makes the first table when it starts and another one at each reload, and publishes
it as a text (`shared_text`); an application without such a master has a table of its own. A mistake
in one entry is that entry's: its last good form is served on. What makes the file unreadable
changes nothing but the reason why.

The values of variables are expanded in a table, so it is kept in memory only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from mcp_proxy.errors import ConfigError
from mcp_proxy.server_groups import SIGN
from mcp_proxy.servers import Server, StdioServer, UnservedServer, path_name

log = logging.getLogger(__name__)

#: Names of servers that were removed and are remembered, the latest first: what is asked of one is
#: told so. Beyond them a name is as unknown as any other.
MAX_REMOVED = 100


class ServerTable(msgspec.Struct, frozen=True):
    """The servers that are served, by a file or by an application of its own.

    `failure` is why the last reload has changed nothing, or not all that it should have; None where
    it has done everything.
    """

    path: str | None
    servers: list[Server]
    removed: list[str] = []
    failure: str | None = None

    def names(self) -> list[str]:
        """The names of the servers, in their order."""
        return [server.name for server in self.servers]

    def renewed(self, read: Sequence[Server]) -> ServerTable:
        """The table once the servers are those that were read.

        Where something is wrong in the entry of one it stays as it was served last. Raises
        ConfigError where none would be served.
        """
        before = {server.name: server for server in self.servers}
        servers: list[Server] = []
        mistakes: list[str] = []
        for server in read:
            last = before.get(server.name)
            if isinstance(server, UnservedServer) and not server.is_disabled:
                mistakes.append(_mistake_in(server, last))
                if last is not None and not isinstance(last, UnservedServer):
                    server = last
            servers.append(server)
        if all(isinstance(server, UnservedServer) for server in servers):
            raise ConfigError("; ".join(["no server would be served", *mistakes]))
        names = {server.name for server in servers}
        gone = [name for name in (*self.names(), *self.removed) if name not in names]
        return ServerTable(self.path, servers, gone[:MAX_REMOVED], "; ".join(mistakes) or None)

    def failed(self, error: Exception) -> ServerTable:
        """The same table, with the reason why it has not become another one."""
        return msgspec.structs.replace(self, failure=str(error))

    def changes_to(self, after: ServerTable) -> str:
        """What another table serves that this one does not, and the other way round, in words."""
        before = {server.name: server for server in self.servers}
        others = {server.name: server for server in after.servers}
        parts = {
            "changed": [n for n, one in others.items() if n in before and before[n] != one],
            "new": [name for name in others if name not in before],
            "removed": [name for name in before if name not in others],
        }
        named = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        return "; ".join(named) or "nothing is different"


def _mistake_in(server: UnservedServer, last: Server | None) -> str:
    """What is wrong in an entry, and what follows."""
    was_served = last is not None and not isinstance(last, UnservedServer)
    follows = "it is served as it was before" if was_served else "it is not served"
    return f"{server}, and {follows}"


def require_servers(servers: Sequence[object], names: Sequence[str] | None) -> None:
    """Raises ConfigError unless these are servers, each with a name of its own that fits into a
    URL; `names` are the only ones that there may be.
    """
    found = [server.name for server in servers if isinstance(server, Server)]
    if not servers or len(found) < len(servers):
        raise ConfigError("servers are StdioServer(...) and HttpServer(...), at least one of them")
    for name in found:
        if name.startswith(SIGN):
            continue
        if found.count(name) > 1 or name in (".", "..") or path_name(name) != name:
            raise ConfigError(f"{name!r} is no name for a server, or is there twice")
    if names is not None and found != list(names):
        raise ConfigError(f"what is served without a file is one server, named {names[0]!r}")


def is_other_process(before: Server, after: Server) -> bool:
    """Whether a process of the one form of a stdio server is none of the other form."""
    if not (isinstance(before, StdioServer) and isinstance(after, StdioServer)):
        return before != after
    one, other = ((each.argv, each.env, each.env_from, each.cwd) for each in (before, after))
    return one != other


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerTable)


def encode(table: ServerTable) -> bytes:
    """A table as the workers of a master are told it."""
    return _encoder.encode(table)


def decode(data: bytes) -> ServerTable:
    """The table in such a text; raises ConfigError for any other text."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the table of servers cannot be read: {error}") from error
