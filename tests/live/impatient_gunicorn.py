"""gunicorn with little time for its clients, and little for their requests to find a thread."""

from typing import Any

from tests.live.plain_gunicorn import *  # noqa: F403


def post_worker_init(worker: Any) -> None:
    worker.client_timeout = worker.request_timeout = 2.0
    worker.max_body_bytes = 100_000
