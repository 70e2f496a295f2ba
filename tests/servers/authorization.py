"""An authorization server for tests: OAuth 2.1 for public clients, in a thread of the test.

It registers every client (RFC 7591), agrees to everything at once and redirects with a code, which
it exchanges for a token when the verifier of the code's challenge is there (RFC 7636). A token is a
JWT for the `resource` that was asked for (RFC 8707). Its metadata are at the well-known path of
OAuth (RFC 8414), its keys at `/keys`, which can be made to hang.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from tests.support.startable import ServerThread

METADATA = "/.well-known/oauth-authorization-server"
KEYS = "/keys"

#: What makes a private key for an algorithm.
MAKERS: dict[str, Any] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}

_LIFE = 3600
_HANGING = 60.0


class Key:
    """A pair of keys with a name."""

    def __init__(self, name: str, algorithm: str = "ES256") -> None:
        self.name = name
        self.algorithm = algorithm
        self.private = MAKERS[algorithm]()

    def public(self, **more: Any) -> dict[str, Any]:
        """The public key as a JWK."""
        made = get_default_algorithms()[self.algorithm].to_jwk(self.private.public_key())
        return {**json.loads(made), "kid": self.name, "use": "sig", **more}

    def sign(self, claims: dict[str, Any], **headers: Any) -> str:
        """A token with these claims; a header that is None is left out."""
        whole = {"kid": self.name, "typ": "at+jwt", "alg": self.algorithm, **headers}
        named = {name: value for name, value in whole.items() if value is not None}
        return jwt.encode(claims, self.private, algorithm=named.pop("alg"), headers=named)


class AuthorizationServer(ServerThread):
    """The server, on a port that the system chooses unless one is given. Its attributes may be
    changed while it runs.

    `keys` are what it publishes, the last of which signs. It gives the scopes that are asked for.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(_Handler, port)
        self.keys = [Key("first")]
        #: How often each path was asked for.
        self.asked: Counter[str] = Counter()
        self._clients: dict[str, list[str]] = {}
        self._codes: dict[str, dict[str, str]] = {}
        self._may_answer = threading.Event()
        self._may_answer.set()

    @property
    def issuer(self) -> str:
        """What its tokens have as `iss`."""
        return f"http://127.0.0.1:{self.port}"

    def rotate(self, name: str) -> None:
        """Publishes a new key, and none of the old ones."""
        self.keys = [Key(name)]

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Within the block nobody who asks for keys gets an answer."""
        self._may_answer.clear()
        try:
            yield
        finally:
            self._may_answer.set()

    def close(self) -> None:
        self._may_answer.set()
        super().close()

    def claims(self, **changed: Any) -> dict[str, Any]:
        """The claims of a token for somebody, changed; None takes one out."""
        now = int(time.time())
        whole = {"iss": self.issuer, "sub": "ann", "iat": now, "exp": now + _LIFE, **changed}
        return {name: value for name, value in whole.items() if value is not None}

    def token(self, **changed: Any) -> str:
        """A token with such claims, signed with the latest key."""
        return self.keys[-1].sign(self.claims(**changed))

    # --- what clients ask for --------------------------------------------------------------------

    def published(self) -> dict[str, Any]:
        """The keys; waits as long as they are to hang."""
        self._may_answer.wait(_HANGING)
        return {"keys": [key.public() for key in self.keys]}

    def metadata(self) -> dict[str, Any]:
        """What clients have to know (RFC 8414)."""
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "registration_endpoint": f"{self.issuer}/register",
            "jwks_uri": f"{self.issuer}{KEYS}",
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code"],
            "token_endpoint_auth_methods_supported": ["none"],
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
        }

    def register(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """A new client."""
        client = secrets.token_hex(8)
        self._clients[client] = wanted["redirect_uris"]
        return {**wanted, "client_id": client, "token_endpoint_auth_method": "none"}

    def authorize(self, asked: dict[str, str]) -> str:
        """Where the person's browser goes on; raises KeyError or ValueError for a wrong request."""
        if asked["redirect_uri"] not in self._clients[asked["client_id"]]:
            raise ValueError("the redirect is not the client's")
        if (asked["response_type"], asked["code_challenge_method"]) != ("code", "S256"):
            raise ValueError("only codes with a challenge are served")
        code = secrets.token_hex(8)
        self._codes[code] = asked
        said = {"code": code, "iss": self.issuer}
        if "state" in asked:
            said["state"] = asked["state"]
        return f"{asked['redirect_uri']}?{urlencode(said)}"

    def exchange(self, given: dict[str, str]) -> dict[str, Any]:
        """The token for a code, once; raises KeyError or ValueError for a wrong request."""
        asked = self._codes.pop(given["code"])
        digest = hashlib.sha256(given["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != asked["code_challenge"]:
            raise ValueError("the verifier is not that of the challenge")
        same = ("client_id", "redirect_uri", "resource")
        if any(given[name] != asked[name] for name in same):
            raise ValueError("the token is asked for otherwise than the code was")
        scope = asked.get("scope", "")
        return {
            "access_token": self.token(aud=given["resource"], scope=scope),
            "token_type": "Bearer",
            "expires_in": _LIFE,
            "scope": scope,
        }


class _Handler(BaseHTTPRequestHandler):
    server: AuthorizationServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.server.asked[parts.path] += 1
        if parts.path == METADATA:
            self._answer(200, self.server.metadata())
        elif parts.path == KEYS:
            self._answer(200, self.server.published())
        elif parts.path == "/authorize":
            self._redirect(_fields(parts.query))
        else:
            self._answer(404, {"error": "not_found"})

    def do_POST(self) -> None:
        self.server.asked[self.path] += 1
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            if self.path == "/register":
                self._answer(201, self.server.register(json.loads(body)))
            else:
                self._answer(200, self.server.exchange(_fields(body)))
        except (KeyError, ValueError) as error:
            self._answer(400, {"error": "invalid_request", "error_description": repr(error)})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests look at what was asked for."""

    def _redirect(self, asked: dict[str, str]) -> None:
        try:
            where = self.server.authorize(asked)
        except (KeyError, ValueError) as error:
            self._answer(400, {"error": "invalid_request", "error_description": repr(error)})
            return
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # who hung up was tired of waiting
            self.end_headers()
            self.wfile.write(body)


def _fields(text: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(text).items()}
