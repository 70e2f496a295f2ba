"""A client of the official Python SDK, 1.x or 2.x, that knows nothing but a URL, and gets a token.

    python authorized_client.py URL auto|legacy|sse [TOKEN]

It may have a token from earlier. The SDK's own OAuth finds the authorization server by the metadata
of the endpoint, registers, has a person agree and exchanges the code for a token. Prints one JSON
document: the revision, what the tool `echo` said, what the person was asked for, and how often the
SDK was refused.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
from mcp.client.auth import OAuthClientProvider
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientMetadata, OAuthToken
from pydantic import AnyUrl
from sdk_session import IS_SDK_1, Json, connected, httpx, plain, say, session_over

#: Where a person's browser would end up; nobody listens there.
CALLBACK = AnyUrl("http://localhost:1/callback")


class Memory:
    """Tokens and registration of one client."""

    def __init__(self, token: str | None) -> None:
        self._tokens: Any = None if token is None else OAuthToken(access_token=token)
        self._client: Any = None

    async def get_tokens(self) -> Any:
        """The tokens, None before the first."""
        return self._tokens

    async def set_tokens(self, tokens: Any) -> None:
        """Keeps tokens."""
        self._tokens = tokens

    async def get_client_info(self) -> Any:
        """How the client is registered, None where it is not."""
        return self._client

    async def set_client_info(self, client_info: Any) -> None:
        """Keeps a registration."""
        self._client = client_info


class Person:
    """Agrees to everything at once: the authorization server redirects without a question."""

    def __init__(self) -> None:
        self.visits: list[Json] = []
        self._found: dict[str, str] = {}

    async def visit(self, url: str) -> None:
        """Opens the page of the authorization server."""
        self.visits.append({name: v[0] for name, v in parse_qs(urlsplit(url).query).items()})
        async with httpx.AsyncClient() as browser:
            answer = await browser.get(url)
        query = parse_qs(urlsplit(answer.headers["Location"]).query)
        self._found = {name: values[0] for name, values in query.items()}

    async def callback(self) -> Any:
        """What the redirect has in it."""
        if IS_SDK_1:
            return self._found["code"], self._found["state"]
        from mcp.shared.auth import AuthorizationCodeResult

        return AuthorizationCodeResult(**self._found)


async def main(url: str, mode: str, token: str | None = None) -> None:
    """Connects, calls a tool, and says how that went."""
    person = Person()
    metadata = OAuthClientMetadata(redirect_uris=[CALLBACK], client_name="test")
    auth = OAuthClientProvider(url, metadata, Memory(token), person.visit, person.callback)
    statuses: list[int] = []

    async def noted(response: Any) -> None:
        statuses.append(response.status_code)

    @asynccontextmanager
    async def session() -> Any:
        if mode == "sse":
            async with session_over(sse_client(url, auth=auth)) as found:
                yield found
            return
        hooks = {"response": [noted]}
        async with (
            httpx.AsyncClient(auth=auth, event_hooks=hooks, timeout=30) as http,
            connected(streamable_http_client(url, http_client=http), mode) as found,
        ):
            yield found

    async with session() as (client, revision):
        tools = plain(await client.list_tools())["tools"]
        answer = plain(await client.call_tool("echo", {"text": "hello"}))
    say(
        revision=revision,
        tools=[tool["name"] for tool in tools],
        answer=answer["content"][0]["text"],
        visits=person.visits,
        refusals=[status for status in statuses if status in (401, 403)],
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    anyio.run(main, *sys.argv[1:])
