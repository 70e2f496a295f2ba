"""Requests of MCP 2026-07-28 in front of a stdio server, on the endpoint of streamable HTTP.

Every request stands for itself: no handshake, no session, and who leaves takes the request back.
References are to "Streamable HTTP" in the transports page of that revision.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial

from msgspec import UNSET

from mcp_proxy.auth import caller_env
from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.backends.group_messages import named
from mcp_proxy.backends.owned import CREDENTIALS, caller_headers
from mcp_proxy.background import KeyedExecutor
from mcp_proxy.config import ProxyOptions
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.edge import Edge
from mcp_proxy.edge.guard import is_local
from mcp_proxy.edge.reply import Reply, json_reply, stream_reply
from mcp_proxy.edge.request import PASS_TO, ClientRequest
from mcp_proxy.errors import (
    BackendError,
    ClientError,
    InvalidRequest,
    MethodNotFound,
    NotAcceptable,
    ProxyError,
    ServerRefused,
)
from mcp_proxy.ownership.homes import Homes, home_of
from mcp_proxy.ownership.owner import Owner
from mcp_proxy.storage.session import ENV_DIGEST, PRINCIPAL, Session
from mcp_proxy.transports.event_stream import EventStream
from mcp_proxy.transports.stdio import pass_by_id, pass_to_owner
from mcp_proxy.wire import jsonrpc, modern, questions, refusals, revisions
from mcp_proxy.wire.capabilities import ROOTS, kinds_of
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.modern import ModernMeta

log = logging.getLogger(__name__)

#: Who calls without saying who.
ANONYMOUS = "anonymous"

# Besides Authorization, which is looked at for itself.
_CREDENTIALS = CREDENTIALS - {"Authorization"}

_PARAM_HEADER = "HTTP_MCP_PARAM_"


class _Call:
    """A request, who calls, and what that client can be asked for."""

    #: What errors of ours begin with.
    label = ""
    #: Whether nobody waits for it who could send it once more.
    is_apart = False

    def __init__(
        self,
        request: ClientRequest,
        message: Request,
        meta: ModernMeta,
        caller: str,
        is_stranger: bool,
    ) -> None:
        self.request = request
        self.message = message
        self.caller = caller
        self.is_stranger = is_stranger
        self.kinds = kinds_of(meta.capabilities)
        if is_stranger:
            self.kinds -= {ROOTS}  # nobody's roots hold for the others


class StatelessFront:
    """Answers the modern requests of one server. Thread-safe."""

    def __init__(self, owner: Owner, edge: Edge, options: ProxyOptions) -> None:
        self._owner = owner
        self._edge = edge
        self._options = options
        self._homes = Homes(owner, options)
        # Each late request has a thread of the worker's, so that is how many there can be.
        self._openers = KeyedExecutor("mcp-opener", options.threads)
        self._numbers = itertools.count(1)
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<StatelessFront {self._homes!r}>"

    def change(self, options: ProxyOptions, is_other: bool) -> None:
        """Has other settings from the next request on; `is_other`: in front of another server."""
        self._options = options
        self._homes.change(options, is_other)

    def answer(self, request: ClientRequest, message: Request) -> Reply:
        """The answer to one request; raises ProxyError."""
        request.session = None
        meta = modern.require_valid(message, request.header)
        if message.method in modern.REMOVED:
            raise MethodNotFound(message.method)
        is_standing = message.method == modern.LISTEN
        if is_standing:
            require_stream(request)
        exchange = self._sent(self._call(request, message, meta), is_standing)
        return reply_with(exchange, request, message, self._edge, self._options)

    # --- for several servers together ------------------------------------------------------------

    def open(
        self, request: ClientRequest, message: Request, meta: ModernMeta, label: str
    ) -> Exchange:
        """The exchange of a request that has been checked; raises ProxyError.

        What is said in the server's place, soon or late, begins with `label`.
        """
        call = self._call(request, message, meta)
        call.label = label
        try:
            return self._sent(call, is_standing=False)
        except (BackendError, ServerRefused) as error:
            raise named(error, label) from error

    def open_apart(self, request: ClientRequest, message: Request, meta: ModernMeta) -> Exchange:
        """The exchange of a request that is sent on behalf of another one, by a thread of ours.

        It may go on when the client of that one has left. Raises BackendError, StorageError.
        """
        call = self._call(request, message, meta)
        call.is_apart = True
        exchange = self._exchange(call, is_standing=message.method == modern.LISTEN)
        exchange.spans, exchange.has_left = None, lambda: exchange.is_closed
        try:
            self._submit(call, exchange)
        except RuntimeError as error:
            raise BackendError(f"There is no thread for it: {error}") from error
        return exchange

    def pass_to_home(self, request: ClientRequest, message: Request, meta: ModernMeta) -> None:
        """Raises Passed where a request was given to the worker that has the homes of its caller in
        its memory.
        """
        call = self._call(request, message, meta)
        pass_by_id(self._owner, request, self._homes.id_for(call.caller, call.kinds))

    def caller_of(self, request: ClientRequest, message: Request, meta: ModernMeta) -> str:
        """What the server's lists are kept by for this client: who calls, and what it can be asked
        for. Raises StorageError.
        """
        call = self._call(request, message, meta)
        return f"{call.caller}/{','.join(sorted(call.kinds))}"

    def require_known(self, request: ClientRequest, message: Request, meta: ModernMeta) -> None:
        """Raises what has a client fall back to initialize unless it may share a legacy server, or
        the server is known for a modern one.
        """
        if not self.is_modern:
            self._require_known(self._call(request, message, meta))

    # --- sending ---------------------------------------------------------------------------------

    def _sent(self, call: _Call, is_standing: bool) -> Exchange:
        """The exchange of a request that its home has got.

        Or gets, by another thread, once it has started: a client of event streams hears comments
        meanwhile, as it does while a call is in flight.
        """
        may_wait = self._may_wait(call)
        is_late = may_wait and not self._homes.knows_era
        session = backend = None
        try:
            if not is_late:
                session = self._home(call)
            if session is not None:
                pass_to_owner(self._owner, call.request, session, is_stream=is_standing)
                backend = self._owner.backend_at_hand(session)
                is_late = may_wait and backend is None
            exchange = self._exchange(call, is_standing)
            if is_standing:
                take_stream(exchange, call.request, self._edge)
            try:
                if is_late:
                    self._send_late(call, exchange)
                else:
                    self._send(call, exchange, session, backend)
            except BaseException:
                exchange.close()
                raise
            return exchange
        finally:
            if not is_late:
                self._homes.end_first_home(call.caller, call.kinds)

    def _may_wait(self, call: _Call) -> bool:
        """Whether the answer to a request may begin before its home is known.

        The status of some answers tells clients what the server speaks. And where workers have
        their homes in memory a request goes to that of its home before anything else.
        """
        request = call.request
        if not request.accepts_stream or call.message.method == modern.DISCOVER:
            return False
        is_one_of_many = PASS_TO in request.environ and request.environ["wsgi.multiprocess"]
        may_go = is_one_of_many and not self._owner.manager.storage.is_shared
        return self._homes.knows_era or (self._is_known(call) and not may_go)

    def _exchange(self, call: _Call, is_standing: bool) -> Exchange:
        request = call.request
        exchange = Exchange(
            [call.message],
            request.accepts_stream,
            None if is_standing else self._options.request_timeout,
            cancels=True,
            headers={**caller_headers.get(), **_param_headers(request)},
        )
        exchange.has_left, exchange.spans = request.has_left, request.spans
        return exchange

    def _send(
        self, call: _Call, exchange: Exchange, session: Session | None, backend: Backend | None
    ) -> None:
        """Sends an exchange to its home; without one the state of its request leads to none."""
        if session is not None:
            self._owner.send(session, exchange, backend, partial(self._send_anew, call))
        else:
            data = questions.invalid_state(call.message.id)
            exchange.offer(ServerMessage(data, is_response=True))

    def _send_anew(self, call: _Call, exchange: Exchange) -> None:
        """Sends an exchange to the home that it has in front of a server of the other era.

        By any thread: the client's connection stays here.
        """
        call.request.stay()
        session = self._home(call, exchange.has_left)
        if session is not None:
            self._owner.send(session, exchange)
        else:
            self._send(call, exchange, None, None)

    def _send_late(self, call: _Call, exchange: Exchange) -> None:
        """Has another thread send an exchange to its home, which has to start first."""
        has_left = call.request.has_left
        call.request.stay()
        exchange.has_left = lambda: exchange.is_closed or has_left()
        try:
            self._submit(call, exchange)
        except RuntimeError:  # there is no thread: the client's own waits
            self._open(call, exchange)

    def _submit(self, call: _Call, exchange: Exchange) -> None:
        """Has a thread of ours send an exchange; raises RuntimeError where there is none."""
        if self._is_closed:
            raise RuntimeError("the server is not served any more")
        act = partial(copy_context().run, self._open, call, exchange)
        self._openers.submit(f"{next(self._numbers)}", act)

    def _open(self, call: _Call, exchange: Exchange) -> None:
        try:
            self._send(call, exchange, self._home(call, exchange.has_left), None)
        except ProxyError as error:
            exchange.resend = None
            if call.label and isinstance(error, BackendError | ServerRefused):
                error = named(error, call.label)
            exchange.refuse(error)
        except Exception:
            log.exception("a modern request could not be sent")
            exchange.refuse(BackendError("The request could not be served"))
        else:
            if call.is_apart:  # whoever learns late of a loss must not wait for a start
                exchange.resend = None
            exchange.note_sent()
        finally:
            self._homes.end_first_home(call.caller, call.kinds)

    def close(self) -> None:
        """Begins no more homes."""
        self._is_closed = True
        self._openers.close()

    def is_for_modern(self, request: ClientRequest, message: Request, is_sent_on: bool) -> bool:
        """Whether the server speaks this era, which is asked anew; raises ProxyError.

        What has been started to ask a legacy one is left unless the request `is_sent_on` to it.
        """
        call = self._call(request, message, modern.require_valid(message, request.header))
        is_modern = self._homes.is_modern_now(call.caller, call.kinds, request.has_left)
        if not is_modern and not is_sent_on:
            self._homes.end_first_home(call.caller, call.kinds)
        return is_modern

    @property
    def is_modern(self) -> bool:
        """Whether the server is known to speak this era."""
        return self._homes.is_known_modern

    def has_begun(self, request: ClientRequest, message: Request) -> bool:
        """Whether a request belongs to a home that there is; raises ProxyError."""
        call = self._call(request, message, modern.require_valid(message, request.header))
        if message.method in modern.MAY_ASK:
            state = questions.retry_of(message.params).state
            if state is not None:
                return self._homes.session_of(state, call.caller) is not None
        return self._homes.has_home(call.caller, call.kinds)

    def _home(self, call: _Call, has_left: Callable[[], bool] | None = None) -> Session | None:
        """The record of the home that a request goes to; None where its state leads to none.

        Raises InvalidRequest where a client that nobody knows would share a server with others.
        """
        state = None
        if call.message.method in modern.MAY_ASK:
            state = questions.retry_of(call.message.params).state
        if state is not None:
            pass_by_id(self._owner, call.request, home_of(state))
            session = self._homes.session_of(state, call.caller)
            if session is not None:
                return session
        if not self._homes.is_modern(call.caller, call.kinds, has_left or call.request.has_left):
            self._require_known(call)
            if state is not None:
                return None
        is_stream = call.message.method == modern.LISTEN
        home_id = self._homes.id_for(call.caller, call.kinds)
        pass_by_id(self._owner, call.request, home_id, is_stream)
        return self._homes.session_for(home_id, call.caller, call.kinds)

    def _is_known(self, call: _Call) -> bool:
        """Whether a client may share a legacy server with whoever has the same name."""
        return self._options.stateless_children is not None or not call.is_stranger

    def _require_known(self, call: _Call) -> None:
        """Raises what has a client fall back to initialize, and so to a server of its own.

        Its code must not be -32020 to -32022 (versioning, "Backward Compatibility").
        """
        if not self._is_known(call):
            spoken = ", ".join(revisions.LEGACY)
            raise InvalidRequest(
                f"Revision {modern.REVISION} is not served here without Authorization; initialize "
                f"at one of {spoken}"
            )

    def _call(self, request: ClientRequest, message: Request, meta: ModernMeta) -> _Call:
        caller = self._caller_of(request)
        is_stranger = caller == ANONYMOUS and (
            self._options.public_url is not None or not is_local(request.environ)
        )
        return _Call(request, message, meta, caller, is_stranger)

    def _caller_of(self, request: ClientRequest) -> str:
        """Who calls: what a record has of the principal. Without one a digest of what the
        Authorization header says, ANONYMOUS without that.

        Where headers go on to the server, others of them say so, too, behind a `.`; and where the
        server gets variables of its caller these do, beside the principal. Raises StorageError.
        """
        authorization = (request.header("Authorization") or "").strip()
        shown = self._values_shown()
        if request.principal_name is not None:
            whose = self._owner.manager.binding(request.principal_name)[PRINCIPAL]
        else:
            whose = self._digest([authorization]) if authorization else ANONYMOUS
            if headers := caller_headers.get():
                given = sorted(headers.items())
                shown += [value for name, value in given if name.title() in _CREDENTIALS]
        return f"{whose}.{self._digest(shown)}" if any(shown) else whose

    def _values_shown(self) -> list[str]:
        """What stands for the variables that a child gets of its caller; empty without any."""
        values = caller_env.current_values()
        if not values:
            return []
        return [self._owner.manager.binding(None, caller_env.as_text(values))[ENV_DIGEST]]

    def _digest(self, shown: list[str]) -> str:
        return self._owner.manager.callers.digest("\0".join(shown).encode("latin-1", "replace"))


def require_stream(request: ClientRequest) -> None:
    """Raises NotAcceptable for a client that takes no event streams."""
    if not request.accepts_stream:
        raise NotAcceptable("Accept must name text/event-stream")


def take_stream(exchange: Exchange, request: ClientRequest, edge: Edge) -> None:
    """Takes a place for the standing stream that a request asks for; raises Overloaded."""
    request.is_standing = True
    edge.streams.acquire()
    exchange.on_close = edge.streams.release


def reply_with(
    exchange: Exchange, request: ClientRequest, message: Request, edge: Edge, options: ProxyOptions
) -> Reply:
    """The answer that an exchange has for a request; raises ProxyError, and closes it then.

    JSON with the status of its error where the answer comes first, else an event stream.
    """
    try:
        return _reply(exchange, request, message, edge, options)
    except BaseException:
        exchange.close()
        raise


def _reply(
    exchange: Exchange, request: ClientRequest, message: Request, edge: Edge, options: ProxyOptions
) -> Reply:
    early = _received_early(request, exchange, options.sse_after)
    request.is_relayed, request.backend = exchange.is_relayed, exchange.backend
    if exchange.is_over and early and early[0].is_response and request.accepts_json:
        exchange.close()
        (answer,) = early
        if answer.failure is not None:
            raise answer.failure
        if refusals.TOLD_BY in answer.data:
            refusals.require_none(answer.data)
        return json_reply(answer.data, _status_of(answer))
    exchange.begin_stream()
    is_standing = request.is_standing
    body = EventStream(
        exchange,
        request.standing_connection() if is_standing else ClientConnection(request.environ),
        options.keepalive_interval,
        early=early,
        request_id=message.id,
        on_failure=request.note,
        on_response=request.answered,
        watcher=edge.disconnects if is_standing else None,
    )
    return stream_reply(body)


def _received_early(
    request: ClientRequest, exchange: Exchange, sse_after: float
) -> list[ServerMessage]:
    """The first message, which decides about the form of the answer, if it comes soon.

    A client that takes JSON alone waits for the answer.
    """
    takes_stream = request.accepts_stream
    waits = sse_after if takes_stream else threading.TIMEOUT_MAX
    until = time.monotonic() + waits
    while not exchange.is_over:
        message = exchange.receive(until - time.monotonic())
        if message is None:
            break
        if message.is_response or takes_stream:
            return [message]
    return []


def is_modern(request: ClientRequest, message: Request | Notification) -> bool:
    """Whether a message is of this era: its metadata decides, not its method.

    One whose header alone says so gets the errors of this era, unless it is of a session.
    """
    version = request.protocol_version
    if version is not None and revisions.is_modern(version) and request.session_id is None:
        return True
    try:
        return message.meta.protocol_version is not UNSET
    except ClientError:
        return False


def _param_headers(request: ClientRequest) -> dict[str, str]:
    """The headers that repeat arguments of a tool, by their names in lower case."""
    if _PARAM_HEADER not in "\n".join(request.environ):  # nearly always, and this is the quickest
        return {}
    return {
        "mcp-param-" + name.removeprefix(_PARAM_HEADER).lower().replace("_", "-"): value
        for name, value in request.environ.items()
        if name.startswith(_PARAM_HEADER)
    }


def _status_of(answer: ServerMessage) -> int:
    """The HTTP status for an answer of the server ("HTTP Status Codes")."""
    if b'"error"' not in answer.data:
        return 200
    response = jsonrpc.parse_message(answer.data)
    if not isinstance(response, Response) or response.error is UNSET:
        return 200
    code = jsonrpc.id_of(jsonrpc.fields_of(response.error).get("code", UNSET))
    return modern.status_of(code) if isinstance(code, int) else 200
