"""Callers with API keys: a file of keys, and ways in that carry one."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from pathlib import Path

import urllib3

from mcp_proxy.auth.key_file import add, line_of, remove
from mcp_proxy.auth.keys import Key, digest_of, new_key
from tests.support.front import Answer, Front, Json


class KeyFile:
    """A file of API keys. Each change has a time of its own, however fast changes come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = str(path)
        path.touch()

    def add(
        self,
        name: str,
        servers: frozenset[str] | None = None,
        scopes: frozenset[str] = frozenset(),
        expires: str | None = None,
    ) -> str:
        """A new key for a name."""
        key = new_key()
        add(self.text, line_of(Key(name, digest_of(key), servers, scopes), expires))
        return key

    def remove(self, name: str) -> None:
        """Nobody is that name any more."""
        remove(self.text, name)

    def write(self, text: str) -> None:
        """Anything, as an editor would leave it."""
        before = os.stat(self.path).st_mtime_ns
        self.path.write_text(text)
        os.utime(self.path, ns=(before + 1_000_000, before + 1_000_000))


class Knowing:
    """A way in whose every request carries a key."""

    def __init__(self, front: Front, key: str, header: str = "Authorization") -> None:
        self.front = front
        self.shown = {header: f"Bearer {key}" if header == "Authorization" else key}

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        return self.front.request(method, path, {**headers, **self.shown}, body)


def ended(answer: Answer) -> float:
    """When a stream has ended, in order or broken off; by the monotonic clock."""
    broken = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError)
    with contextlib.suppress(*broken):
        for _ in answer.pieces:
            pass
    answer.close()
    return time.monotonic()


def told(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    """All that a client learns of an answer, but for the time and the request's own id."""
    own = ("date", "x-request-id")
    headers = {n.lower(): v for n, v in answer.headers.items() if n.lower() not in own}
    return answer.status, headers, answer.body()
