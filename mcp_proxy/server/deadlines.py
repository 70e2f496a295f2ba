"""The deadlines of our worker classes, from the environment; gunicorn's `raw_env` is part of it.

So they are the same in front of any application, with this package's configuration or without.
"""

from __future__ import annotations

import sys
from typing import Any

from mcp_proxy.config import value_in_environment
from mcp_proxy.errors import ConfigError

#: The settings that are attributes of a worker, in seconds.
DEADLINES = ("client_timeout", "request_timeout")


def require_deadlines() -> None:
    """Exits with a sentence where the environment has one that does not fit."""
    try:
        for name in DEADLINES:
            value_in_environment(name)
    except ConfigError as error:
        sys.exit(f"mcp-wsgi-proxy: {error}")


def set_deadlines(worker: Any) -> None:
    """Gives a worker those of the environment; one that no longer fits is logged and not taken.

    gunicorn makes a worker in its master, which must not end when it is reloaded.
    """
    for name in DEADLINES:
        try:
            setattr(worker, name, value_in_environment(name))
        except ConfigError as error:
            default = getattr(worker, name)
            worker.log.error("%s; %s is %g", error, name, default)
