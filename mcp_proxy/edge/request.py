"""A client's request: a thin view of the WSGI environ (PEP 3333), made once per request."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import UNSET, Raw, UnsetType
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.wsgi import get_input_stream

from mcp_proxy import metrics
from mcp_proxy.auth.principal import Caller, Principal
from mcp_proxy.edge.disconnects import ClientConnection
from mcp_proxy.edge.operations import Operations, count_failure, kind_of
from mcp_proxy.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientError,
    InvalidRequest,
    Passed,
    ProxyError,
    RequestId,
)
from mcp_proxy.wire import headers
from mcp_proxy.wire.jsonrpc import (
    CANCELLED,
    Batch,
    Message,
    Notification,
    Request,
    cancelled_id_of,
)
from mcp_proxy.wire.outcomes import Outcome, outcomes_in

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from mcp_proxy.spans import CallSpans, Tracer

log = logging.getLogger(__name__)

# RFC 9110 section 8.6; a length with more digits is too large anyway.
_LENGTH = re.compile(r"[0-9]{1,18}")

_MAX_REQUEST_ID = 128

#: Characters of a session's id that are shown: the whole is a credential.
SHOWN_OF_ID = 8

# Seconds for which a client that has closed its sending side is taken to wait for the answer.
_HALF_CLOSED = 1.0

# RFC 9112 section 3.2: origin-form begins with `/`, absolute-form with the scheme. What follows the
# scheme's host is the path, or the query where there is no path.
_ABSOLUTE_FORM = re.compile(r"https?://[^/?#]+(?=[/?]|\Z)", re.IGNORECASE)

#: Where our worker class has what gives a request to another worker of this machine.
PASS_TO = "mcp_proxy.pass_to"

# Requests that others may be waiting for, and that take no time themselves.
_NEVER_HELD = frozenset({"ping", "tasks/get", "tasks/cancel"})

#: Where it has what counts the calls of a session that have a thread.
ADMIT = "mcp_proxy.admit"

#: Where it has what cancels a call that waits to have one.
CANCEL = "mcp_proxy.cancel"

#: What our worker class says of a request that another worker has given to it.
WAS_PASSED = "mcp_proxy.was_passed"

#: What it says of one that was counted for its caller (`rate_limit`) when it was read before.
WAS_COUNTED = "mcp_proxy.was_counted"

# Where servers tell the whole target: gunicorn and werkzeug, and uWSGI and mod_wsgi.
_WHOLE_TARGETS = ("RAW_URI", "REQUEST_URI")


class RequestIds:
    """Ids for requests without one: a nonce of this process and a number. Thread-safe.

    They are no secrets. The nonce is drawn with the first id, and again after a fork.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._nonce = ""
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """An id that no other request has."""
        pid = os.getpid()
        if self._pid != pid:
            # Two threads may both get here and use two nonces; the numbers keep the ids unique.
            self._nonce = secrets.token_hex(4)
            self._pid = pid
        return f"{self._nonce}{next(self._numbers):08x}"


