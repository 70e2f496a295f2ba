"""HTTP backends, by requests: one call at a time, its bytes passed on as they come.

The only module that knows requests and urllib3. requests' adapter is used below its sessions, which
would add headers, cookies, proxies and passwords of their own. A call can be aborted from another
thread at any time, also while the backend is silent: its socket is shut down under the reader.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import SKIP_HEADER

from mcp_proxy.errors import BackendLost, BackendTimeout, BackendUnreached, ClientLeft
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.urls import Address, parse_target

#: Seconds after which a pooled connection is not used again: servers close theirs after five.
MAX_IDLE = 2.0

_QUICKACK = getattr(socket, "TCP_QUICKACK", None)

# A peer that is silent for 15 seconds is asked three times whether it is there, every 5 seconds.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]
_MAX_HOPS = 5  # redirects that are followed
_POOLS = 64  # backends to which connections are kept

# What a connection is to be known by, so that its call can be aborted before there is a response.
_calling = threading.local()


class HttpClient:
    """Connections to any number of backends, `pool_size` kept open to each. Thread-safe.

    `connect_timeout` in seconds; `verify` as requests has it: True, False, or a file of CAs.
    """

    def __init__(self, connect_timeout: float, pool_size: int, verify: bool | str = True) -> None:
        self.connect_timeout = connect_timeout
        self.verify = verify
        self._adapter = _Adapter(pool_connections=_POOLS, pool_maxsize=pool_size)

    def send(self, request: _Outbound, call: HttpCall, timeout: float) -> requests.Response:
        """The response as far as its headers; raises what requests raises."""
        _calling.call = call
        try:
            return self._adapter.send(
                request,
                stream=True,
                timeout=(self.connect_timeout, timeout),
                verify=self.verify,
            )
        finally:
            _calling.call = None

    def probe(self, address: Address) -> str | None:
        """Why a backend cannot be connected to, None if it can; no request is sent."""
        try:
            place = (address.host, address.port)
            socket.create_connection(place, self.connect_timeout).close()
        except OSError as error:
            return f"{address.url}: {error.strerror or error}"
        return None

    def close(self) -> None:
        """Closes the connections that are idle."""
        self._adapter.close()


class HttpCall:
    """One request to one backend, and its response.

    `send` and `pieces` belong to one thread; `abort` and `close` may come from any.
    """

    def __init__(
        self,
        client: HttpClient,
        address: Address,
        method: str,
        target: str,
        headers: Headers,
        body: bytes,
    ) -> None:
        self.address = address
        self.status = 0
        self.headers: Headers = []
        self._client = client
        self.target = target
        self._given, self._body = headers, body
        self._hops = 0
        self._request = _outbound(address, method, target, headers, body)
        self._response: requests.Response | None = None
        self._lock = threading.Lock()  # guards what follows
        self._socket: socket.socket | None = None
        self._was_connected = False
        self._is_aborted = False

    def __repr__(self) -> str:
        return f"<HttpCall {self._request.method} {self._request.url} {self.status or 'unsent'}>"

    def send(self, timeout: float) -> None:
        """Sends the request and receives status and headers.

        Raises ClientLeft when the call was aborted meanwhile, BackendUnreached when the backend
        cannot have got anything of it, BackendTimeout when no answer begins within `timeout`
        seconds, BackendLost otherwise.
        """
        try:
            self._response = self._client.send(self._request, self, timeout)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if self._is_aborted:
                raise ClientLeft from error
            raise _translated(error, timeout, self._was_connected) from error
        raw = self._response.raw
        self.status = raw.status
        self.headers = list(raw.headers.iteritems())

    def header(self, name: str) -> str | None:
        """The first value of a response header, None where it is absent."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def wait_for_ever(self) -> None:
        """From now on the backend may be silent as long as it likes: an event stream.

        That its host is there is asked by TCP: one that vanished breaks the stream within a minute.
        """
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.settimeout(None)
                for level, option, value in _KEEPALIVE:
                    self._socket.setsockopt(level, option, value)

    def pieces(self) -> Iterator[bytes]:
        """The body, each piece as soon as it is there, its encoding untouched.

        Raises BackendLost when it ends before it is complete, BackendTimeout when it stalls.
        """
        assert self._response is not None
        raw = self._response.raw
        expected = self._expected_length()
        received = 0
        try:
            self._acknowledge()
            while piece := raw.read1():
                received += len(piece)
                yield piece
                self._acknowledge()
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib3.exceptions.ReadTimeoutError):
                raise BackendTimeout("The server stopped in the middle of its answer") from error
            raise BackendLost("The server broke off in the middle of its answer") from error
        if expected is not None and received < expected:
            # read1 takes an early end for the end.
            raise BackendLost(f"The server sent {received} of {expected} bytes and closed")

    def _acknowledge(self) -> None:
        """Has the kernel acknowledge what came, at once.

        A server that writes headers and body apart, with Nagle on, waits for that before
        it sends the rest; left to itself the kernel takes 40 ms (measured with uvicorn's streams).
        """
        sock = self._socket
        if _QUICKACK is not None and sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def read(self, limit: int) -> bytes:
        """The whole body; raises as `pieces` does, and BackendLost over `limit` bytes."""
        found = bytearray()
        for piece in self.pieces():
            found += piece
            if len(found) > limit:
                raise BackendLost(f"The server answered with more than {limit} bytes")
        return bytes(found)

    def _expected_length(self) -> int | None:
        length = self.header("Content-Length")
        has_body = self._request.method != "HEAD" and self.status not in (204, 304)
        if not has_body or length is None or not length.isdigit():
            return None
        return None if self.header("Transfer-Encoding") else int(length)

    def redirected(self) -> HttpCall | None:
        """The same request where this answer redirects it, None where it does not or must not.

        Only on the same host, never from https to http, and only by what keeps method and body
        (RFC 9110 section 15.4, and 301 and 302 as everybody means them for POST).
        """
        location = self.header("Location")
        if self.status not in (301, 302, 307, 308) or location is None or self._hops >= _MAX_HOPS:
            return None
        try:
            there = parse_target(urljoin(self._named_url(), location))
        except ValueError:
            return None
        if there is None or there.host != (self.address.name or self.address.host):
            return None
        if self.address.scheme == "https" and there.scheme == "http":
            return None
        if there.scheme == self.address.scheme and there.port != self.address.port:
            return None  # another program on that host, to which Authorization does not belong
        address = self.address._replace(scheme=there.scheme, port=there.port)
        target = f"{there.path or '/'}?{there.query}" if there.query else there.path or "/"
        method, body = str(self._request.method), self._body
        call = HttpCall(self._client, address, method, target, self._given, body)
        call._hops = self._hops + 1
        return call

    def _named_url(self) -> str:
        return self.address._replace(host=self.address.name or self.address.host).url + self.target

    def connected(self, sock: socket.socket) -> None:
        """The call has this socket to itself, until it is told otherwise."""
        with self._lock:
            self._socket = sock
            self._was_connected = True
        if self._is_aborted:
            self._shut_down()

    def disconnected(self) -> None:
        """The call is over, and the socket another call's from now on."""
        with self._lock:
            self._socket = None

    def abort(self) -> None:
        """Nobody wants the answer any more: whoever waits for it stops waiting."""
        self._is_aborted = True
        self._shut_down()

    def end(self) -> None:
        """As `abort`, for who ends everything that goes on."""
        self.abort()

    def _shut_down(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the connection: kept if the response was read to its end, closed otherwise."""
        if self._response is not None:
            self._response.raw.close() if self._is_unread() else self._response.close()

    def _is_unread(self) -> bool:
        return self._response is not None and not self._response.raw.isclosed()


class _Outbound(requests.PreparedRequest):
    """A request that is sent as it stands. `server_name` is what the certificate must be for."""

    server_name: str | None = None


def _outbound(
    address: Address, method: str, target: str, headers: Headers, body: bytes
) -> _Outbound:
    request = _Outbound()
    request.method = method
    request.url = address.url + target
    request.headers = CaseInsensitiveDict(
        {"User-Agent": SKIP_HEADER, "Accept-Encoding": SKIP_HEADER}
    )
    request.headers.update(headers)
    request.headers["Host"] = address.host_header
    if body or method in ("POST", "PUT", "PATCH"):
        request.headers["Content-Length"] = str(len(body))
    request.body = body or None
    request.hooks = requests.hooks.default_hooks()
    request.server_name = address.name
    return request


class _Adapter(HTTPAdapter):
    """requests' adapter over our pools; a certificate must be for the name, not the address."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def build_connection_pool_key_attributes(
        self, request: Any, verify: Any, cert: Any = None
    ) -> Any:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if request.server_name is None or host["scheme"] != "https":
            return host, pool
        named = {"server_hostname": request.server_name, "assert_hostname": request.server_name}
        return host, {**pool, **named}


