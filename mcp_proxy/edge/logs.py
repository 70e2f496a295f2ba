"""Logs: every line about a request has its id; an access line is written at its end.

The package logs through the standard library and configures nothing when it is embedded; our own
command and gunicorn configuration call `configure`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

from mcp_proxy.edge.log_writer import LogHandler, LogWriter
from mcp_proxy.edge.operations import kind_of
from mcp_proxy.edge.request import SHOWN_OF_ID, ClientRequest
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.outcomes import CLIENT_LEFT, Outcome

#: The id of the request that this thread serves, empty between requests.
current_request: ContextVar[str] = ContextVar("mcp_proxy_request", default="")

access = logging.getLogger("mcp_proxy.access")


# gunicorn's own loggers; what has none at all, for example a library's warning, is its last resort.
_GUNICORN = ("gunicorn.error", "gunicorn.access")

_STDERR = 2


def configure(log_format: str, log_level: str) -> LogWriter:
    """Sends the package's log lines to stderr, as text or as one JSON object a line.

    Returns what writes them. For a process of our own. What gunicorn writes to stderr or stdout
    goes the same way, in its own form unless the format is `json`. A worker calls `start_writing`.
    """
    formatter = JsonFormatter() if log_format == "json" else TextFormatter()
    handler = LogHandler(_writer(_STDERR, formatter), formatter)
    logger = logging.getLogger("mcp_proxy")
    logger.handlers = [handler]
    logger.setLevel(log_level.upper())
    logger.propagate = False
    last_resort = LogHandler(handler.writer, formatter)
    last_resort.setLevel(logging.WARNING)
    logging.lastResort = last_resort
    take_over(log_format)
    return handler.writer


def take_over(log_format: str) -> None:
    """Has gunicorn's lines go the way of ours, once more after it has made its handlers anew."""
    (ours,) = logging.getLogger("mcp_proxy").handlers
    assert isinstance(ours, LogHandler)
    for logger in map(logging.getLogger, _GUNICORN):
        logger.handlers = [_taken_over(each, ours, log_format) for each in logger.handlers]


class _HandlerOfGunicorn(LogHandler):
    """Stands in place of one of gunicorn's handlers, which it makes anew when it is reloaded."""

    _gunicorn = True  # it takes away what is marked so


def start_writing() -> None:
    """From now on a thread writes the lines of this process, which does not fork any more."""
    for writer in {handler.writer for handler in _handlers()}:
        writer.start()


def _taken_over(theirs: logging.Handler, ours: LogHandler, log_format: str) -> logging.Handler:
    """A handler in place of one of gunicorn's, unless that writes to a file or is the user's."""
    if type(theirs) is not logging.StreamHandler or not hasattr(theirs, "_gunicorn"):
        return theirs
    formatter = ours.formatter if log_format == "json" else theirs.formatter
    assert formatter is not None
    descriptor = theirs.stream.fileno()
    if descriptor == _STDERR:
        return _HandlerOfGunicorn(ours.writer, formatter)
    return _HandlerOfGunicorn(_writer(descriptor, formatter), formatter)


def _writer(descriptor: int, formatter: logging.Formatter) -> LogWriter:
    def describe(count: int) -> str:
        what = "%d log lines were left out: whoever reads the log was too slow"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, what, (count,), None)
        record.fields = {"left_out": count}
        return formatter.format(record)

    return LogWriter(descriptor, describe)


def _handlers() -> Iterator[LogHandler]:
    for name in ("mcp_proxy", *_GUNICORN):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, LogHandler):
                yield handler