class ClientRequest:
    """One HTTP request. Used by one thread at a time.

    `session_id`, `protocol_version` and `content_type` are the headers of that name, None where
    they are absent; a client without Accept accepts JSON only. `is_encoded` says whether the body
    is compressed, say. `message` is what a POST carried, once it was read, if the answer to it
    leaves on this response: failures then do as well.

    Others are for the log: `id` is the client's X-Request-ID if it is valid, else one of `ids`;
    `rpc` is the JSON-RPC method and `params` are its parameters, `session` is the session that was
    named or opened, `record` is what the store has of it, `backend` is what has answered, and
    `reason` says why the request was refused or failed, each once it is known. Where `is_logged`,
    `outcome` is how a call of a stream has ended, of several the first that failed.
    `is_standing` is for the server: the answer is a standing stream. `principal` is who calls, and
    `principal_name` what the caller's sessions are bound to; None where callers are unknown.
    `lacks` is why no child can be started with what the request says of its caller, if that is so.

    Others are for metrics: `server` is the name of the MCP server, `is_relayed` says that another
    replica has it, `is_answered_elsewhere` that the answer leaves on the stream of a session, and
    `failure` is the last error that the client was told.
    """

    __slots__ = (
        "_connection",
        "_is_known",
        "accepts_json",
        "accepts_stream",
        "backend",
        "body",
        "content_type",
        "environ",
        "failure",
        "id",
        "is_answered_elsewhere",
        "is_counted",
        "is_encoded",
        "is_logged",
        "is_relayed",
        "is_standing",
        "lacks",
        "message",
        "method",
        "operations",
        "outcome",
        "params",
        "path",
        "principal",
        "principal_name",
        "protocol_version",
        "reason",
        "record",
        "rpc",
        "server",
        "session",
        "session_id",
        "spans",
        "started",
    )

    def __init__(self, environ: WSGIEnvironment, ids: RequestIds, server: str = "") -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ.get("PATH_INFO", "")
        accept: str = environ.get("HTTP_ACCEPT", headers.JSON)
        self.accepts_json = headers.accepts(accept, headers.JSON)
        self.accepts_stream = headers.accepts(accept, headers.EVENT_STREAM)
        self.content_type: str | None = environ.get("CONTENT_TYPE") or None
        encoding: str = environ.get("HTTP_CONTENT_ENCODING", "")
        self.is_encoded = encoding.strip().lower() not in ("", "identity")
        self.session_id: str | None = environ.get("HTTP_MCP_SESSION_ID")
        self.protocol_version: str | None = environ.get("HTTP_MCP_PROTOCOL_VERSION")
        given: str | None = environ.get("HTTP_X_REQUEST_ID")
        self.id = given if given and _is_request_id(given) else ids.new()
        self.started = time.monotonic()
        self._connection: ClientConnection | None = None
        #: The whole body, where the request may be put off, until it is known that it is not.
        self.body = b""
        self.message: Message | Batch | None = None
        self.reason = ""
        self.rpc: str | None = None
        self.params: Raw | UnsetType = UNSET
        self.session = self.session_id
        self.record: Mapping[str, str] | None = None
        self.backend = ""
        self.is_logged = False
        self.outcome: Outcome | None = None
        #: The spans of what it asks for, where that is traced and known.
        self.spans: CallSpans | None = None
        self.is_standing = False
        self.server = server
        self.is_relayed = self.is_answered_elsewhere = False
        self.failure: ProxyError | None = None
        #: What the request asks for, where that is counted, once there is an answer.
        self.operations: Operations | None = None
        #: Whether it was counted for its caller, here or where it was read before.
        self.is_counted = WAS_COUNTED in environ
        self.lacks: ClientError | None = None
        self.principal: Principal | None = None
        self.principal_name: str | None = None
        self._is_known: Callable[[], bool] | None = None

    def identify(self, caller: Caller) -> None:
        """From now on it is known who calls."""
        self.principal = caller.principal
        self.principal_name = caller.principal.name
        self._is_known = caller.is_known

    def standing_connection(self) -> ClientConnection:
        """The connection behind a standing stream: it ends when the caller is no longer known."""
        return ClientConnection(self.environ, self._is_known)

    def note(self, error: ProxyError) -> None:
        """Has the access line say what went wrong, and counts it.

        The error loses its traceback: the frames there hold this request, which holds the error,
        and all of that would stay until the collector comes.
        """
        self.failure = error.with_traceback(None)
        counters = metrics.current()
        if counters is not None:
            count_failure(counters, self.server, error)
        if error.kind or error.status >= 400:
            self.reason = f"{error.kind}: {error}" if error.kind else str(error)

    def answered(self, data: bytes, failure: ProxyError | None = None) -> None:
        """A response is about to leave on the stream that answers this request.

        `failure` is why the proxy has written it itself.
        """
        if self.operations is not None:
            self.operations.answered(data, failure)
        if self.is_logged:
            self.note_outcome(data, failure)
        if self.spans is not None:
            self.spans.answered(data, kind_of(failure))

    def begin_spans(self, tracer: Tracer, message: Message | Batch | None) -> None:
        """Has what a POST asks for traced; to be called once it is known."""
        parts = message if isinstance(message, list) else [message]
        requests = [part for part in parts if isinstance(part, Request)]
        if requests:
            attributes: dict[str, str | int] = {
                "network.transport": "tcp",
                "network.protocol.name": "http",
                "mcp_proxy.server": self.server,
            }
            known = {
                "client.address": self.environ.get("REMOTE_ADDR"),
                "mcp.protocol.version": self.protocol_version,
                "mcp.session.id": self.session_id and self.session_id[-SHOWN_OF_ID:],
                "enduser.id": self.principal_name,
            }
            attributes |= {name: value for name, value in known.items() if value}
            self.spans = tracer.spans(requests, attributes, self.environ, self.started)

    def note_outcome(self, data: bytes, failure: ProxyError | None = None) -> None:
        """Has the access line say how this has ended, unless something has failed before."""
        if self.outcome is not None and self.outcome.error_type:
            return
        outcomes = outcomes_in(data)
        found = next((each for each in outcomes if each.error_type), outcomes[0])
        self.outcome = found if failure is None else found._replace(error_type=kind_of(failure))

    @property
    def way(self) -> str:
        """How the request has come to its server: local, passed or relayed."""
        if self.is_relayed:
            return "relayed"
        return "passed" if WAS_PASSED in self.environ else "local"

    def header(self, name: str) -> str | None:
        """The value of a request header, None where it is absent."""
        value: str | None = self.environ.get(_key_of(name))
        return value

    def has_left(self) -> bool:
        """Whether the client is known to have left.

        One that has only closed its sending side may still read: it counts once it has waited.
        """
        if time.monotonic() - self.started < _HALF_CLOSED:
            return False
        if self._connection is None:
            self._connection = ClientConnection(self.environ)
        return self._connection.has_left()

    def pass_to(self, replica_id: str | None, session_id: str, is_stream: bool = False) -> None:
        """Raises Passed where the request was given to the worker that is this replica.

        Without a replica it is for the worker that has the session in its memory, as the id says;
        Unpassable is raised where a request of this form cannot go there. To be called once what it
        carries was read and checked, before anything is done. Without a session it is for a worker
        that has clearly fewer sessions than this one. Where the replica is this one, or out
        of reach, or better relayed to, nothing happens, then and later.
        """
        give = self.environ.pop(PASS_TO, None)
        if give is not None and give(
            replica_id, session_id, self.body, self.id, is_stream, self.is_counted
        ):
            raise Passed
        if ADMIT not in self.environ:
            self.body = b""

    def admit(self, session_id: str) -> frozenset[RequestId]:
        """Raises Passed where calls of this session have as many threads as those of one may have.

        The request then comes again, when one of them has ended; Overloaded is raised for one that
        cannot. What is returned are its calls that were cancelled until then, and that nobody is
        to make. To be called for a request that waits for an answer, before anything is done.
        """
        admit = None if self.rpc in _NEVER_HELD else self.environ.pop(ADMIT, None)
        cancelled: frozenset[RequestId] | None = frozenset()
        if admit is not None:
            parts = self.message if isinstance(self.message, list) else [self.message]
            calls = [part.id for part in parts if isinstance(part, Request)]
            cancelled = admit(session_id, self.body, self.id, self.is_counted, calls)
        if cancelled is None:
            raise Passed
        if PASS_TO not in self.environ:
            self.body = b""
        return cancelled

    def cancels_waiting(self, session_id: str, notification: Notification) -> bool:
        """Whether a notification has cancelled a call of its session that was put off (`admit`), of
        which the server has nothing.
        """
        cancel = self.environ.get(CANCEL) if notification.method == CANCELLED else None
        return cancel is not None and cancel(session_id, cancelled_id_of(notification))

    def stay(self) -> None:
        """From now on the request is neither another worker's nor put off."""
        self.environ.pop(PASS_TO, None)
        self.environ.pop(ADMIT, None)
        self.body = b""

    def accepts(self, media_type: str) -> bool:
        """Whether the client named `media_type` in Accept; without that header, only JSON."""
        return headers.accepts(self.environ.get("HTTP_ACCEPT", headers.JSON), media_type)

    def read_body(self, limit: int) -> bytes:
        """The whole body, also a chunked one.

        Raises BodyTooLarge over `limit` bytes, BodyTooSlow where the server's time limit has
        passed, InvalidRequest when the body ended early or is not framed as HTTP wants it: each
        server has errors of its own for that.
        """
        size: str = self.environ.get("CONTENT_LENGTH") or ""
        is_plain = "HTTP_TRANSFER_ENCODING" not in self.environ and _LENGTH.fullmatch(size)
        try:
            if not is_plain:
                data = self._read_to_the_end(limit)
            elif int(size) > limit:
                raise BodyTooLarge(limit)
            else:
                data = self.environ["wsgi.input"].read(int(size))
                if len(data) < int(size):
                    data = self._read_rest(data, int(size))
        except (ClientDisconnected, OSError) as error:
            if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
                raise BodyTooSlow from error
            raise InvalidRequest("The request body ended early") from error
        except ProxyError:
            raise
        except Exception as error:
            log.info("a request body cannot be read: %s: %s", type(error).__name__, error)
            raise InvalidRequest("The request body cannot be read: its framing is wrong") from error
        if PASS_TO in self.environ or ADMIT in self.environ:
            self.body = data
        return data

    def keep_body(self, limit: int) -> bytes:
        """As `read_body`, for whoever looks at it first: it can be read once more."""
        data = self.read_body(limit)
        self.environ = {
            **self.environ,
            "wsgi.input": io.BytesIO(data),
            "CONTENT_LENGTH": str(len(data)),
        }
        self.environ.pop("HTTP_TRANSFER_ENCODING", None)
        return data

    def _read_rest(self, data: bytes, size: int) -> bytes:
        """The whole body: a stream may give fewer bytes than it is asked for."""
        while len(data) < size:
            piece = self.environ["wsgi.input"].read(size - len(data))
            if not piece:
                raise ClientDisconnected
            data += piece
        return data

    def _read_to_the_end(self, limit: int) -> bytes:
        try:
            # One byte more than the limit: a chunked body is cut off there without an error.
            body = get_input_stream(self.environ, max_content_length=limit + 1).read()
        except RequestEntityTooLarge as error:
            raise BodyTooLarge(limit) from error
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body


