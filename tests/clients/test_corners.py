"""Every client of the official SDKs gets the same of every stdio server, whatever their eras."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.clients.corner_steps import APART, CLIENTS, LEGACY, MODERN, answers, differences
from tests.clients.programs import (
    HERE,
    ROOT,
    go_program,
    node,
    node_modules,
    python_with_mcp1,
    run_client,
)
from tests.support.era_servers import EraServerProcess
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

_PYTHON = str(HERE / "corner_client.py")
_TYPESCRIPT = str(HERE / "corner_client.mjs")

#: How a client gets to a server: as its own child, or by a proxy with so many workers.
DIRECT, ONE, FOUR = "direct", "one", "four"

#: The same of a server that speaks HTTP.
HTTP_DIRECT, HTTP_ONE, HTTP_FOUR = "http-direct", "http-one", "http-four"
CARRIERS = (DIRECT, ONE, FOUR, HTTP_DIRECT, HTTP_ONE, HTTP_FOUR)
UNBRIDGED = (DIRECT, HTTP_DIRECT)
PROXIED = (ONE, FOUR, HTTP_ONE, HTTP_FOUR)

_LOUD = re.compile(r"Traceback|\b(WARNING|ERROR|CRITICAL)\b")


@dataclass
class Place:
    """A server, and how it is reached."""

    server: str
    carrier: str
    target: str
    trace: Path

    def run(self, client: str, *more: str) -> dict[str, Any]:
        """What a client says of it, which is told more."""
        language, generation, mode = CLIENTS[client]
        if language == "typescript":
            node_modules()
            command = [node(), _TYPESCRIPT, self.target, generation, mode]
        elif language == "go":
            command = [go_program("clients/go/corner_client"), self.target, mode]
        else:
            python = python_with_mcp1() if generation == "1" else sys.executable
            command = [python, _PYTHON, self.target, mode]
        record = run_client(*command, str(self.trace), *more)
        assert record["sdk"].startswith(f"{generation}.")
        return record


def command_of(server: str, trace: Path) -> list[str]:
    """The command of one of the two servers."""
    script = ROOT / "tests" / "servers" / f"{server}.py"
    return [sys.executable, "-I", "-S", str(script), "--trace", str(trace)]


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The server and the carrier that a test's parameter names."""
    carrier, server = request.param
    trace = tmp_path_factory.mktemp("corner") / "trace"
    trace.touch()
    options: list[str] = []
    if carrier in (FOUR, HTTP_FOUR):
        redis: RedisServer = request.getfixturevalue("redis_server")
        prefix = f"corners-{carrier}-{server}:"
        options = ["--workers", "4", "--redis-url", redis.url, "--redis-prefix", prefix]
    with contextlib.ExitStack() as stack:
        command = command_of(server, trace)
        if carrier in (HTTP_DIRECT, HTTP_ONE, HTTP_FOUR):
            there = stack.enter_context(EraServerProcess(server, trace=trace))
            command, options = [], [*options, "--target-url", there.url]
        if carrier == DIRECT:
            yield Place(server, carrier, json.dumps(command), trace)
        elif carrier == HTTP_DIRECT:
            yield Place(server, carrier, there.url, trace)
        else:
            proxy = stack.enter_context(ProxyProcess(command, options=options))
            yield Place(server, carrier, proxy.url, trace)
            require_quiet(proxy)


def require_quiet(proxy: ProxyProcess) -> None:
    """Fails where the log says more than it does in normal operation."""
    proxy.stop()
    loud = [line for line in proxy.log().splitlines() if _LOUD.search(line)]
    assert not loud, proxy.log()


CELLS = [
    pytest.param((carrier, server), client, id=f"{carrier}-{server}-{client}")
    for carrier, server, client in product(CARRIERS, (LEGACY, MODERN), CLIENTS)
    if carrier not in UNBRIDGED or (server, CLIENTS[client][2]) not in APART
]


@pytest.mark.parametrize(("place", "client"), CELLS, indirect=["place"])
def test_the_same_steps_give_the_same_answers(place: Place, client: str) -> None:
    mode = CLIENTS[client][2]
    if mode == "auto":  # the proxy speaks the newest revision for every server
        mode = place.server if place.carrier in UNBRIDGED else MODERN
    assert differences(place.run(client), answers(place.server, client, mode)) == {}


@pytest.mark.parametrize(
    ("place", "client"),
    [
        pytest.param((carrier, server), client, id=f"{carrier}-{server}-{client}")
        for carrier, server, client in product(UNBRIDGED, (LEGACY, MODERN), CLIENTS)
        if (server, CLIENTS[client][2]) in APART
    ],
    indirect=["place"],
)
def test_without_a_proxy_the_eras_do_not_meet(place: Place, client: str) -> None:
    """What makes the bridges worth their while, and the steps able to fail."""
    mode = CLIENTS[client][2]
    try:
        record = place.run(client)
    except AssertionError:
        record = {}  # it could not connect
    assert {"tools", "echo"} <= differences(record, answers(place.server, client, mode)).keys()
