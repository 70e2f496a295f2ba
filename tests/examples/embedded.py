"""All three transports below one WSGI application, over one store of sessions.

`python -m tests.examples.embedded http://127.0.0.1:9000/mcp` serves it on port 8080.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

from mcp_proxy import (
    LocalStorage,
    ProxyError,
    ProxyOptions,
    SessionManager,
    SSEProxy,
    Storage,
    StreamableProxy,
    TransparentProxy,
    __version__,
    demo_server,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_LAST_CALLS = 5.0

OPTIONS = ProxyOptions(
    threads=16, request_timeout=30, allowed_hosts=("localhost", "127.0.0.1", "::1")
)


@contextmanager
def embedded(target_url: str, storage: Storage) -> Iterator[WSGIApplication]:
    """The application; in the end calls that run get a few seconds, and the store is left open."""
    server = demo_server()
    with (
        StreamableProxy(server, storage, name="demo", options=OPTIONS) as streamable,
        SSEProxy(server.argv, storage, name="demo-sse", options=OPTIONS) as sse,
        TransparentProxy(
            [target_url], storage, name="http", allowed_backends=(), verify=True, options=OPTIONS
        ) as http,
    ):
        yield DispatcherMiddleware(NotFound(), {"/mcp": streamable, "/old": sse, "/http": http})
        for proxy in (streamable, sse, http):
            proxy.close(timeout=_LAST_CALLS)


def revision_of(storage: Storage, name: str, session_id: str) -> str:
    """Which revision a client of the transport `name` speaks, or why that is not known."""
    try:
        session = SessionManager(storage.scoped(name)).load(session_id)
    except ProxyError as error:
        return f"{error.status} {error.message}"
    return session.metadata["protocol_version"]


def main(arguments: Sequence[str]) -> int:
    """Serves until it is interrupted; the exit code."""
    storage = LocalStorage(ttl=3600)
    try:
        with embedded(arguments[0], storage) as application:
            print(f"mcp_proxy {__version__}")
            run_simple("127.0.0.1", 8080, application, threaded=True)
    except ProxyError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        return 2
    finally:
        storage.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
