"""An application in front of a group of servers, as tests of groups need it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mcp_proxy import ProxyConfig, create_app
from mcp_proxy.app import Application
from tests.support.front import McpClient, WsgiFront
from tests.support.modern_client import ModernClient

Json = dict[str, Any]

SERVERS = Path(__file__).parents[1] / "servers"
MEMBER = str(SERVERS / "member.py")


def entry(name: str, *options: str) -> Json:
    """A server that says its name."""
    return {"command": sys.executable, "args": ["-I", "-S", MEMBER, "--name", name, *options]}


class House:
    """An application in front of a group."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "servers.json"
        self._apps: list[Application] = []

    def write(self, servers: Json, members: list[Any] | None = None) -> None:
        """Has the file list these servers, and a group of them."""
        group = {"g": {"members": members or list(servers)}}
        self._file.write_text(json.dumps({"mcpServers": servers, "groups": group}))

    def serve(self, servers: Json, members: list[Any] | None = None, **settings: Any) -> McpClient:
        """A client of the group's endpoint, whose session has begun."""
        self.write(servers, members)
        self.made(**settings)
        return self.client().open()

    def made(self, **settings: Any) -> None:
        """Makes the application."""
        self.app = create_app(ProxyConfig(config=str(self._file), **settings))
        self._apps.append(self.app)

    def client(self, path: str = "/groups/g/mcp") -> McpClient:
        """Another client of the group's endpoint."""
        return McpClient(WsgiFront(self.app), path)

    def modern(self, path: str = "/groups/g/mcp") -> ModernClient:
        """A client of revision 2026-07-28."""
        return ModernClient(WsgiFront(self.app), path=path)

    def children(self) -> int:
        """How many processes there are."""
        return self.app.parts.supervisor.children

    def close(self) -> None:
        """Ends everything."""
        for app in self._apps:
            app.close()


def tools(client: McpClient) -> list[str]:
    """The names of all tools."""
    return [tool["name"] for tool in client.result("tools/list")["tools"]]


def said(result: Json) -> Any:
    """What a tool of the servers says."""
    return json.loads(result["content"][0]["text"])


def call(client: McpClient, name: str) -> Any:
    """What a tool says."""
    return said(client.result("tools/call", {"name": name, "arguments": {}}))
