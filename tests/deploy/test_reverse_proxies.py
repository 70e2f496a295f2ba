"""The reverse proxies of deploy/ take their configuration, and hold nothing back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import urllib3

from tests.deploy.fronts import HOST, KINDS, Front, TlsFront
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess, is_alive
from tests.support.sse_client import SseClient
from tests.support.waiting import eventually

# What the comments of the files say that the proxy needs; and keepalives that come soon.
_SETTINGS = {
    "MCP_PROXY_ALLOWED_HOSTS": HOST,
    "MCP_PROXY_TRUSTED_PROXIES": "127.0.0.1",
    "MCP_PROXY_KEEPALIVE_INTERVAL": "0.3",
}

_TEN_MIB = 10 * 1024 * 1024


@pytest.fixture(scope="module", params=KINDS)
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """One of them before the proxy."""
    directory = tmp_path_factory.mktemp(request.param)
    with (
        ProxyProcess(SCRIPTED, environment=_SETTINGS) as process,
        Front(request.param, directory, process.port) as front,
    ):
        client = McpClient(TlsFront(front))
        # HAProxy and Caddy ask for /readyz first.
        eventually(lambda: client.request("OPTIONS", None).status == 405, 20)
        yield front


@pytest.fixture
def client(front: Front) -> Iterator[McpClient]:
    """A session through it."""
    client = McpClient(TlsFront(front)).open()
    yield client
    client.delete().close()


def test_the_program_finds_nothing_wrong_with_the_file(front: Front) -> None:
    checked = front.check()
    assert checked.returncode == 0, checked.stderr
    for warning in ("[warn]", "[WARNING]"):  # of nginx and of HAProxy
        assert warning not in checked.stdout + checked.stderr


def test_an_event_arrives_before_the_next_is_made(client: McpClient) -> None:
    client.require_streaming()


def test_a_silent_stream_stays_open_and_has_its_comments(client: McpClient) -> None:
    stream = client.listen()
    assert b": keepalive" in next(stream.pieces)
    stream.close()


def test_the_older_wire_works_and_a_client_that_leaves_is_noticed(front: Front) -> None:
    client = SseClient(TlsFront(front)).open()
    server = client.result("count")["pid"]
    assert client.result("echo", {"text": "x"}) == {"text": "x"}
    client.close()
    eventually(lambda: not is_alive(server))


def test_the_host_of_the_client_reaches_the_proxy(front: Front) -> None:
    """So a foreign one is refused, whoever lets it through."""
    refused = McpClient(TlsFront(front, "evil.example")).initialize()
    assert refused.status in (200, 403)  # Caddy serves the names in its file, and answers others
    assert refused.headers.get("Mcp-Session-Id") is None
    assert McpClient(TlsFront(front)).initialize().status == 200


def test_a_body_may_have_what_the_proxy_takes_and_no_more(client: McpClient) -> None:
    assert client.result("echo", {"text": "x" * 7_000_000}) == {"text": "x" * 7_000_000}

    def is_told() -> bool:
        """Who closes before all of a body has come is not heard each time (RFC 9112, 9.6)."""
        try:
            answer = client.call("echo", {"text": "x" * _TEN_MIB})
        except urllib3.exceptions.HTTPError:
            return False
        assert answer.status == 413
        return True

    eventually(is_told)


def test_without_these_settings_the_public_name_is_refused() -> None:
    """The comment at the head of each file."""
    with ProxyProcess(SCRIPTED) as process:
        client = McpClient(HttpFront(process.base))
        assert client.initialize(Host=HOST).status == 403
