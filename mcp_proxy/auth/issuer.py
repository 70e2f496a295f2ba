"""What an issuer of tokens publishes: where its keys are, and the keys themselves.

The address of the keys is a setting, or stands in the issuer's metadata (RFC 8414, or OpenID
Connect Discovery 1.0), which are looked for where MCP clients look for them (MCP 2025-11-25,
authorization, "Authorization Server Metadata Discovery").
"""

from __future__ import annotations

import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from mcp_proxy.auth.key_set import KeySet

# The longest document that is read, in bytes.
_MAX_BYTES = 1024 * 1024
_PIECE = 64 * 1024

# How urllib3 names a connection in front of what was wrong with it.
_OBJECT = re.compile(r"(<[^<>]+ object at [^<>]+>|\w+\(host=[^()]+\)): ")

_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}


class IssuerError(Exception):
    """An issuer's keys cannot be had; the message says why, for the operator."""


class Issuer:
    """One issuer. Immutable, so thread-safe.

    `keys_url` is where its keys are, None where its metadata say that; `verify` is as of requests:
    True for the well-known CAs, or a path. `timeout` is for a connection and for each silence, in
    seconds; a whole document may take twice as long.
    """

    def __init__(
        self,
        url: str,
        keys_url: str | None = None,
        verify: bool | str = True,
        timeout: float = 5.0,
    ) -> None:
        self.url = url
        self._keys_url = keys_url
        self._verify = verify
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<Issuer {self.url}>"

    def keys(self) -> KeySet:
        """The issuer's keys as they are now. Waits for the issuer; raises IssuerError."""
        url = self._keys_url or self._discovered()
        document = self._document(url)
        try:
            return KeySet(document)
        except ValueError as error:
            raise IssuerError(f"{url} is no set of keys: {error}") from None

    def _discovered(self) -> str:
        """Where the issuer's metadata say that its keys are."""
        reasons = []
        for url in metadata_urls(self.url):
            try:
                found = self._document(url)
            except IssuerError as error:
                reasons.append(str(error))
                continue
            issuer = found.get("issuer") if isinstance(found, dict) else None
            if issuer != self.url:  # RFC 8414 section 3.3: they must not be used
                reasons.append(f"{url} is of the issuer {issuer!r}, not {self.url!r}")
                continue
            where = found.get("jwks_uri")
            if not isinstance(where, str) or urlsplit(where).scheme not in ("https", "http"):
                reasons.append(f"{url} has no jwks_uri")
            elif urlsplit(self.url).scheme == "https" and urlsplit(where).scheme != "https":
                reasons.append(f"the jwks_uri of {url} is not https")
            else:
                return where
        raise IssuerError("; ".join(reasons))

    def _document(self, url: str) -> Any:
        """The JSON document at a URL; redirects are not followed."""
        until = time.monotonic() + 2 * self._timeout
        try:
            with requests.get(
                url,
                headers=_HEADERS,
                timeout=self._timeout,
                verify=self._verify,
                stream=True,
                allow_redirects=False,
            ) as answer:
                if answer.status_code != 200:
                    raise IssuerError(f"{url} answers {answer.status_code}")
                return json.loads(_body(answer, until))
        except (requests.RequestException, HTTPError, OSError) as error:
            raise IssuerError(f"{url} cannot be read: {_reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise IssuerError(f"{url} is no JSON") from error


def metadata_urls(issuer: str) -> list[str]:
    """Where an issuer's metadata may be, in the order in which they are tried."""
    parts = urlsplit(issuer)
    root = f"{parts.scheme}://{parts.netloc}"
    path = parts.path.rstrip("/")
    oauth = f"{root}/.well-known/oauth-authorization-server{path}"
    openid = f"{root}/.well-known/openid-configuration{path}"
    return [oauth, openid, *([f"{root}{path}/.well-known/openid-configuration"] if path else [])]


def _body(answer: requests.Response, until: float) -> bytes:
    """The whole body; raises IssuerError for one that is too long or comes too slowly."""
    body = b""
    while piece := answer.raw.read1(_PIECE):
        body += piece
        if len(body) > _MAX_BYTES:
            raise IssuerError(f"{answer.url} is longer than {_MAX_BYTES} bytes")
        if time.monotonic() > until:
            raise IssuerError(f"{answer.url} comes too slowly")
    return body


def _reason(error: Exception) -> str:
    """What went wrong, without the names of objects that requests shows."""
    cause = error.args[0] if error.args else error
    reason = getattr(cause, "reason", cause)
    return f"{type(error).__name__}: {_OBJECT.sub('', str(reason))}"
