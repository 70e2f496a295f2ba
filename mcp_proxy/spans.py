"""The spans of calls, with the names and attributes of OpenTelemetry's conventions for MCP.

A proxy is both sides: each request of a client is a server span, and what goes on for it a client
span below that, which is the parent of whatever the server makes. The context travels in
`params._meta` (SEP-414), to HTTP servers in the header `traceparent`, too. A relayed call has two
spans at each of its workers. Arguments, results, and what errors say are in no span.

The conventions are in development: semantic-conventions-genai, "Model Context Protocol".
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET, Raw
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mcp_proxy.background import Reader
from mcp_proxy.errors import ClientError, RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.outcomes import Outcome, outcomes_in

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Attributes = Mapping[str, str | int]

# Seconds for which the end of a process waits for its last spans.
_LAST_SPANS = 3.0

# Characters of what a client says that a span has at most.
_MAX_SHOWN = 200

# What a client span ends with whose call goes to another backend, since this one got nothing.
_SENT_AGAIN = "sent-again"

_W3C = TraceContextTextMapPropagator()
_NO_CONTEXT = Context()


class _Carrier(msgspec.Struct):
    traceparent: str | None = None
    tracestate: str | None = None


class _Params(msgspec.Struct):
    meta: _Carrier | None = msgspec.field(default=None, name="_meta")


_params = msgspec.json.Decoder(_Params)


class Tracer:
    """Makes the spans of this process. Thread-safe."""

    def __init__(self, provider: TracerProvider, own: TracerProvider | None = None) -> None:
        self._tracer = provider.get_tracer("mcp_proxy")
        self._own = own

    @classmethod
    def of_process(cls) -> Tracer:
        """One whose spans go the way of the process where that has one, as an embedding
        application's; else to where the variables OTEL_EXPORTER_OTLP_... say.
        """
        provider = trace.get_tracer_provider()
        if isinstance(provider, TracerProvider):
            return cls(provider)
        about = Resource.create({"service.name": "mcp-wsgi-proxy", "process.pid": os.getpid()})
        resource = about.merge(OTELResourceDetector().detect())
        own = TracerProvider(resource=resource, shutdown_on_exit=False)
        own.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(own, own)

    def close(self) -> None:
        """Sends what is not sent yet, for a few seconds at most, and ends the exporter's thread."""
        if self._own is None:
            return
        done = threading.Event()
        own = self._own

        def shut_down() -> None:
            own.shutdown()
            done.set()

        try:
            Reader("mcp-last-spans", shut_down, done.set).start()
        except RuntimeError:  # the system has no thread to give
            return
        done.wait(_LAST_SPANS)

    def spans(
        self,
        requests: Sequence[Request],
        attributes: Attributes,
        environ: WSGIEnvironment | None = None,
        since: float | None = None,
        ends_when_received: bool = False,
    ) -> CallSpans:
        """The spans of requests that have come `since` (by the monotonic clock).

        What has no context in `_meta` has that of the HTTP request of `environ`.
        """
        around = _NO_CONTEXT if environ is None else _W3C.extract(_headers_of(environ), _NO_CONTEXT)
        made = CallSpans(self._tracer, attributes, ends_when_received)
        for request in requests:
            made.begin(request, around, since)
        return made

    def in_context(self, request: Request, environ: WSGIEnvironment) -> Request:
        """A request with the context of its HTTP request in `_meta`, unless it has one of its own:
        for one that is answered elsewhere.
        """
        carrier = _headers_of(environ)
        return _with_context(request, carrier) if carrier and not _carrier_of(request) else request


class _OpenSpan(NamedTuple):
    """A span that has not ended, and what both spans of its request say of that."""

    span: Span
    name: str
    about: Attributes


