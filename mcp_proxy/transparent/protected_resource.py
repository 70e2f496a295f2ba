"""What an HTTP server that wants authorization says of itself, in the proxy's public name.

Such a server names itself in the challenge of a 401 or 403 and in its metadata (RFC 9728), and a
client refuses metadata whose `resource` is not the URL that it uses. So where the proxy has a
public URL, that stands there instead of the server's own. What names another server stays as it is:
a client has to see that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from mcp_proxy.backends.http import HttpCall
from mcp_proxy.edge.forwarded import mount_of
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.transparent.forwarding import decoded
from mcp_proxy.wire import headers
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.urls import Target, own_path_in, request_target

# The longest metadata that is read, in bytes.
_MAX_METADATA = 256 * 1024

# Either the parameter and its URL, or a text of another parameter, in which it would mean nothing.
_PARAMETER = re.compile(
    r'(\bresource_metadata\s*=\s*"?)([^\s",]+)|"(?:[^"\\]|\\.)*"', re.IGNORECASE
)

_OF_THE_BODY = frozenset({"content-length", "content-encoding"})


class PublicName:
    """The public URL of one transport; `targets` are its servers."""

    def __init__(self, url: str, targets: Sequence[Target]) -> None:
        self._url = url
        self._target = targets[0]
        self._addresses = [target.address for target in targets]

    def challenges(self, given: Headers, request: ClientRequest, call: HttpCall | None) -> Headers:
        """Headers whose challenges lead to the server's metadata by way of the proxy.

        `call` is the one that has them, None where they came over a bridge.
        """

        def renamed(found: re.Match[str]) -> str:
            path = None if found[2] is None else self._own_path_in(found[2], request, call)
            return found[0] if path is None else f"{found[1]}{self._here(request)}{path}"

        return [
            (name, _PARAMETER.sub(renamed, value) if name.lower() == "www-authenticate" else value)
            for name, value in given
        ]

    def metadata(self, request: ClientRequest, call: HttpCall) -> bytes | None:
        """The body of an answer that is the server's metadata, renamed; None for any other.

        A server may have its metadata anywhere, so they are known by what they say.
        """
        if request.method != "GET" or call.status != 200 or call.media_type != headers.JSON:
            return None
        body = call.read_ahead(_MAX_METADATA)
        if body is None or (body := decoded(body, call.header("Content-Encoding"))) is None:
            return None
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or "authorization_servers" not in found:
            return None
        resource = found.get("resource")
        path = self._own_path_in(resource, request, call) if isinstance(resource, str) else None
        if path is None:
            return None
        if path == request_target(self._target, call.address, "/mcp", "").partition("?")[0]:
            path = "/mcp"
        found["resource"] = self._here(request) + path
        return json.dumps(found, ensure_ascii=False).encode()

    def _here(self, request: ClientRequest) -> str:
        """What the paths of this transport follow."""
        return self._url + mount_of(request.environ, ())

    def _own_path_in(self, url: str, request: ClientRequest, call: HttpCall | None) -> str | None:
        """What follows the host in a URL that names the server, None where it names another one."""
        host = request.environ.get("HTTP_HOST", "") if call is None else call.host
        addresses = self._addresses if call is None else [*self._addresses, call.address]
        found = (own_path_in(url, address, host) for address in addresses)
        return next((path for path in found if path is not None), None)


def with_body(given: Headers, body: bytes) -> Headers:
    """Headers for another body than they came with."""
    kept = [(name, value) for name, value in given if name.lower() not in _OF_THE_BODY]
    return [*kept, ("Content-Length", str(len(body)))]
