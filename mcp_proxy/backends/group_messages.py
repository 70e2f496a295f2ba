"""What a client of several servers gets of the messages of one of them.

Errors of ours say which server they are about, questions and log messages whose they are, and URIs
are those that the client knows. All else stays as the server has said it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from msgspec import UNSET, Raw

from mcp_proxy.backends.exchange import ServerMessage
from mcp_proxy.errors import PROXY_ERROR, BackendError, BackendLost, ServerRefused
from mcp_proxy.wire import jsonrpc, merging, refusals
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

UPDATED = "notifications/resources/updated"

#: A message with its URIs as the client knows them.
WithUris = Callable[[bytes], bytes]


class ServerVoice:
    """How one server of a group is heard; people read of `label` whose something is.

    `with_uris` is called for what may have URIs. Thread-safe.
    """

    def __init__(self, label: str, prefix: str, with_uris: WithUris) -> None:
        self._label = label
        self._prefix = prefix
        self._with_uris = with_uris

    def answer(self, message: ServerMessage) -> ServerMessage:
        """A response as the client gets it; a challenge of the server's is not for the group."""
        if message.failure is not None:
            return self._failure(message, message.failure)
        plain = refusals.as_plain_error(message.data)
        data = self._with_own_uris(merging.marked_questions(self._prefix, plain))
        return message if data is message.data else message._replace(data=data)

    def question(self, request: Request) -> Request:
        """A question as the client gets it."""
        params = merging.marked_question(self._prefix, request.method, request.params)
        return Request(request.id, request.method, params)

    def notification(self, notification: Notification) -> Notification:
        """A notification as the client gets it."""
        if notification.method == UPDATED and notification.params is not UNSET:
            return Notification(UPDATED, Raw(self._with_own_uris(bytes(notification.params))))
        return merging.marked_log(self._prefix, notification)

    def _failure(self, message: ServerMessage, failure: BackendError) -> ServerMessage:
        failure = named(failure, self._label)
        parsed = jsonrpc.parse_message(message.data)
        key = parsed.id if isinstance(parsed, Response) else None
        data = jsonrpc.encode_error(PROXY_ERROR, failure.message, key)
        return message._replace(data=data, failure=failure)

    def _with_own_uris(self, data: bytes) -> bytes:
        if b"uri" not in data and b"Uri" not in data:
            return data
        return merging.without_structured(data, self._with_uris)


def named(error: BackendError | ServerRefused, label: str) -> BackendError:
    """The same error, which says of which server it is; a challenge of the server's is not for the
    group.
    """
    if isinstance(error, ServerRefused):
        return BackendLost(f"{label}: {error.message}")
    renamed = copy.copy(error)
    renamed.args = (f"{label}: {error.message}",)
    return renamed
