"""The public keys of an issuer, as its JSON Web Key Set (RFC 7517) has them. Nothing here waits.

The algorithm of a signature is chosen by nobody but us: it has to be one of `ALGORITHMS`, and the
kind of the key has to be that of the algorithm. So `none`, and an HMAC whose secret is a public
key, are no signatures (RFC 8725 sections 2.1 and 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jwt import PyJWK
from jwt.exceptions import PyJWTError

#: The algorithms that are taken, each with the kind of its keys and, where it has one, the curve.
ALGORITHMS: Mapping[str, tuple[str, str | None]] = {
    "RS256": ("RSA", None),
    "RS384": ("RSA", None),
    "RS512": ("RSA", None),
    "PS256": ("RSA", None),
    "PS384": ("RSA", None),
    "PS512": ("RSA", None),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "EdDSA": ("OKP", "Ed25519"),
}

# Keys of a set that are looked at. A token without the name of its key is tried with each of them.
_MAX_KEYS = 32


class KeySet:
    """The keys of one document that can check signatures. Immutable, so thread-safe.

    Those for encryption, shared secrets and private keys are left out. Two sets with the same keys
    are equal. The constructor raises ValueError where there is no key that can be used.
    """

    def __init__(self, document: object) -> None:
        keys = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(keys, list):
            raise ValueError("it has no list of keys")
        usable = [key for key in keys if isinstance(key, dict) and _is_usable(key)]
        if not usable:
            raise ValueError("none of its keys can be used")
        self._keys: tuple[dict[str, Any], ...] = tuple(usable[:_MAX_KEYS])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and self._keys == other._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<KeySet {[key.get('kid') for key in self._keys]}>"

    def matching(self, name: str | None, algorithm: str) -> tuple[PyJWK, ...]:
        """The keys with this `kid` for this algorithm; without a name all that are for it."""
        named = self._keys if name is None else [k for k in self._keys if k.get("kid") == name]
        return tuple(key for jwk in named if (key := _made(jwk, algorithm)) is not None)


def _is_usable(key: dict[str, Any]) -> bool:
    """Whether a key is a public one that checks signatures (RFC 7517 sections 4.2 and 4.3)."""
    operations = key.get("key_ops")
    return (
        key.get("use", "sig") == "sig"
        and (not isinstance(operations, list) or "verify" in operations)
        and "d" not in key
        and any(_made(key, algorithm) is not None for algorithm in ALGORITHMS)
    )


def _made(key: dict[str, Any], algorithm: str) -> PyJWK | None:
    """A key of the set as PyJWT takes it, None for one that is not for this algorithm."""
    kind, curve = ALGORITHMS[algorithm]
    if key.get("alg", algorithm) != algorithm or key.get("kty") != kind:
        return None
    if curve is not None and key.get("crv") != curve:
        return None
    return _key(json.dumps(key, sort_keys=True), algorithm)


@lru_cache(maxsize=8 * _MAX_KEYS)
def _key(text: str, algorithm: str) -> PyJWK | None:
    """The key in a text, None where its numbers are none."""
    try:
        return PyJWK.from_json(text, algorithm)
    except (PyJWTError, ValueError, TypeError):
        return None
