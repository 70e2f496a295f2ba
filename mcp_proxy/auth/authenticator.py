"""Authentication: who sends a request, by its WSGI environ alone.

An embedder's hook is asked first, where there is one, then the keys for what
`Authorization: Bearer` and `X-API-Key` show, then the issuer of the token in the former. Nothing is
read of the body and nothing is stored, whatever a stranger sends. Nobody is waited for, but the
issuer of a token whose key is not known: a quarter of the threads may do that, for some seconds in
half a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Self

from mcp_proxy.auth.keys import ApiKeys
from mcp_proxy.auth.principal import (
    NO_MEMBERS,
    Authenticate,
    Caller,
    Principal,
    bearer_token,
    until_expiry,
)
from mcp_proxy.errors import ConfigError, NotPermitted, Unauthenticated

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from mcp_proxy.auth.access_tokens import AccessTokens
    from mcp_proxy.background import Workers
    from mcp_proxy.config import ProxyOptions

log = logging.getLogger(__name__)

# Headers by which callers say who they are, in title case. Which of them a hook goes by only its
# author knows; a login is often a cookie.
_OF_KEYS = frozenset({"Authorization", "X-Api-Key"})
_OF_HOOKS = _OF_KEYS | {"Cookie"}


class Authenticator:
    """Says who sends a request. Thread-safe; the constructor raises ConfigError.

    `hook` is an embedder's own authentication. It is called once for each request, also by the
    thread that refuses what a full worker has no other thread for, so it has to be quick.
    """

    def __init__(
        self,
        hook: Authenticate | None = None,
        keys: ApiKeys | None = None,
        tokens: AccessTokens | None = None,
    ) -> None:
        if hook is not None and not callable(hook):
            raise ConfigError(f"authenticate is a function of the WSGI environ, not {hook!r}")
        self._hook = hook
        self._keys = keys
        self._tokens = tokens
        #: The headers that stop here: what a server gets of its caller has none of them.
        self.credentials = _OF_KEYS if hook is None else _OF_HOOKS

    @classmethod
    def of(
        cls,
        options: ProxyOptions,
        hook: Authenticate | None,
        workers: Workers | None,
        tokens: AccessTokens | None = None,
    ) -> Self | None:
        """What the settings and an embedder ask for; None where callers are not authenticated.

        Raises ConfigError.
        """
        if hook is None and options.api_keys is None and tokens is None:
            return None
        if options.asks:
            raise ConfigError(
                "unknown_session_status=ask does not go with authentication: whose session it is "
                "that a server still knows, nobody can say; take 400 or 404"
            )
        keys = None if options.api_keys is None else ApiKeys(options.api_keys, workers)
        return cls(hook, keys, tokens)

    def __repr__(self) -> str:
        return f"<Authenticator hook={self._hook is not None} {self._keys!r} {self._tokens!r}>"

    def key_digests(self) -> Collection[str]:
        """The digests of the API keys that there are now."""
        return () if self._keys is None else self._keys.digests()

    def doubt(self) -> str | None:
        """What is wrong although callers are known, None where nothing is."""
        return None if self._keys is None else self._keys.doubt

    def look(self) -> None:
        """Has changes of the keys count at once."""
        if self._keys is not None:
            self._keys.look()

    def start(self) -> None:
        """Has changes of the keys noticed; harmless when repeated, and quick."""
        if self._keys is not None:
            self._keys.start()

    def stop(self) -> None:
        """Ends the threads that look at the keys."""
        if self._keys is not None:
            self._keys.stop()
        if self._tokens is not None:
            self._tokens.stop()

    def caller_of(
        self,
        environ: WSGIEnvironment,
        server: str | None,
        scopes: tuple[str, ...] = (),
        members: Mapping[str, tuple[str, ...]] = NO_MEMBERS,
    ) -> Caller:
        """Who sends a request to `server`, None for none of ours, for which an access token needs
        these scopes, too.

        Where that is a group `members` are its servers, with the scopes that each of them needs:
        one of them that the caller may use is enough, and the principal knows which.

        Raises Unauthenticated, NotPermitted where the caller may not use that server, and
        KeysUnavailable where that cannot be found out now.
        """
        caller = None if self._hook is None else _called_back(self._hook, environ)
        if caller is None and self._keys is not None:
            caller = _with_key(self._keys, environ, server, members)
        if caller is None and self._tokens is not None:
            caller = self._tokens.caller(bearer_token(environ), environ, server, scopes, members)
        if caller is None:
            raise Unauthenticated
        if not caller.principal.may_use(server, members):
            raise NotPermitted("The caller may not use this server")
        return caller


def _with_key(
    keys: ApiKeys, environ: WSGIEnvironment, server: str | None, members: Collection[str]
) -> Caller | None:
    """Who has a key that a request shows; raises NotPermitted."""
    keys.start()
    for shown in (bearer_token(environ), environ.get("HTTP_X_API_KEY")):
        caller = None if shown is None else keys.caller(shown.strip(), server, members)
        if caller is not None:
            return caller
    return None


def _called_back(hook: Authenticate, environ: WSGIEnvironment) -> Caller | None:
    """The caller, as an embedder's hook says; None for nobody. Raises what the hook raises."""
    principal = hook(environ)
    if principal is None:
        return None
    if not isinstance(principal, Principal) or not principal.name:
        raise TypeError(
            f"authenticate returned {type(principal).__name__}, not a Principal or None"
        )
    caller = until_expiry(principal)
    return caller if caller.is_known() else None
