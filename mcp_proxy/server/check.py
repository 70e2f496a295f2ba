"""`mcp-wsgi-proxy check`: tries everything that a deployment needs, and prints a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from mcp_proxy.app import storage_of
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.http import HttpClient
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.forwarded import HeaderPolicy
from mcp_proxy.errors import ConfigError, ProxyError, StorageUnavailable
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.redis.client import password_in
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.replica import Replica
from mcp_proxy.server.greeting import greet, greet_child
from mcp_proxy.server.gunicorn import require_shared_sessions
from mcp_proxy.servers import HttpServer, StdioServer
from mcp_proxy.wire.urls import Target, parse_target

# A shorter value is no secret worth the name, and would be found everywhere.
_SHORTEST_SECRET = 6


class Row(NamedTuple):
    """One line of the table."""

    what: str
    is_good: bool
    finding: str


def check(config: ProxyConfig) -> int:
    """Prints the table and returns 0 if everything is in order, else 1."""
    secrets = _secrets(config)
    rows = []
    for row in _rows(config):
        rows.append(row)
        finding = row.finding
        for secret in secrets:
            finding = finding.replace(secret, "***")
        print(f"{'ok  ' if row.is_good else 'FAIL'}  {row.what:<24} {finding}", flush=True)
    return 0 if all(row.is_good for row in rows) else 1


def _secrets(config: ProxyConfig) -> list[str]:
    """What must not be printed, though a server may repeat it; the longest first."""
    urls = [*config.target_url, *config.allowed_backends]
    headers = [*config.forward_headers]
    told: list[str] = []
    for server in config.servers():
        if isinstance(server, HttpServer):
            urls += server.urls
            headers += server.headers
        else:
            told += server.env.values()
    told += [header.partition(":")[2].strip() for header in headers]
    told += [word for value in told for word in value.split()]
    told += [value for url in urls for _, value in parse_qsl(urlsplit(url).query)]
    for url in filter(None, (config.redis_url, config.backend_proxy)):
        password = password_in(url)
        told += [password, unquote(password)]
    return sorted({s for s in told if len(s) >= _SHORTEST_SECRET}, key=len, reverse=True)


def _rows(config: ProxyConfig) -> Iterator[Row]:
    yield Row("configuration", True, repr(config))
    for sentence in config.ignored():
        yield Row("configuration", True, sentence)
    yield _workers(config)
    yield _store(config)
    supervisor = Supervisor(Replica())
    client = HttpClient(config.connect_timeout, 1, config.ca_file or True, config.backend_proxy)
    try:
        for server in config.servers():
            if isinstance(server, HttpServer):
                for url in server.urls:
                    yield _backend(config, client, server, url)
            else:
                yield _server(config, server, supervisor)
    finally:
        client.close()
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
        try:
            store.check()
            version = ".".join(map(str, store.version()))
        finally:
            store.close()
    except StorageUnavailable as error:
        return Row("sessions", False, error.detail)
    except ProxyError as error:
        return Row("sessions", False, str(error))
    return Row("sessions", True, f"Redis {version}, which takes writes")


def _backend(config: ProxyConfig, client: HttpClient, server: HttpServer, url: str) -> Row:
    """Initializes one replica of an HTTP server, as a client would through the proxy."""
    what = f"server {server.name}"
    target = parse_target(url)
    assert target is not None
    policy = HeaderPolicy(changes=(*config.forward_headers, *server.headers))
    headers = policy.outbound({"wsgi.url_scheme": "http"})
    try:
        return Row(what, True, f"{greet(client, target, headers)} ({_shown(target)})")
    except ProxyError as error:
        return Row(what, False, f"{error} ({_shown(target)})")


def _shown(target: Target) -> str:
    return target.address.url + target.path


def _server(config: ProxyConfig, server: StdioServer, supervisor: Supervisor) -> Row:
    what = f"server {server.name}"
    try:
        limit = config.max_message_bytes
        bridge = Bridge(supervisor, server, limit, on_lost=lambda lost: None)
    except ProxyError as error:
        return Row(what, False, f"{error} ({server})")
    try:
        return Row(what, True, greet_child(bridge))
    except ProxyError as error:
        tail = "".join(f"\n      stderr: {line}" for line in bridge.stderr_tail[-5:])
        return Row(what, False, f"{error} ({server}){tail}")
    finally:
        bridge.close()
