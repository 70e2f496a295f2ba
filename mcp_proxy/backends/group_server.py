"""One server of a group: what the group needs of it, and the process or conversation that runs.

What tells the messages of a running server from those of the others is made here: the number in
the ids of its questions, the prefix in what people read, the URIs as the client knows them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Raw

from mcp_proxy.auth.caller_env import Values
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.catalogue import Listed
from mcp_proxy.backends.exchange import Exchange, ServerMessage
from mcp_proxy.backends.group_exchanges import InnerExchange
from mcp_proxy.backends.group_lists import require_bounded
from mcp_proxy.backends.group_messages import ServerVoice
from mcp_proxy.backends.owned import OwnedBackend, called_by
from mcp_proxy.backends.switchboard import PROGRESS
from mcp_proxy.errors import BackendError, RequestId
from mcp_proxy.wire import jsonrpc, merging
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.tools import ToolFilter

#: Seconds that a server has for all of its lists.
LOOK_TIME = 60.0

#: Seconds that a client hears at most once in of changes of one kind of list.
CHANGES_APART = 1.0

# Pages of one list that are asked for.
_MAX_PAGES = 100

_ROOTS = "roots/list"
_EMPTY = Raw(b"{}")


class Wanted(NamedTuple):
    """A server that a group wants to be started.

    `session` is what the pauses between its starts are remembered by; `values` and `headers` are
    those of the client, for all servers of the group; `on_lost` is called when it
    is lost; `is_needed` says whether it must not be stopped for others although nobody calls it;
    `has_left` whether the client has left that waits for it.
    """

    session: str
    initialize: Request
    values: Values | None
    headers: Mapping[str, str]
    on_lost: Callable[[OwnedBackend], object]
    is_needed: Callable[[], bool]
    has_left: Callable[[], bool] | None


class Started(NamedTuple):
    """A server that has answered initialize, by `result`."""

    bridge: Bridge
    result: Raw


class Member(Protocol):
    """One server of a group, as the group needs it. Thread-safe."""

    name: str
    prefix: str
    tools: ToolFilter | None
    schemes: frozenset[str]

    @property
    def timeout(self) -> float:
        """Seconds that a call of the server may take."""

    def key(self, declared: bytes, values: Values | None, headers: Mapping[str, str]) -> str:
        """What its lists are known by, for a client that has declared these capabilities, and of
        whom the servers get these variables and headers.
        """

    def start(self, wanted: Wanted) -> Started:
        """Starts the server for a session; raises ProxyError."""

    def headers_for(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers of a client's request that it gets."""


def label_of(member: Member) -> str:
    """What people read of whose something of a group is."""
    return member.prefix or member.name


class Hearer(Protocol):
    """Who hears a running server: the group of its session. Thread-safe."""

    #: What no other group has, nor one of the same session before it.
    child_id: str
    #: The headers of the client's last call that servers may get.
    client_headers: Mapping[str, str]

    @property
    def stream(self) -> Exchange | None:
        """The standing stream of the client."""

    def with_uris(self, member: Member, data: bytes) -> bytes:
        """A message of a server with its URIs as the client knows them."""

    def note_changed(self, running: RunningServer, notification: str) -> None:
        """The server says that its lists have changed. Never waits."""

    def note_lost(self, running: RunningServer) -> None:
        """The server is lost."""

    def passes_roots_question(self, running: RunningServer, own_id: RequestId) -> bool:
        """Whether a server's `roots/list` goes to the client: not where that is known, or where the
        client has it from another server. Never waits.
        """


