"""JWT bearer tokens (RFC 7519, RFC 9068): who calls, as the issuer of a token says.

A token is believed when a key of the issuer has signed it, when the issuer and the time are right,
and when it was issued for the endpoint that it is shown to (MCP 2025-11-25, authorization, "Token
Handling"). What was found out is kept by the token's digest for a minute at most: a check costs
about 165 us, most of it the signature's.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Collection
from typing import Any, NamedTuple

import jwt
from jwt.exceptions import (
    ExpiredSignatureError,
    ImmatureSignatureError,
    InvalidIssuerError,
    InvalidSignatureError,
    MissingRequiredClaimError,
    PyJWTError,
)

from mcp_proxy.auth.key_set import ALGORITHMS, KeySet
from mcp_proxy.auth.principal import Principal
from mcp_proxy.auth.signing_keys import SigningKeys
from mcp_proxy.errors import Unauthenticated

# Seconds that the issuer's clock and ours may differ.
_LEEWAY = 10.0

# Seconds for which a checked token is not checked again, and how many are kept.
_KEPT = 60.0
_MAX_KEPT = 4096

# The longest token that is looked at, in characters.
_MAX_LENGTH = 16 * 1024

_OPTIONS: Any = {
    "require": ["exp", "iss", "sub"],
    "verify_aud": False,  # it depends on the endpoint
    "enforce_minimum_key_length": True,
}

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ExpiredSignatureError, "The token has expired"),
    (ImmatureSignatureError, "The token is not valid yet"),
    (InvalidIssuerError, "The token is of another issuer"),
    (InvalidSignatureError, "The signature of the token is not its issuer's"),
    (MissingRequiredClaimError, "The token lacks one of the claims exp, iss and sub"),
)


class _Checked(NamedTuple):
    """What was found out about a token, until a time (seconds since the epoch), with these keys."""

    principal: Principal
    audiences: frozenset[str]
    until: float
    keys: KeySet | None


class TokenVerifier:
    """Checks the tokens of one issuer. Thread-safe.

    `issuer` is what the claim `iss` has to be, to the letter.
    """

    def __init__(self, issuer: str, keys: SigningKeys) -> None:
        self.keys = keys
        self._issuer = issuer
        self._lock = threading.Lock()  # guards _kept
        self._kept: dict[bytes, _Checked] = {}

    def __repr__(self) -> str:
        return f"<TokenVerifier {self._issuer} kept={len(self._kept)}>"

    def principal_of(
        self, token: str, audiences: Collection[str], may_wait: bool = True
    ) -> Principal:
        """Who calls with a token that was issued for one of these audiences.

        Raises Unauthenticated for any other, and KeysUnavailable where that cannot be found out
        now. Where it may it waits a few seconds for a key that is not known.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        checked = self._kept.get(digest)
        is_current = checked is not None and checked.keys is self.keys.current
        if checked is None or not is_current or time.time() >= checked.until:
            checked = self._checked(token, may_wait)
            self._keep(digest, checked)
        if checked.audiences.isdisjoint(audiences):
            raise Unauthenticated("The token was issued for another audience")
        return checked.principal

    def _keep(self, digest: bytes, checked: _Checked) -> None:
        with self._lock:
            self._kept.pop(digest, None)
            if len(self._kept) >= _MAX_KEPT:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[digest] = checked

    def _checked(self, token: str, may_wait: bool) -> _Checked:
        """What a token says, once its signature, issuer and times are known to be right."""
        name, algorithm = _named_key(token)
        known = self.keys.current
        keys = self.keys.matching(name, algorithm, may_wait)
        if not keys:
            raise Unauthenticated("The token is signed with a key that its issuer does not have")
        try:
            claims = self._claims(token, keys, algorithm)
        except (PyJWTError, ValueError, OverflowError, RecursionError) as error:
            raise Unauthenticated(_reason(error)) from None
        if not claims["sub"]:
            raise Unauthenticated("The token names nobody: its claim sub is empty")
        expires = float(claims["exp"]) + _LEEWAY
        audience = claims.get("aud")
        return _Checked(
            Principal(f"{self._issuer} {claims['sub']}", _scopes_in(claims), claims, expires),
            frozenset(_texts_in(audience if isinstance(audience, list) else [audience])),
            min(time.time() + _KEPT, expires),
            known,
        )

    def _claims(self, token: str, keys: Collection[jwt.PyJWK], algorithm: str) -> dict[str, Any]:
        """The claims of a token that one of these keys has signed; raises PyJWTError."""
        for key in keys:
            with contextlib.suppress(InvalidSignatureError):
                return jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    issuer=self._issuer,
                    leeway=_LEEWAY,
                    options=_OPTIONS,
                )
        raise InvalidSignatureError


def _named_key(token: str) -> tuple[str | None, str]:
    """The `kid` in a token's header, None where it has none, and the algorithm, one of ours."""
    if len(token) > _MAX_LENGTH:
        raise Unauthenticated("The token is too long")
    try:
        header = jwt.get_unverified_header(token)
    except (PyJWTError, ValueError, RecursionError):
        raise Unauthenticated("The token is no JWT") from None
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise Unauthenticated("The token is signed by an algorithm that is not taken here")
    return header.get("kid"), algorithm


def _scopes_in(claims: dict[str, Any]) -> frozenset[str]:
    """The scopes of a token: `scope` (RFC 8693 section 4.2), or `scp` of some issuers."""
    found: set[str] = set()
    for claim in (claims.get("scope"), claims.get("scp")):
        found.update(_texts_in(claim.split() if isinstance(claim, str) else claim))
    return frozenset(found)


def _texts_in(claim: object) -> list[str]:
    return [each for each in claim if isinstance(each, str)] if isinstance(claim, list) else []


def _reason(error: Exception) -> str:
    """What is wrong with a token, in our words: a library's may quote it."""
    return next(
        (reason for kind, reason in _REASONS if isinstance(error, kind)), "The token is no JWT"
    )
