"""Calls to HTTP backends that are our own: a handshake, a ping, the end of a session.

They carry the headers of the client's request that made them necessary, such as Authorization.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

from msgspec import UNSET

from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.errors import BackendError
from mcp_proxy.sessions import claims
from mcp_proxy.transparent.forwarding import InitializeReader, is_lost_session
from mcp_proxy.wire import headers, jsonrpc, modern, results
from mcp_proxy.wire.handshake import INITIALIZED
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.urls import Address, Target, request_target

#: Seconds for each call, so that all of a handshake fit well into a claim.
CALL_TIME = claims.CLAIM_TIME / 6

_INITIALIZED = jsonrpc.encode(Notification(INITIALIZED))
_PING = "ping"

# Request headers that belong to one session or body, and those that we set ourselves, since we read
# the answer.
_NOT_TAKEN_ALONG = frozenset(
    {
        "Mcp-Session-Id",
        "Mcp-Protocol-Version",
        "Last-Event-Id",
        "Accept",
        "Accept-Encoding",
        "Content-Type",
        "Content-Encoding",
    }
)
_OURS = {"Accept": f"{headers.JSON}, {headers.EVENT_STREAM}", "Content-Type": headers.JSON}


#: Has a function called when a client leaves; what it returns ends that.
Watch = Callable[[Callable[[], object]], Callable[[], object]]


class Answered(NamedTuple):
    """The answer to a call: its JSON-RPC response, None where it has none.

    `is_lost` says that the backend does not know the session; `address` is where a redirect led, if
    there was one.
    """

    address: Address
    status: int
    session_id: str | None
    response: Response | None
    is_lost: bool
    headers: Headers

    @property
    def has_result(self) -> bool:
        """Whether this is a JSON-RPC result."""
        return self.response is not None and self.response.result is not UNSET

    @property
    def may_know_no_sessions(self) -> bool:
        """Whether this is how a server of 2026-07-28 refuses what belongs to a session; a legacy
        one may have another reason for the same.
        """
        error = UNSET if self.response is None else self.response.error
        return error is not UNSET and results.code_of(error) in modern.NO_HANDSHAKE


class OwnCalls:
    """Calls to the backends of one transport, each with `timeout` seconds. Thread-safe.

    The methods raise BackendError, and ClientLeft where a client waits for the call, and `watch`
    says that it has left.
    """

    def __init__(
        self, client: HttpClient, target: Target, timeout: float, watch: Watch | None = None
    ) -> None:
        self._client = client
        self._target = target
        self._timeout = min(timeout, CALL_TIME)
        self._watch = watch

    def waited_for(self, watch: Watch | None) -> Self:
        """The same calls, for which a client waits."""
        return type(self)(self._client, self._target, self._timeout, watch)

    def ask(
        self,
        address: Address,
        given: Mapping[str, str],
        body: bytes,
        timeout: float | None = None,
        is_fresh: bool = False,
    ) -> Answered:
        """The answer to a request; `is_fresh` has it sent over a connection of its own."""
        timeout = self._timeout if timeout is None else min(timeout, self._timeout)
        call = self._send(address, "POST", given, body, timeout, is_fresh)
        try:
            is_lost = is_lost_session(call)
            response = _response_in(call)
        finally:
            call.close()
        session_id = call.header(headers.SESSION_ID)
        return Answered(call.address, call.status, session_id, response, is_lost, call.headers)

    def ping(
        self, address: Address, given: Mapping[str, str], session_id: str, is_fresh: bool = False
    ) -> Answered:
        """The answer to a ping in a session."""
        body = jsonrpc.encode(Request(f"mcp-proxy-{secrets.token_hex(4)}", _PING))
        given = {**given, headers.SESSION_ID: session_id}
        return self.ask(address, given, body, is_fresh=is_fresh)

    def is_modern(self, address: Address, given: Mapping[str, str]) -> bool:
        """Whether a backend says that it speaks 2026-07-28; False where it says nothing usable."""
        discover = modern.discover_request()
        given = {**given, **dict(modern.headers_of(discover))}
        try:
            answer = self.ask(address, given, jsonrpc.encode(discover))
        except BackendError:
            return False
        return answer.response is not None and results.is_modern(answer.response)

    def send_initialized(
        self, address: Address, given: Mapping[str, str], timeout: float | None = None
    ) -> None:
        """Sends `notifications/initialized`; what is answered does not matter."""
        timeout = self._timeout if timeout is None else min(timeout, self._timeout)
        self._send(address, "POST", given, _INITIALIZED, timeout).close()

    def end(self, address: Address, given: Mapping[str, str], session_id: str) -> None:
        """Ends a session at its backend."""
        given = {**given, headers.SESSION_ID: session_id}
        self._send(address, "DELETE", given, b"", self._timeout).close()

    def _send(
        self,
        address: Address,
        method: str,
        given: Mapping[str, str],
        body: bytes,
        timeout: float,
        is_fresh: bool = False,
    ) -> HttpCall:
        target = request_target(self._target, address, "/mcp", "")
        call = HttpCall(self._client, address, method, target, given, body, is_fresh)
        try:
            self._await(call, timeout)
            while (successor := call.redirected()) is not None:
                call.close()
                call = successor
                self._await(call, timeout)
        except BaseException:
            call.close()
            raise
        return call

    def _await(self, call: HttpCall, timeout: float) -> None:
        if self._watch is not None:
            call.on_close(self._watch(call.abort))
        call.send(timeout)


def taken_along(request_headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a client's request that a call of ours carries, and our own."""
    kept = {n: v for n, v in request_headers.items() if n.title() not in _NOT_TAKEN_ALONG}
    return {**kept, **_OURS}


def _response_in(call: HttpCall) -> Response | None:
    """The response in a body, as soon as it arrives; None where the body has none."""
    found: list[Response | None] = []
    reader = InitializeReader(call.media_type, found.append)
    for piece in call.pieces():
        reader.feed(piece)
        if found:
            break
    return found[0] if found else None
