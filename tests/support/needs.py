"""What a test needs of a worker that has threads, and one of gevent has not.

`WORKER_CLASS_OF_TEST=gevent` gives every proxy of the tests workers of that class, unless a test
names one. A test that cannot be right then says why, and the run lists it with that reason. The
docs name the same differences ("Worker classes" in docs/deployment.md).
"""

from __future__ import annotations

import os

import pytest

from tests.support.proxy_process import WORKER_CLASS

#: The mark; its only argument is the reason.
NAME = "needs_threads"


_GEVENT = "gevent"


def _needs(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.needs_threads(reason)


#: Connections that go to the worker that has their session.
PASSING = _needs("gevent passes no connections")

#: Several workers whose sessions are in memory.
MEMORY = _needs("several gevent workers want Redis, since they pass no connections")

#: A worker that leaves, and whose sessions in memory go on at the one that comes.
HANDING_ON = _needs("a gevent worker leaves its sessions in memory to no other one")

#: A bound of the calls of one session, and calls that wait for it.
SHARES = _needs("gevent has no shares: a call waits for no thread")

#: A worker with so many threads, which may all be taken.
THREADS = _needs("gevent has no thread for each request")

#: A worker that is bound to a CPU.
PINNING = _needs("gevent workers are bound to no CPU")

#: A worker that has had its `max_requests` and waits for old calls before it leaves.
PATIENT_RECYCLING = _needs("a gevent worker that has had max_requests leaves at once")


def store_of_several(redis_url: str, prefix: str) -> dict[str, str]:
    """The environment of several workers, for a test that is not about where their sessions are."""
    if os.environ.get(WORKER_CLASS) != _GEVENT:
        return {}
    return {"MCP_PROXY_REDIS_URL": redis_url, "MCP_PROXY_REDIS_PREFIX": prefix}


def missing_for(item: pytest.Item) -> str | None:
    """Why a test does not apply to the workers that proxies have now; None where it does."""
    mark = item.get_closest_marker(NAME)
    if mark is None or os.environ.get(WORKER_CLASS) != _GEVENT:
        return None
    reason: str = mark.args[0]
    return reason
