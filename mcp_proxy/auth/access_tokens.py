"""Access tokens as the credential of a caller: which are taken at an endpoint, and what is said of
the others.

Who calls is what the token's issuer says. Whether the token is for this endpoint is looked at here:
for which URL it was issued, and which scopes it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from msgspec.structs import replace

from mcp_proxy.auth.principal import NO_MEMBERS, Caller, until_expiry
from mcp_proxy.auth.protected_resource import ProtectedResource
from mcp_proxy.errors import ConfigError, NotPermitted, Unauthenticated

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from mcp_proxy.auth.tokens import TokenVerifier
    from mcp_proxy.background import Workers
    from mcp_proxy.config import ProxyOptions


#: In the environ of a request that has to be answered at once: its thread is needed elsewhere.
AT_ONCE = "mcp_proxy.at_once"


class AccessTokens:
    """The JWTs of one issuer, at the endpoints of one application. Thread-safe.

    `audiences` are what tokens have to be issued for, one of them; empty where the endpoint's own
    URL is. `scopes` are needed, all of them.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        resource: ProtectedResource,
        audiences: tuple[str, ...] = (),
        scopes: tuple[str, ...] = (),
    ) -> None:
        self.resource = resource
        self._verifier = verifier
        self._audiences = audiences
        self._scopes = frozenset(scopes)

    @classmethod
    def of(
        cls,
        options: ProxyOptions,
        workers: Workers | None = None,
        verify: bool | str = True,
        path_of: Callable[[str], str] = lambda server: "",
    ) -> Self | None:
        """What the settings ask for, None where no JWT is taken.

        `path_of` is the path of a server's mount, `verify` what the issuer's certificate is checked
        by, as in requests. Raises ConfigError where settings do not go together, or PyJWT is
        missing.
        """
        options.require_issuer()
        if options.jwt_issuer is None or options.public_url is None:
            return None
        require_libraries()
        from mcp_proxy.auth.issuer import Issuer
        from mcp_proxy.auth.signing_keys import SigningKeys
        from mcp_proxy.auth.tokens import TokenVerifier

        issuer = Issuer(options.jwt_issuer, options.jwt_jwks_url, verify, options.connect_timeout)
        keys = SigningKeys(issuer, workers, max_waiting=options.threads // 4)
        verifier = TokenVerifier(options.jwt_issuer, keys)
        resource = ProtectedResource(
            options.public_url, options.jwt_issuer, options.jwt_scopes, path_of
        )
        return cls(verifier, resource, options.jwt_audience, options.jwt_scopes)

    def __repr__(self) -> str:
        return f"<AccessTokens {self._verifier!r}>"

    def not_ready_reason(self) -> str | None:
        """Why no token can be checked yet, None if some can.

        Has the keys fetched, and does not wait for them.
        """
        self._verifier.keys.start()
        return self._verifier.keys.reason()

    def stop(self) -> None:
        """Ends the thread that fetches the keys."""
        self._verifier.keys.stop()

    def caller(
        self,
        token: str | None,
        environ: WSGIEnvironment,
        server: str | None,
        scopes: tuple[str, ...] = (),
        members: Mapping[str, tuple[str, ...]] = NO_MEMBERS,
    ) -> Caller:
        """Who has a token, None for none, for a request to `server`, which wants these scopes, too.

        Of a group with `members` those of one are enough; the principal may use whose it has.

        Raises Unauthenticated, NotPermitted where the token lacks a scope, and KeysUnavailable.
        """
        if token is None:
            raise Unauthenticated(challenge=self.resource.challenge(environ, scopes))
        try:
            audiences = self._audiences or self.resource.audiences(environ, server)
            may_wait = AT_ONCE not in environ
            principal = self._verifier.principal_of(token, audiences, may_wait)
        except Unauthenticated as error:
            reason = error.message
            challenge = self.resource.challenge(environ, scopes, "invalid_token", reason)
            raise Unauthenticated(reason, challenge) from None
        missing = self._scopes - principal.scopes
        permitted = [one for one, wanted in members.items() if principal.scopes.issuperset(wanted)]
        if not permitted:
            missing |= frozenset(scopes) - principal.scopes
        if missing:
            reason = f"The token lacks the scope {' '.join(sorted(missing))}"
            challenge = self.resource.challenge(environ, scopes, "insufficient_scope", reason)
            raise NotPermitted(reason, challenge)
        if any(members.values()):  # a server that comes later may want other scopes
            principal = replace(principal, servers=frozenset(permitted))
        return until_expiry(principal)


def require_libraries() -> None:
    """Raises ConfigError where what checks tokens is not installed; imports nothing of it."""
    missing = [name for name in ("jwt", "cryptography") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"jwt_issuer needs {' and '.join(missing)}: pip install 'mcp-wsgi-proxy[auth]'"
        )
