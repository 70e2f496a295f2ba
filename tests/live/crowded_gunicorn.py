"""gunicorn with little memory for requests that are arriving."""

from typing import Any

from tests.live.plain_gunicorn import *  # noqa: F403


def post_worker_init(worker: Any) -> None:
    worker.max_arriving_bytes = 100_000
