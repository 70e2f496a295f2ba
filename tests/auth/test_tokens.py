"""Which tokens are believed, with a real issuer whose keys come over HTTP."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm

from mcp_proxy.auth.issuer import Issuer
from mcp_proxy.auth.signing_keys import SigningKeys
from mcp_proxy.auth.tokens import TokenVerifier
from mcp_proxy.errors import KeysUnavailable, Unauthenticated
from tests.servers.authorization import KEYS, METADATA, AuthorizationServer, Key
from tests.support.waiting import eventually

AUDIENCE = "https://mcp.example/mcp"
OURS = [AUDIENCE]

# Seconds in which what waits for nobody is over.
AT_ONCE = 0.5


@pytest.fixture
def verifier_of() -> Iterator[Callable[..., TokenVerifier]]:
    """Makes what checks the tokens of a server, whose thread ends with the test."""
    with ExitStack() as made:

        def make(issuer: AuthorizationServer, keys_url: str | None = None) -> TokenVerifier:
            keys = SigningKeys(Issuer(issuer.issuer, keys_url, timeout=0.5))
            made.callback(keys.stop, 5)
            return TokenVerifier(issuer.issuer, keys)

        yield make


@pytest.fixture
def verifier(
    verifier_of: Callable[..., TokenVerifier], issuer: AuthorizationServer
) -> TokenVerifier:
    """What checks the tokens of `issuer`."""
    return verifier_of(issuer)


def refused(verifier: TokenVerifier, token: str, why: str) -> None:
    """Fails unless a token is refused with this reason, and without a word of it."""
    with pytest.raises(Unauthenticated, match=why) as caught:
        verifier.principal_of(token, OURS)
    assert caught.value.status == 401
    assert not any(part and part in str(caught.value) for part in token.split("."))


def signed(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token that no library would make."""
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


# --- good ones -----------------------------------------------------------------------------------


def test_a_token_says_who_calls(verifier: TokenVerifier, issuer: AuthorizationServer) -> None:
    token = issuer.token(aud=AUDIENCE, scope="a b", team="red")
    principal = verifier.principal_of(token, OURS)
    assert principal.name == f"{issuer.issuer} ann"
    assert principal.scopes == {"a", "b"}
    assert principal.claims["team"] == "red"
    assert principal.expires is not None
    assert 0 <= principal.expires - principal.claims["exp"] <= 30
    assert issuer.asked[METADATA] == issuer.asked[KEYS] == 1


@pytest.mark.parametrize(
    ("made", "algorithm"),
    [
        *(("RS256", each) for each in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        *((each, each) for each in ("ES256", "ES384", "EdDSA")),
    ],
)
def test_each_algorithm_of_ours_is_taken(
    verifier: TokenVerifier, issuer: AuthorizationServer, made: str, algorithm: str
) -> None:
    issuer.keys = [key := Key("its", made)]
    token = key.sign(issuer.claims(aud=AUDIENCE), alg=algorithm)
    assert verifier.principal_of(token, OURS).claims["sub"] == "ann"


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["https://other.example", AUDIENCE]])
def test_one_of_several_audiences_is_enough(
    verifier: TokenVerifier, issuer: AuthorizationServer, audience: object
) -> None:
    assert verifier.principal_of(issuer.token(aud=audience), ["x", AUDIENCE])


@pytest.mark.parametrize(
    "claims", [{"scope": "a b"}, {"scope": ["a", "b"]}, {"scp": "a b"}, {"scp": ["a", "b"]}]
)
def test_scopes_are_found_where_issuers_have_them(
    verifier: TokenVerifier, issuer: AuthorizationServer, claims: dict[str, Any]
) -> None:
    assert verifier.principal_of(issuer.token(aud=AUDIENCE, **claims), OURS).scopes == {"a", "b"}


