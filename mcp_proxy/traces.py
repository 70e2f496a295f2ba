"""Whether this process makes spans of its calls (OpenTelemetry), and who does.

`Tracing.tracer` is None until somebody asks for traces: then no call makes any, and nothing of
OpenTelemetry is loaded. It is begun in the process that serves, by its first request at the latest:
the thread that exports is of that process.
"""

from __future__ import annotations

import importlib.metadata
import threading
from typing import TYPE_CHECKING, ClassVar

from mcp_proxy.errors import ConfigError

if TYPE_CHECKING:
    from mcp_proxy.spans import Tracer

_PACKAGES = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")


class Tracing:
    """The tracer of this process, which all its applications share. Thread-safe."""

    #: Who makes the spans; None: nobody.
    tracer: ClassVar[Tracer | None] = None

    _lock: ClassVar[threading.Lock] = threading.Lock()  # guards changes of tracer and _users
    _users: ClassVar[int] = 0

    @classmethod
    def begin(cls) -> None:
        """Has calls traced until `end` was called as often."""
        from mcp_proxy.spans import Tracer

        with cls._lock:
            cls._users += 1
            if cls.tracer is None:
                cls.tracer = Tracer.of_process()

    @classmethod
    def end(cls) -> None:
        """Sends what is not sent yet, for a few seconds at most; nothing is traced from then on."""
        with cls._lock:
            cls._users -= 1
            if cls._users > 0:
                return
            tracer, cls.tracer = cls.tracer, None
        if tracer is not None:
            tracer.close()


def require_library() -> None:
    """Raises ConfigError where what makes and sends spans is not installed."""
    try:
        for package in _PACKAGES:  # looked up and not imported, which is for the workers to do
            importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "traces needs OpenTelemetry: pip install 'mcp-wsgi-proxy[otel]'"
        ) from None