@lru_cache(maxsize=256)
def _key_of(header: str) -> str:
    """Where WSGI has a header."""
    return "HTTP_" + header.upper().replace("-", "_")


def with_path(environ: WSGIEnvironment) -> WSGIEnvironment:
    """The environ with the path as PATH_INFO where the server has left a URL there, as wsgiref does
    (RFC 9112 section 3.2.2 wants absolute-form taken).
    """
    told: str = environ.get("PATH_INFO", "")
    found = _ABSOLUTE_FORM.match(told)
    return environ if found is None else {**environ, "PATH_INFO": told[found.end() :] or "/"}


def require_path(environ: WSGIEnvironment) -> None:
    """Raises InvalidRequest unless the request target has a path, or is a URL that has one.

    Anything else, such as `@host:port/x`, would become part of the host where a URL is built of it.
    Servers differ in what they tell of the target: everything that they tell is looked at.
    """
    for name in ("SCRIPT_NAME", "PATH_INFO", "RAW_URI", "REQUEST_URI"):
        told: str = environ.get(name) or "/"
        if told.startswith("/") or (name in _WHOLE_TARGETS and _ABSOLUTE_FORM.match(told)):
            continue
        raise InvalidRequest("The request target must be a path or an http:// or https:// URL")


def path_as_sent(environ: WSGIEnvironment) -> str | None:
    """The path in the request target, percent-encoded as the client sent it; None where unknown."""
    raw: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    path = _ABSOLUTE_FORM.sub("", raw, count=1) if not raw.startswith("/") else raw
    return path.partition("?")[0] if path.startswith("/") else None


def _is_request_id(given: str) -> bool:
    return len(given) <= _MAX_REQUEST_ID and headers.is_session_id(given)
