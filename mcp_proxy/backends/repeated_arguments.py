"""Which arguments a modern HTTP server wants repeated in headers, as its own list of tools says.

MCP 2026-07-28, tools, "x-mcp-header". The list is asked for when a call needs it, and believed for
a while. A server's list may be long, slow or without an end: what is read of it is bounded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from msgspec import UNSET, Raw

from mcp_proxy.errors import BackendUnreached, ProxyError
from mcp_proxy.wire import jsonrpc, modern, param_headers
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.param_headers import Path

log = logging.getLogger(__name__)

#: Seconds for all pages of a list.
LIST_TIME = 10.0

#: Seconds within which a server is not asked for its tools again because it refuses what a call
#: repeats of its arguments.
RENEWAL_PAUSE = 1.0

#: Seconds for which a list is believed.
BELIEVED = 10.0

#: The bytes that are read of all pages of a list together.
MAX_SIZE = 64 * 1024 * 1024

# The pages of a list that are read, and the seconds below which no further one is asked for.
_MAX_PAGES = 100
_LEAST_TIME = 0.1

# What a request of our own repeats of a client's metadata.
_LISTED = frozenset({modern.PROTOCOL_VERSION, modern.CLIENT_CAPABILITIES, modern.CLIENT_INFO})

#: The arguments of each tool, by the rest of the header's name.
Annotations = Mapping[str, Mapping[str, Path]]


class Page(NamedTuple):
    """A request for one page, which has so many seconds and bytes for its answer."""

    request: Request
    seconds: float
    size: int
    is_first: bool


#: Has the result of a page's request, None without one; raises ProxyError.
Ask = Callable[[Page], Raw | None]


class _Known(NamedTuple):
    at: float
    annotations: Annotations


class RepeatedArguments:
    """The arguments that one server wants repeated, by tool. Thread-safe.

    Of several callers one has the list asked for; the others wait for it where nothing is known
    yet, and take what was known before otherwise. `label` names the server in the log.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._known: _Known | None = None
        self._outdated: _Known | None = None  # what is to be renewed before its time
        self._lock = threading.Lock()  # held while the tools are asked for

    def of(self, request: Request, ask: Ask) -> Annotations:
        """What is repeated, listed by `ask` for the client of a request where that is due.

        Raises BackendUnreached where the server cannot be reached for the first page. What is
        missing of a list otherwise is said in the log.
        """
        known = self._known
        if known is None or known is self._outdated:
            with self._lock:
                return self._renewed(known, request, ask)
        if self._is_believed(known) or not self._lock.acquire(blocking=False):
            return known.annotations
        try:
            return self._renewed(known, request, ask)
        finally:
            self._lock.release()

    def may_have_changed(self, since: float) -> bool:
        """Whether a call that began `since` then, and was refused for its headers, may have others
        by now: the list has been renewed meanwhile, or will be.
        """
        known = self._known
        if known is None or known is self._outdated or known.at > since:
            return True
        if known.at >= time.monotonic() - RENEWAL_PAUSE:
            return False
        self._outdated = known
        return True

    def _is_believed(self, known: _Known) -> bool:
        return known.at > time.monotonic() - BELIEVED

    def _renewed(self, known: _Known | None, request: Request, ask: Ask) -> Annotations:
        """Asks for the tools, unless somebody has since they were `known`. The lock is held."""
        if self._known is None or self._known is known:
            found = param_headers.annotated(self._pages(request, ask))
            self._known = _Known(time.monotonic(), found)
        return self._known.annotations

    def _pages(self, request: Request, ask: Ask) -> Iterator[Raw]:
        """The pages of the list, one after the other, up to what goes wrong or is too much."""
        params = own_params(request)
        until = time.monotonic() + LIST_TIME
        size = MAX_SIZE
        cursors: set[bytes] = set()  # those of all pages so far
        try:
            while (left := until - time.monotonic()) >= _LEAST_TIME and len(cursors) < _MAX_PAGES:
                listing = Request("mcp-proxy-tools", "tools/list", params)
                result = ask(Page(listing, left, size, not cursors))
                if result is None:
                    return
                yield result
                size -= len(result)
                cursor = jsonrpc.member(jsonrpc.fields_of(result), "nextCursor")
                if cursor is UNSET:
                    return
                if bytes(cursor) in cursors:
                    log.warning("[%s] the list of tools comes back to where it was", self._label)
                    return
                cursors.add(bytes(cursor))
                params = jsonrpc.edited(params, partial(_set_cursor, cursor))
            log.warning("[%s] the list of tools is not read to its end", self._label)
        except ProxyError as error:
            if isinstance(error, BackendUnreached) and not cursors:
                raise
            log.warning("[%s] the tools could not be listed: %s", self._label, error)


def own_params(request: Request) -> Raw:
    """The params of a request of our own for the client of another one."""
    meta = modern.meta_of(request.params)
    return jsonrpc.as_payload({"_meta": {n: v for n, v in meta.items() if n in _LISTED}})


def _set_cursor(cursor: Raw, fields: dict[str, Raw]) -> None:
    fields["cursor"] = cursor
