"""What is printed at the start: where the servers are, and what to tell a client."""

from __future__ import annotations

import json
import os
import re

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.guard import is_loopback, url_host
from mcp_proxy.servers import HttpServer, Served, StdioServer, UnservedServer


def banner(config: ProxyConfig, addresses: list[str], token: str = "") -> str:
    """The URLs and a client configuration block for the servers at `addresses`.

    With a `token` the URL of the status page, too, where it is served there.
    """
    address = addresses[0] if addresses else config.bind
    if address.startswith("unix:"):
        return _unix_banner(config, address)
    base = base_url(config, addresses)
    urls = server_urls(config, base)
    block = {"mcpServers": {_client_name(config, name): _entry(url) for name, url in urls.items()}}
    lines = [
        *(f"  {name}: {url}" for name, url in urls.items()),
        *_older(config, base),
        "",
        "  For a client's configuration:",
        *(f"    {line}" for line in json.dumps(block, indent=2).splitlines()),
        "",
        f"  Health: {base}/healthz and {base}/readyz",
        *_status_line(config, base, token),
        *_warnings(config, addresses),
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def _status_line(config: ProxyConfig, base: str, token: str) -> list[str]:
    """Where the status page is, for who reads the banner; nothing where it is not served."""
    if not token or not config.is_for_one_machine or not is_loopback(url_host(base)):
        return []
    return [f"  Status: {base}/status?token={token}"]


def _client_name(config: ProxyConfig, name: str) -> str:
    """What a client may call a server; one without a name of its own, after what it is.

    `python -m mcp_server_time` is `mcp_server_time`, `npx -y @scope/server-git@1` `server-git`.
    """
    if config.command:
        program, *arguments = config.command
        words = [word for word in arguments if word != "run" and not re.match("-|.*=", word)]
        package = words[0] if words else program
        found = os.path.basename(package).partition("@")[0].removesuffix(".py")
    elif config.target_url:
        found = url_host(config.target_url[0])
    else:
        return name
    return re.sub("[^A-Za-z0-9_-]+", "-", found).strip("-") or name


def _unix_banner(config: ProxyConfig, address: str) -> str:
    """The same for a socket that no client can be given the URL of."""
    paths = server_urls(config, "")
    lines = [
        *(f"  {name}: {path} on {address}" for name, path in paths.items()),
        *_older(config, ""),
        "",
        "  Health: /healthz and /readyz",
        *_stranger_warnings(config, [address]),
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def _warnings(config: ProxyConfig, addresses: list[str]) -> list[str]:
    """What whoever starts this should know, with empty lines before each."""
    return [
        *_open_warnings(config, addresses),
        *_rebinding_warnings(config, addresses),
        *_stranger_warnings(config, addresses),
    ]


def is_open_to_all(config: ProxyConfig, addresses: list[str]) -> bool:
    """Whether everybody who can reach an address beyond this machine may call."""
    hosts = filter(None, map(url_host, addresses))
    return not config.authenticates and not all(map(is_loopback, hosts))


def _open_warnings(config: ProxyConfig, addresses: list[str]) -> list[str]:
    if not is_open_to_all(config, addresses):
        return []
    return [
        "",
        "  Nobody is asked who they are: whoever reaches this address can call every tool. Set",
        "  api_keys or jwt_issuer, unless something in front authenticates.",
    ]


def refuses_strangers(config: ProxyConfig, addresses: list[str]) -> bool:
    """Whether clients of 2026-07-28 without Authorization are refused in front of stdio servers
    that know sessions alone, since some come from elsewhere as far as the configuration tells.
    """
    if config.stateless_children is not None or "streamable" not in config.stdio_transports:
        return False
    if config.authenticates:
        return False  # there are no strangers
    is_behind_another = config.allowed_hosts is not None or config.public_url is not None
    return (
        is_behind_another
        or bool(config.trusted_proxies)
        or any(
            address.startswith("unix:") or not is_loopback(url_host(address))
            for address in addresses
        )
    )


def _stranger_warnings(config: ProxyConfig, addresses: list[str]) -> list[str]:
    has_stdio = any(isinstance(server, StdioServer) for server in config.servers())
    if not has_stdio or not refuses_strangers(config, addresses):
        return []
    return [
        "",
        "  Clients of 2026-07-28 from elsewhere that send no Authorization are answered so that",
        "  they fall back to sessions, where a server knows nothing newer: they would share its",
        "  process. stateless_children=shared lets them.",
    ]


def _rebinding_warnings(config: ProxyConfig, addresses: list[str]) -> list[str]:
    hosts = [host for host in map(url_host, addresses) if host and not is_loopback(host)]
    if not hosts or config.allowed_hosts is not None:
        return []
    return [
        "",
        "  Every Host is served beyond this machine: a web page can reach this address under a",
        "  name of its own (DNS rebinding). Set allowed_hosts to the names that clients use.",
    ]


def base_url(config: ProxyConfig, addresses: list[str]) -> str:
    """The URL of the proxy that listens at `addresses`, without a path."""
    return _reachable(addresses[0]) if addresses else f"http://{config.bind}"


def server_urls(config: ProxyConfig, base: str) -> dict[str, str]:
    """The MCP endpoint of each server that is served, under `base`, by the server's name."""
    return {
        server.name: _url(config, base, server)
        for server in config.servers()
        if not isinstance(server, UnservedServer)
    }


def _url(config: ProxyConfig, base: str, server: Served) -> str:
    path = "/sse" if _is_old(config, server) else "/mcp"
    return f"{_mount(config, base, server)}{path}"


def _mount(config: ProxyConfig, base: str, server: Served) -> str:
    return f"{base}{config.path_of(server.name)}"


def _is_old(config: ProxyConfig, server: Served) -> bool:
    """Whether a server is served over HTTP+SSE (2024-11-05) only."""
    return not isinstance(server, HttpServer) and "streamable" not in config.stdio_transports


def _older(config: ProxyConfig, base: str) -> list[str]:
    """The HTTP+SSE URLs (2024-11-05) of servers that have both transports, one a line."""
    if set(config.stdio_transports) != {"streamable", "sse"}:
        return []
    servers = [
        server for server in config.servers() if not isinstance(server, HttpServer | UnservedServer)
    ]
    urls = (f"{_mount(config, base, server)}/sse" for server in servers)
    return [f"  {url} for clients of 2024-11-05 (HTTP+SSE)" for url in urls]


def _entry(url: str) -> dict[str, str]:
    return {"type": "sse" if url.endswith("/sse") else "http", "url": url}


def _reachable(address: str) -> str:
    """An address to connect to: the loopback one where it names all interfaces."""
    return re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", address)
