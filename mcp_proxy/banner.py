"""What is printed when the proxy listens: where it is, and what to paste into a client."""

from __future__ import annotations

import json
import re

from mcp_proxy.config import ProxyConfig


def banner(config: ProxyConfig, addresses: list[str]) -> str:
    """The URLs and a client configuration block for the servers at `addresses`."""
    base = _reachable(addresses[0]) if addresses else f"http://{config.bind}"
    urls = server_urls(config, base)
    block = {"mcpServers": {name: {"type": "http", "url": url} for name, url in urls.items()}}
    lines = [
        *(f"  {name}: {url}" for name, url in urls.items()),
        "",
        "  For a client's configuration:",
        *(f"    {line}" for line in json.dumps(block, indent=2).splitlines()),
        "",
        f"  Health: {base}/healthz and {base}/readyz",
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def server_urls(config: ProxyConfig, base: str) -> dict[str, str]:
    """The MCP endpoint of each server under `base`, by the server's name."""
    servers = config.servers()
    if not config.config:
        return {server.name: f"{base}/mcp" for server in servers}
    return {server.name: f"{base}/servers/{server.name}/mcp" for server in servers}


def _reachable(address: str) -> str:
    """An address one can type: every interface is also this machine."""
    return re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", address)
