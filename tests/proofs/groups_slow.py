"""A group with a server that needs 12 s, one that ends, one that hangs, and one that is not there.

What a client is told of the others does not depend on them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.front import HttpFront, McpClient
from tests.support.groups import entry, tools
from tests.support.modern_client import ModernClient
from tests.support.proxy_process import ProxyProcess

Json = dict[str, Any]

#: Seconds that initialize takes at most, and initialize with the first list.
INITIALIZE, FIRST_LIST = 3.5, 21.0

#: Milliseconds of a session after that, to its list.
SECOND = 50.0

_PATIENCE = 60.0
_MISSING = "mcp-wsgi-proxy/missing"

_SERVERS: Json = {
    "one": entry("A"),
    "slow": entry("S", "--delay", "12"),
    "ended": {"command": "false"},
    "mute": entry("M", "--mute"),
    "gone": {"command": "/nonexistent/server"},
    "two": entry("B"),
}
_TOLD = [
    f"{name}__{tool}"
    for name in ("one", "slow", "two")
    for tool in ("who", "exit", "ask", "grow", "link")
]


def groups_slow() -> None:
    """Clients of both eras get a whole first list in time, and the next one at once."""
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        file = Path(folder, "servers.json")
        groups = {"g": {"members": list(_SERVERS)}}
        file.write_text(json.dumps({"mcpServers": _SERVERS, "groups": groups}))
        for first_list in (_legacy, _modern):
            with ProxyProcess(options=["--config", str(file), "--log-level", "error"]) as process:
                first_list(process)


def _legacy(process: ProxyProcess) -> None:
    front = HttpFront(process.base, _PATIENCE)
    began = time.monotonic()
    client = McpClient(front, "/groups/g/mcp").open()
    initialized = time.monotonic() - began
    listed = client.result("tools/list")
    _judge("legacy", initialized, time.monotonic() - began, listed)
    servers = len(process.server_pids())
    began = time.monotonic()
    again = tools(McpClient(front, "/groups/g/mcp").open())
    took = 1000 * (time.monotonic() - began)
    begun = len(process.server_pids()) - servers
    print(f"  a second session has its list after {took:.0f} ms; {begun} servers begun for it")
    assert again == _TOLD
    assert took < SECOND
    assert begun <= 0  # what hangs may have been given up meanwhile


def _modern(process: ProxyProcess) -> None:
    client = ModernClient(HttpFront(process.base, _PATIENCE), path="/groups/g/mcp")
    began = time.monotonic()
    client.call("server/discover").message()
    discovered = time.monotonic() - began
    listed = client.call("tools/list").message()["result"]
    _judge("modern", discovered, time.monotonic() - began, listed)


def _judge(era: str, begun: float, took: float, listed: Json) -> None:
    names = [tool["name"] for tool in listed["tools"]]
    missing = listed["_meta"][_MISSING]
    print(f"  {era}: began after {begun:.1f} s, {len(names)} tools after {took:.1f} s")
    print(f"  {era}: missing: {missing}", flush=True)
    assert names == _TOLD
    assert missing.keys() == {"ended", "mute", "gone"}
    assert begun < INITIALIZE
    assert took < FIRST_LIST
