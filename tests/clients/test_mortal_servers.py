"""A tool that kills its server costs every official SDK one call, and not the session."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.programs import HERE, node, node_modules, python_with_mcp1, run_client
from tests.support.proxy_process import ProxyProcess

_SERVER = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "servers" / "mortal.py")]
_PYTHON = str(HERE / "mortal_client.py")
_TYPESCRIPT = str(HERE / "mortal_client.mjs")

CLIENTS = {
    "python 1": ("python1", _PYTHON, "legacy"),
    "python 2": (sys.executable, _PYTHON, "legacy"),
    "python 2 auto": (sys.executable, _PYTHON, "auto"),
    "typescript 1": ("node", _TYPESCRIPT, "1", "default"),
    "typescript 2": ("node", _TYPESCRIPT, "2", "default"),
    "typescript 2 auto": ("node", _TYPESCRIPT, "2", "auto"),
}


@pytest.fixture
def proxy() -> Iterator[ProxyProcess]:
    """One of its own for each test: clients of the modern era share a server, and its count."""
    with ProxyProcess(_SERVER) as process:
        yield process


def _program(name: str) -> str:
    if name == "node":
        node_modules()
        return node()
    return python_with_mcp1() if name == "python1" else name


@pytest.mark.parametrize(
    ("given", "how"), [({"code": 7}, "exit code 7"), ({"signal": 9}, "signal SIGKILL")]
)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_a_tool_kills_costs_one_call(
    client: str, given: dict[str, int], how: str, proxy: ProxyProcess
) -> None:
    name, script, *mode = CLIENTS[client]
    seen = run_client(_program(name), script, proxy.url, *mode, json.dumps(given))
    before, died, after = seen["outcomes"]
    assert died.startswith("failed: ")
    assert f"The server exited ({how}) before it answered" in died
    assert (before, after) == ("call 1", "call 1")  # the second is of another process