class OnceAMinute:
    """Lets the first of many equal lines through, then one a minute. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _next
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether the line is to be logged now."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                return False
            self._next = now + 60
            return True


def log_access(
    request: ClientRequest, status: int, body: bytes = b"", is_left: bool = False
) -> None:
    """Logs the access line of a request whose response, streams included, was sent.

    `body` is the response where it was sent as a whole; `is_left` says that nobody was there any
    more to be answered.
    """
    if not request.is_logged:
        return
    name, client_name = jsonrpc.names_in(request.params)
    if not client_name and request.record is not None:
        client_name = jsonrpc.client_in(request.record.get(_INIT_BODY, ""))
    outcome = _outcome_of(request, status, body, is_left)
    fields: dict[str, object] = {
        "method": escaped(request.method),
        "path": escaped(_path_of(request)),
        "status": status,
        "ms": round((time.monotonic() - request.started) * 1000, 1),
        "client": request.environ.get("REMOTE_ADDR", ""),
        "principal": escaped(request.principal_name or ""),
        "client_name": escaped(client_name),
        "session": escaped((request.session or "")[-SHOWN_OF_ID:]),
        "rpc": escaped(request.rpc or ""),
        "tool": escaped(name) if request.rpc == "tools/call" else "",
        "server": escaped(request.server),
        "pid": os.getpid(),
        "backend": request.backend,
        "way": request.way,
        "outcome": outcome.error_type or "ok",
        "code": outcome.code,
        "trace": "" if request.spans is None else request.spans.trace_id,
        "reason": escaped(request.reason),
    }
    more = _more(fields, request.reason[:_MAX_REASON])
    access.info(_ACCESS_LINE, {**fields, "more": more}, extra={"fields": fields})


# Where a session's record has the initialize that began it.
_INIT_BODY = "init_body"


def _path_of(request: ClientRequest) -> str:
    """The path; servers of 2024-11-05 may have the session's id in it."""
    path: str = request.environ.get("SCRIPT_NAME", "") + request.path
    session = request.session or ""
    if len(session) > SHOWN_OF_ID and session in path:
        return path.replace(session, f"...{session[-SHOWN_OF_ID:]}")
    return path


def _outcome_of(request: ClientRequest, status: int, body: bytes, is_left: bool) -> Outcome:
    """How a request has ended: by its answer, else by the error, else by the status."""
    failure = request.failure
    if failure is not None and request.outcome is None:
        return Outcome(None, kind_of(failure), failure.code if body else None)
    if body and request.rpc:
        request.note_outcome(body)
    outcome = request.outcome or Outcome()
    if outcome.error_type:
        return outcome
    if is_left:
        return Outcome(None, CLIENT_LEFT)
    return Outcome(None, str(status)) if status >= 400 else outcome


def _more(fields: Mapping[str, object], reason: str) -> str:
    """What a text line says besides: names and words, where there are any.

    What quotes somebody stays on one line as a JSON string.
    """
    code = fields["code"]
    shown = {
        "backend": fields["backend"],
        "way": fields["way"] if fields["way"] != "local" else "",
        "outcome": fields["outcome"] if fields["outcome"] != "ok" else "",
        "code": code if code is not None and str(code) != fields["outcome"] else "",
        "trace": fields["trace"],
    }
    quoted = {name: fields[name] for name in ("server", "principal", "tool", "client_name")}
    plain = "".join(f" {name}={value}" for name, value in shown.items() if value != "")
    words = (*quoted.items(), ("reason", reason))
    return plain + "".join(f" {n}={json.dumps(v, ensure_ascii=False)}" for n, v in words if v)


# Characters of what a client said that a log line has at most.
_MAX_SHOWN = 200
_MAX_REASON = 500  # in a text line, where the sentence is to be whole


def escaped(text: str) -> str:
    """A client's words for a log line: in one line, visible, and not too many."""
    shown = text[:_MAX_SHOWN]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(text) <= _MAX_SHOWN else shown + "[...]"


_ACCESS_LINE = (
    "%(client)s %(method)s %(path)s %(rpc)s -> %(status)s in %(ms)s ms session=%(session)s "
    "pid=%(pid)s%(more)s"
)


# What a terminal or a reader of lines would act on.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def visible(text: str) -> str:
    """A text in one line, with escapes for what a terminal would act on."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class TextFormatter(logging.Formatter):
    """Time, level, request id, logger, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s%(request)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        request = current_request.get()
        record.request = f" [{request}]" if request else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line; what others said cannot begin a second one. A traceback follows as it is."""
        return visible(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; the fields of an access line are members of it."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """ISO 8601 with the zone, which is UTC."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if request := current_request.get():
            line["request"] = request
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return _encoder.encode(line).decode()
        except (UnicodeEncodeError, OverflowError):  # half a character, a number of 70 bits
            return json.dumps(line, default=str)


_encoder = msgspec.json.Encoder(enc_hook=str)
