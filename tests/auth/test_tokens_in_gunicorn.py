"""Tokens at the real command: keys that hang, change and come late, in each class of worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests

from tests.servers.authorization import KEYS, AuthorizationServer, Key
from tests.support.front import INITIALIZE
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

PUBLIC = "https://mcp.example"
AUDIENCE = f"{PUBLIC}/mcp"

# Seconds in which a call is answered that waits for nobody.
AT_ONCE = 1.0


@contextmanager
def protected(issuer: AuthorizationServer, *options: str) -> Iterator[ProxyProcess]:
    """The bundled demo server, for callers with a token; nothing may have gone wrong."""
    needed = ["--jwt-issuer", issuer.issuer, "--public-url", PUBLIC, *options]
    with ProxyProcess(options=needed) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log(), proxy.log()


def initialize(proxy: ProxyProcess, token: str) -> requests.Response:
    """The answer to an initialize; the session ends with it."""
    headers = {"Accept": "application/json, text/event-stream", "Authorization": f"Bearer {token}"}
    answer = requests.post(proxy.url, json=INITIALIZE, headers=headers, timeout=30)
    if session := answer.headers.get("Mcp-Session-Id"):
        headers["Mcp-Session-Id"] = session
        assert requests.delete(proxy.url, headers=headers, timeout=30).status_code < 300
    return answer


def test_good_tokens_are_served_at_once_while_the_keys_hang(issuer: AuthorizationServer) -> None:
    with protected(issuer) as proxy, ThreadPoolExecutor() as pool:
        assert initialize(proxy, issuer.token(aud=AUDIENCE)).status_code == 200
        strange = Key("strange").sign(issuer.claims(aud=AUDIENCE))
        with issuer.hanging():
            waiting = [pool.submit(initialize, proxy, strange) for _ in range(4)]
            eventually(lambda: issuer.asked[KEYS] == 2)
            for number in range(5):
                token = issuer.token(aud=AUDIENCE, jti=str(number))
                began = time.monotonic()
                assert initialize(proxy, token).status_code == 200
                assert time.monotonic() - began < AT_ONCE
            assert not any(each.done() for each in waiting), "the keys did not hang"
            assert {each.result().status_code for each in waiting} == {503}
        assert issuer.asked[KEYS] == 2


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_a_rotated_key_is_taken_in_each_class_of_worker(
    issuer: AuthorizationServer, kind: str
) -> None:
    with protected(issuer, "--worker-class", kind) as proxy:
        old = issuer.token(aud=AUDIENCE)
        assert initialize(proxy, old).status_code == 200
        issuer.rotate("second")
        assert initialize(proxy, issuer.token(aud=AUDIENCE)).status_code == 200
        assert initialize(proxy, old).status_code == 401
        for token in (old, issuer.token(aud=AUDIENCE)):
            assert token.rpartition(".")[2] not in proxy.log()


def test_a_proxy_that_starts_before_its_issuer_serves_when_that_is_there() -> None:
    with AuthorizationServer() as gone:
        pass
    with protected(gone) as proxy:
        assert initialize(proxy, gone.token(aud=AUDIENCE)).status_code == 503
        eventually(lambda: "every token is refused with 503" in proxy.log())
        with AuthorizationServer(gone.port) as issuer:
            token = issuer.token(aud=AUDIENCE)
            eventually(lambda: initialize(proxy, token).status_code == 200, 20)


def test_check_says_whether_the_keys_can_be_had(
    issuer: AuthorizationServer, capsys: pytest.CaptureFixture[str]
) -> None:
    from mcp_proxy.server.cli import main

    options = ["check", "--bind", "127.0.0.1:0", "--public-url", PUBLIC, "--jwt-issuer"]
    assert main([*options, issuer.issuer]) == 0
    assert f"ok    jwt_issuer               1 keys of {issuer.issuer}" in capsys.readouterr().out
    issuer.keys = []
    assert main([*options, issuer.issuer]) == 1
    assert "FAIL  jwt_issuer" in capsys.readouterr().out


def test_without_the_library_the_command_says_what_to_install(
    issuer: AuthorizationServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from mcp_proxy.server.cli import main

    monkeypatch.setitem(sys.modules, "jwt", None)
    assert main(["--public-url", PUBLIC, "--jwt-issuer", issuer.issuer]) != 0
    assert "pip install 'mcp-wsgi-proxy[auth]'" in capsys.readouterr().err
