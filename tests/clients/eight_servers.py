"""A group of six servers that others have written and two over HTTP, and what clients see of it.

The two are tests/servers/legacy.py and modern.py, which have the same tools, prompts and resources.
Each client takes the steps of the corners at either of them, as a member of the group, in two
sessions at the same time, and in one of them calls a tool of each of the six. What comes is to be
what comes of each server alone.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.clients.corner_steps import CLIENTS, LEGACY, MODERN, answers, differences, in_a_group
from tests.clients.real_servers import RealServer, real_servers
from tests.clients.test_corners import Place, command_of, require_quiet
from tests.support.era_servers import EraServerProcess
from tests.support.front import HttpFront, McpClient
from tests.support.modern_client import ModernClient
from tests.support.proxy_process import ProxyProcess

Json = dict[str, Any]

#: How the group is carried. Several workers serve HTTP servers with Redis alone: where they have
#: none, all eight are stdio servers.
ONE, FOUR, REDIS = "one", "four", "redis"
CARRIERS = (ONE, FOUR, REDIS)

#: What the names and the URIs of the two begin with. The legacy one is the first of the group.
_STARTS = {LEGACY: ("legacy__", ""), MODERN: ("modern__", "modern+")}

_PATIENCE = 60.0

#: The lists, and the key of each.
_LISTS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}

_GROUP = "/groups/g"

_NOT_FOUND = -32601


@contextmanager
def eight_servers(carrier: str, redis_url: str = "") -> Iterator[Eight]:
    """The group, served; nothing may have gone wrong in it."""
    options: list[str] = []
    if carrier != ONE:
        options = ["--workers", "4"]
    if carrier == REDIS:
        options += ["--redis-url", redis_url, "--redis-prefix", f"eight-{secrets.token_hex(4)}:"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eight-")))
        real = stack.enter_context(real_servers(folder))
        servers = {name: one.entry for name, one in real.items()}
        for era in _STARTS:
            trace = folder / era
            trace.touch()
            if carrier == FOUR:
                program, *arguments = command_of(era, trace)
                servers[era] = {"command": program, "args": arguments}
            else:
                there = stack.enter_context(EraServerProcess(era, trace=trace))
                servers[era] = {"url": there.url}
        groups = {"g": {"members": [LEGACY, *real, MODERN]}}
        file = folder / "servers.json"
        file.write_text(json.dumps({"mcpServers": servers, "groups": groups}), encoding="utf-8")
        proxy = stack.enter_context(ProxyProcess(options=[*options, "--config", str(file)]))
        yield Eight(proxy.base, folder, real)
        require_quiet(proxy)


class Eight:
    """The group, and its servers alone."""

    def __init__(self, base: str, folder: Path, real: Mapping[str, RealServer]) -> None:
        self._base = base
        self._folder = folder
        self._real = real
        self._members = [LEGACY, *real, MODERN]
        self._alone = {name: _Listing(self._legacy(f"/servers/{name}")) for name in self._members}
        self._called = [self._call_alone(name, one) for name, one in real.items()]

    def _legacy(self, path: str) -> McpClient:
        return McpClient(HttpFront(self._base, _PATIENCE), f"{path}/mcp").open()

    def _modern(self, path: str) -> ModernClient:
        return ModernClient(HttpFront(self._base, _PATIENCE), path=f"{path}/mcp")

    def _call_alone(self, name: str, server: RealServer) -> Any:
        params = {"name": server.tool, "arguments": server.arguments}
        result = self._alone[name].client.call("tools/call", params).message()["result"]
        texts = [part["text"] for part in result["content"]]
        assert server.expected in "".join(texts), result
        return [result.get("isError", False), texts]

    def differences(self, client: str) -> Json:
        """What a client sees in the group that is not as it is alone, for each of the two."""
        with ThreadPoolExecutor() as pool:
            walks = [pool.submit(self._walk, client, era) for era in _STARTS]
            seen = {era: walk.result() for era, walk in zip(_STARTS, walks, strict=True)}
        return {era: found for era, found in seen.items() if found}

    def _walk(self, client: str, server: str) -> Json:
        names, uris = _STARTS[server]
        # Both sessions are the same caller's, for whom the servers start once.
        member: Json = {"names": names, "uris": uris, "caller": client}
        era = LEGACY if CLIENTS[client][2] == LEGACY else MODERN
        wanted = in_a_group(answers(server, client, era), server)
        if server == LEGACY:
            real = self._real.items()
            member["calls"] = [[f"{name}__{one.tool}", one.arguments] for name, one in real]
            wanted["calls"] = self._called
            wanted["unknown_resource"] = _nobodys(client, era)
        place = Place(server, "", f"{self._base}{_GROUP}/mcp", self._folder / server)
        record = place.run(client, json.dumps(member))
        record["ask_roots"] = record["ask_roots"].get("answer", record["ask_roots"])
        if server == LEGACY and isinstance(record["resources"], list):
            # Its URIs are as they are, and in front of all others.
            record["resources"][0] = record["resources"][0][: len(wanted["resources"][0])]
            record["templates"] = record["templates"][: len(wanted["templates"])]
        return differences(record, wanted)

    def lists(self) -> Iterator[tuple[str, Sequence[Json], Sequence[Json]]]:
        """Each list that each era has: its name, what it has, and what its servers have alone."""
        modern = {name: _Listing(self._modern(f"/servers/{name}")) for name in self._members}
        for era, group, alone in (
            (LEGACY, _Listing(self._legacy(_GROUP)), self._alone),
            (MODERN, _Listing(self._modern(_GROUP)), modern),
        ):
            for method in _LISTS:
                wanted = [
                    shown(name, entry, method)
                    for name in self._members
                    for entry in alone[name].entries(method)
                ]
                yield f"{method}, {era}", group.entries(method), wanted


class _Listing(NamedTuple):
    """What a client is told of lists; one that the server does not know is empty."""

    client: McpClient | ModernClient

    def entries(self, method: str) -> Sequence[Json]:
        """What the list has."""
        message = self.client.call(method).message()
        if message.get("error", {}).get("code") == _NOT_FOUND:
            return []
        found: Sequence[Json] = message["result"][_LISTS[method]]
        return found


def shown(server: str, entry: Json, method: str) -> Json:
    """An entry of a server's list as the group has it."""
    if method in ("tools/list", "prompts/list"):
        return {**entry, "name": f"{server}__{entry['name']}"}
    key = "uri" if method == "resources/list" else "uriTemplate"
    return {**entry, key: f"modern+{entry[key]}" if server == MODERN else entry[key]}


def _nobodys(client: str, era: str) -> Json:
    """What a resource is answered with that no server of the group has."""
    is_shown = era == LEGACY and not client.startswith("typescript-2")
    return {"error": -32002 if is_shown else -32602, "message": "Resource not found: demo://none"}