class RunningServer:
    """One running server of a group, and what tells its messages from those of the others.

    The first part of an id of its questions is `serial`, which no other of the session ever has.
    """

    bridge: Bridge
    result: Raw = _EMPTY

    def __init__(self, group: Hearer, member: Member, serial: int) -> None:
        self.member = member
        self.serial = serial
        #: Its lists, once it has changed them.
        self.changed: Listed | None = None
        #: What it has said of them since they were looked at, whether somebody does or will, and
        #: when that was done last (monotonic). The group's lock guards these.
        self.changes: set[str] = set()
        self.is_looking = False
        self.looked_at = -CHANGES_APART
        self._group = group
        self._voice = ServerVoice(label_of(member), member.prefix, partial(group.with_uris, member))
        self._lock = threading.Lock()  # guards _listening
        self._listening: InnerExchange | None = None

    def begin(self, started: Started) -> None:
        """The server has answered initialize."""
        self.bridge, self.result = started
        self.bridge.on_notice = self._take_notice

    def _take_notice(self, notification: Notification) -> bool:
        """Whether a notification is for the group, or for nobody. Quick.

        For the group is that a list has changed, for nobody is progress of calls of others.
        """
        if notification.method == PROGRESS:
            return not self.bridge.is_of_a_call(notification)
        if notification.method not in merging.CHANGED:
            return False
        self._group.note_changed(self, notification.method)
        return True

    def look_again(self) -> None:
        """Asks for the lists that have changed."""
        found = self.listed()
        if not found.is_same(self.changed):  # the same object has the same lists joined
            self.changed = found

    # --- what the client says to it --------------------------------------------------------------

    def send(self, exchange: Exchange) -> None:
        """Sends the requests of an exchange; raises BackendError."""
        exchange.headers = self.member.headers_for(exchange.headers)
        with self._for_client():
            self.bridge.send(exchange)

    def notify(self, notification: Notification, has_left: Callable[[], bool] | None) -> None:
        """Passes a notification on; raises BackendError."""
        with self._for_client():
            self.bridge.notify(notification, has_left)

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        """Passes the answer to a question on, under the server's own id; raises BackendError."""
        with self._for_client():
            self.bridge.respond(response, has_left)

    def ask(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> Response:
        """The answer to a request of ours; raises what keeps the server from answering."""
        with self._for_client():
            return handshake.ask(self.bridge, request, timeout, has_left)

    def _for_client(self) -> AbstractContextManager[None]:
        """Has an HTTP server get the headers that it gets of the client alone."""
        return called_by(self.member.headers_for(self._group.client_headers))

    def is_usable(self) -> bool:
        """Whether calls can be sent; one of an older form of its server ends between two."""
        bridge = self.bridge
        if bridge.is_outdated and bridge.end_between_calls():
            return False
        return bridge.is_alive

    def can(self, capability: str) -> bool:
        """Whether the server has said that it can do something."""
        found = jsonrpc.fields_of(self.result).get("capabilities", UNSET)
        return capability in jsonrpc.fields_of(found)

    def note_lost(self, backend: OwnedBackend) -> None:
        """The server is lost."""
        self._group.note_lost(self)

    def listed(self) -> Listed:
        """What the server lists, all pages, in `LOOK_TIME` seconds; raises ProxyError."""
        until = time.monotonic() + LOOK_TIME
        lists = {
            method: self._entries(method, until) if self.can(capability) else []
            for method, capability in merging.CAPABILITY.items()
        }
        return Listed(self.result, lists)

    def _entries(self, method: str, until: float) -> list[Raw]:
        found: list[Raw] = []
        cursors: list[str | None] = [None]
        for number in range(_MAX_PAGES):
            params = jsonrpc.as_payload({"cursor": cursors[-1]}) if cursors[-1] else UNSET
            request = Request(f"mcp-proxy-{method}-{number}", method, params)
            answer = self.ask(request, max(0.1, until - time.monotonic()))
            if answer.result is UNSET:
                break
            entries, cursor = merging.entries_of(answer.result, method)
            found += entries
            require_bounded(method, found)
            if not cursor or cursor in cursors:
                break
            cursors.append(cursor)
        return found

    def listen(self) -> None:
        """Has what names no call come on the client's standing stream, or wait where there is
        none.
        """
        with self._lock:
            older, self._listening = self._listening, None
            if older is not None:
                older.exchange.close()
            stream = self._group.stream
            if stream is None or not self.bridge.is_alive:
                return
            exchange = Exchange()
            exchange.rewrite = self.shown
            exchange.attach(self.bridge)
            self._listening = InnerExchange(exchange, stream)
        with contextlib.suppress(BackendError), self._for_client():  # it has ended meanwhile
            self.bridge.deliver_to(exchange)

    def pass_on(self) -> None:
        """The client of the standing stream has room again."""
        listening = self._listening
        if listening is not None:
            listening.pass_on()

    # --- what the client gets of it --------------------------------------------------------------

    def shown(self, message: ServerMessage) -> ServerMessage | None:
        """A message as the client gets it; None where it gets none."""
        if message.is_response:
            return self._voice.answer(message)
        parsed = jsonrpc.parse_message(message.data)
        if isinstance(parsed, Response):
            return message
        if isinstance(parsed, Request) and parsed.method == _ROOTS and self._is_answered(parsed):
            return None
        changed = self._shown(parsed)
        return message if changed is parsed else message._replace(data=jsonrpc.encode(changed))

    def _is_answered(self, question: Request) -> bool:
        """Whether a question for the client's roots is answered without it."""
        return not self._group.passes_roots_question(self, question.id)

    def _shown(self, message: Request | Notification) -> Request | Notification:
        if isinstance(message, Request):
            asked = Request(self.public_id(message.id), message.method, message.params)
            return self._voice.question(asked)
        if message.method == jsonrpc.CANCELLED:
            asked_id = jsonrpc.cancelled_id_of(message)
            if asked_id is not None:
                public = self.public_id(asked_id)
                params = jsonrpc.replace_field(message.params, ("requestId",), public)
                return Notification(message.method, params)
        return self._voice.notification(message)

    def public_id(self, own: RequestId) -> str:
        """The id of a question of the server, as the client knows it."""
        return f"{self._name}.{msgspec.json.encode(own).decode()}"

    @property
    def _name(self) -> str:
        """What no other running server has ever had, also of a group that was here before."""
        return f"{self._group.child_id[:6]}{self.serial}"

    def own_id(self, public: RequestId) -> RequestId | None:
        """The server's id of a question; None where the question is another's."""
        number, dot, own = str(public).partition(".")
        if not dot or number != self._name:
            return None
        return jsonrpc.id_of(Raw(own.encode()))
