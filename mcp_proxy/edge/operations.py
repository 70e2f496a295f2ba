"""What clients have asked for, counted when it is answered (`mcp_proxy.metrics`).

An operation is a request or a notification of a client. It is counted before the last byte of its
answer leaves: whoever has an answer finds it counted. What a client says becomes a label only where
the server has agreed, or where there are few of it: methods are those of MCP's revisions.
"""

from __future__ import annotations

import re
import time
from functools import cache

import msgspec

from mcp_proxy.errors import BackendError, ClientError, ClientLeft, ProxyError, RequestId
from mcp_proxy.metrics import (
    BACKEND_ERRORS,
    CALLS,
    OPERATIONS,
    OTHER,
    REFUSED,
    SESSIONS_STARTED,
    Counters,
)
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Batch, Message, Notification, Request, Response
from mcp_proxy.wire.outcomes import CLIENT_LEFT, outcomes_in

_CALL = "tools/call"
_INITIALIZE = "initialize"

#: The requests and notifications of clients in all revisions that are served.
METHODS = frozenset(
    f"""
    {_INITIALIZE} ping {_CALL} tools/list prompts/list prompts/get completion/complete
    resources/list resources/read resources/templates/list resources/subscribe
    resources/unsubscribe logging/setLevel server/discover subscriptions/listen
    tasks/get tasks/list tasks/result tasks/cancel tasks/update
    notifications/initialized notifications/cancelled notifications/progress
    notifications/roots/list_changed notifications/tasks/status
    """.split()
)


class _Operation(msgspec.Struct):
    """One request or notification; `tool` is what its client calls the tool."""

    method: str
    tool: str
    client: str
    began: float
    is_request: bool


class Operations:
    """What the messages of a client ask a server for, until each is counted.

    `is_shared` says that their answers leave on a stream with others, and that any thread may
    begin one. Without it one thread at a time begins and answers; `close` may be called by any.
    """

    def __init__(self, counters: Counters, server: str, is_shared: bool = False) -> None:
        self._counters = counters
        self._server = server
        self._is_shared = is_shared
        self._pending: dict[RequestId | None, _Operation] = {}

    def begin(
        self, message: Request | Notification, began: float | None = None, way: str | None = None
    ) -> None:
        """A message has come, at `began` by the monotonic clock; the request went that `way`."""
        is_request = isinstance(message, Request)
        tool = client = ""
        if message.method in (_CALL, _INITIALIZE):
            tool, client = jsonrpc.names_in(message.params)
        operation = _Operation(
            message.method if message.method in METHODS else OTHER,
            tool if message.method == _CALL else "",
            client,
            time.monotonic() if began is None else began,
            is_request,
        )
        if way is not None and is_request:
            self._counters.count(CALLS, self._server, way)
        if isinstance(message, Request):
            self._pending[message.id] = operation
        else:
            self._count(operation, "")

    def begin_all(self, message: Message | Batch, began: float, way: str) -> None:
        """As `begin`, for each message of a batch; what answers the server is no operation."""
        for part in message if isinstance(message, list) else [message]:
            if not isinstance(part, Response):
                self.begin(part, began, way)

    def answered(self, data: bytes, failure: ProxyError | None = None, status: int = 200) -> None:
        """A response, or an array of them, is about to leave; harmless when repeated.

        `failure` is why the proxy has written it itself; the HTTP `status` counts where neither
        that nor the response says what went wrong.
        """
        if not self._pending:
            return
        otherwise = "" if status < 400 else str(status)
        found = outcomes_in(data, self._is_shared or len(self._pending) > 1)
        if not self._is_shared and len(self._pending) == len(found) == 1:
            _, operation = self._pending.popitem()
            self._count(operation, kind_of(failure) or found[0].error_type or otherwise)
            return
        for outcome in found:
            known = self._pending.pop(outcome.id, None)
            if known is not None:
                self._count(known, kind_of(failure) or outcome.error_type or otherwise)

    def close(self, error_type: str) -> None:
        """What is not answered by now has ended in this way."""
        while self._pending:
            _, operation = self._pending.popitem()
            self._count(operation, error_type)

    def _count(self, operation: _Operation, error_type: str) -> None:
        counters, server = self._counters, self._server
        tool = operation.tool
        if tool:
            tool = counters.tool(server, tool, is_proven=not error_type)
        seconds = time.monotonic() - operation.began
        counters.observe(OPERATIONS, seconds, server, operation.method, tool, error_type)
        if operation.method == _INITIALIZE and not error_type:
            counters.count(SESSIONS_STARTED, server, counters.client(operation.client))


def count_failure(counters: Counters, server: str, error: ProxyError) -> None:
    """Counts an error that a request is answered with, by whose fault it is."""
    if isinstance(error, BackendError) and error.kind:
        counters.count(BACKEND_ERRORS, server, error.kind)
    elif error.kind or isinstance(error, ClientError):
        counters.count(REFUSED, server, kind_of(error))


def kind_of(error: ProxyError | None) -> str:
    """What an error is to whoever counts; empty for none."""
    if error is None:
        return ""
    if isinstance(error, ClientLeft):
        return CLIENT_LEFT
    return error.kind or _in_words(type(error).__name__)


@cache
def _in_words(kind: str) -> str:
    """The name of a class with hyphens: session-ended."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", kind).lower()
