"""What is printed when the proxy listens: where it is, and what to paste into a client."""

from __future__ import annotations

import json
import re

from mcp_proxy.config import ProxyConfig
from mcp_proxy.servers import Server, StdioServer


def banner(config: ProxyConfig, addresses: list[str]) -> str:
    """The URLs and a client configuration block for the servers at `addresses`."""
    base = _reachable(addresses[0]) if addresses else f"http://{config.bind}"
    urls = server_urls(config, base)
    block = {"mcpServers": {name: _entry(url) for name, url in urls.items()}}
    lines = [
        *(f"  {name}: {url}" for name, url in urls.items()),
        *_older(config, base),
        "",
        "  For a client's configuration:",
        *(f"    {line}" for line in json.dumps(block, indent=2).splitlines()),
        "",
        f"  Health: {base}/healthz and {base}/readyz",
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def server_urls(config: ProxyConfig, base: str) -> dict[str, str]:
    """The MCP endpoint of each server under `base`, by the server's name."""
    return {server.name: _url(config, base, server) for server in config.servers()}


def _url(config: ProxyConfig, base: str, server: Server) -> str:
    path = "/sse" if _is_old(config, server) else "/mcp"
    return f"{_mount(config, base, server)}{path}"


def _mount(config: ProxyConfig, base: str, server: Server) -> str:
    return f"{base}/servers/{server.name}" if config.config else base


def _is_old(config: ProxyConfig, server: Server) -> bool:
    """Whether a server is there for clients of 2024-11-05 alone."""
    return isinstance(server, StdioServer) and "streamable" not in config.stdio_transports


def _older(config: ProxyConfig, base: str) -> list[str]:
    """Where clients of 2024-11-05 find the servers that the others find elsewhere."""
    if set(config.stdio_transports) != {"streamable", "sse"}:
        return []
    servers = [server for server in config.servers() if isinstance(server, StdioServer)]
    urls = (f"{_mount(config, base, server)}/sse" for server in servers)
    return [f"  {url} for clients of 2024-11-05 (HTTP+SSE)" for url in urls]


def _entry(url: str) -> dict[str, str]:
    return {"type": "sse" if url.endswith("/sse") else "http", "url": url}


def _reachable(address: str) -> str:
    """An address one can type: every interface is also this machine."""
    return re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", address)
