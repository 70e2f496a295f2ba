"""Logs: every line about a request has its id; an access line is written at its end.

The package logs through the standard library and configures nothing when it is embedded; our own
command and gunicorn configuration call `configure`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from contextvars import ContextVar

from mcp_proxy.edge.request import ClientRequest

#: The id of the request that this thread serves, empty between requests.
current_request: ContextVar[str] = ContextVar("mcp_proxy_request", default="")

access = logging.getLogger("mcp_proxy.access")


def configure(log_format: str, log_level: str) -> None:
    """Sends the package's log lines to stderr, as text or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger = logging.getLogger("mcp_proxy")
    logger.handlers = [handler]
    logger.setLevel(log_level.upper())
    logger.propagate = False


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


def log_access(request: ClientRequest, status: int) -> None:
    """Logs the access line of a request whose response, streams included, was sent."""
    if not access.isEnabledFor(logging.INFO):
        return
    fields = {
        "method": escaped(request.method),
        "path": escaped(request.environ.get("SCRIPT_NAME", "") + request.path),
        "status": status,
        "ms": round((time.monotonic() - request.started) * 1000, 1),
        "client": request.environ.get("REMOTE_ADDR", ""),
        "session": escaped((request.session or "")[-8:]),
        "rpc": escaped(request.rpc or ""),
        "reason": escaped(request.reason),
    }
    # A sentence may quote the client: as a JSON string it stays on one line.
    reason = f" reason={json.dumps(request.reason, ensure_ascii=False)}" if request.reason else ""
    access.info(_ACCESS_LINE, {**fields, "why": reason}, extra={"fields": fields})


# Characters of what a client said that a log line has at most.
_MAX_SHOWN = 200


def escaped(text: str) -> str:
    """A client's words for a log line: in one line, visible, and not too many."""
    shown = text[:_MAX_SHOWN]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(text) <= _MAX_SHOWN else shown + "[...]"


_ACCESS_LINE = (
    "%(client)s %(method)s %(path)s %(rpc)s -> %(status)s in %(ms)s ms session=%(session)s%(why)s"
)


# What a terminal or a reader of lines would act on.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


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
        return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line; the fields of an access line are members of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := current_request.get():
            line["request"] = request
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