class CallSpans:
    """The spans of requests whose answers come together, by their ids. Thread-safe.

    A server span ends with `answered`, or with the client span below it where these spans are of a
    side that nobody waits at (`ends_when_received`).
    """

    def __init__(
        self, tracer: trace.Tracer, attributes: Attributes, ends_when_received: bool = False
    ) -> None:
        #: The id of the first trace, in hexadecimal digits.
        self.trace_id = ""
        self._tracer = tracer
        self._attributes = attributes
        self._ends_when_received = ends_when_received
        self._lock = threading.Lock()  # guards what follows
        self._is_single = True  # whether there was one request, so that an answer is its own
        self._server: dict[RequestId, _OpenSpan] = {}
        self._client: dict[RequestId, _OpenSpan] = {}

    def __repr__(self) -> str:
        return f"<CallSpans {self.trace_id} server={len(self._server)} client={len(self._client)}>"

    def begin(
        self, request: Request, around: Context = _NO_CONTEXT, since: float | None = None
    ) -> None:
        """A request has come: its server span begins, as a child of what its `_meta` names."""
        parent, links = _parent_of(request, around)
        began = None if since is None else time.time_ns() - int((time.monotonic() - since) * 1e9)
        name, about = _described(request)
        attributes = {**about, **self._attributes}
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, links, began)
        self.trace_id = self.trace_id or f"{span.get_span_context().trace_id:032x}"
        with self._lock:
            self._is_single = self._is_single and not self._server
            self._server[request.id] = _OpenSpan(span, name, about)

    # --- what goes on ----------------------------------------------------------------------------

    def sent(self, requests: Sequence[Request], attributes: Attributes) -> list[Request]:
        """The requests as they go on, with the context of their client spans, which begin.

        Those that went to another backend before, in vain, end.
        """
        with self._lock:
            in_vain = [each for one in requests if (each := self._client.pop(one.id, None))]
        for each in in_vain:
            _end(each, Outcome(None, _SENT_AGAIN))
        return [self._sent(request, attributes) for request in requests]

    def _sent(self, request: Request, attributes: Attributes) -> Request:
        with self._lock:
            server = self._server.get(request.id)
        if server is None:
            return request
        span, name, about = server
        parent = trace.set_span_in_context(span, _NO_CONTEXT)
        span = self._tracer.start_span(name, parent, SpanKind.CLIENT, {**about, **attributes})
        with self._lock:
            self._client[request.id] = _OpenSpan(span, name, about)
        return _with_context(request, _carried(span))

    def headers(self) -> dict[str, str]:
        """The headers of an HTTP request by which the first of these calls goes on."""
        with self._lock:
            first = next(iter(self._client.values()), None)
        return {} if first is None else _carried(first.span)

    # --- what comes back -------------------------------------------------------------------------

    def received(self, data: bytes, failure: str) -> None:
        """A response has come from where a request went; `failure` is why the proxy has made it."""
        with self._lock:
            ended = self._popped(self._client, data)
            if self._ends_when_received:
                ended += self._popped(self._server, data)
        for each, outcome in ended:
            _end(each, outcome, failure)

    def answered(self, data: bytes, failure: str, status: int = 200) -> None:
        """A response, or an array of them, is about to leave for the client.

        The HTTP `status` counts where neither `failure` nor the response says what went wrong.
        """
        with self._lock:
            ended = self._popped(self._client, data) + self._popped(self._server, data)
        for each, outcome in ended:
            _end(each, outcome, failure, "" if status < 400 else str(status))

    def close(self, error_type: str) -> None:
        """What is not answered by now has ended in this way."""
        with self._lock:
            left = [*self._client.values(), *self._server.values()]
            self._client, self._server = {}, {}
        for each in left:
            _end(each, Outcome(None, error_type))

    def _popped(
        self, spans: dict[RequestId, _OpenSpan], data: bytes
    ) -> list[tuple[_OpenSpan, Outcome]]:
        """Those that `data` answers, which are taken out, each with how it has ended.

        The lock is held.
        """
        if not spans:
            return []
        outcomes = outcomes_in(data, needs_id=not self._is_single)
        if self._is_single:
            return [(spans.popitem()[1], outcomes[0])]
        named = ((spans.pop(each.id, None), each) for each in outcomes if each.id is not None)
        return [(found, outcome) for found, outcome in named if found is not None]


