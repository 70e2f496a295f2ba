"""The application as gunicorn serves it, and each response says which worker it came from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mcp_proxy.wsgi import app as unlabelled

#: The header with the worker's process id.
LABEL = "X-Worker"


class Labelled:
    """A WSGI application with one more header; everything else of it is the product's."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, (LABEL, str(os.getpid()))], *more)

        answer: Iterable[bytes] = self._inner(environ, start)
        return answer


app = Labelled(unlabelled)
