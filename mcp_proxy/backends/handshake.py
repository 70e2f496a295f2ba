"""The handshake with a backend: replayed to one that takes the place of a lost one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing

import msgspec
from msgspec import UNSET, Raw

from mcp_proxy.backends.exchange import Backend, Exchange
from mcp_proxy.errors import BackendNotStarted, BadAnswer, ClientError, SessionEnded
from mcp_proxy.wire import jsonrpc, refusals
from mcp_proxy.wire.handshake import INITIALIZE, INITIALIZED, decode_resume
from mcp_proxy.wire.jsonrpc import Notification, Request, Response


class _ServerInfo(msgspec.Struct):
    name: str = "unnamed"
    version: str = "?"


class _InitializeResult(msgspec.Struct):
    protocol_version: str = msgspec.field(name="protocolVersion")
    server_info: _ServerInfo = msgspec.field(name="serverInfo", default_factory=_ServerInfo)


def ask(
    backend: Backend,
    request: Request,
    timeout: float,
    has_left: Callable[[], bool] | None = None,
) -> Response:
    """The server's answer; raises what kept it from answering, ServerRefused and ClientLeft too."""
    with closing(Exchange([request], accepts_stream=False, timeout=timeout)) as exchange:
        exchange.has_left = has_left
        backend.send(exchange)
        answer = exchange.receive(timeout + 1)
    if answer is None:
        raise BackendNotStarted("The server did not answer when it was started again")
    if answer.failure is not None:
        raise answer.failure
    refusals.require_none(answer.data)
    response = jsonrpc.parse_message(answer.data)
    assert isinstance(response, Response)
    return response


def initialized(
    bridge: Backend,
    initialize: Request,
    timeout: float,
    has_left: Callable[[], bool] | None = None,
) -> Raw:
    """The InitializeResult of a server, which is told that it is initialized.

    Raises BackendError, BadAnswer where it refuses, ClientLeft when `has_left` says so.
    """
    answer = ask(bridge, initialize, timeout, has_left)
    if answer.result is UNSET:
        reason = bytes(answer.error or b"").decode("utf-8", "replace")[:200]
        raise BadAnswer(f"The server refused initialize: {reason}")
    bridge.notify(Notification(INITIALIZED))
    return answer.result


def recorded(body: str, version: str, resume: str | None) -> list[Request]:
    """The requests that tell a new server what the lost one knew; the first is initialize.

    Raises SessionEnded where what was recorded makes no handshake.
    """
    try:
        request = jsonrpc.parse_message(body.encode())
        params = request.params if isinstance(request, Request) else None
        if params is None:
            raise SessionEnded
        params = jsonrpc.replace_field(params, ("protocolVersion",), version)
        state = decode_resume(resume).requests()
    except (ClientError, UnicodeEncodeError, msgspec.DecodeError) as error:
        raise SessionEnded from error
    return [Request("mcp-proxy-initialize", INITIALIZE, params), *state]


def replay(backend: Backend, requests: Sequence[Request], version: str, timeout: float) -> None:
    """Tells a new server what `recorded` has found; it has to answer at `version`.

    Raises BackendError when it has not answered all of it in `timeout` seconds,
    SessionEnded when it does not speak `version` any more.
    """
    until = time.monotonic() + timeout
    initialize, *others = requests
    response = ask(backend, initialize, timeout)
    if jsonrpc.protocol_version_of(response.result) != version:
        raise SessionEnded
    backend.notify(Notification(INITIALIZED))
    for request in others:
        ask(backend, request, max(0.1, until - time.monotonic()))


def describe(response: Response) -> str:
    """What an InitializeResult says of the server, in words; raises BadAnswer for an error."""
    try:
        result = msgspec.json.decode(response.result or b"", type=_InitializeResult)
    except msgspec.DecodeError as error:
        reason = bytes(response.error or b"no InitializeResult").decode("utf-8", "replace")
        raise BadAnswer(f"The server refused initialize: {reason}") from error
    info = result.server_info
    return f"{info.name} {info.version}, revision {result.protocol_version}"
