"""The roots of a client, for which it is asked once although several servers want to know them."""

from __future__ import annotations

import math
import threading
import time
from typing import NamedTuple

from msgspec import UNSET, Raw

from mcp_proxy.backends.group_server import RunningServer
from mcp_proxy.errors import RequestId
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Response

ROOTS = "roots/list"

#: Seconds for which an answer holds where the client does not say when it changes, and after which
#: another server's question goes to the client although one before it has no answer.
ROOTS_TIME = 30.0

#: Questions that wait for the answer to another one; what a server asks beyond goes to the client.
MAX_WAITING = 64


class Asker(NamedTuple):
    """A server that wants to know, and the id of its question."""

    running: RunningServer
    own_id: RequestId


class Verdict(NamedTuple):
    """What becomes of a question: its answer where that is known, else whether the client is asked.
    Where it is not, the answer comes with that to another server's question.
    """

    answer: Raw | None = None
    goes_to_client: bool = False


class SharedRoots:
    """What a client says of its roots. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._answer: Raw | None = None
        self._until = 0.0  # monotonic
        self._asked: Asker | None = None  # whose question the client has
        self._asked_at = 0.0  # monotonic
        self._waiting: list[Asker] = []
        self._holds = ROOTS_TIME

    def begin(self, capabilities: Raw) -> None:
        """The client has declared these; it says when its roots change, or it does not."""
        roots = jsonrpc.fields_of(jsonrpc.fields_of(capabilities).get("roots", UNSET))
        self._holds = math.inf if roots.get("listChanged") == Raw(b"true") else ROOTS_TIME

    def forget(self) -> None:
        """The client has others now."""
        with self._lock:
            self._answer = None

    def ask(self, asker: Asker) -> Verdict:
        """What becomes of a server's question."""
        now = time.monotonic()
        with self._lock:
            if self._answer is not None and now < self._until:
                return Verdict(answer=self._answer)
            if self._asked == asker:
                return Verdict(goes_to_client=True)
            if self._asked is None or now > self._asked_at + ROOTS_TIME:
                self._asked, self._asked_at = asker, now
            elif len(self._waiting) < MAX_WAITING:
                self._waiting.append(asker)
                return Verdict()
            return Verdict(goes_to_client=True)

    def answered(self, asker: Asker, response: Response) -> list[Asker]:
        """A server's question has an answer; the others that wait for the same."""
        with self._lock:
            if self._asked != asker:
                return []
            if response.result is not UNSET and "roots" in jsonrpc.fields_of(response.result):
                self._answer, self._until = response.result, time.monotonic() + self._holds
            self._asked, waiting, self._waiting = None, self._waiting, []
            return waiting

    def lost(self, running: RunningServer) -> Asker | None:
        """A server is lost; of those that waited for the answer to its question the one whose
        question goes to the client now.
        """
        with self._lock:
            self._waiting = [each for each in self._waiting if each.running is not running]
            if self._asked is None or self._asked.running is not running:
                return None
            self._asked = self._waiting.pop(0) if self._waiting else None
            self._asked_at = time.monotonic()
            return self._asked
