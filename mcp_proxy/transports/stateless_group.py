"""Requests of MCP 2026-07-28 for several servers together.

There is no session and no record: a call goes where it would go at the endpoint of the server that
its name leads to, with the same home or target, and a retry goes the same way. What is for all
servers, lists and subscriptions, each of them is asked by a request of ours.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from functools import cached_property, partial
from typing import NamedTuple

from msgspec import Raw

from mcp_proxy.backends import group_requests
from mcp_proxy.backends.catalogue import Catalogue, Listed
from mcp_proxy.backends.exchange import Exchange, ServerMessage, wait_for
from mcp_proxy.backends.group import INITIALIZE_WAIT, Settings
from mcp_proxy.backends.group_lists import GroupLists, Part, lists_of
from mcp_proxy.backends.group_messages import ServerVoice
from mcp_proxy.backends.group_requests import BY_NAME, COMPLETE, NO_VALUES, Addressed
from mcp_proxy.backends.group_server import LOOK_TIME, Member, label_of
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.guard import is_local
from mcp_proxy.edge.reply import Reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import (
    PROXY_ERROR,
    BackendError,
    BackendLost,
    BackendTimeout,
    ClientError,
    InvalidParams,
    MethodNotFound,
    ProxyError,
)
from mcp_proxy.transports.group_listening import GroupListening, Heard
from mcp_proxy.transports.group_survey import Asked, Learnt, Survey, looked_up
from mcp_proxy.transports.stateless import StatelessFront, reply_with, require_stream, take_stream
from mcp_proxy.wire import jsonrpc, listening, merging, modern, results
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.listening import Filter
from mcp_proxy.wire.modern import ModernMeta

# Servers that are remembered for not having answered.
_MAX_SILENT = 1000

_READ = "resources/read"


class FrontedMember(NamedTuple):
    """A server of a group, and what answers modern requests for it alone.

    `on_behalf_of` has what is done meanwhile be done for whoever has sent a request; it raises
    ClientError where that does not say all that the server needs. `front` is None for a server that
    is not served, for a `reason`.
    """

    member: Member
    front: StatelessFront | None
    on_behalf_of: Callable[[ClientRequest], AbstractContextManager[object]]
    reason: str = ""


class _Seen(NamedTuple):
    """A server as one caller sees it; `key` is what its lists are known by.

    `front` is None where it is missing for this caller, for a `reason`.
    """

    member: Member
    front: StatelessFront | None
    key: str
    context: Context
    reason: str


class _Underway(NamedTuple):
    """A server that is being asked, since when (monotonic), and who waits for that."""

    since: float
    surveys: list[Survey]


class _Call:
    """A request for a group, and what its caller sees. Used by one thread at a time."""

    def __init__(
        self,
        request: ClientRequest,
        message: Request,
        meta: ModernMeta,
        members: Sequence[FrontedMember],
    ) -> None:
        self.request = request
        self.message = message
        self.meta = meta
        self.members = members

    @cached_property
    def seen(self) -> list[_Seen]:
        """All servers, with what is particular to this caller."""
        return [self._seen(fronted) for fronted in self.members]

    def _seen(self, fronted: FrontedMember) -> _Seen:
        member, front = fronted.member, fronted.front
        if front is None:
            return _Seen(member, None, "", copy_context(), fronted.reason)
        try:
            with fronted.on_behalf_of(self.request):
                caller = front.caller_of(self.request, self.message, self.meta)
                key = f"{modern.REVISION}/{member.key(b'', None, {})}/{caller}"
                return _Seen(member, front, key, copy_context(), "")
        except ClientError as error:
            return _Seen(member, None, "", copy_context(), error.message)

    def open_at(self, seen: _Seen, method: str, params: Raw) -> Exchange:
        """A request of ours to one server, which is said to come from the same client."""
        assert seen.front is not None
        fields = modern.meta_of(self.message.params)
        fields.pop(modern.PROGRESS_TOKEN, None)
        message = Request(f"mcp-proxy-{method}", method, modern.with_meta(params, fields))
        # One context may be entered once at a time.
        enter = seen.context.copy().run
        return enter(seen.front.open_apart, self.request, message, self.meta)


class StatelessGroup:
    """Answers the modern requests of a group. Thread-safe.

    `members` are those that there are just now, in their order.
    """

    def __init__(
        self,
        members: Callable[[ClientRequest], Sequence[FrontedMember]],
        catalogue: Catalogue,
        settings: Settings,
        edge: Edge,
        options: ProxyOptions,
    ) -> None:
        self._members = members
        self._catalogue = catalogue
        self._settings = settings
        self._edge = edge
        self._options = options
        self._lock = threading.Lock()  # guards what follows
        self._underway: dict[str, _Underway] = {}  # by what is asked, of whom, for whom
        self._silent: dict[str, bool] = {}  # the keys of those that did not answer at all
        self._listening: weakref.WeakSet[GroupListening] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<StatelessGroup {self._settings.name} listening={len(self._listening)}>"

    def change(self, options: ProxyOptions) -> None:
        """Has other settings from the next request on."""
        self._options = options

    def answer(self, request: ClientRequest, message: Request) -> Reply:
        """The answer to one request; raises ProxyError."""
        request.session = None
        meta = modern.require_valid(message, request.header)
        call = _Call(request, message, meta, self._members(request))
        method = message.method
        if method in modern.REMOVED:
            raise MethodNotFound(method)
        self._require_known(call)
        try:
            return self._answer(call)
        except InvalidParams as error:  # as a server would say it, with HTTP's own 200
            data = jsonrpc.encode_error(error.code, error.message, message.id, error.data)
            return self._answered(call, data)

    def _answer(self, call: _Call) -> Reply:
        method = call.message.method
        if method in BY_NAME or method in (_READ, COMPLETE):
            return self._call_one(call)
        if method in merging.KINDS:
            return self._list(call)
        if method == modern.DISCOVER:
            return self._discover(call)
        if method == modern.LISTEN:
            return self._listen(call)
        raise MethodNotFound(method)

    def _require_known(self, call: _Call) -> None:
        """Raises what has a client fall back to initialize where one of the servers may be a legacy
        one that such a client must not share: else it would lose that server without a word.
        """
        is_near = self._options.public_url is None and is_local(call.request.environ)
        if is_near or call.request.principal_name is not None:
            return
        for seen in call.seen:
            if seen.front is not None and not seen.front.is_modern:
                enter = seen.context.copy().run
                enter(seen.front.require_known, call.request, call.message, call.meta)

    # --- what is for one server ------------------------------------------------------------------

    def _call_one(self, call: _Call) -> Reply:
        found = self._addressed(call)
        if found is None:
            response = Response(call.message.id, self._upgraded(call, NO_VALUES))
            return self._answered(call, jsonrpc.encode(response))
        return self._forward(call, found)

    def _addressed(self, call: _Call) -> Addressed | None:
        """Whose a request is; None for a completion of nobody's. Raises InvalidParams."""
        message = call.message
        if message.method == COMPLETE:
            return group_requests.completion(message, self._lists(call))
        members = [each.member for each in call.members]
        if message.method in BY_NAME and (found := group_requests.by_prefix(message, members)):
            return found
        if group_requests.needs_lists(message):
            self._learn(call)
        if message.method in BY_NAME:
            return group_requests.by_name(message, members, self._lists(call))
        found = group_requests.by_uri(message, self._lists(call))
        if found is None:
            uri = group_requests.uri_of(message)
            error = InvalidParams(f"Resource not found: {uri[:200]}")
            error.data = {"uri": uri}
            raise error
        return found

    def _forward(self, call: _Call, found: Addressed) -> Reply:
        fronted = call.members[found.number]
        label = label_of(fronted.member)
        if fronted.front is None:
            raise BackendLost(f"{label}: The server is not served: {fronted.reason}")
        with fronted.on_behalf_of(call.request):
            exchange = fronted.front.open(call.request, found.request, call.meta, label)
        exchange.rewrite = partial(_shown, self._voice(call, found.number))
        return reply_with(exchange, call.request, call.message, self._edge, self._options)

    def _with_uris(self, call: _Call, number: int, data: bytes) -> bytes:
        owners = self._lists(call).owners
        return owners.shown_in(number, data) if owners.is_needed else data

    # --- what is known ---------------------------------------------------------------------------

    def _lists(self, call: _Call, learnt: Mapping[str, Learnt] | None = None) -> GroupLists:
        """The lists as this caller sees them; those of servers that have just been asked are
        `learnt`.
        """
        parts = []
        for seen in call.seen:
            found = None if learnt is None else learnt.get(seen.key)
            listed = self._catalogue.listed(seen.key) if found is None else found.listed
            parts.append(_part(seen.member, listed))
        return lists_of(tuple(parts))

    def _missing(self, call: _Call, learnt: Mapping[str, Learnt]) -> dict[str, str]:
        """The servers of which this caller sees nothing, with the reason."""
        found: dict[str, str] = {}
        for seen in call.seen:
            if seen.front is None:
                found[seen.member.name] = seen.reason
            elif seen.key not in learnt and self._catalogue.listed(seen.key) is None:
                reason = self._catalogue.reason(seen.key)
                found[seen.member.name] = reason or "it has not answered yet"
        return found

    def _learn(self, call: _Call) -> None:
        """Waits for lists that are unknown, where they say whose something is."""
        if all(self._catalogue.listed(seen.key) is not None for seen in call.seen if seen.front):
            return
        are_known = threading.Event()
        timeout = self._settings.gather_timeout
        self._survey(call, None, timeout, lambda learnt: are_known.set())
        wait_for(are_known, timeout + 1, call.request.has_left)

    def _survey(
        self,
        call: _Call,
        methods: Sequence[str] | None,
        timeout: float,
        done: Callable[[Mapping[str, Learnt]], object],
    ) -> None:
        """Asks servers for these lists, and those of which nothing is known for all; without any
        what they say of themselves, and for None nothing else. `done` gets what they have said
        after `timeout` seconds at the latest; a server that others wait for already is waited for
        as long as by them.
        """
        self._stay(call)
        survey = Survey(done)
        begun = [self._asked(call, seen, methods, survey) for seen in call.seen]
        for asked in filter(None, begun):
            self._call_later(LOOK_TIME, asked.give_up)
            asked.begin()
        end = time.monotonic() + timeout
        self._call_later(timeout, survey.finish)
        for key, until in survey.awaited().items():
            if until < end:
                self._call_later(until - time.monotonic(), partial(survey.give_up, key))
        survey.finish_if_whole()

    def _call_later(self, seconds: float, act: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # no thread: each server has its own time limit
            self._catalogue.timer.call_later(seconds, act)

    def _asked(
        self, call: _Call, seen: _Seen, methods: Sequence[str] | None, survey: Survey
    ) -> Asked | None:
        """What asks a server for a survey; None where that is not asked, or is being asked.

        Nobody waits for one that has not answered others in time.
        """
        key, known = seen.key, self._catalogue.listed(seen.key)
        if seen.front is None or (known is not None and methods is None):
            return None
        now = time.monotonic()
        with self._lock:
            others = self._underway.get(key)
            until = self._settings.gather_timeout + (now if others is None else others.since)
            is_in_time = key not in self._silent and now < until
            if is_in_time:
                survey.expect(key, until)
            if others is not None and (known is None or not is_in_time):
                others.surveys.append(survey)
                return None
            # What has begun before a client asks may be older than what that client has heard of.
            own = _Underway(now, [survey])
            self._underway.setdefault(key, own)
        note = partial(self._note_learnt, key, own)
        return Asked(partial(call.open_at, seen), looked_up(known, methods or ()), note)

    def _stay(self, call: _Call) -> None:
        """Has a request answered here; raises Passed where another worker has the homes of its
        caller in its memory.
        """
        for seen in call.seen:
            if seen.front is not None:
                act = seen.context.copy().run
                act(seen.front.pass_to_home, call.request, call.message, call.meta)
                break
        call.request.stay()

    def _note_learnt(self, key: str, own: _Underway, learnt: Learnt | ProxyError) -> None:
        """A server has said what it lists, or has not."""
        with self._lock:
            if self._underway.get(key) is own:
                del self._underway[key]
            surveys = list(own.surveys)
            was_missing = self._silent.pop(key, False) or self._catalogue.reason(key) is not None
            if isinstance(learnt, BackendTimeout):
                self._silent[key] = True
                if len(self._silent) > _MAX_SILENT:
                    del self._silent[next(iter(self._silent))]
        if isinstance(learnt, Learnt):
            took = time.monotonic() - own.since
            known = self._catalogue.listed(key)
            others = {} if known is None else known.lists
            whole = Listed(learnt.listed.result, {**others, **learnt.listed.lists})
            learnt = learnt._replace(listed=whole)
            self._catalogue.note(key, whole)
            if was_missing or took > self._settings.gather_timeout:
                for each in self._all_listening():
                    each.note_come(key)
        else:
            self._catalogue.note_failure(key, learnt.message)
        for survey in surveys:
            survey.note(key, learnt)

    # --- what is for all -------------------------------------------------------------------------

    def _list(self, call: _Call) -> Reply:
        cursor = jsonrpc.fields_of(call.message.params).get("cursor")
        if cursor is not None and bytes(cursor) != b"null":
            raise InvalidParams("There is one page only: cursor is none")
        method = call.message.method
        # Whose a resource is depends on both lists.
        methods = merging.TOGETHER.get(method, (method,))
        exchange = self._exchange(call)
        done = partial(self._offer_list, call, exchange)
        self._survey(call, methods, self._settings.gather_timeout, done)
        return reply_with(exchange, call.request, call.message, self._edge, self._options)

    def _offer_list(self, call: _Call, exchange: Exchange, learnt: Mapping[str, Learnt]) -> None:
        method = call.message.method
        lists, missing = self._lists(call, learnt), self._missing(call, learnt)
        if all(seen.member.name in missing for seen in call.seen):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            failure = BackendError(f"No server of the group can be reached ({reasons})")
            data = jsonrpc.encode_error(PROXY_ERROR, failure.message, call.message.id)
            exchange.offer(ServerMessage(data, is_response=True, failure=failure))
            return
        missing |= lists.left_out()
        is_public = call.request.principal_name is None and all(
            one.is_public for one in learnt.values()
        )
        is_whole = not missing and len(learnt) == len(call.seen)
        hints = {
            "ttlMs": min(one.ttl for one in learnt.values()) if is_whole else 0,
            "cacheScope": "public" if is_public and is_whole else "private",
        }
        result = merging.list_result(method, lists.entries(method), missing, hints)
        self._offer(exchange, call, result)

    def _discover(self, call: _Call) -> Reply:
        exchange = self._exchange(call)
        done = partial(self._offer_discovered, call, exchange)
        self._survey(call, (), min(INITIALIZE_WAIT, self._settings.gather_timeout), done)
        return reply_with(exchange, call.request, call.message, self._edge, self._options)

    def _offer_discovered(
        self, call: _Call, exchange: Exchange, learnt: Mapping[str, Learnt]
    ) -> None:
        missing = self._missing(call, learnt) | self._lists(call, learnt).left_out()
        listed = [(seen.member.prefix, self._catalogue.listed(seen.key)) for seen in call.seen]
        known = [(prefix, each) for prefix, each in listed if each is not None]
        result = merging.discover_result(
            modern.SUPPORTED,
            merging.capabilities(
                [each.capabilities or Raw(b"{}") for _, each in known], len(known) == len(listed)
            ),
            merging.instructions(
                [(prefix, merging.text_in(each.result, "instructions")) for prefix, each in known],
                missing,
            ),
        )
        self._offer(exchange, call, result)

    def _exchange(self, call: _Call) -> Exchange:
        """An exchange that is answered here."""
        request = call.request
        exchange = Exchange(
            [call.message], request.accepts_stream, self._options.request_timeout, cancels=True
        )
        exchange.has_left, exchange.spans = request.has_left, request.spans
        exchange.attach(_Here())
        return exchange

    def _answered(self, call: _Call, data: bytes) -> Reply:
        exchange = self._exchange(call)
        exchange.offer(ServerMessage(data, is_response=True))
        return reply_with(exchange, call.request, call.message, self._edge, self._options)

    def _offer(self, exchange: Exchange, call: _Call, result: Raw) -> None:
        data = jsonrpc.encode(Response(call.message.id, self._upgraded(call, result)))
        exchange.offer(ServerMessage(data, is_response=True))

    def _upgraded(self, call: _Call, result: Raw) -> Raw:
        info = merging.server_info(self._settings.name, self._settings.version)
        return results.upgraded_result(call.message.method, result, info)

    # --- subscriptions ---------------------------------------------------------------------------

    def _listen(self, call: _Call) -> Reply:
        require_stream(call.request)
        asked = listening.filter_of(call.message.params)
        if asked.uris:
            self._learn(call)
        self._stay(call)
        owners = self._lists(call).owners
        uris = tuple(uri for uri in asked.uris[: listening.MAX_URIS] if owners.find(uri))
        wanted = Filter(asked.tools, asked.prompts, asked.resources, uris)
        exchange = Exchange([call.message], True, None, cancels=True)
        exchange.has_left, exchange.spans = call.request.has_left, call.request.spans
        take_stream(exchange, call.request, self._edge)
        try:
            made = GroupListening(
                exchange,
                call.message.id,
                wanted,
                partial(self._heard, call),
                self._catalogue.timer,
            )
            with self._lock:
                self._listening.add(made)
            made.begin()
        except BaseException:
            exchange.close()
            raise
        return reply_with(exchange, call.request, call.message, self._edge, self._options)

    def _heard(self, call: _Call, wanted: Filter) -> dict[str, Heard]:
        """The servers that a client listens to, as they are now."""
        now = _Call(call.request, call.message, call.meta, self._members(call.request))
        owners = self._lists(now).owners
        found = [each for each in map(owners.find, wanted.uris) if each is not None]
        heard: dict[str, Heard] = {}
        for number, seen in enumerate(now.seen):
            if seen.front is None:
                continue
            uris = tuple(each.uri for each in found if each.number == number)
            own = Filter(wanted.tools, wanted.prompts, wanted.resources, uris)
            heard[f"{seen.member.prefix}/{seen.key}"] = Heard(
                seen.front, partial(_subscribed, now, seen), own, self._voice(now, number)
            )
        return heard

    def announce_changes(self) -> None:
        """Has clients that listen told of servers that have come or gone. Never waits."""
        for each in self._all_listening():
            self._catalogue.look(f"{self._settings.name}/listening/{id(each)}", each.note_servers)

    def end_streams(self) -> None:
        """Ends all subscriptions in good order."""
        for each in self._all_listening():
            each.end()

    def _all_listening(self) -> list[GroupListening]:
        with self._lock:
            return list(self._listening)

    def _voice(self, call: _Call, number: int) -> ServerVoice:
        member = call.members[number].member
        with_uris = partial(self._with_uris, call, number)
        return ServerVoice(label_of(member), member.prefix, with_uris)


def _subscribed(call: _Call, seen: _Seen, wanted: Filter) -> Exchange:
    """A subscription of ours at one server."""
    params = jsonrpc.as_payload({"notifications": wanted})
    return call.open_at(seen, modern.LISTEN, params)


def _part(member: Member, listed: Listed | None) -> Part:
    return Part(member.name, member.prefix, member.tools, member.schemes, listed)


def _shown(voice: ServerVoice, message: ServerMessage) -> ServerMessage:
    """A message of a server as the client gets it."""
    if message.is_response:
        return voice.answer(message)
    parsed = jsonrpc.parse_message(message.data)
    if not isinstance(parsed, Notification):
        return message
    changed = voice.notification(parsed)
    return message if changed is parsed else message._replace(data=jsonrpc.encode(changed))


class _Here:
    """The source of an answer that is put together here, whoever is asked for it."""

    def stream_begun(self, exchange: Exchange) -> None:
        """Does nothing: no server need know."""

    def expire(self, exchange: Exchange, failure: BackendError) -> None:
        """Answers that there is no answer."""
        (request,) = exchange.requests
        data = jsonrpc.encode_error(PROXY_ERROR, failure.message, request.id)
        exchange.offer(ServerMessage(data, is_response=True, failure=failure))

    def leave(self, exchange: Exchange) -> None:
        """Does nothing: what the servers say is taken note of all the same."""
