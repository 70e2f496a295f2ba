"""gevent in front of an HTTPS target: it has to patch before urllib3 is loaded."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.http_backend import HttpBackend, stream
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import COMMAND, GUNICORN, ROOT, ProxyProcess
from tests.support.tls import Certificates

*_GUNICORN, _ = GUNICORN


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def target(certificates: Certificates) -> Iterator[HttpBackend]:
    """An HTTPS server; its clients need no certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))
    with HttpBackend(tls=context) as backend:
        yield backend


def client_of(process: ProxyProcess) -> McpClient:
    return McpClient(HttpFront(process.base))


def test_an_https_target_is_served(target: HttpBackend, certificates: Certificates) -> None:
    environment = {
        "GEVENT_TLS_TARGET": target.url,
        "GEVENT_TLS_CA": certificates.path("ca.pem"),
        "MCP_PROXY_WORKER_CLASS": "gevent",
    }
    way = (*_GUNICORN, "-k", "gevent", "tests.live.gevent_tls:app")
    target.on("GET", "/mcp", stream(b'data: {"jsonrpc":"2.0","method":"m"}\n\n'))
    with ProxyProcess(way=way, environment=environment) as process:
        assert "Using worker: mcp_proxy.server.gevent_worker.GeventWorker" in process.log()
        client = client_of(process).open()
        for _ in range(3):
            assert client.result("tools/list")["backend"] == "backend"
        assert client.listen().message()["method"] == "m"
        assert "RecursionError" not in process.log()
    assert [seen.rpc for seen in target.seen].count("tools/list") == 3


def test_our_command_refuses_a_certificate_of_nobody_known(target: HttpBackend) -> None:
    options = ["--worker-class", "gevent", "--target-url", target.url]
    with ProxyProcess(options=options, way=COMMAND) as process:
        for _ in range(2):
            answer = client_of(process).initialize(Connection="close")
            assert (answer.status, answer.failure) == (200, "server-unreachable")
            assert "certificate" in answer.error()["message"]
        assert "RecursionError" not in process.log()
    assert target.seen == []


@pytest.mark.parametrize("name", ["MCP_PROXY_CA_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_our_command_takes_cas_of_ones_own(
    target: HttpBackend, certificates: Certificates, name: str, kind: str
) -> None:
    options = ["--worker-class", kind, "--target-url", target.url]
    others = {"REQUESTS_CA_BUNDLE": "", "SSL_CERT_FILE": ""}
    environment = {**others, name: certificates.path("ca.pem")}
    with ProxyProcess(options=options, way=COMMAND, environment=environment) as process:
        assert client_of(process).open().result("tools/list")["backend"] == "backend"
        assert "RecursionError" not in process.log()


def test_the_extra_names_what_gunicorns_worker_imports() -> None:
    """It would be there in the tests by accident: pytest needs it, too."""
    text = Path(ROOT, "setup.py").read_text(encoding="utf-8")
    extra = re.search(r'"gevent": \[(.*)\]', text)
    assert extra is not None
    assert re.findall(r'"([a-z]+)', extra[1]) == ["gevent", "packaging"]
