"""Real gunicorns with API keys, as many workers as a deployment has, and callers at them."""

from __future__ import annotations

import contextlib
import secrets
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.callers import KeyFile, Knowing, told
from tests.support.front import Answer, HttpFront
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess

#: Workers, whether their sessions are in Redis, and whether they pass requests to one another.
DEPLOYMENTS = {
    "two in memory": (2, False, "on"),
    "four with Redis": (4, True, "on"),
    "two that relay": (2, True, "off"),
}

#: Their names, for parameters.
NAMES = [pytest.param("two in memory", marks=needs.MEMORY), "four with Redis", "two that relay"]

#: Requests, each on a connection of its own, that reach every worker as good as certainly.
EVERYWHERE = 12


class Deployment:
    """A running proxy and its file of keys: `alice` has two of them, `mallory` and `bob` one."""

    def __init__(self, process: ProxyProcess, keys: KeyFile, shown: dict[str, str]) -> None:
        self.process = process
        self.keys = keys
        self._shown = shown

    def front(self, name: str) -> Knowing:
        """A way in of somebody."""
        return Knowing(HttpFront(self.process.base), self._shown[name])


@contextlib.contextmanager
def deployed(
    tmp_path: Path,
    command: Sequence[str],
    workers: int,
    redis_url: str | None,
    prefix: str | None = None,
    keys: KeyFile | None = None,
    **settings: object,
) -> Iterator[Deployment]:
    """A deployment in front of a stdio server, or of what `settings` say; with the `keys` of
    another one, beside its own.
    """
    keys = keys or KeyFile(tmp_path / f"keys-{uuid.uuid4().hex}")
    shown = {name: keys.add(name) for name in ("alice", "mallory", "bob")}
    shown["alice again"] = keys.add("alice")
    options = {"workers": workers, "api_keys": keys.text, **settings}
    if redis_url is not None:
        options |= {"redis_url": redis_url, "redis_prefix": prefix or f"t-{uuid.uuid4().hex}:"}
    with ProxyProcess(command, options=as_options(options)) as process:
        yield Deployment(process, keys, shown)


def unknown_like(session: str) -> str:
    """The id of a session that there never was, of the form of one that there is."""
    return f"{session[:-32]}{secrets.token_hex(16)}"


def all_told(answers: Iterator[Answer]) -> set[str]:
    """What answers tell; equal ones count once."""
    return {repr(told(answer)) for answer in answers}