class _Response(http.client.HTTPResponse):
    """A response whose informational forerunners (1xx) are passed over, all of them."""

    def _read_status(self) -> Any:
        while True:
            line = super()._read_status()  # type: ignore[misc]
            if not 100 <= line[1] < 200 or line[1] == http.client.SWITCHING_PROTOCOLS:
                return line
            http.client.parse_headers(self.fp)


class _KnownToTheCall:
    """A connection that tells the call of its thread as soon as it stands.

    Its socket, not the connection: that one gives its socket away when the response is to end with
    it, and keeps it from the call that has to be able to shut it down.
    """

    idle_since = 0.0
    call: HttpCall | None = None
    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        if self.call is not None:
            self.call.connected(self.sock)


class _HttpConnection(_KnownToTheCall, HTTPConnection):
    response_class = _Response


class _HttpsConnection(_KnownToTheCall, HTTPSConnection):
    response_class = _Response


class _FreshConnections:
    """Connections that were idle too long are opened anew, and each is made known to its call."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)  # type: ignore[misc]
        if connection.sock is not None and time.monotonic() - connection.idle_since > MAX_IDLE:
            connection.close()
        connection.call = getattr(_calling, "call", None)
        if connection.call is not None and connection.sock is not None:
            connection.call.connected(connection.sock)
        return connection

    def _put_conn(self, connection: Any) -> None:
        if connection is not None:
            connection.idle_since = time.monotonic()
            if connection.call is not None:
                connection.call.disconnected()
                connection.call = None
        super()._put_conn(connection)  # type: ignore[misc]


class _HttpPool(_FreshConnections, HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(_FreshConnections, HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


def _translated(
    error: requests.RequestException | urllib3.exceptions.HTTPError,
    timeout: float,
    was_connected: bool,
) -> BackendLost | BackendTimeout:
    """What an error of requests means for the call."""
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else None
    if isinstance(error, requests.ConnectTimeout):
        return BackendUnreached("The server cannot be reached in time")
    if isinstance(error, requests.exceptions.SSLError) and not was_connected:
        return BackendUnreached(f"The server's certificate or TLS is not acceptable: {reason}")
    if isinstance(
        reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.NameResolutionError)
    ):
        return BackendUnreached("The server cannot be reached: the connection was refused")
    if isinstance(error, requests.Timeout):
        return BackendTimeout(f"The server did not answer within {timeout:g} seconds")
    return BackendLost("The server closed the connection before it answered")
