"""How a client finds out where to get a token: RFC 9728, as MCP wants it.

A 401 names a document about the endpoint, and that names the issuer (MCP 2025-11-25 and 2026-07-28,
authorization, "Authorization Server Location"). Both are built from `public_url` and the path,
never from what a request says of its host: a client refuses a document whose `resource` is not the
URL that it uses, and that URL is what its token is issued for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import msgspec

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: What the path of such a document begins with (RFC 9728 section 3).
WELL_KNOWN = "/.well-known/oauth-protected-resource"

#: Where the environ has the path at which the application is mounted, before any dispatcher.
MOUNT = "mcp_proxy.mount"

#: The endpoints of a server, below its mount.
ENDPOINTS = ("/mcp", "/sse")

# RFC 3986 section 3.3: the characters of a path.
_PATH_SAFE = "/:@!$&'()*+,;=~-._"
_PLAIN = re.compile(rf"[A-Za-z0-9{re.escape(_PATH_SAFE)}]*")

# RFC 6750 section 3: characters that a value in quotes cannot have.
_NOT_QUOTED = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")


class ProtectedResource:
    """The endpoints below one public URL, whose tokens are of one issuer. Immutable.

    `scopes` are those that each token must have; the methods get those that a server wants besides.
    `path_of` is the path of a server's mount below that of the application.
    """

    def __init__(
        self,
        public_url: str,
        issuer: str,
        scopes: Collection[str] = (),
        path_of: Callable[[str], str] = lambda server: "",
    ) -> None:
        self._url = public_url
        self._path = urlsplit(public_url).path
        self._issuer = issuer
        self._scopes = tuple(scopes)
        self._path_of = path_of

    def __repr__(self) -> str:
        return f"<ProtectedResource {self._url} of {self._issuer}>"

    def audiences(self, environ: WSGIEnvironment, server: str | None) -> list[str]:
        """What a token may be issued for that is shown with this request: the URL of the request,
        of the server, or of an endpoint of the server.

        A client of HTTP+SSE has a token for `/sse`, and shows it at another path.
        """
        mount = f"{self._url}{_mount_of(environ)}"
        at = f"{mount}{_path_below_mount(environ)}"
        if server is None:
            return [at]
        base = f"{mount}{self._path_of(server)}"
        return [at, base, f"{base}/", *(f"{base}{endpoint}" for endpoint in ENDPOINTS)]

    def endpoint_of(self, environ: WSGIEnvironment) -> str | None:
        """The path of the endpoint that is asked about, None where the request is for another path.

        Where the application does not stand at the root of its host, clients look for the document
        above its path, and a challenge names it below: whichever gets here is served.
        """
        path: str = environ.get("PATH_INFO", "")
        if path != WELL_KNOWN and not path.startswith(f"{WELL_KNOWN}/"):
            return None
        endpoint = path.removeprefix(WELL_KNOWN).rstrip("/")
        above = f"{self._path}{_mount_of(environ)}"
        if above and f"{endpoint}/".startswith(f"{above}/"):
            endpoint = endpoint.removeprefix(above)
        return endpoint

    def document(
        self, environ: WSGIEnvironment, endpoint: str, scopes: Collection[str] = ()
    ) -> bytes:
        """The metadata of an endpoint (RFC 9728 section 2), as JSON."""
        found: dict[str, object] = {
            "resource": f"{self._url}{_mount_of(environ)}{_quoted(endpoint)}",
            "authorization_servers": [self._issuer],
            "bearer_methods_supported": ["header"],
        }
        if wanted := self._and(scopes):
            found["scopes_supported"] = wanted
        return msgspec.json.encode(found)

    def challenge(
        self,
        environ: WSGIEnvironment,
        scopes: Collection[str] = (),
        error: str | None = None,
        reason: str | None = None,
    ) -> str:
        """What a refusal tells the client to do (RFC 6750 section 3, RFC 9728 section 5.1).

        `error` is None where the request had no token.
        """
        document = f"{_mount_of(environ)}{WELL_KNOWN}{_path_below_mount(environ)}"
        texts = {
            "error": error,
            "error_description": reason,
            "resource_metadata": f"{self._url}{document}",
            "scope": " ".join(self._and(scopes)),
        }
        pairs = (f'{name}="{_NOT_QUOTED.sub("?", text)}"' for name, text in texts.items() if text)
        return f"Bearer {', '.join(pairs)}"

    def _and(self, scopes: Collection[str]) -> list[str]:
        """All scopes that a token needs, each once."""
        return list(dict.fromkeys((*self._scopes, *scopes)))


def _mount_of(environ: WSGIEnvironment) -> str:
    """The path at which the application is mounted, percent-encoded; "" for the root."""
    mount: str = environ.get(MOUNT, "")
    return _quoted(mount).rstrip("/")


def _path_below_mount(environ: WSGIEnvironment) -> str:
    """The path of a request below the application's mount, percent-encoded."""
    whole: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return _quoted(whole.removeprefix(environ.get(MOUNT, ""))).rstrip("/")


def _quoted(path: str) -> str:
    """A path of the environ, percent-encoded; most need nothing, and that is found out faster."""
    return path if _PLAIN.fullmatch(path) else quote(path.encode("latin-1"), safe=_PATH_SAFE)
