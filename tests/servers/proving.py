"""legacy.py with tools whose answers say whose they are, and which process gave them.

    python tests/servers/proving.py [OPTIONS OF legacy.py]

Every tool takes a `nonce` and says it wherever it says anything; `worker` is the parent process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where python is started with -I

from legacy import LegacyServer
from two_eras import Asking, Call, Json, command_line, form, told

STEPS = 3


def own(call: Call, **more: Any) -> Json:
    """A result that says whose it is."""
    nonce = call.given["nonce"]
    return told(nonce, nonce=nonce, pid=os.getpid(), worker=os.getppid(), **more)


def plain(call: Call) -> Json:
    """Its nonce, after `seconds`."""
    call.wait(call.given.get("seconds", 0))
    return own(call)


def progress(call: Call) -> Json:
    """Its nonce, after some progress."""
    for number in range(1, STEPS + 1):
        call.tell_progress(number, STEPS, f"{call.given['nonce']} {number}")
        call.wait(call.given.get("seconds", 0) / STEPS)
    return own(call)


def question(call: Call) -> Asking:
    """Asks about its nonce; the worker is in the question, too."""
    answers = yield {"form": form(f"{call.given['nonce']} {os.getppid()}")}
    return own(call, answers=answers)


class ProvingServer(LegacyServer):
    """A legacy server with these tools, too."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.tools |= {tool.__name__: tool for tool in (plain, progress, question)}


def main() -> None:
    """Runs the server."""
    parser = command_line(__doc__)
    options = parser.parse_args()
    options.ignore_discover = options.exit_on_discover = options.roots_first = False
    options.log_level = options.version = None
    ProvingServer(options).run()


if __name__ == "__main__":
    main()
