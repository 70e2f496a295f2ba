"""The table of transports in the README, cell by cell: one application, one SessionManager."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import (
    LocalStorage,
    RedisStorage,
    SessionManager,
    SSEProxy,
    StreamableProxy,
    TransparentProxy,
)
from mcp_proxy.storage.records import Storage
from mcp_proxy.transports.base import Transport
from tests.servers.http_backend import HttpBackend
from tests.servers.old_server import OldServer
from tests.support.front import SCRIPTED, McpClient
from tests.support.modern_client import ModernClient, server_of
from tests.support.sse_client import SseClient
from tests.support.transparent import LocalFront

README = Path(__file__).parents[2] / "README.md"
REVISION = re.compile(r"\d{4}-\d\d-\d\d")

OLDEST, MODERN = "2024-11-05", "2026-07-28"


class Row(NamedTuple):
    """One transport of the table."""

    name: str
    clients: list[str]
    servers: list[str]
    storages: list[str]


def rows() -> list[Row]:
    """The table as the README shows it."""
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- transports -->\n(.*?)\n<!-- /transports -->", text, re.DOTALL)
    assert found is not None
    head, _, *lines = (line.strip("|").split("|") for line in found[1].splitlines())
    kinds = [cell.strip() for cell in head[4:]]
    return [
        Row(
            cells[1].strip().strip("`"),
            REVISION.findall(cells[2]),
            REVISION.findall(cells[3]),
            [kind for kind, cell in zip(kinds, cells[4:], strict=True) if cell.strip() == "yes"],
        )
        for cells in lines
    ]


def cells(name: str) -> list[tuple[str, str, str]]:
    """Client's revision, server's revision and storage, for one transport.

    A row that names no revisions of servers is for those of its clients.
    """
    (row,) = (row for row in rows() if row.name == name)
    pairs = [(c, s) for c in row.clients for s in row.servers or [c]]
    return [(*pair, kind) for pair in pairs for kind in row.storages]


def test_the_table_is_whole() -> None:
    assert [row.name for row in rows()] == ["StreamableProxy", "SSEProxy", "TransparentProxy"]
    assert all(row.storages == ["in memory", "in Redis"] for row in rows())
    assert len(cells("StreamableProxy")) == 4 * 5 * 2
    assert len(cells("SSEProxy")) == 5 * 2
    assert len(cells("TransparentProxy")) == 5 * 2


class Together:
    """Every transport in one application."""

    def __init__(self, storage: Storage, version: str, backends: list[str]) -> None:
        self.manager = SessionManager(storage.scoped("together"))
        is_modern = version == MODERN
        command = server_of("modern") if is_modern else [*SCRIPTED, "--version", version]
        self.streamable = StreamableProxy(command, storage, name="together")
        self.sse = SSEProxy(command, storage, name="together")
        self.old, self.new = (TransparentProxy(url, storage, name="together") for url in backends)
        mounts = {
            "/stdio/mcp": self.streamable,
            "/stdio": self.sse,
            "/old": self.old,
            "/new": self.new,
        }
        self.front = LocalFront(DispatcherMiddleware(NotFound(), mounts))

    def close(self) -> None:
        """Ends them all."""
        self.front.close()
        transports: list[Transport] = [self.streamable, self.sse, self.old, self.new]
        for transport in transports:
            transport.close()


@pytest.fixture
def together(request: pytest.FixtureRequest) -> Iterator[Together]:
    """The application over the storage of a cell, with servers of its revision."""
    _, version, kind = request.param
    storage: Storage = LocalStorage()
    with ExitStack() as stack:
        if kind == "in Redis":
            url = request.getfixturevalue("redis_url")
            storage = RedisStorage(url, prefix=request.getfixturevalue("redis_prefix"))
        stack.callback(storage.close)
        old, new = stack.enter_context(OldServer("old")), stack.enter_context(HttpBackend())
        together = Together(storage, version, [f"{old.url}/sse", f"{new.url}/mcp"])
        stack.callback(together.close)
        yield together


def over(name: str) -> pytest.MarkDecorator:
    """A test for each cell of a transport."""
    found = cells(name)
    ids = [f"{client}, {server}, {kind}" for client, server, kind in found]
    return pytest.mark.parametrize(
        ("together", "cell"), [(c, c) for c in found], ids=ids, indirect=["together"]
    )


@pytest.mark.parametrize(
    "together", [("", OLDEST, k) for k in ("in memory", "in Redis")], indirect=True
)
def test_a_session_is_its_transport_s_own(together: Together) -> None:
    behind = SseClient(together.front, path="/old/sse").open()
    own = SseClient(together.front, path="/stdio/sse").open()
    modern = McpClient(together.front, "/stdio/mcp")
    modern.session = behind.session
    assert modern.call("ping").status == 400
    for client, path in ((behind, "/stdio/messages"), (own, "/stdio/mcp")):
        message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        uri = f"{path}?session_id={client.session}"
        assert client.post(message, uri).status == 400
    assert own.result("echo", {"to": "you"}) == {"to": "you"}


def test_log_lines_name_the_session(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    with OldServer("old") as old:
        together = Together(LocalStorage(), OLDEST, [f"{old.url}/sse", f"{old.url}/mcp"])
        own, behind = (
            SseClient(together.front, path=f"/{at}/sse").open() for at in ("stdio", "old")
        )
        modern = McpClient(together.front, "/stdio/mcp")
        modern.initialize(OLDEST).body()
        for client in (own, behind):
            client.close()
        together.close()
    seen = {(record.fields["path"], record.fields["session"]) for record in caplog.records}  # type: ignore[attr-defined]
    for path, session in (
        ("/stdio/sse", own.session),
        ("/stdio/messages", own.session),
        ("/old/sse", behind.session),
        ("/old/messages", behind.session),
        ("/stdio/mcp", modern.session or ""),
    ):
        assert (path, session[-8:]) in seen


def echo_of(server: str) -> tuple[str, dict[str, object]]:
    """A request that a server of a revision answers."""
    if server == MODERN:
        return "tools/call", {"name": "echo", "arguments": {"text": "you"}}
    return "echo", {"to": "you"}


def spoken_in(cell: tuple[str, str, str]) -> str:
    """The revision of a session: the server's, or the client's where the server has no sessions."""
    return cell[0] if cell[1] == MODERN else cell[1]


@over("StreamableProxy")
def test_streamable_http_in_front_of_stdio(together: Together, cell: tuple[str, str, str]) -> None:
    client = McpClient(together.front, "/stdio/mcp")
    if cell[0] == MODERN:
        modern = ModernClient(together.front, path="/stdio/mcp")
        discovered = modern.call("server/discover").message()["result"]
        assert discovered["supportedVersions"] == [MODERN]
        method, params = echo_of(cell[1])
        assert "result" in modern.call(method, params).message()
        return
    answer = client.initialize(cell[0]).message()
    assert answer["result"]["protocolVersion"] == spoken_in(cell)
    assert client.notify("notifications/initialized").status == 202
    assert client.result(*echo_of(cell[1]))
    assert client.delete().status == 204


@over("SSEProxy")
def test_http_with_sse_in_front_of_stdio(together: Together, cell: tuple[str, str, str]) -> None:
    client = SseClient(together.front, path="/stdio/sse")
    assert client.connect().status == 200
    wanted = {
        "protocolVersion": cell[0],
        "capabilities": {},
        "clientInfo": {"name": "t", "version": "1"},
    }
    assert client.result("initialize", wanted)["protocolVersion"] == spoken_in(cell)
    assert client.notify("notifications/initialized").status == 202
    assert client.result(*echo_of(cell[1]))
    client.close()


@over("TransparentProxy")
def test_the_transparent_proxy(together: Together, cell: tuple[str, str, str]) -> None:
    version = cell[0]
    if version == OLDEST:
        old = SseClient(together.front, path="/old/sse").open(version)
        assert old.uri.startswith("/old/messages?")
        assert old.result("tools/call", {"a": 1})["params"] == {"a": 1}
        old.close()
        return
    client = McpClient(together.front, "/new/mcp")
    if version != MODERN:
        client.open(version)
    headers = {"Mcp_Protocol_Version": version, "Mcp_Method": "tools/call"}
    answer = client.call("tools/call", {"name": "echo"}, **headers)
    assert answer.status == 200
    assert "result" in answer.message()
