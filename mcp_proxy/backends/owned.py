"""What the owner of sessions holds: a backend that lives in this replica.

It is a child that one session has to itself, or what stands in front of children and of servers of
the other era. `worker://<replica>/<child_id>` names any of them.
"""

from __future__ import annotations

import math
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

from mcp_proxy.backends.exchange import Backend, StreamLog
from mcp_proxy.context_value import ContextValue
from mcp_proxy.errors import BackendLost, RequestId

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

#: The headers of the client for whom something is done that a server is told of.
caller_headers: ContextVar[Mapping[str, str]] = ContextVar("caller_headers", default=_NO_HEADERS)


#: Headers by which HTTP servers know their callers, in title case.
CREDENTIALS = frozenset({"Authorization", "Cookie", "X-Api-Key", "Api-Key"})


def called_by(headers: Mapping[str, str]) -> ContextValue[Mapping[str, str]]:
    """Has what is sent meanwhile go with these headers of a client, and with no others."""
    return ContextValue(caller_headers, headers)


class Peer(Protocol):
    """What takes and gives the lines of one server: a process, or a conversation over HTTP."""

    session: str
    pid: int
    #: Those of the last client; a process has no use for them.
    headers: Mapping[str, str]
    #: Whether its answers may say with which HTTP status a request was refused.
    may_refuse: bool
    #: Requests, by the ids that it knows them by, of which it certainly got nothing.
    untaken: Collection[RequestId]

    @property
    def label(self) -> str:
        """What log lines call it."""

    @property
    def end_sentence(self) -> str:
        """What clients are told of its end."""

    @property
    def end_in_log(self) -> str:
        """What the log says of it."""

    @property
    def stderr_tail(self) -> list[str]:
        """The last lines that it wrote to stderr."""

    def write(
        self,
        line: bytes,
        timeout: float,
        has_left: Callable[[], bool] | None = None,
        hand_on: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Gives the server messages, a line each; raises BackendError, ClientLeft."""


class Starter(Protocol):
    """Who begins conversations: the supervisor of processes, or the way to an HTTP server."""

    def spawn(
        self,
        server: Any,
        max_message: int,
        on_exit: Callable[[str], None],
        on_mute: Callable[[], None] | None = None,
    ) -> Any:
        """A Peer; `on_exit` is called when it has ended, with the reason in words.

        `on_mute` is called when it will say nothing any more, and is ended for that.
        """

    def read(self, child: Any, on_line: Callable[[bytes], None]) -> None:
        """Has `on_line` called with every line of the server."""

    def stop_child(self, child: Any) -> None:
        """Begins to end a conversation; harmless when repeated."""


#: Seconds after which a home that nobody uses ends.
HOME_IDLE = 600.0


class OwnedBackend(Backend):
    """A backend of this replica. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.child_id = secrets.token_hex(8)
        self.started = time.monotonic()
        #: Whether messages can still be sent.
        self.is_alive = True
        #: When a client last said or got something (monotonic), and whether it ever called.
        self.last_used = self.started
        self.was_called = False
        #: The log of the session's streams, once there is a session; None: none can be resumed.
        self.log: StreamLog | None = None
        #: Seconds after which it ends because nobody uses it; None: its session decides.
        self.idle_limit: float | None = None
        #: Whether another one has taken its place, so that it ends when nobody needs it.
        self.is_superseded = False
        #: Whether its server has another command by now, so that it ends between two calls, and
        #: when it has waited for that long enough (monotonic).
        self.is_outdated = False
        self.waits_until = math.inf
        #: Whose calls come here; empty for the client of a session.
        self.caller = ""
        #: Variables that it has of its caller; None: none, or not known.
        self.caller_values: Mapping[str, str] | None = None
        #: Called once, by `close`.
        self.on_close: Callable[[], object] | None = None

    def outdate(self, seconds: float) -> None:
        """Its server has another command: it ends between two calls, for which it waits so long.

        Then what is sent waits for the calls that are under way, and goes to another backend.
        """
        self.waits_until = time.monotonic() + seconds
        self.is_outdated = True

    @property
    @abstractmethod
    def name(self) -> str:
        """What log lines call the backend."""

    @property
    def location(self) -> str:
        """What access lines call the server."""
        return self.name

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a client waits for an answer."""

    @property
    @abstractmethod
    def is_watched(self) -> bool:
        """Whether a client waits for an answer or listens to a standing stream."""

    @property
    def size(self) -> int:
        """How many of the processes that a worker may have this takes."""
        return 1

    @property
    def parked(self) -> int:
        """How many calls wait for their client's answer to a question."""
        return 0

    @property
    def parked_since(self) -> float:
        """When the first of them has begun to (monotonic)."""
        return math.inf

    def end_oldest(self) -> bool:
        """Ends the call that has waited longest; whether there was one."""
        return False

    def say(self, message: bytes) -> bool:
        """Puts a message of ours on the standing stream; False where there is none. Never waits."""
        return False

    def set_on_initialized(self, on_initialized: Callable[[], object]) -> None:
        """Has `on_initialized`, which must be quick, called once: when initialize is answered, or
        the backend is lost. At once where nothing starts.
        """
        on_initialized()

    @abstractmethod
    def note_session(self, session_id: str) -> None:
        """Has log lines name the session that this serves."""

    @abstractmethod
    def is_idle(self, seconds: float) -> bool:
        """Whether nobody needs the backend, nor has for `seconds`.

        It is needed while a call is in flight, also one whose client has left, while a client
        listens to a standing stream, and while the server waits for a client's answer.
        """

    @abstractmethod
    def stop_if_idle(self, seconds: float) -> bool:
        """Closes the backend where it is idle (`is_idle`); returns whether it did."""

    @abstractmethod
    def hand_over(self) -> bool:
        """Closes the backend unless a client waits for an answer; returns whether it did."""

    @abstractmethod
    def end_between_calls(self) -> bool:
        """Closes the backend unless a call is in flight; returns whether it did.

        One whose client has left, or is asked something, counts as well. Who listens does not.
        """

    @abstractmethod
    def end_stream(self) -> None:
        """Ends the standing streams; their clients may open others elsewhere."""

    @abstractmethod
    def expire_left_calls(self) -> None:
        """Applies the deadlines of calls for which no client waits now."""

    @abstractmethod
    def close(self, failure: BackendLost | None = None) -> None:
        """As promised; calls in flight fail with `failure`, by default as the session has ended."""
