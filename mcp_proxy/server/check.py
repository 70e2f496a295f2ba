"""`mcp-wsgi-proxy check`: tries everything that a deployment needs, and prints a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mcp_proxy import __version__
from mcp_proxy.app import storage_of
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.http import HttpClient
from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import ConfigError, ProxyError
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.replica import Replica
from mcp_proxy.server.gunicorn import require_shared_sessions
from mcp_proxy.servers import HttpServer, StdioServer
from mcp_proxy.wire import jsonrpc, revisions
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.urls import parse_target

#: The first Redis with GETEX.
REDIS_NEEDED = (6, 2)

# Seconds for a server to answer initialize; `npx` and `uvx` may have to fetch it first.
_ANSWER_TIME = 60.0


class Row(NamedTuple):
    """One line of the table."""

    what: str
    is_good: bool
    finding: str


def check(config: ProxyConfig) -> int:
    """Prints the table and returns 0 if everything is in order, else 1."""
    rows = []
    for row in _rows(config):
        rows.append(row)
        print(f"{'ok  ' if row.is_good else 'FAIL'}  {row.what:<24} {row.finding}", flush=True)
    return 0 if all(row.is_good for row in rows) else 1


def _rows(config: ProxyConfig) -> Iterator[Row]:
    yield Row("configuration", True, repr(config))
    yield _workers(config)
    yield _store(config)
    supervisor = Supervisor(Replica())
    try:
        for server in config.servers():
            if isinstance(server, HttpServer):
                yield from _backends(config, server)
            else:
                yield _server(config, server, supervisor)
    finally:
        supervisor.close()


def _workers(config: ProxyConfig) -> Row:
    try:
        require_shared_sessions(config, config.workers)
    except ConfigError as error:
        return Row("workers", False, str(error))
    return Row("workers", True, f"{config.workers} with {config.threads} threads")


def _store(config: ProxyConfig) -> Row:
    if config.redis_url is None:
        return Row("sessions", True, "in the memory of the one worker")
    try:
        store = storage_of(config)
        assert isinstance(store, RedisStorage)
        version = store.version()
        store.close()
    except ProxyError as error:
        return Row("sessions", False, str(error))
    found = ".".join(map(str, version))
    if version < REDIS_NEEDED:
        return Row("sessions", False, f"Redis {found} is too old: GETEX came with 6.2")
    return Row("sessions", True, f"Redis {found}")


def _backends(config: ProxyConfig, server: HttpServer) -> Iterator[Row]:
    """Whether each replica of an HTTP server accepts connections."""
    client = HttpClient(config.connect_timeout, pool_size=1, verify=config.ca_file or True)
    for url in server.urls:
        target = parse_target(url)
        assert target is not None
        reason = client.probe(target.address)
        yield Row(f"server {server.name}", reason is None, reason or f"{url} accepts connections")


def _server(config: ProxyConfig, server: StdioServer, supervisor: Supervisor) -> Row:
    what = f"server {server.name}"
    try:
        limit = config.max_message_bytes
        bridge = Bridge(supervisor, server, limit, on_lost=lambda lost: None)
    except ProxyError as error:
        return Row(what, False, f"{error} ({server})")
    try:
        return Row(what, True, _greet(bridge))
    except ProxyError as error:
        tail = "".join(f"\n      stderr: {line}" for line in bridge.stderr_tail[-5:])
        return Row(what, False, f"{error} ({server}){tail}")
    finally:
        bridge.close()


def _greet(bridge: Bridge) -> str:
    """Initializes a server and returns its name, version and revision; raises ProxyError."""
    params = {
        "protocolVersion": revisions.LEGACY[-1],
        "capabilities": {},
        "clientInfo": {"name": "mcp-wsgi-proxy check", "version": __version__},
    }
    request = Request("check", INITIALIZE, jsonrpc.as_payload(params))
    answer = handshake.ask(bridge, request, _ANSWER_TIME)
    return handshake.describe(answer)
