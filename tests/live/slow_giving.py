"""The labelled application, whose thread pauses once it has given a request to another worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from mcp_proxy.edge.request import PASS_TO
from tests.proofs.labelled import app as labelled

# Seconds within which the other worker answers.
_PAUSE = 0.5


class _Slowly:
    def __init__(self, give: Callable[..., bool]) -> None:
        self._give = give

    def __call__(self, *given: Any) -> bool:
        was_given = self._give(*given)
        time.sleep(_PAUSE if was_given else 0)
        return was_given


class SlowGiving:
    """A WSGI application; everything but the pause is the labelled one's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(labelled, name)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        give = environ.get(PASS_TO)
        if give is not None:
            environ[PASS_TO] = partial(_Slowly(give.func), *give.args)
        return labelled(environ, start_response)


app = SlowGiving()
