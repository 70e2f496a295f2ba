"""gunicorn in a place where a worker may have only six threads besides the main one."""

import _thread
import threading
from typing import Any

from tests.live.plain_gunicorn import *  # noqa: F403

_LIMIT = 6


def post_fork(server: Any, worker: Any) -> None:
    def start(*args: Any, **kwargs: Any) -> int:
        if threading.active_count() > _LIMIT + 1:  # the main one, and this one
            raise RuntimeError("can't start new thread")
        return _thread.start_new_thread(*args, **kwargs)

    threading._start_new_thread = start  # type: ignore[attr-defined]
