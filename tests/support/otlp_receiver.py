"""A collector of spans: what OpenTelemetry's exporters send by OTLP over HTTP, in protobuf."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.support.startable import ServerThread
from tests.support.waiting import eventually

_KINDS = {
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_CLIENT: "client",
}


class ReceivedSpan(NamedTuple):
    """A span as it was sent; ids in hexadecimal digits, `parent` is empty for a root."""

    trace: str
    id: str
    parent: str
    name: str
    kind: str
    attributes: dict[str, Any]
    has_failed: bool
    links: list[str]
    service: str
    process: int
    seconds: float

    @classmethod
    def of(cls, span: trace_pb2.Span, resource: dict[str, Any]) -> Self:
        return cls(
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            _KINDS[span.kind],
            {each.key: _value(each.value) for each in span.attributes},
            span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
            [link.span_id.hex() for link in span.links],
            resource["service.name"],
            resource["process.pid"],
            (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        )

    @property
    def traceparent(self) -> str:
        """How its context travels, where it is sampled."""
        return f"00-{self.trace}-{self.id}-01"


class OtlpReceiver(ServerThread):
    """Takes spans until it is closed."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self._lock = threading.Lock()  # guards _spans
        self._spans: list[ReceivedSpan] = []
        #: The bodies, as they came.
        self.bodies: list[bytes] = []

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead an exporter here, and have it send soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    @property
    def spans(self) -> list[ReceivedSpan]:
        """What has come so far."""
        with self._lock:
            return list(self._spans)

    def take(self, body: bytes) -> None:
        """One request of an exporter."""
        found = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self.bodies.append(body)
            for of_resource in found.resource_spans:
                about = {each.key: _value(each.value) for each in of_resource.resource.attributes}
                for of_scope in of_resource.scope_spans:
                    self._spans += [ReceivedSpan.of(span, about) for span in of_scope.spans]

    def of_trace(self, trace: str, count: int) -> list[ReceivedSpan]:
        """The spans of a trace, from its root down, once there are so many."""

        def found() -> list[ReceivedSpan]:
            mine = [span for span in self.spans if span.trace == trace]
            return mine if len(mine) >= count else []

        spans = eventually(found, 20, f"the trace has not {count} spans")
        return _in_order(spans)

    def named(self, name: str, where: Callable[[ReceivedSpan], bool] = bool) -> ReceivedSpan:
        """The first server span of this name, once it is there."""

        def found() -> ReceivedSpan | None:
            mine = (each for each in self.spans if (each.kind, each.name) == ("server", name))
            return next(filter(where, mine), None)

        return eventually(found, 20, f"there is no span {name}")


def _in_order(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    """Spans that are one chain, each below the one before."""
    ids = {span.id for span in spans}
    by_parent = {span.parent: span for span in spans}
    assert len(by_parent) == len(spans), f"no chain: {spans}"
    (span,) = [each for each in spans if each.parent not in ids]
    chain = [span]
    while chain[-1].id in by_parent:
        chain.append(by_parent[chain[-1].id])
    return chain


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


class _Handler(BaseHTTPRequestHandler):
    server: OtlpReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.server.take(body)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
