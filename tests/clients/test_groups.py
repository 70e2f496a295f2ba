"""The clients of the official SDKs get of a server in a group what they get of it alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.clients.corner_steps import CLIENTS, LEGACY, MODERN, answers, differences
from tests.clients.test_corners import Place, command_of, require_quiet
from tests.support.era_servers import EraServerProcess
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

ONE, FOUR, HTTP = "one", "four", "http"


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The server and the carrier that a test's parameter names, alone in a group."""
    carrier, server = request.param
    directory = tmp_path_factory.mktemp("group")
    trace = directory / "trace"
    trace.touch()
    options: list[str] = []
    if carrier == FOUR:
        redis: RedisServer = request.getfixturevalue("redis_server")
        options = ["--workers", "4", "--redis-url", redis.url, "--redis-prefix", f"{server}:"]
    if carrier == HTTP:
        with EraServerProcess(server, trace=trace) as there:
            yield from _served(server, carrier, {"url": there.url}, directory, options)
    else:
        program, *arguments = command_of(server, trace)
        entry = {"command": program, "args": arguments}
        yield from _served(server, carrier, entry, directory, options)


def _served(
    server: str, carrier: str, entry: dict[str, object], directory: Path, options: list[str]
) -> Iterator[Place]:
    file = directory / "servers.json"
    members = [{"server": "one", "prefix": ""}]
    document = {"mcpServers": {"one": entry}, "groups": {"g": {"members": members}}}
    file.write_text(json.dumps(document), encoding="utf-8")
    with ProxyProcess([], options=[*options, "--config", str(file)]) as proxy:
        url = proxy.url.removesuffix("/mcp") + "/groups/g/mcp"
        yield Place(server, carrier, url, directory / "trace")
        require_quiet(proxy)


@pytest.mark.parametrize(
    ("place", "client"),
    [
        pytest.param((carrier, server), client, id=f"{carrier}-{server}-{client}")
        for carrier, server, client in product((ONE, FOUR, HTTP), (LEGACY, MODERN), CLIENTS)
    ],
    indirect=["place"],
)
def test_the_same_steps_give_the_same_answers(place: Place, client: str) -> None:
    era = LEGACY if CLIENTS[client][2] == LEGACY else MODERN
    assert differences(place.run(client), answers(place.server, client, era)) == {}
