"""What crosses a group of ours, of mcp-hub and of FastMCP, step by step of the corners.

`bench/peers` installs the others. The clients are those of the Python SDK 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import requests

from tests.clients.corner_steps import LEGACY, MODERN, answers, differences, in_a_group
from tests.clients.programs import HERE, ROOT, node, run_client
from tests.clients.test_bridged_servers import free_port
from tests.clients.test_corners import command_of
from tests.support.groups import entry
from tests.support.waiting import eventually

_HUB = ROOT / "bench" / "node" / "node_modules" / "mcp-hub" / "dist" / "cli.js"
_FASTMCP = ROOT / "bench" / ".venv-fastmcp" / "bin" / "fastmcp"
_PATIENCE = 30.0

# What URIs are in a group is each proxy's own, and which revision it speaks is no step.
_LEFT_OUT = {
    *("resources", "templates", "ask_in_resource", "unknown_resource", "updates", "revision"),
}


class Peer(NamedTuple):
    """A proxy with groups: its command for a file and a port, and what names begin with there."""

    command: Callable[[Path, int], Sequence[str]]
    names: str
    eras: tuple[str, ...] = (LEGACY, MODERN)
    is_sse: bool = False


def _ours(file: Path, port: int) -> Sequence[str]:
    options = ["--config", str(file), "--aggregate", "--log-level", "warning"]
    return [sys.executable, "-m", "mcp_proxy", "--bind", f"127.0.0.1:{port}", *options]


def _hub(file: Path, port: int) -> Sequence[str]:
    return [node(), str(_HUB), "--port", str(port), "--config", str(file)]


def _fastmcp(file: Path, port: int) -> Sequence[str]:
    options = ["--transport", "http", "--host", "127.0.0.1", "--port", str(port), "--no-banner"]
    return [str(_FASTMCP), "run", str(file), *options, "--log-level", "ERROR"]


OURS = "mcp-wsgi-proxy"
PEERS = {
    OURS: Peer(_ours, "legacy__"),
    "mcp-hub": Peer(_hub, "legacy__", (LEGACY,), is_sse=True),
    "FastMCP": Peer(_fastmcp, "legacy_"),
}


def groups_peers() -> None:
    """All steps are through ours as they are alone; of the others is told which are."""
    for program in (_HUB, _FASTMCP):
        assert program.exists(), f"{program.relative_to(ROOT)} is missing: run bench/peers"
    lost: dict[tuple[str, str], list[str]] = {}
    for name, peer in PEERS.items():
        for era in peer.eras:
            found, count = _lost_by(peer, era)
            print(f"  {name}, {era} client: {count - len(found)} of {count} steps as alone")
            print(f"    lost: {', '.join(found) or 'none'}", flush=True)
            lost[name, era] = found
    assert lost[OURS, LEGACY] == lost[OURS, MODERN] == []


def _lost_by(peer: Peer, era: str) -> tuple[list[str], int]:
    """The steps that do not give what they give alone, and of how many.

    Who asks may be named, and somebody else may have asked for the roots.
    """
    with _served(peer) as (url, trace):
        member = {"names": peer.names, "is_sse": peer.is_sse, "caller": "somebody"}
        client = [sys.executable, str(HERE / "corner_client.py"), url, era, str(trace)]
        record = run_client(*client, json.dumps(member))
    record["ask_roots"] = record["ask_roots"].get("answer", record["ask_roots"])
    alone = answers(LEGACY, "python-2", era)
    named = in_a_group(alone, LEGACY)
    alone["ask_roots"] = named["ask_roots"]
    lost = differences(record, alone).keys() & differences(record, named).keys()
    return sorted(lost - _LEFT_OUT), len(alone.keys() - _LEFT_OUT)


@contextmanager
def _served(peer: Peer) -> Iterator[tuple[str, Path]]:
    """A group of two servers of legacy revisions, of which one is asked."""
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        trace, file = Path(folder, "trace"), Path(folder, "servers.json")
        trace.touch()
        program, *arguments = command_of(LEGACY, trace)
        servers = {LEGACY: {"command": program, "args": arguments}, "other": entry("B")}
        file.write_text(json.dumps({"mcpServers": servers}), encoding="utf-8")
        port = free_port()
        own = {f"XDG_{kind}_HOME": folder for kind in ("STATE", "DATA", "CONFIG", "CACHE")}
        process = subprocess.Popen(
            peer.command(file, port),
            env={**os.environ, **own},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}/mcp"
            eventually(lambda: _takes_clients(url), _PATIENCE, "no client is taken")
            yield url, trace
        finally:
            process.terminate()
            process.wait(_PATIENCE)


def _takes_clients(url: str) -> bool:
    """Whether a GET has an answer that is none of a proxy which still begins."""
    try:
        with requests.get(url, stream=True, timeout=5) as answer:
            return answer.status_code < 500
    except requests.RequestException:
        return False
