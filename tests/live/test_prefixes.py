"""Under a prefix, in Flask, in Django and behind nginx, both wires work as they do bare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import requests

from tests.examples.serving import require
from tests.support.front import SCRIPTED, Answer, HttpFront, McpClient
from tests.support.nginx import Nginx
from tests.support.proxy_process import COMMAND, ProxyProcess, is_alive
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

NOTE = "notifications/message"

# Somebody else's gunicorn, none of our hooks and settings.
_MOUNTED = ("-m", "gunicorn", "-c", "python:tests.live.plain_gunicorn")
_FLASK = (*_MOUNTED, "tests.live.mounted:flask_app")
_DJANGO = (*_MOUNTED, "tests.live.mounted:django_app")

_SETTINGS = {"MCP_PROXY_KEEPALIVE_INTERVAL": "0.3", "MCP_PROXY_TRUSTED_PROXIES": "127.0.0.1"}

# How gunicorn is started, and the prefix that nginx takes away, if there is one.
WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "bare": (COMMAND, ""),
    "flask": (_FLASK, ""),
    "django": (_DJANGO, ""),
    "nginx": (COMMAND, "/public"),
    "nginx, flask": (_FLASK, "/public"),
}


class Place(NamedTuple):
    """Where the proxy is for its clients."""

    front: HttpFront
    prefix: str

    def sse(self) -> SseClient:
        """A client of HTTP+SSE."""
        return SseClient(self.front, path=f"{self.prefix}/sse")

    def streamable(self) -> McpClient:
        """A client of streamable HTTP."""
        return McpClient(self.front, f"{self.prefix}/mcp")


@pytest.fixture(scope="module", params=WAYS)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The proxy in one of the ways."""
    way, public = WAYS[request.param]
    mount = "" if way == COMMAND else "/tools"
    require("flask")
    require("django")
    with ExitStack() as stack:
        process = stack.enter_context(ProxyProcess(SCRIPTED, way=way, environment=_SETTINGS))
        base = process.base
        if public:
            directory = tmp_path_factory.mktemp("nginx")
            base = stack.enter_context(Nginx(directory, base, public)).base
        yield Place(HttpFront(base), f"{public}{mount}")


@pytest.fixture
def old(place: Place) -> Iterator[SseClient]:
    """A session over HTTP+SSE."""
    client = place.sse().open()
    yield client
    client.close()


@pytest.fixture
def new(place: Place) -> Iterator[McpClient]:
    """A session over streamable HTTP."""
    client = place.streamable().open()
    yield client
    client.delete().close()


# --- HTTP+SSE ------------------------------------------------------------------------------------


def test_the_uri_for_messages_is_the_one_that_the_client_sees(place: Place, old: SseClient) -> None:
    assert old.uri.startswith(f"{place.prefix}/messages?session_id=mcp-")
    assert old.result("echo", {"text": "x" * 100_000}) == {"text": "x" * 100_000}


def test_each_event_arrives_before_the_next_is_made(old: SseClient) -> None:
    key = old.call("hold", {"name": "h", "_meta": {"progressToken": "t"}})
    assert old.next()["params"]["progressToken"] == "t"
    old.call("release", {"name": "h"})
    assert old.answer(key)["result"]["held"] == "h"


def test_keepalives_arrive(old: SseClient) -> None:
    assert old.stream is not None
    assert b": keepalive" in next(old.stream.pieces)


def test_sampling_is_answered(old: SseClient) -> None:
    key = old.call("ask", {"method": "sampling/createMessage", "id": "q"})
    assert old.next()["id"] == "q"
    old.post({"jsonrpc": "2.0", "id": "q", "result": {"role": "assistant"}})
    assert old.answer(key)["result"]["result"] == {"role": "assistant"}


def test_a_client_that_leaves_ends_its_session(place: Place) -> None:
    client = place.sse().open()
    server = client.result("count")["pid"]
    client.close()
    eventually(lambda: not is_alive(server))
    assert client.post({"jsonrpc": "2.0", "method": "x"}).status == 404


def test_a_post_to_the_stream_is_a_405(place: Place) -> None:
    answer = place.sse().post({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, place.sse().path)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")


# --- streamable HTTP -----------------------------------------------------------------------------


def test_a_call_is_answered(new: McpClient) -> None:
    answer = new.call("echo", {"text": "x" * 100_000})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.message()["result"] == {"text": "x" * 100_000}


def test_an_answer_that_streams_is_not_held_back(new: McpClient) -> None:
    new.require_streaming()


def test_the_standing_stream_is_not_held_back(new: McpClient) -> None:
    stream = new.listen()
    new.result("later", {"message": {"method": NOTE, "params": {"n": 1}}})
    assert next(stream.stream())["params"] == {"n": 1}
    stream.close()


def test_an_ended_session_is_a_404(place: Place) -> None:
    client = place.streamable().open()
    assert client.delete().status == 204
    assert client.call("echo").status == 404


# --- what surrounds it ---------------------------------------------------------------------------


def test_the_application_around_it_is_served(place: Place) -> None:
    home = place.prefix.removesuffix("/tools") if place.prefix.endswith("/tools") else None
    if home is not None:
        answer = requests.get(f"{place.front.base}{home}/", timeout=10)
        assert answer.text in ("Flask", "Django")


def test_streams_ask_nginx_not_to_buffer() -> None:
    """Behind nginx the header is gone, nginx heeds it; so it is looked at without."""
    with ProxyProcess(SCRIPTED) as process:
        new, old = (client(HttpFront(process.base)) for client in (McpClient, SseClient))
        assert isinstance(new, McpClient)
        assert isinstance(old, SseClient)
        new.open()
        streams: list[Answer] = [new.listen(), new.call("notify", {"count": 1}), old.connect()]
        for answer in streams:
            assert answer.headers["X-Accel-Buffering"] == "no"
            answer.close()
