"""gunicorn with little time for its clients."""

from typing import Any

from tests.live.plain_gunicorn import *  # noqa: F403


def post_worker_init(worker: Any) -> None:
    worker.client_timeout = 2.0