def test_clocks_may_differ_by_some_seconds(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    now = time.time()
    ahead = issuer.token(aud=AUDIENCE, iat=now + 5, nbf=now + 5)
    behind = issuer.token(aud=AUDIENCE, exp=now - 5)
    for token in (ahead, behind):
        assert verifier.principal_of(token, OURS)


def test_a_token_without_the_name_of_its_key_is_tried_with_all(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    issuer.keys = [Key("one"), Key("two")]
    for key in issuer.keys:
        assert verifier.principal_of(key.sign(issuer.claims(aud=AUDIENCE), kid=None), OURS)
    refused(verifier, Key("x").sign(issuer.claims(aud=AUDIENCE), kid=None), "not its issuer's")


def test_the_keys_may_have_an_address_of_their_own(
    verifier_of: Callable[..., TokenVerifier], issuer: AuthorizationServer
) -> None:
    verifier = verifier_of(issuer, f"{issuer.issuer}{KEYS}")
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    assert issuer.asked[METADATA] == 0


# --- bad ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"aud": "https://mcp.example/other"}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"aud": 7}, "another audience"),
        ({"iss": "https://other.example"}, "another issuer"),
        ({"iss": None}, "lacks one"),
        ({"sub": None}, "lacks one"),
        ({"sub": ""}, "names nobody"),
        ({"sub": 7}, "no JWT"),
        ({"exp": None}, "lacks one"),
        ({"exp": time.time() - 30}, "expired"),
        ({"exp": "soon"}, "no JWT"),
        ({"exp": float("inf")}, "no JWT"),
        ({"nbf": time.time() + 3600}, "not valid yet"),
        ({"iat": time.time() + 3600}, "not valid yet"),
    ],
)
def test_a_token_with_wrong_claims_is_refused(
    verifier: TokenVerifier, issuer: AuthorizationServer, changed: dict[str, Any], why: str
) -> None:
    refused(verifier, issuer.token(**{"aud": AUDIENCE, **changed}), why)


def test_none_is_no_signature(verifier: TokenVerifier, issuer: AuthorizationServer) -> None:
    claims = issuer.claims(aud=AUDIENCE)
    for name in ("none", "None", "NONE", ""):
        for kid in ({}, {"kid": "first"}):
            refused(verifier, signed({"alg": name, **kid}, claims), "algorithm")
    refused(verifier, signed({"kid": "first"}, claims), "algorithm")
    assert issuer.asked[KEYS] == 0, "such a token is worth no look at the keys"


