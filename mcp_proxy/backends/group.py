"""Several servers as one backend: what stands behind an endpoint that carries them together.

A call is built anew with the server's own name for its tool and handed on with the transport's own
exchange, so that its answer comes as it would from the server alone. Lists and the handshake are
answered here, from what is known; a server starts when it is used, or when nothing is known of it.
What a server asks or tells goes to the client with what tells the servers apart: the number of a
running server in the id of a question, the prefix in what people read.

Threads: request threads send, the servers' readers call `RunningServer.shown`, threads of the
catalogue ask for lists. One lock guards the tables; everything that waits happens outside it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from contextvars import copy_context
from functools import partial
from typing import NamedTuple

from msgspec import Raw

from mcp_proxy.auth.caller_env import Values
from mcp_proxy.auth.group_env import of_server
from mcp_proxy.backends import group_requests
from mcp_proxy.backends.catalogue import Catalogue, Gathering, Listed
from mcp_proxy.backends.exchange import (
    Exchange,
    ServerMessage,
    wait_for,
)
from mcp_proxy.backends.group_exchanges import InnerExchange, SplitBatch
from mcp_proxy.backends.group_lists import GroupLists, Part, lists_of
from mcp_proxy.backends.group_messages import named
from mcp_proxy.backends.group_requests import (
    BY_NAME,
    BY_URI,
    COMPLETE,
    NO_VALUES,
    SUBSCRIBE,
    UNSUBSCRIBE,
)
from mcp_proxy.backends.group_roots import ROOTS, Asker, SharedRoots
from mcp_proxy.backends.group_server import (
    CHANGES_APART,
    Member,
    RunningServer,
    Wanted,
    label_of,
)
from mcp_proxy.backends.owned import OwnedBackend, caller_headers
from mcp_proxy.backends.switchboard import PROGRESS
from mcp_proxy.errors import (
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    PROXY_ERROR,
    BackendError,
    BackendExited,
    BackendLost,
    BackendUnreached,
    ClientError,
    ProxyError,
    RequestId,
    ServerRefused,
)
from mcp_proxy.wire import jsonrpc, merging, results, revisions
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.jsonrpc import Notification, Request, Response

log = logging.getLogger(__name__)

#: Seconds that initialize waits for servers of which nothing is known: for their instructions.
INITIALIZE_WAIT = 3.0

#: Seconds that a server has to be told what one before it knew.
RESTORE_TIME = 10.0

#: Seconds that a running server has to take another log level.
LEVEL_WAIT = 5.0

# Messages of ours that wait for a standing stream.
_MAX_WAITING = 64

# The most resources that a session subscribes to, as its record has them.
_MAX_SUBSCRIPTIONS = 256

_OVER = "The session has ended"

_EMPTY = Raw(b"{}")

_SET_LEVEL = "logging/setLevel"
# What a client says that may be for any of the servers.
_ROOTS_CHANGED = "notifications/roots/list_changed"
_PASSED_ON = frozenset({jsonrpc.CANCELLED, _ROOTS_CHANGED, PROGRESS})


class Settings(NamedTuple):
    """How a group is called, and how long things may take, in seconds."""

    name: str
    version: str
    request_timeout: float
    gather_timeout: float


class Group(OwnedBackend):
    """Several servers as one session sees them. Thread-safe.

    `members` are those that there are just now, in their order. `values` are variables that they
    get of the caller, and say which of them are hidden from it. Nothing starts in the constructor.
    """

    def __init__(
        self,
        members: Callable[[], Sequence[Member]],
        catalogue: Catalogue,
        settings: Settings,
        values: Values | None = None,
    ) -> None:
        super().__init__()
        self._all_members = members
        self.caller_values = values
        self.client_headers: Mapping[str, str] = {}  # of its last call
        self._catalogue = catalogue
        self._settings = settings
        self._serials = itertools.count(1)
        self._lock = threading.Lock()  # guards what follows
        self._running: dict[str, RunningServer] = {}  # by the server's name
        self._starting: dict[str, threading.Event] = {}
        self._posts: set[Exchange] = set()  # those that are answered here
        self._under_way = 0  # calls that are being handed on
        self._stream: Exchange | None = None
        self._waiting: deque[ServerMessage] = deque(maxlen=_MAX_WAITING)
        self._submitted: set[InnerExchange] = set()  # calls whose answers come on the stream
        self._subscriptions: dict[str, str] = {}  # names of servers by the URIs that clients know
        self._level: Raw | None = None
        self._params: Raw = _EMPTY  # of the client's initialize
        self._declared = b""
        self._roots = SharedRoots()
        self._shown_lists: dict[str, list[Raw]] = {}  # what the client has heard last
        self._to_announce: set[str] = set()  # notifications
        self._is_about_to_announce = False
        self._told_at = 0.0  # monotonic
        self._session = ""
        catalogue.listen(self)

    def __repr__(self) -> str:
        return f"<Group {self.name} running={list(self._running)} posts={len(self._posts)}>"

    @property
    def name(self) -> str:
        return self._settings.name

    def note_session(self, session_id: str) -> None:
        self._session = session_id
        for running in self._all_running():
            running.bridge.note_session(session_id)

    def _members(self) -> Sequence[Member]:
        """The servers of the group that the caller may use."""
        values, members = self.caller_values, self._all_members()
        if not values:
            return members
        return [each for each in members if not of_server(values, each.name).is_hidden]

    def _key(self, member: Member) -> str:
        return member.key(self._declared, self.caller_values, self.client_headers)

    def _note_call(self, headers: Mapping[str, str]) -> None:
        """The client says something, with headers that servers may get, if it has any."""
        self.last_used = time.monotonic()
        self.client_headers = headers or self.client_headers

    def _all_running(self) -> list[RunningServer]:
        with self._lock:
            return list(self._running.values())

    # --- from the client -------------------------------------------------------------------------

    def send(self, exchange: Exchange) -> None:
        self._note_call(exchange.headers)
        if not self.is_alive:
            raise BackendExited(_OVER)
        if len(exchange.requests) > 1:
            SplitBatch(exchange, self.log if exchange.accepts_stream else None).send(self._dispatch)
            return
        self.was_called = exchange.requests[0].method != INITIALIZE
        self._dispatch(exchange)

    def _dispatch(self, exchange: Exchange) -> None:
        """Answers the one request of an exchange, or hands it on; raises ProxyError."""
        (request,) = exchange.requests
        method = request.method
        with self._lock:
            self._under_way += 1
        try:
            if method in BY_NAME:
                self._send_by_name(exchange, request)
            elif method in BY_URI:
                self._send_by_uri(exchange, request)
            elif method in merging.KINDS:
                self._answer_list(exchange, request)
            elif method == COMPLETE:
                self._complete(exchange, request)
            else:
                self._answer_here(exchange, request)
        except ClientError as error:
            self._attach(exchange)
            self._offer_error(exchange, request, error)
        finally:
            with self._lock:
                self._under_way -= 1

    def _answer_here(self, exchange: Exchange, request: Request) -> None:
        self._attach(exchange)
        if request.method == INITIALIZE:
            self._begin(exchange, request)
        elif request.method == "ping":
            self._offer(exchange, Response(request.id, _EMPTY))
        elif request.method == _SET_LEVEL:
            self._set_level(request, exchange.has_left)
            self._offer(exchange, Response(request.id, _EMPTY))
        else:
            sentence = f"Method not found: {request.method}"
            error = jsonrpc.error_payload(METHOD_NOT_FOUND, sentence)
            self._offer(exchange, Response(request.id, error=error))

    def _send_by_name(self, exchange: Exchange, request: Request) -> None:
        members = self._members()
        addressed = group_requests.by_prefix(request, members)
        if addressed is None:
            if group_requests.needs_lists(request):
                self._wait_for_lists(exchange.has_left)
            members, lists = self._now()
            addressed = group_requests.by_name(request, members, lists)
        self._forward(exchange, members[addressed.number], addressed.request)

    def _wait_for_lists(self, has_left: Callable[[], bool] | None) -> None:
        """Waits for lists that are unknown, where they say whose something is."""
        are_known = threading.Event()
        self._gather(self._settings.gather_timeout, are_known.set)
        wait_for(are_known, self._settings.gather_timeout + 1, has_left)

    def _send_by_uri(self, exchange: Exchange, request: Request) -> None:
        uri = group_requests.uri_of(request)
        self._wait_for_lists(exchange.has_left)
        members, lists = self._now()
        found = group_requests.by_uri(request, lists)
        if found is None:
            code, sentence = results.RESOURCE_NOT_FOUND, f"Resource not found: {uri[:200]}"
            self._attach(exchange)
            error = jsonrpc.error_payload(code, sentence, {"uri": uri})
            self._offer(exchange, Response(request.id, error=error))
            return
        member = members[found.number]
        with self._lock:
            if request.method == SUBSCRIBE and len(self._subscriptions) < _MAX_SUBSCRIPTIONS:
                self._subscriptions[uri] = member.name
            elif request.method == UNSUBSCRIBE:
                self._subscriptions.pop(uri, None)
        self._forward(exchange, member, found.request)

    def _complete(self, exchange: Exchange, request: Request) -> None:
        """A completion of an argument of a prompt, or of a template; none where nobody has any."""
        members, lists = self._now()
        found = group_requests.completion(request, lists)
        if found is None:
            self._attach(exchange)
            self._offer(exchange, Response(request.id, NO_VALUES))
        else:
            self._forward(exchange, members[found.number], found.request)

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        """As promised: the answer comes as a call's of its own would, on the standing stream."""
        self._note_call(caller_headers.get())
        self.was_called, stream = True, self._stream
        if stream is None:
            raise BackendLost("There is no stream for the answer")
        if stream.on_submit is not None:
            request = stream.on_submit(request)
        exchange = Exchange([request], timeout=timeout, headers=self.client_headers)
        exchange.may_be_logged = False
        exchange.has_left = has_left
        inner = InnerExchange(exchange, stream, self._submitted.discard)
        self._submitted.add(inner)
        inner.send(self._dispatch)
        due = exchange.deadline
        if due is not None and (stream.deadline is None or due < stream.deadline):
            stream.set_deadline(due)

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        self._note_call(caller_headers.get())
        if notification.method not in _PASSED_ON:
            return  # each server is told that it is initialized when it starts
        if notification.method == _ROOTS_CHANGED:
            self._roots.forget()
        for running in self._all_running():
            with contextlib.suppress(BackendError):  # the others are to hear of it all the same
                running.notify(notification, has_left)

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        self._note_call(caller_headers.get())
        for running in self._all_running():
            own = running.own_id(response.id)
            if own is not None:
                answer = Response(own, response.result, response.error)
                self._answer_roots(self._roots.answered(Asker(running, own), answer), answer)
                running.respond(answer, has_left)
                return
        log.info("[%s] dropped a client's response to no pending request", self.name)

    # --- the handshake, and lists ----------------------------------------------------------------

    def _begin(self, exchange: Exchange, request: Request) -> None:
        params = request.params or _EMPTY
        with self._lock:
            self._params = params
            declared = jsonrpc.fields_of(params).get("capabilities", _EMPTY)
            self._declared = bytes(declared)
        self._roots.begin(declared)
        done = partial(self._offer_initialized, exchange, request)
        self._gather(min(INITIALIZE_WAIT, self._settings.gather_timeout), done)

    def _offer_initialized(self, exchange: Exchange, request: Request) -> None:
        wanted = jsonrpc.protocol_version_of(request.params) or ""
        version = wanted if revisions.is_legacy(wanted) else revisions.LEGACY[-1]
        members, lists = self._now()
        listed = [(member, self._listed(member)) for member in members]
        known = [(member.prefix, each) for member, each in listed if each is not None]
        capabilities = merging.capabilities(
            [each.capabilities or _EMPTY for _, each in known], len(known) == len(members)
        )
        texts = [(prefix, merging.text_in(each.result, "instructions")) for prefix, each in known]
        result = merging.initialize_result(
            version,
            self._settings.name,
            self._settings.version,
            capabilities,
            merging.instructions(texts, self._missing(members, lists)),
        )
        self._offer(exchange, Response(request.id, result))

    def _answer_list(self, exchange: Exchange, request: Request) -> None:
        self._attach(exchange)
        cursor = jsonrpc.fields_of(request.params).get("cursor")
        if cursor is not None and bytes(cursor) != b"null":
            error = jsonrpc.error_payload(INVALID_PARAMS, "There is one page only: cursor is none")
            self._offer(exchange, Response(request.id, error=error))
            return
        done = partial(self._offer_list, exchange, request)
        self._gather(self._settings.gather_timeout, done)

    def _offer_list(self, exchange: Exchange, request: Request) -> None:
        members, lists = self._now()
        missing = self._missing(members, lists)
        if missing and all(self._listed(member) is None for member in members):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            failure = BackendError(f"No server of the group can be reached ({reasons})")
            self._offer_failure(exchange, request, failure)
            return
        entries = lists.entries(request.method)
        with self._lock:
            self._shown_lists[request.method] = entries
        result = merging.list_result(request.method, entries, missing)
        self._offer(exchange, Response(request.id, result))

    def _missing(self, members: Sequence[Member], lists: GroupLists) -> dict[str, str]:
        """The servers whose lists are not known, or not shown, with the reason."""
        found = lists.left_out()
        for member in members:
            if self._listed(member) is None:
                reason = self._catalogue.reason(self._key(member))
                found[member.name] = reason or "it has not answered yet"
        return found

    def _gather(self, timeout: float, done: Callable[[], object]) -> None:
        """Calls `done` once the lists of all servers are known that can be waited for."""
        looks: dict[str, Callable[[], Listed]] = {}
        for member in self._members():
            key = self._key(member)
            look = partial(copy_context().run, self._look_up, member)
            if self._catalogue.is_awaited(key):
                looks[key] = look
            elif self._catalogue.is_to_be_asked_again(key):
                self._catalogue.ask(key, look)
        if looks:
            Gathering(self._catalogue, looks, timeout, done, lambda: self.is_alive).begin()
        else:
            done()

    def _look_up(self, member: Member) -> Listed:
        """What a server lists, which is started for that where it does not run."""
        return self._listed_by(self._running_of(member, None))

    def _listed_by(self, running: RunningServer) -> Listed:
        """What a running server lists; raises BackendExited where it was the session that ended:
        that says nothing of the server.
        """
        try:
            return running.listed()
        except BackendError as error:
            if self.is_alive:
                raise
            raise BackendExited(_OVER) from error

    def _listed(self, member: Member) -> Listed | None:
        with self._lock:
            running = self._running.get(member.name)
        is_running = running is not None and running.bridge.is_alive
        changed = running.changed if running is not None and is_running else None
        return changed or self._catalogue.listed(self._key(member))

    def _now(self) -> tuple[Sequence[Member], GroupLists]:
        """The servers, and their lists, as they are known just now."""
        members = self._members()
        parts = (
            Part(each.name, each.prefix, each.tools, each.schemes, self._listed(each))
            for each in members
        )
        return members, lists_of(tuple(parts))

    # --- changes of lists ------------------------------------------------------------------------

    def note_listed(self, key: str) -> None:
        """Another server's lists are known, or have changed: the client hears of it soon."""
        if any(self._key(member) == key for member in self._members()):
            self.announce_changes()

    def note_changed(self, running: RunningServer, notification: str) -> None:
        """A running server says that its lists have changed: they are asked for, for this session
        alone and at most every `CHANGES_APART` seconds, and then the client is told the same. Never
        waits.
        """
        with self._lock:
            running.changes.add(notification)
            if running.is_looking:
                return
            running.is_looking = True
            seconds = running.looked_at + CHANGES_APART - time.monotonic()
        if seconds > 0:
            with contextlib.suppress(RuntimeError):  # no thread: it is looked at now
                self._catalogue.timer.call_later(seconds, partial(self._look_again, running))
                return
        self._look_again(running)

    def _look_again(self, running: RunningServer) -> None:
        with self._lock:
            changes, running.changes = running.changes, set()
        key = f"{self.child_id}/{running.serial}"
        done = partial(self._note_looked, running, changes)
        self._catalogue.look(key, running.look_again, done)

    def _note_looked(self, running: RunningServer, changes: Set[str]) -> None:
        with self._lock:
            running.is_looking, running.looked_at = False, time.monotonic()
            more = next(iter(running.changes), None)
        for notification in changes:
            self.announce_changes(notification)
        if more is not None and running.bridge.is_alive:  # meanwhile once more
            self.note_changed(running, more)

    def announce_changes(self, notification: str | None = None) -> None:
        """Has the client told of lists that are others than it has heard, and what `notification`
        says; not more often than every `CHANGES_APART` seconds. Never waits.
        """
        with self._lock:
            if notification is not None:
                self._to_announce.add(notification)
            is_wanted = bool(self._to_announce or self._shown_lists)
            if not is_wanted or self._is_about_to_announce or not self.is_alive:
                return
            self._is_about_to_announce = True
            seconds = max(0.0, self._told_at + CHANGES_APART - time.monotonic())
        with contextlib.suppress(RuntimeError):  # no thread: the next change is told of
            self._catalogue.timer.call_later(seconds, self._announce_changes)

    def _announce_changes(self) -> None:
        members, lists = self._now()
        names = {member.name for member in members}
        for running in self._all_running():
            if running.member.name not in names:  # a reload has taken it out
                running.bridge.end_between_calls()
        entries = {method: lists.entries(method) for method in merging.KINDS}
        with self._lock:
            self._is_about_to_announce, self._told_at = False, time.monotonic()
            heard, to_announce = self._shown_lists, self._to_announce
            self._to_announce = set()
            changed = {method for method, shown in heard.items() if shown != entries[method]}
            heard.update({method: entries[method] for method in changed})
        for notification, methods in merging.CHANGED.items():
            if notification in to_announce or changed.intersection(methods):
                line = jsonrpc.encode(Notification(notification))
                self._say(ServerMessage(line, is_response=False))

    def say(self, message: bytes) -> bool:
        stream = self._stream
        if stream is not None:
            stream.offer(ServerMessage(message, is_response=False))
        return stream is not None

    def _say(self, message: ServerMessage) -> None:
        """Puts a message of ours on the standing stream, now or once there is one."""
        with self._lock:
            stream = self._stream
            if stream is None:
                self._waiting.append(message)
        if stream is not None:
            stream.offer(message)

    # --- the servers -----------------------------------------------------------------------------

    def _forward(self, exchange: Exchange, member: Member, request: Request) -> None:
        """Hands a call on; again, to a new process, where the first certainly got nothing of it."""
        before = (
            exchange.requests,
            exchange.resend,
            exchange.timeout,
            exchange.headers,
            exchange.rewrite,
        )
        if exchange.timeout is not None:
            exchange.timeout = member.timeout
        exchange.requests = [request]
        exchange.resend = partial(self._forward_again, member)
        try:
            self._send_to(member, exchange)
        except BackendUnreached:
            if not self.is_alive:  # the session has another backend by now
                (
                    exchange.requests,
                    exchange.resend,
                    exchange.timeout,
                    exchange.headers,
                    exchange.rewrite,
                ) = before
                raise
            exchange.resend = None
            self._forward_again(member, exchange)

    def _forward_again(self, member: Member, exchange: Exchange) -> None:
        try:
            self._send_to(member, exchange)
        except BackendUnreached as error:
            raise BackendLost(f"{label_of(member)}: {error.message}") from error

    def _send_to(self, member: Member, exchange: Exchange) -> None:
        try:
            running = self._running_of(member, exchange.has_left)
        except BackendExited:
            if not self.is_alive:
                raise
            raise BackendLost(f"{label_of(member)}: The server has exited") from None
        except (BackendUnreached, ServerRefused) as error:
            raise BackendLost(f"{label_of(member)}: {error.message}") from error
        except BackendError as error:
            raise named(error, label_of(member)) from error
        exchange.rewrite = running.shown
        running.bridge.log = self.log
        running.send(exchange)

    def _running_of(self, member: Member, has_left: Callable[[], bool] | None) -> RunningServer:
        """The running server; it is started first where it does not run. Raises ProxyError."""
        while True:
            running = self._running.get(member.name)
            if running is not None and running.is_usable():
                return running
            with self._lock:
                if self._running.get(member.name) is not running:
                    continue
                if not self.is_alive:
                    raise BackendExited(_OVER)
                others = self._starting.get(member.name)
                if others is None:
                    is_started = self._starting[member.name] = threading.Event()
            if others is not None:
                wait_for(others, self._settings.request_timeout, has_left)
                continue
            try:
                return self._start(member, has_left)
            finally:
                with self._lock:
                    del self._starting[member.name]
                is_started.set()

    def _start(self, member: Member, has_left: Callable[[], bool] | None) -> RunningServer:
        running = RunningServer(self, member, next(self._serials))
        request = Request(f"mcp-proxy-{INITIALIZE}", INITIALIZE, self._params)
        is_needed = self._is_subscribed_to(member)
        wanted = Wanted(
            self.child_id,
            request,
            self.caller_values,
            self.client_headers,
            running.note_lost,
            is_needed,
            has_left,
        )
        running.begin(member.start(wanted))
        running.bridge.log = self.log
        running.bridge.note_session(self._session)
        with self._lock:
            is_over = not self.is_alive
            if not is_over:
                self._running[member.name] = running
        if is_over:
            running.bridge.close()
            raise BackendExited(_OVER)
        running.listen()
        self._restore_state(running, has_left)
        self._catalogue.ask(self._key(member), partial(self._listed_by, running))
        return running

    def _is_subscribed_to(self, member: Member) -> Callable[[], bool]:
        return lambda: member.name in self._subscriptions.values()

    def restore(self, requests: Sequence[Request]) -> None:
        """Takes over the log level and the subscriptions of a group whose place this one takes,
        before anything starts.
        """
        with self._lock:
            for request in requests:
                if request.method == _SET_LEVEL:
                    self._level = request.params or _EMPTY
                elif request.method == SUBSCRIBE:
                    uri = merging.text_in(request.params or _EMPTY, "uri")
                    self._subscriptions[uri] = ""

    def start_subscribed(self) -> None:
        """Has the servers start whose resources the client is subscribed to. Never waits."""
        if self._subscriptions:
            start = partial(copy_context().run, self._start_subscribed)
            self._catalogue.look(f"{self.child_id}/subscriptions", start)

    def _start_subscribed(self) -> None:
        self._wait_for_lists(None)
        members, lists = self._now()
        found = [lists.owners.find(uri) for uri in list(self._subscriptions)]
        for number in {one.number for one in found if one is not None}:
            with contextlib.suppress(ProxyError):  # its next call says why
                self._running_of(members[number], None)

    def _restore_state(self, running: RunningServer, has_left: Callable[[], bool] | None) -> None:
        """Tells a server what the client has told it before, or the group; what it does not take
        in time it goes on without.
        """
        requests: list[Request] = []
        if self._level is not None and running.can("logging"):
            requests.append(Request("mcp-proxy-level", _SET_LEVEL, self._level))
        members, lists = self._now()
        for number, uri in enumerate(list(self._subscriptions)):
            found = lists.owners.find(uri)
            if found is not None and members[found.number].name == running.member.name:
                self._subscriptions[uri] = running.member.name
                params = jsonrpc.as_payload({"uri": found.uri})
                requests.append(Request(f"mcp-proxy-subscribe-{number}", SUBSCRIBE, params))
        until = time.monotonic() + RESTORE_TIME
        for request in requests:
            try:
                left = max(0.1, until - time.monotonic())
                running.ask(request, left, has_left)
            except (BackendError, ServerRefused) as error:
                log.warning("[%s] %s was not restored: %s", self.name, request.method, error)

    def _set_level(self, request: Request, has_left: Callable[[], bool] | None) -> None:
        """Tells the running servers, which have it before the calls that follow; the others when
        they start.
        """
        self._level = request.params or _EMPTY
        for running in self._all_running():
            if running.can("logging") and running.bridge.is_alive:
                # Its next start gets the level in any case.
                with contextlib.suppress(BackendError, ServerRefused):
                    running.ask(request, LEVEL_WAIT, has_left)

    def note_lost(self, running: RunningServer) -> None:
        """A server is lost; the next call of it has it started again."""
        with self._lock:
            if self._running.get(running.member.name) is running:
                del self._running[running.member.name]
        asker = self._roots.lost(running)
        if asker is not None:
            question = Request(asker.running.public_id(asker.own_id), ROOTS)
            self._say(ServerMessage(jsonrpc.encode(question), is_response=False))

    # --- the client's roots ----------------------------------------------------------------------

    def passes_roots_question(self, running: RunningServer, own_id: RequestId) -> bool:
        """Whether a server's `roots/list` goes to the client: not where that is known, or where the
        client has it from another server. Never waits.
        """
        asker = Asker(running, own_id)
        verdict = self._roots.ask(asker)
        if verdict.answer is not None:
            self._answer_roots([asker], Response(own_id, verdict.answer))
        return verdict.goes_to_client

    def _answer_roots(self, askers: Sequence[Asker], answer: Response) -> None:
        """Has servers get the same answer, by another thread: each may take its time."""
        for running, own_id in askers:
            own = Response(own_id, answer.result, answer.error)
            key = f"{self.child_id}/roots/{running.serial}/{own_id}"
            self._catalogue.look(key, partial(running.respond, own))

    # --- the standing stream ---------------------------------------------------------------------

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        exchange.attach(self, self.log, on_read=self._note_read)
        with self._lock:
            is_taken = self._stream is not None
        if self.log is not None and not self.log.continue_standing(exchange, after, is_taken):
            exchange.end(replaced=True)
            return
        with self._lock:
            older, self._stream = self._stream, exchange
            waiting = list(self._waiting)
            self._waiting.clear()
        for message in waiting:
            exchange.offer(message)
        if older is not None:
            older.end(replaced=True)
        for running in self._all_running():
            running.listen()

    def _note_read(self) -> None:
        """The client has read something: what had to wait for that goes on."""
        for running in self._all_running():
            running.pass_on()
        for inner in list(self._submitted):
            inner.pass_on()

    @property
    def stream(self) -> Exchange | None:
        """The standing stream of the client."""
        return self._stream

    def end_stream(self) -> None:
        if self._submitted:
            return  # answers are still to be sent on it, as over HTTP+SSE
        with self._lock:
            stream, self._stream = self._stream, None
        for running in self._all_running():
            running.listen()
        if stream is not None:
            stream.end()

    # --- from exchanges --------------------------------------------------------------------------

    def _attach(self, exchange: Exchange) -> None:
        """The exchange is answered here."""
        is_logged = exchange.accepts_stream and exchange.may_be_logged
        exchange.attach(self, self.log if is_logged else None)
        with self._lock:
            self._posts.add(exchange)

    def _offer(self, exchange: Exchange, response: Response) -> None:
        self._offer_last(exchange, ServerMessage(jsonrpc.encode(response), is_response=True))

    def _offer_error(self, exchange: Exchange, request: Request, error: ProxyError) -> None:
        data = jsonrpc.encode_error(error.code, error.message, request.id, error.data)
        self._offer_last(exchange, ServerMessage(data, is_response=True))

    def _offer_failure(self, exchange: Exchange, request: Request, failure: BackendError) -> None:
        data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
        self._offer_last(exchange, ServerMessage(data, is_response=True, failure=failure))

    def _offer_last(self, exchange: Exchange, message: ServerMessage) -> None:
        with self._lock:
            is_open = exchange in self._posts
            self._posts.discard(exchange)
        if is_open:
            exchange.offer(message)

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: no server need know."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """Answers the request of an exchange for which nobody has answered in time."""
        if exchange.requests:
            self._offer_failure(exchange, exchange.requests[0], failure)
            return
        for inner in list(self._submitted):
            inner.exchange.expire_if_due()
        dues = (inner.exchange.deadline for inner in list(self._submitted))
        due = min((each for each in dues if each is not None), default=None)
        if due is not None:
            exchange.set_deadline(due)

    def with_uris(self, member: Member, data: bytes) -> bytes:
        """A message of a server with its URIs as the client knows them."""
        members, lists = self._now()
        numbers = [number for number, each in enumerate(members) if each.name == member.name]
        if not numbers or not lists.owners.is_needed:
            return data
        return lists.owners.shown_in(numbers[0], data)

    def leave(self, exchange: Exchange) -> None:
        """Detaches an exchange whose client has left."""
        self.last_used = time.monotonic()
        with self._lock:
            self._posts.discard(exchange)
            is_stream = self._stream is exchange
            if is_stream:
                self._stream = None
        if is_stream:
            for running in self._all_running():
                running.listen()
            self._close_submitted()

    def _close_submitted(self) -> None:
        """Nobody is there any more for answers that were to come on the standing stream."""
        for inner in list(self._submitted):
            self._submitted.discard(inner)
            inner.exchange.close()

    def expire_left_calls(self) -> None:
        for running in self._all_running():
            running.bridge.expire_left_calls()

    # --- what it is doing ------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        is_gathering = any(not exchange.is_closed for exchange in list(self._posts))
        is_sending = bool(self._under_way or self._submitted)
        return is_gathering or is_sending or any(r.bridge.is_busy for r in self._all_running())

    @property
    def is_watched(self) -> bool:
        return self.is_busy or self._stream is not None

    def is_idle(self, seconds: float) -> bool:
        with self._lock:
            is_needed = bool(self._posts or self._starting or self._under_way or self._stream)
        if is_needed or time.monotonic() - self.last_used < seconds:
            return False
        alive = (running.bridge for running in self._all_running() if running.bridge.is_alive)
        return all(bridge.is_idle(seconds) for bridge in alive)

    def stop_if_idle(self, seconds: float) -> bool:
        if not self.is_idle(seconds):
            return False
        self.close(BackendLost("The servers were stopped while their session was idle"))
        return True

    def hand_over(self) -> bool:
        if self.is_busy:
            return False
        self.close(BackendLost("The session goes to another replica"))
        return True

    def end_between_calls(self) -> bool:
        """A group is no process, so there is none to end: its servers are replaced one by one."""
        self.is_outdated = False
        return False

    def close(self, failure: BackendLost | None = None) -> None:
        with self._lock:
            self.is_alive = False
            running, self._running = list(self._running.values()), {}
            posts, self._posts = list(self._posts), set()
            stream, self._stream = self._stream, None
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()
        failure = failure or BackendLost("The session has ended and its servers were stopped")
        for exchange in posts:
            for request in exchange.requests:
                data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
                exchange.offer(ServerMessage(data, is_response=True, failure=failure))
        for each in running:
            each.bridge.close(failure)
        if stream is not None:
            stream.end()
        self._close_submitted()
