"""The handshake: what of it is recorded, and how it is replayed to a restarted server."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from mcp_proxy.backends.base import Backend
from mcp_proxy.errors import BackendLost, SessionEnded, SessionNotFound
from mcp_proxy.replica import has_ended
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import INIT_BODY, PROTOCOL_VERSION, RESUME, Session, new_session
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

#: An initialize request that is longer (bytes) is not kept, so its session cannot be brought back.
MAX_INIT_BODY = 64 * 1024

INITIALIZE = "initialize"
INITIALIZED = "notifications/initialized"

_SET_LEVEL = "logging/setLevel"
_SUBSCRIBE = "resources/subscribe"
_UNSUBSCRIBE = "resources/unsubscribe"

# Subscriptions share the record with everything else.
_MAX_SUBSCRIPTIONS = 256


class _ServerInfo(msgspec.Struct):
    name: str = "unnamed"
    version: str = "?"


class _InitializeResult(msgspec.Struct):
    protocol_version: str = msgspec.field(name="protocolVersion")
    server_info: _ServerInfo = msgspec.field(name="serverInfo", default_factory=_ServerInfo)


class Change(NamedTuple):
    """A request that changes what the server remembers: its method and its argument."""

    method: str
    argument: str


class _Resume(msgspec.Struct):
    level: str | None = None
    subscriptions: list[str] = []


class _Level(msgspec.Struct):
    level: str


class _Uri(msgspec.Struct):
    uri: str


def opened(session_id: str, kind: str, request: Request, response: Response | None) -> Session:
    """The record of a session that `request` opened, and that `response`, if known, accepted."""
    metadata: dict[str, str] = {}
    if response is not None:
        metadata[PROTOCOL_VERSION] = jsonrpc.protocol_version_of(response.result) or ""
    body = jsonrpc.encode(request)
    if len(body) <= MAX_INIT_BODY:
        metadata[INIT_BODY] = body.decode()
    return new_session(session_id, kind, **metadata)


def describe(response: Response) -> str:
    """What an InitializeResult says of the server, in words; raises BackendLost for an error."""
    try:
        result = msgspec.json.decode(response.result or b"", type=_InitializeResult)
    except msgspec.DecodeError as error:
        said = bytes(response.error or b"no InitializeResult").decode("utf-8", "replace")
        raise BackendLost(f"The server refused initialize: {said}") from error
    info = result.server_info
    return f"{info.name} {info.version}, revision {result.protocol_version}"


def change_of(request: Request) -> Change | None:
    """What `request`, once it succeeds, leaves behind in the server; None for most requests."""
    if request.method == _SET_LEVEL:
        return Change(
            request.method, msgspec.json.decode(request.params or b"{}", type=_Level).level
        )
    if request.method in (_SUBSCRIBE, _UNSUBSCRIBE):
        return Change(request.method, msgspec.json.decode(request.params or b"{}", type=_Uri).uri)
    return None


def changed(resume: str | None, change: Change) -> str:
    """The `resume` metadata after `change`."""
    state = msgspec.json.decode(resume or "{}", type=_Resume)
    if change.method == _SET_LEVEL:
        state.level = change.argument
        return msgspec.json.encode(state).decode()
    others = [uri for uri in state.subscriptions if uri != change.argument]
    added = [change.argument] if change.method == _SUBSCRIBE else []
    state.subscriptions = [*others, *added][-_MAX_SUBSCRIPTIONS:]
    return msgspec.json.encode(state).decode()


def remember(manager: SessionManager, session_id: str, change: Change) -> None:
    """Notes a log level or a subscription in the session's record, for when the child is lost.

    Waits while somebody is bringing the child back; raises StorageUnavailable.
    """
    while True:
        try:
            session = claims.unclaimed(manager, manager.load(session_id), has_ended)
        except SessionNotFound:
            return
        resume = changed(session.metadata.get(RESUME), change)
        if manager.swap(session, session.with_metadata(**{RESUME: resume})):
            return


def replay(backend: Backend, body: str, version: str, resume: str | None, timeout: float) -> None:
    """Tells a new server what the lost one knew: initialize at `version`, log level, subscriptions.

    Raises BackendLost or BackendTimeout when it has not answered all of it in `timeout` seconds,
    SessionEnded when it does not speak `version` any more.
    """
    until = time.monotonic() + timeout
    request = jsonrpc.parse_message(body.encode())
    assert isinstance(request, Request)
    params = jsonrpc.replace_field(request.params, ("protocolVersion",), version)
    response = ask(backend, Request("mcp-proxy-initialize", INITIALIZE, params), timeout)
    if jsonrpc.protocol_version_of(response.result) != version:
        raise SessionEnded
    backend.notify(Notification(INITIALIZED))
    for request in _resuming(msgspec.json.decode(resume or "{}", type=_Resume)):
        ask(backend, request, max(0.1, until - time.monotonic()))


def _resuming(state: _Resume) -> list[Request]:
    requests = []
    if state.level is not None:
        requests.append(
            Request("mcp-proxy-level", _SET_LEVEL, jsonrpc.as_payload({"level": state.level}))
        )
    for number, uri in enumerate(state.subscriptions):
        params = jsonrpc.as_payload({"uri": uri})
        requests.append(Request(f"mcp-proxy-subscribe-{number}", _SUBSCRIBE, params))
    return requests


def ask(backend: Backend, request: Request, timeout: float) -> Response:
    """The server's answer; raises what kept it from answering."""
    exchange = backend.send([request], accepts_stream=False, timeout=timeout)
    delivery = exchange.receive(timeout + 1)
    if delivery is None:
        raise BackendLost("The server did not answer when it was started again")
    if delivery.failure is not None:
        raise delivery.failure
    response = jsonrpc.parse_message(delivery.data)
    assert isinstance(response, Response)
    return response
