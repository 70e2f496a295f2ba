"""How the client of the conformance suite gets tokens: the SDK's OAuth, and who agrees to it.

The suite starts an authorization server for each scenario. What that wants to know of its client
beforehand stands in MCP_CONFORMANCE_CONTEXT.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
from mcp.client.auth import OAuthClientProvider
from mcp.shared.auth import (
    AuthorizationCodeResult,
    OAuthClientInformationFull,
    OAuthClientMetadata,
    OAuthToken,
)
from pydantic import AnyUrl
from sdk_session import Json

#: What begins the names of scenarios with an authorization server.
AUTHORIZED = "auth/"

#: Where a person's browser would end up; nobody listens there.
CALLBACK = AnyUrl("http://localhost:1/callback")

#: The scenario whose client has a document that describes it, and the URL that the suite expects.
DESCRIBED = "auth/basic-cimd"
DOCUMENT = "https://conformance-test.local/client-metadata.json"


class Memory:
    """Tokens and registration of one client."""

    def __init__(self, registered: OAuthClientInformationFull | None = None) -> None:
        self._registered = registered
        self._tokens: OAuthToken | None = None

    async def get_tokens(self) -> OAuthToken | None:
        """The tokens, None before the first."""
        return self._tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        """Keeps tokens."""
        self._tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        """How the client is registered, None where it is not."""
        return self._registered

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        """Keeps a registration."""
        self._registered = client_info


class Person:
    """Agrees to everything at once: the authorization server redirects without a question."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    async def visit(self, url: str) -> None:
        """Opens the page of the authorization server."""
        async with httpx2.AsyncClient() as browser:
            answer = await browser.get(url)
        query = parse_qs(urlsplit(answer.headers["Location"]).query)
        self._found = {name: values[0] for name, values in query.items()}

    async def callback(self) -> AuthorizationCodeResult:
        """What the redirect has in it."""
        found = self._found
        return AuthorizationCodeResult(
            code=found["code"], state=found.get("state"), iss=found.get("iss")
        )


def authorization(url: str, scenario: str, context: Json) -> httpx2.Auth | None:
    """What authorizes the client's requests in a scenario, None where it needs nothing."""
    if not scenario.startswith(AUTHORIZED):
        return None
    person = Person()
    return OAuthClientProvider(
        url,
        OAuthClientMetadata(redirect_uris=[CALLBACK], client_name="conformance"),
        Memory(registration(context)),
        person.visit,
        person.callback,
        DOCUMENT if scenario == DESCRIBED else None,
    )


def registration(context: Json) -> OAuthClientInformationFull | None:
    """How the client was registered beforehand, None where it was not."""
    known: dict[str, Any] = {
        k: context[k] for k in ("client_id", "client_secret", "issuer") if k in context
    }
    if not known:
        return None
    return OAuthClientInformationFull(
        redirect_uris=[CALLBACK], token_endpoint_auth_method="client_secret_basic", **known
    )
