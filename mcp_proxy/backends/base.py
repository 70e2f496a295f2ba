"""The contract between transports and whatever stands behind a session.

A transport sends client messages and reads deliveries from exchanges; whether the server is a child
of this process, of another replica, or behind HTTP shows nowhere above this line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from mcp_proxy.errors import BackendError
from mcp_proxy.wire.jsonrpc import Notification, Request, Response


class Delivery(NamedTuple):
    """One message for the client: a line of JSON.

    `is_response` tells answers from what comes before them. `failure` is set where the proxy wrote
    the answer itself because the backend gave none. `event_id` is set where the message was logged
    under it; without data it is where a stream begins.
    """

    data: bytes
    is_response: bool
    failure: BackendError | None = None
    event_id: str | None = None


class Exchange(ABC):
    """The messages that belong to one client request (or batch, or listening stream), in order.

    Read by one thread; may be closed from any.
    """

    #: Whether this was a standing stream whose place a newer one took.
    was_replaced = False

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether everything that belongs here was received."""

    @abstractmethod
    def receive(self, timeout: float) -> Delivery | None:
        """The next message, None if nothing came for `timeout` seconds or the exchange is over.

        A backend that is lost, silent beyond the request's deadline, or cancelled is no exception
        here: each request gets a delivery that says so. Only that the backend got nothing of the
        request, where this turns out late, raises BackendUnreached, before any delivery.
        """

    def begin(self) -> None:  # noqa: B027  (not every exchange has something to do here)
        """The client gets a stream, even if nothing but the answer comes: what is received from
        now on can be resumed, if the backend keeps a log. Harmless when repeated.
        """

    @abstractmethod
    def close(self) -> None:
        """The client no longer listens; a call that is running goes on. Harmless when repeated."""


class Backend(ABC):
    """One MCP server as one session sees it. Every method may be called from any thread."""

    @abstractmethod
    def send(self, requests: Sequence[Request], accepts_stream: bool, timeout: float) -> Exchange:
        """Sends requests that arrived in one body and returns what belongs to them.

        The exchange is over when each was answered; each is answered within `timeout` seconds, if
        need be by a failure. `accepts_stream` says whether anything but responses may be delivered.
        Raises BackendLost when the backend is gone, BackendUnreached when it is certain that it got
        nothing of them.
        """

    @abstractmethod
    def submit(self, request: Request, timeout: float) -> None:
        """Passes a request on whose answer, or failure, goes to the session's standing stream.

        That is how the HTTP+SSE wire of 2024-11-05 works. Raises BackendLost when the backend is
        gone or there is no such stream, BackendUnreached when it is certain that it got nothing.
        """

    @abstractmethod
    def notify(self, notification: Notification) -> None:
        """Passes a notification on; raises BackendLost when the backend is gone."""

    @abstractmethod
    def respond(self, response: Response) -> None:
        """Passes on the answer to a request of the server; drops one that nobody waits for."""

    @abstractmethod
    def listen(self, after: str | None = None) -> Exchange:
        """The session's standing stream; an older one ends.

        `after` names the last event that the client got of an earlier one, which then goes on where
        it was; unless another has begun meanwhile: then what the client missed is all it gets.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the backend and every exchange with it; returns before the server has stopped."""
