"""A WSGI application whose answers are held back until a file appears.

`gunicorn tests.live.held:app`; HELD_UNTIL names the file. Of the path the last part counts:

- `held` answers when the file is there; `open` sends its head at once, its body when it is there;
- `large` is answered with 8 MiB;
- `broken` fails in the middle of its body; anything else answers at once, with the worker's pid.

`/probe` can be answered by the main thread, and so can any request by `overloaded`. The query is
written to standard error.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _hold() -> None:
    while not Path(os.environ["HELD_UNTIL"]).exists():
        time.sleep(0.01)


def _body(way: str) -> Iterator[bytes]:
    if way == "open":
        yield b""
    if way in ("open", "held"):
        _hold()
    yield bytes(8 * 1024 * 1024) if way == "large" else b"%d\n" % os.getpid()
    if way == "broken":
        raise RuntimeError("broken on purpose")


class Held:
    """The application."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        way = environ["PATH_INFO"].rpartition("/")[2]
        environ["wsgi.input"].read()
        if environ["QUERY_STRING"]:
            print(environ["QUERY_STRING"], file=sys.stderr, flush=True)
        start_response("200 OK", [("Content-Type", "text/plain")])
        if way == "probe":
            return iter([threading.current_thread().name.encode()])
        return _body(way)

    def answers_at_once(self, path: str) -> bool:
        """Whether the main thread may answer."""
        return path == "/probe"

    def overloaded(self, environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        """The answer where no thread is free."""
        body = environ["wsgi.input"].read()
        start_response("200 OK", [("X-Overloaded", "yes"), ("Content-Length", str(len(body)))])
        return iter([body])


app = Held()
