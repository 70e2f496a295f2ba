"""What is printed when the proxy listens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.config import ProxyConfig
from mcp_proxy.server.banner import banner, server_urls


@pytest.fixture
def two_servers(tmp_path: Path) -> ProxyConfig:
    """A configuration with a file of two servers."""
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"a": {"command": "x"}, "b": {"command": "y"}}}))
    return ProxyConfig(config=str(file))


def pasted(printed: str) -> dict[str, Any]:
    """The client configuration in a banner."""
    block = printed[printed.index("    {") : printed.rindex("}") + 1]
    made: dict[str, Any] = json.loads(block)
    return made


def test_one_server_is_at_the_root() -> None:
    assert server_urls(ProxyConfig(command=("x",)), "http://h:1") == {"default": "http://h:1/mcp"}


def test_servers_of_a_file_have_paths_of_their_own(two_servers: ProxyConfig) -> None:
    assert server_urls(two_servers, "http://h:1") == {
        "a": "http://h:1/servers/a/mcp",
        "b": "http://h:1/servers/b/mcp",
    }


def test_clients_of_2024_11_05_are_told_their_url() -> None:
    printed = banner(ProxyConfig(command=("x",)), ["http://127.0.0.1:9000"])
    assert "http://127.0.0.1:9000/sse for clients of 2024-11-05" in printed
    printed = banner(ProxyConfig(target_url=("http://h/mcp",)), ["http://127.0.0.1:9000"])
    assert "/sse" not in printed


def test_a_server_without_streamable_http_is_at_its_stream() -> None:
    only = ProxyConfig(command=("x",), stdio_transports=("sse",))
    entry = {"type": "sse", "url": "http://127.0.0.1:9000/sse"}
    assert pasted(banner(only, ["http://127.0.0.1:9000"])) == {"mcpServers": {"x": entry}}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m mcp_server_time", "mcp_server_time"),
        ("/usr/bin/python3 -I /srv/weather.py --port 5", "weather"),
        ("npx -y @modelcontextprotocol/server-git@1.2", "server-git"),
        ("uvx mcp-server-fetch", "mcp-server-fetch"),
        ("docker run -i --rm -e=A=1 mcp/time", "time"),
        ("/opt/bin/server --stdio", "server"),
        ("x y@", "y"),
        ("server @", "default"),
    ],
)
def test_a_client_is_given_a_name_that_says_what_the_server_is(command: str, name: str) -> None:
    config = ProxyConfig(command=tuple(command.split()))
    assert list(pasted(banner(config, ["http://h:1"]))["mcpServers"]) == [name]


def test_a_client_is_given_the_host_of_an_http_server_as_its_name() -> None:
    config = ProxyConfig(target_url=("http://search.example:9/mcp",))
    assert list(pasted(banner(config, ["http://h:1"]))["mcpServers"]) == ["search-example"]


def test_the_banner_holds_what_a_client_wants_to_paste(two_servers: ProxyConfig) -> None:
    printed = banner(two_servers, ["http://127.0.0.1:9000"])
    assert pasted(printed) == {
        "mcpServers": {
            "a": {"type": "http", "url": "http://127.0.0.1:9000/servers/a/mcp"},
            "b": {"type": "http", "url": "http://127.0.0.1:9000/servers/b/mcp"},
        }
    }
    assert "http://127.0.0.1:9000/healthz" in printed


@pytest.mark.parametrize("addresses", [["unix:/run/x.sock"], []])
def test_a_unix_socket_is_no_url(addresses: list[str]) -> None:
    printed = banner(ProxyConfig(bind="unix:/run/x.sock"), addresses)
    assert "demo: /mcp on unix:/run/x.sock\n" in printed
    assert "http:" not in printed
    assert "sock/" not in printed


@pytest.mark.parametrize("address", ["http://0.0.0.0:80", "http://[::]:80"])
def test_every_interface_is_shown_as_this_machine(address: str) -> None:
    printed = banner(ProxyConfig(), [address])
    assert "http://127.0.0.1:80/mcp" in printed
    assert address not in printed


@pytest.mark.parametrize(
    ("address", "hosts", "warns"),
    [
        ("http://0.0.0.0:80", None, True),
        ("http://[::]:80", None, True),
        ("http://10.0.0.1:80", None, True),
        ("http://10.0.0.1:80", ("www.example.com",), False),
        ("http://127.0.0.1:80", None, False),
        ("http://[::1]:80", None, False),
        ("unix:/run/proxy.sock", None, False),
    ],
)
def test_beyond_loopback_the_banner_names_rebinding(
    address: str, hosts: tuple[str, ...] | None, warns: bool
) -> None:
    printed = banner(ProxyConfig(allowed_hosts=hosts), [address])
    assert ("rebinding" in printed and "allowed_hosts" in printed) is warns


@pytest.mark.parametrize(
    ("address", "settings", "warns"),
    [
        ("http://0.0.0.0:80", {}, True),
        ("http://10.0.0.1:80", {"allowed_hosts": ("www.example.com",)}, True),
        ("unix:/run/proxy.sock", {}, True),
        ("http://127.0.0.1:80", {}, False),
        ("http://127.0.0.1:80", {"allowed_hosts": ("www.example.com",)}, True),
        ("http://127.0.0.1:80", {"trusted_proxies": ("127.0.0.1",)}, True),
        ("http://127.0.0.1:80", {"public_url": "https://mcp.example.com"}, True),
        ("http://0.0.0.0:80", {"stateless_children": "shared"}, False),
        ("http://0.0.0.0:80", {"stdio_transports": ("sse",)}, False),
        ("http://0.0.0.0:80", {"target_url": ("http://h/mcp",)}, False),
    ],
)
def test_beyond_loopback_the_banner_says_who_falls_back_to_sessions(
    address: str, settings: dict[str, Any], warns: bool
) -> None:
    printed = banner(ProxyConfig(**settings), [address])
    assert ("fall back to sessions" in printed and "stateless_children" in printed) is warns


def test_without_an_address_the_setting_is_shown() -> None:
    assert "http://127.0.0.1:8080/mcp" in banner(ProxyConfig(), [])