def _end(ended: _OpenSpan, outcome: Outcome, failure: str = "", otherwise: str = "") -> None:
    """Ends a span: with `failure`, with what its answer says, or else with `otherwise`."""
    span = ended.span
    error_type = failure or outcome.error_type or otherwise
    if error_type:
        span.set_attribute("error.type", error_type)
        span.set_status(Status(StatusCode.ERROR))
    if outcome.code is not None:
        span.set_attribute("rpc.response.status_code", str(outcome.code))
    span.end()


# --- what clients say ------------------------------------------------------------------------


def _shown(text: str) -> str:
    """A client's word: visible, and not too long."""
    shown = text[:_MAX_SHOWN]
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "?" for c in shown)


def _described(request: Request) -> tuple[str, Attributes]:
    """The name of the spans of a request, and what both say of it."""
    method = _shown(request.method)
    about: dict[str, str | int] = {
        "mcp.method.name": method,
        "jsonrpc.request.id": _shown(str(request.id)),
    }
    if method not in ("tools/call", "prompts/get"):
        return method, about
    target = _shown(jsonrpc.names_in(request.params)[0])
    if method == "tools/call":
        about |= {"gen_ai.tool.name": target, "gen_ai.operation.name": "execute_tool"}
    else:
        about["gen_ai.prompt.name"] = target
    return f"{method} {target}", about


# --- the context ---------------------------------------------------------------------------------


def _parent_of(request: Request, around: Context) -> tuple[Context, list[Link]]:
    """The context of a request's `_meta`, linked to the one around it; that where it has none.

    An embedding application that traces HTTP has a span of its own around it.
    """
    ambient = trace.get_current_span()
    if ambient.get_span_context().is_valid:
        around = trace.set_span_in_context(ambient, _NO_CONTEXT)
    own = _W3C.extract(_carrier_of(request), _NO_CONTEXT)
    if not _context_in(own).is_valid:
        return around, []
    outer = _context_in(around)
    is_other = outer.is_valid and outer != _context_in(own)
    return own, [Link(outer)] if is_other else []


def _context_in(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _carrier_of(request: Request) -> dict[str, str]:
    """What the `_meta` of a request has of its trace; nothing where the types are wrong."""
    try:
        meta = _params.decode(request.params or b"{}").meta or _Carrier()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return _carrier(meta.traceparent, meta.tracestate)


def _carrier(traceparent: str | None, tracestate: str | None) -> dict[str, str]:
    found = {"traceparent": traceparent, "tracestate": tracestate}
    return {name: value for name, value in found.items() if value}


def _headers_of(environ: WSGIEnvironment) -> dict[str, str]:
    """What the headers of an HTTP request have of a trace (W3C Trace Context)."""
    return _carrier(environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE"))


def _carried(span: Span) -> dict[str, str]:
    """The context of a span, as headers and `_meta` have it."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span, _NO_CONTEXT))
    return carrier


def _with_context(request: Request, carrier: Mapping[str, str]) -> Request:
    """A request with this context in its `_meta`; everything else in it keeps its bytes.

    One whose params are no object, or are nested very deeply, stays as it is.
    """
    if request.params is not UNSET and not jsonrpc.is_object(request.params):
        return request

    def change(meta: dict[str, Raw]) -> None:
        meta.pop("tracestate", None)
        meta.update({name: jsonrpc.as_payload(value) for name, value in carrier.items()})

    def change_params(params: dict[str, Raw]) -> None:
        params["_meta"] = jsonrpc.edited(params.get("_meta", UNSET), change)

    try:
        return Request(request.id, request.method, jsonrpc.edited(request.params, change_params))
    except ClientError:
        return request