def test_the_public_key_is_no_secret_of_an_hmac(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    import hashlib
    import hmac

    public = issuer.keys[-1].private.public_key()
    known = (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(issuer.keys[-1].public()).encode(),
    )
    for secret in known:
        unsigned = signed({"alg": "HS256", "kid": "first"}, issuer.claims(aud=AUDIENCE))
        said = unsigned.rpartition(".")[0]
        mac = hmac.new(secret, said.encode(), hashlib.sha256).digest()
        signature = base64.urlsafe_b64encode(mac).rstrip(b"=").decode()
        refused(verifier, f"{said}.{signature}", "algorithm")


def test_a_shared_secret_among_the_keys_signs_nothing(
    verifier: TokenVerifier, issuer: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = b"s" * 32
    jwk = {"kty": "oct", "kid": "s", "k": base64.urlsafe_b64encode(secret).decode().rstrip("=")}
    monkeypatch.setattr(
        issuer, "published", lambda: {"keys": [jwk, issuer.keys[0].public(alg="ES256")]}
    )
    token = jwt.encode(issuer.claims(aud=AUDIENCE), secret, "HS256", {"kid": "s"})
    refused(verifier, token, "algorithm")
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)


def test_a_key_signs_with_its_own_algorithm_only(
    verifier: TokenVerifier, issuer: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key("its", "RS256")
    monkeypatch.setattr(issuer, "published", lambda: {"keys": [key.public(alg="RS512")]})
    refused(verifier, key.sign(issuer.claims(aud=AUDIENCE)), "does not have")
    assert verifier.principal_of(key.sign(issuer.claims(aud=AUDIENCE), alg="RS512"), OURS)


@pytest.mark.parametrize("more", [{"use": "enc"}, {"key_ops": ["encrypt"]}])
def test_what_is_no_public_key_for_signatures_is_left_out(
    verifier: TokenVerifier,
    issuer: AuthorizationServer,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    other = Key("other")
    published = {"keys": [issuer.keys[0].public(**more), other.public()]}
    monkeypatch.setattr(issuer, "published", lambda: published)
    refused(verifier, issuer.token(aud=AUDIENCE), "does not have")
    assert verifier.principal_of(other.sign(issuer.claims(aud=AUDIENCE)), OURS)


def test_a_private_key_that_is_published_signs_nothing(
    verifier: TokenVerifier, issuer: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked, other = issuer.keys[0], Key("other")
    whole = {**json.loads(ECAlgorithm.to_jwk(leaked.private)), "kid": leaked.name}
    assert "d" in whole
    monkeypatch.setattr(issuer, "published", lambda: {"keys": [whole, other.public()]})
    refused(verifier, leaked.sign(issuer.claims(aud=AUDIENCE)), "does not have")
    assert verifier.principal_of(other.sign(issuer.claims(aud=AUDIENCE)), OURS)


def test_a_token_of_a_stranger_with_the_name_of_our_key_is_refused(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    refused(verifier, Key("first").sign(issuer.claims(aud=AUDIENCE)), "not its issuer's")


def test_a_changed_token_is_refused_though_the_whole_one_is_kept(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    token = issuer.token(aud=AUDIENCE)
    assert verifier.principal_of(token, OURS)
    head, _, signature = token.split(".")
    other = signed({}, issuer.claims(aud=AUDIENCE, sub="bob")).split(".")[1]
    refused(verifier, f"{head}.{other}.{signature}", "not its issuer's")


def test_a_kept_token_is_not_good_for_another_endpoint(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    token = issuer.token(aud=AUDIENCE)
    assert verifier.principal_of(token, OURS)
    with pytest.raises(Unauthenticated, match="another audience"):
        verifier.principal_of(token, ["https://mcp.example/other"])


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "\ud800.\ud800.\ud800",
        "é.é.é",
        "x" * 20_000,
        base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.e30",
        base64.urlsafe_b64encode(b"[]").decode().rstrip("=") + ".e30.e30",
        signed({"alg": ["ES256"]}, {}),
        signed({"alg": "ES256", "kid": 7}, {}),
        signed({"alg": "ES256", "kid": "first", "crit": ["x"]}, {}),
    ],
)
def test_what_is_no_token_is_refused(verifier: TokenVerifier, token: str) -> None:
    refused(verifier, token, "The token")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(token=st.text() | st.from_regex(r"\A[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\Z"))
def test_any_text_is_refused(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(Unauthenticated):
        verifier.principal_of(token, OURS)


# --- keys that come, go and change ---------------------------------------------------------------


def test_a_rotated_key_is_found_and_the_old_one_is_no_good_any_more(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    old = issuer.token(aud=AUDIENCE)
    assert verifier.principal_of(old, OURS)
    issuer.rotate("second")
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    refused(verifier, old, "does not have")
    assert issuer.asked[KEYS] == 2


def test_tokens_of_unknown_keys_cause_one_fetch(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    for number in range(200):
        strange = Key(f"strange-{number}" if number % 2 else "strange")
        refused(verifier, strange.sign(issuer.claims(aud=AUDIENCE)), "does not have")
    assert issuer.asked[KEYS] == 2
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)


def test_known_keys_serve_on_while_their_server_hangs(
    verifier: TokenVerifier, issuer: AuthorizationServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    with issuer.hanging():
        verifier.keys.wake()
        eventually(lambda: issuer.asked[KEYS] == 2)
        began = time.monotonic()
        for number in range(50):
            assert verifier.principal_of(issuer.token(aud=AUDIENCE, jti=str(number)), OURS)
        assert time.monotonic() - began < AT_ONCE
        eventually(lambda: "those that are known serve on" in caplog.text)
        assert verifier.principal_of(issuer.token(aud=AUDIENCE, jti="late"), OURS)


def test_known_keys_serve_on_when_their_server_is_gone(
    verifier_of: Callable[..., TokenVerifier], caplog: pytest.LogCaptureFixture
) -> None:
    with AuthorizationServer() as issuer:
        verifier = verifier_of(issuer)
        assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    verifier.keys.wake()
    eventually(lambda: "those that are known serve on" in caplog.text)
    assert verifier.principal_of(issuer.token(aud=AUDIENCE, jti="late"), OURS)
    with pytest.raises(KeysUnavailable):
        verifier.principal_of(Key("new").sign(issuer.claims(aud=AUDIENCE)), OURS)


def test_without_keys_tokens_are_refused_for_now_and_not_for_ever(
    verifier_of: Callable[..., TokenVerifier], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with AuthorizationServer() as issuer:
        port = issuer.port
    verifier = verifier_of(issuer)
    token = issuer.token(aud=AUDIENCE)
    with pytest.raises(KeysUnavailable) as caught:
        verifier.principal_of(token, OURS)
    assert caught.value.status == 503
    eventually(lambda: "cannot be had" in caplog.text)
    assert str(port) in (verifier.keys.reason() or "")
    with AuthorizationServer(port) as again:
        again.keys = issuer.keys
        verifier.keys.wake()
        eventually(lambda: verifier.keys.current is not None)
        assert verifier.principal_of(token, OURS)
        assert verifier.keys.reason() is None
        eventually(lambda: "can be read again" in caplog.text)


def test_a_hanging_server_holds_the_first_requests_for_some_seconds_together(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    token = issuer.token(aud=AUDIENCE)
    with issuer.hanging():
        with pytest.raises(KeysUnavailable):
            verifier.principal_of(token, OURS)
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(KeysUnavailable):
                verifier.principal_of(token, OURS)
        assert time.monotonic() - began < AT_ONCE


def test_most_requests_do_not_wait_for_a_hanging_server(
    issuer: AuthorizationServer,
) -> None:
    keys = SigningKeys(Issuer(issuer.issuer, timeout=0.5), max_waiting=1)
    verifier = TokenVerifier(issuer.issuer, keys)
    token = issuer.token(aud=AUDIENCE)
    with issuer.hanging(), ThreadPoolExecutor() as pool:
        first = pool.submit(verifier.principal_of, token, OURS)
        eventually(lambda: issuer.asked[KEYS] == 1)
        with pytest.raises(KeysUnavailable):
            verifier.principal_of(token, OURS)
        assert not first.done()
    with pytest.raises(KeysUnavailable):
        first.result(10)
    keys.stop(5)


def test_who_may_not_wait_is_refused_at_once(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    with issuer.hanging():
        began = time.monotonic()
        with pytest.raises(KeysUnavailable):
            verifier.principal_of(issuer.token(aud=AUDIENCE), OURS, may_wait=False)
        assert time.monotonic() - began < AT_ONCE


def test_a_kept_token_is_looked_at_again_when_it_has_expired(
    verifier: TokenVerifier, issuer: AuthorizationServer
) -> None:
    token = issuer.token(aud=AUDIENCE, exp=time.time() - 7)
    assert verifier.principal_of(token, OURS)

    def is_refused() -> bool:
        try:
            return verifier.principal_of(token, OURS) is None
        except Unauthenticated:
            return True

    eventually(is_refused)


@pytest.mark.parametrize(
    "said", [{"keys": []}, {"keys": [7, {"kty": "EC"}]}, [], {"keys": {}}, "x"]
)
def test_what_is_no_set_of_keys_changes_nothing(
    verifier: TokenVerifier,
    issuer: AuthorizationServer,
    caplog: pytest.LogCaptureFixture,
    said: Any,
) -> None:
    assert verifier.principal_of(issuer.token(aud=AUDIENCE), OURS)
    issuer.published = lambda: said  # type: ignore[method-assign]
    verifier.keys.wake()
    eventually(lambda: "is no set of keys" in caplog.text)
    assert verifier.principal_of(issuer.token(aud=AUDIENCE, jti="late"), OURS)
