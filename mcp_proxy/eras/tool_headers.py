"""Arguments of a server's tools that their callers repeat in headers.

MCP 2026-07-28, transports, "Custom Headers from Tool Parameters". Whoever reads the body must
refuse a call in which the two differ, so the tools are asked for before the first call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import UNSET, Raw, UnsetType

from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.backends.handshake import ask
from mcp_proxy.errors import ClientError, HeaderMismatch, ProxyError
from mcp_proxy.wire import jsonrpc, param_headers
from mcp_proxy.wire.jsonrpc import Request
from mcp_proxy.wire.param_headers import Path

log = logging.getLogger(__name__)

#: Pages of a list of tools that are read, and seconds for all of them.
MAX_PAGES = 100
LIST_TIME = 10.0

#: Seconds for which the tools are known; those that have changed may be called anew before. And for
#: which those that were known still are where they could not be listed.
KNOWN_TIME = 60.0
RETRY_TIME = 5.0

# Seconds before tools are asked for again because a call does not fit what is known of them.
_PAUSE = 1.0

_Annotations = Mapping[str, Path]


class _Known(NamedTuple):
    at: float  # when the tools were last asked for
    until: float
    headers: Mapping[str, _Annotations]  # by tool
    has_any: bool


class ToolHeaders:
    """The headers that belong to the tools of one server. Thread-safe.

    `meta` is what a request of ours needs as `_meta`, None where it needs none.
    """

    def __init__(self, meta: Mapping[str, object] | None = None) -> None:
        self._meta = meta
        self._known: _Known | None = None
        self._lock = threading.Lock()  # held while the tools are asked for

    def has_refused(self, backend: Backend, exchange: Exchange) -> bool:
        """Whether an exchange is a tools/call that differs from its headers, and is answered so.

        A tool that is not known is not checked.
        """
        request = exchange.requests[0]
        if request.method != "tools/call":
            return False
        try:
            self._require_matching(backend, request, exchange.headers)
        except ClientError as error:
            refuse(exchange, error)
            return True
        return False

    def _require_matching(
        self, backend: Backend, request: Request, headers: Mapping[str, str]
    ) -> None:
        known = self._of(backend)
        if not known.has_any:
            return
        fields = jsonrpc.fields_of(request.params)
        name = jsonrpc.text_of(fields.get("name", UNSET)) or ""
        arguments = fields.get("arguments", UNSET)
        if not _are_matching(known.headers.get(name), arguments, headers):
            if time.monotonic() - known.at > _PAUSE:  # the tool may have changed
                with self._lock:
                    known = self._renewed(backend, known)
            _require_matching(known.headers.get(name), arguments, headers)

    def _of(self, backend: Backend) -> _Known:
        """What is known of the tools; while somebody asks for them anew others take what is."""
        known = self._known
        if known is None:
            with self._lock:
                return self._renewed(backend, None)
        if known.until > time.monotonic() or not self._lock.acquire(blocking=False):
            return known
        try:
            return self._renewed(backend, known)
        finally:
            self._lock.release()

    def _renewed(self, backend: Backend, known: _Known | None) -> _Known:
        """Asks for the tools, unless somebody has since they were `known`. The lock is held."""
        if self._known is not None and self._known is not known:
            return self._known
        found, now = self._listed(backend), time.monotonic()
        if found is not None:
            renewed = _Known(now, now + KNOWN_TIME, found, any(found.values()))
        elif known is not None:
            renewed = known._replace(at=now, until=now + RETRY_TIME)
        else:
            renewed = _Known(now, now + RETRY_TIME, {}, False)
        self._known = renewed
        return renewed

    def _listed(self, backend: Backend) -> Mapping[str, _Annotations] | None:
        """The annotations of all tools, None where they could not be listed."""
        pages: list[Raw] = []
        cursor: Raw | UnsetType = UNSET
        until = time.monotonic() + LIST_TIME
        try:
            while len(pages) < MAX_PAGES:
                answer = ask(backend, self._request(cursor), max(0.0, until - time.monotonic()))
                if answer.result is UNSET:
                    return None
                pages.append(answer.result)
                cursor = jsonrpc.member(jsonrpc.fields_of(answer.result), "nextCursor")
                if cursor is UNSET:
                    break
        except ProxyError as error:
            log.warning("the tools of a server could not be listed: %s", error)
            return None
        return param_headers.annotated(pages)

    def _request(self, cursor: Raw | UnsetType) -> Request:
        params: dict[str, object] = {} if cursor is UNSET else {"cursor": cursor}
        if self._meta is not None:
            params["_meta"] = self._meta
        return Request("mcp-proxy-tools", "tools/list", jsonrpc.as_payload(params))


def _require_matching(
    wanted: _Annotations | None, arguments: Raw | UnsetType, headers: Mapping[str, str]
) -> None:
    if wanted:
        param_headers.require_matching(wanted, arguments, lambda name: headers.get(name.lower()))


def _are_matching(
    wanted: _Annotations | None, arguments: Raw | UnsetType, headers: Mapping[str, str]
) -> bool:
    try:
        _require_matching(wanted, arguments, headers)
    except HeaderMismatch:
        return False
    return True


def refuse(exchange: Exchange, error: ClientError) -> None:
    """Answers a request by what is wrong with it; the server does not get it."""
    (request,) = exchange.requests
    data = jsonrpc.encode_error(error.code, error.message, request.id, error.data)
    exchange.offer(ServerMessage(data, is_response=True))
