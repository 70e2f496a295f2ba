"""The application as gunicorn serves it, whose responses say which worker sent them, and how."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mcp_proxy.edge.request import PASS_TO
from mcp_proxy.wsgi import app as unlabelled

#: The header with the worker's process id.
LABEL = "X-Worker"

#: The header that is "passed" where another worker of the machine has passed the request there.
WAY = "X-Way"


class Labelled:
    """A WSGI application with two more headers; everything else of it is the product's."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        give = environ.get(PASS_TO)
        way = "passed" if give is not None and give.args[0].stays else "direct"

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, (LABEL, str(os.getpid())), (WAY, way)], *more)

        answer: Iterable[bytes] = self._inner(environ, start)
        return answer


app = Labelled(unlabelled)
