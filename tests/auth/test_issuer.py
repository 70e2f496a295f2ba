"""Where an issuer's keys are looked for, and what is made of what is found there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.auth.issuer import Issuer, IssuerError, metadata_urls
from mcp_proxy.auth.key_set import KeySet
from tests.servers.authorization import Key
from tests.servers.http_backend import HttpBackend, Turn
from tests.support.tls import Certificates

OAUTH = "/.well-known/oauth-authorization-server"
OPENID = "/.well-known/openid-configuration"

KEYS = {"keys": [Key("one").public()]}


@pytest.fixture
def server() -> Iterator[HttpBackend]:
    with HttpBackend() as server:
        yield server


def answers(document: Any, status: int = 200, *headers: str) -> Callable[[Turn], None]:
    """Answers with a document, or with bytes as they are."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return lambda turn: turn.reply(status, body, *headers)


def base_of(server: HttpBackend) -> str:
    return server.url.removesuffix("/mcp")


def paths(server: HttpBackend) -> list[str]:
    return [seen.target for seen in server.seen]


# --- discovery -----------------------------------------------------------------------------------


def test_metadata_are_looked_for_where_clients_look() -> None:
    assert metadata_urls("https://a.example") == [
        f"https://a.example{OAUTH}",
        f"https://a.example{OPENID}",
    ]
    assert metadata_urls("https://a.example/realms/x/") == [
        f"https://a.example{OAUTH}/realms/x",
        f"https://a.example{OPENID}/realms/x",
        f"https://a.example/realms/x{OPENID}",
    ]


@pytest.mark.parametrize("path", ["", "/realms/x"])
def test_the_first_metadata_of_the_issuer_lead_to_its_keys(server: HttpBackend, path: str) -> None:
    url = base_of(server) + path
    last = metadata_urls(url)[-1].removeprefix(base_of(server))
    found = {"issuer": url, "jwks_uri": f"{base_of(server)}/k"}
    for each in metadata_urls(url):
        server.on("GET", each.removeprefix(base_of(server)), answers({}, 404))
    server.on("GET", last, answers(found))
    server.on("GET", "/k", answers(KEYS))
    assert Issuer(url).keys() == KeySet(KEYS)
    assert paths(server)[-2:] == [last, "/k"]


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"issuer": "https://other.example", "jwks_uri": "KEYS"}, "is of the issuer"),
        ({"jwks_uri": "KEYS"}, "is of the issuer None"),
        ([], "is of the issuer None"),
        ({"issuer": "OWN"}, "has no jwks_uri"),
        ({"issuer": "OWN", "jwks_uri": "file:///etc/keys"}, "has no jwks_uri"),
    ],
)
def test_metadata_of_somebody_else_lead_nowhere(
    server: HttpBackend, metadata: Any, why: str
) -> None:
    own = base_of(server)
    text = json.dumps(metadata).replace("OWN", own).replace("KEYS", f"{own}/k").encode()
    server.on("GET", OAUTH, answers(text))
    server.on("GET", OPENID, answers({}, 404))
    server.on("GET", "/k", answers(KEYS))
    with pytest.raises(IssuerError, match=why):
        Issuer(own).keys()
    assert "/k" not in paths(server)


# --- documents -----------------------------------------------------------------------------------


def drip(turn: Turn) -> None:
    """A byte now and then, for ever."""
    turn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        turn.send(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (answers(b"no"), "is no JSON"),
        (answers(b"[" * 100_000), "is no JSON"),
        (answers({}), "is no set of keys: it has no list"),
        (answers({"keys": [{"kty": "RSA", "n": 1}]}), "is no set of keys"),
        (answers(b" " * 2_000_000), "is longer than"),
        (answers(KEYS, 404), "answers 404"),
        (answers(KEYS, 302, "Location: /other"), "answers 302"),
        (drip, "comes too slowly"),
        (lambda turn: turn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), "cannot be read"),
        (lambda turn: turn.send(b"nonsense\r\n\r\n"), "cannot be read"),
    ],
)
def test_what_is_no_document_with_keys_is_refused(
    server: HttpBackend, act: Callable[[Turn], None], why: str
) -> None:
    server.on("GET", "/k", act)
    server.on("GET", "/other", answers(KEYS))
    issuer = Issuer("https://issuer.example", f"{base_of(server)}/k", timeout=0.3)
    began = time.monotonic()
    with pytest.raises(IssuerError, match=why) as caught:
        issuer.keys()
    assert time.monotonic() - began < 3
    assert "object at 0x" not in str(caught.value)
    assert "/other" not in paths(server)


def test_a_key_with_wrong_numbers_is_left_out() -> None:
    wrong = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "wrong"}
    keys = KeySet({"keys": [wrong, *KEYS["keys"]]})
    assert keys == KeySet(KEYS)
    assert keys.matching("wrong", "ES256") == ()
    with pytest.raises(ValueError, match="can be used"):
        KeySet({"keys": [wrong]})


def test_a_set_with_more_keys_than_anybody_has_is_cut() -> None:
    assert len(KeySet({"keys": [Key(f"{number}").public() for number in range(50)]})) == 32


def test_the_certificate_of_an_issuer_is_checked(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with HttpBackend(tls=certificates.for_anybody()) as server:
        own = base_of(server)
        server.on("GET", OAUTH, answers({"issuer": own, "jwks_uri": f"{own}/k"}))
        server.on("GET", "/k", answers(KEYS))
        assert Issuer(own, verify=certificates.path("ca.pem")).keys() == KeySet(KEYS)
        with pytest.raises(IssuerError, match="certificate verify failed"):
            Issuer(own).keys()
        plain = {"issuer": own, "jwks_uri": "http://127.0.0.1:1/k"}
        server.on("GET", OAUTH, answers(plain))
        server.on("GET", OPENID, answers({}, 404))
        with pytest.raises(IssuerError, match="is not https"):
            Issuer(own, verify=certificates.path("ca.pem")).keys()
