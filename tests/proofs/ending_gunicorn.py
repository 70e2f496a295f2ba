"""gunicorn's configuration as it is, and threads of ours that end when a file names them.

`ENDING_FILE` is that file; what began and ended is written to the file of that name with `.said`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcp_proxy.background import Worker
from mcp_proxy.gunicorn_conf import *  # noqa: F403

_FILE = Path(os.environ["ENDING_FILE"])
_SAID = _FILE.with_suffix(".said")


def _say(word: str, worker: Worker) -> None:
    with _SAID.open("a", encoding="utf-8") as file:
        file.write(f"{word} {worker.name}\n")


def _end_if_named(worker: Worker) -> None:
    if _FILE.exists() and _FILE.read_text(encoding="utf-8") == worker.name:
        _FILE.unlink()
        raise SystemExit


def _run(run: Callable[[Worker], None]) -> Callable[[Worker], None]:
    def running(worker: Worker) -> None:
        run_once = worker.run_once

        def round_and_look() -> None:
            run_once()
            _end_if_named(worker)

        _say("began", worker)
        patched: Any = worker
        patched.run_once = round_and_look
        try:
            run(worker)
        finally:
            del patched.run_once
            _say("ended", worker)

    return running


setattr(Worker, "_run", _run(Worker._run))  # noqa: B010  # mypy has its own idea of methods
