"""Calls to HTTP backends, made with requests; the bytes of a response are unchanged.

The only module that knows requests and urllib3. requests' adapter is used below its sessions, which
would add headers, cookies, proxies and passwords of their own. A call can be aborted from another
thread at any time, also while the backend is silent: that shuts its socket down.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import logging
import re
import select
import socket
import ssl
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import select_proxy, should_bypass_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import SKIP_HEADER

from mcp_proxy.errors import (
    BackendLost,
    BackendTimeout,
    BackendUnreached,
    BadAnswer,
    ClientLeft,
    ConnectionBroken,
    InvalidRequest,
    ProxyError,
    RedirectRefused,
    in_seconds,
)
from mcp_proxy.wire.headers import Headers, media_type
from mcp_proxy.wire.urls import Address, Target, is_host, parse_target

log = logging.getLogger(__name__)

#: Seconds after which a pooled connection is not used again: servers close theirs after five.
MAX_IDLE = 2.0

#: The longest piece of a body, in bytes. The kernel may have many megabytes of it.
MAX_PIECE = 256 * 1024

_QUICKACK = getattr(socket, "TCP_QUICKACK", None)

# TCP probes a peer that is silent for 15 seconds three times, every 5 seconds.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]
_LENGTH = re.compile(r"[0-9]{1,18}")
_KEEPING = (307, 308)  # redirects that keep method and body
_REDIRECTS = (301, 302, 303, *_KEEPING)
_MAX_SHOWN = 200  # characters of a path in a sentence
_MAX_HOPS = 5  # redirects that are followed
_MAX_INFORMATIONAL = 16  # answers with 1xx before the answer
_MAX_HEAD = 256 * 1024  # bytes of a head, those of the answers before it included
_MAX_TRAILERS = 64 * 1024  # bytes
_POOLS = 64  # backends to which connections are kept

# Why a connection was not made, for clients; any other reason has the system's words.
_REASONS = {
    errno.ECONNREFUSED: ": the connection was refused",
    errno.EHOSTUNREACH: ": there is no route to its host",
    errno.ENETUNREACH: ": its network is unreachable",
    errno.ECONNRESET: ": the connection broke off",
    errno.ETIMEDOUT: " in time",
}

# Where in its own source Python's ssl module has noticed something.
_LINE_OF_SOURCE = re.compile(r"\A_ssl\.c:\d+: ")

# How http.client begins when the answer to CONNECT is not 200.
_TUNNEL_REFUSED = "Tunnel connection failed:"

_NO_PROXY = "The outbound proxy cannot be reached"
_NOT_SPOKEN_TO = "The outbound proxy in the environment has no http:// URL; set backend_proxy"

# The call of this thread; its connection registers with it, so that `abort` works before there is a
# response.
_calling = threading.local()


class HttpClient:
    """Connections to any number of backends, at most `pool_size` kept to each. Thread-safe.

    `connect_timeout` in seconds; `verify` as in requests: True, False, or a file of CAs.
    `outbound_proxy` is the URL of the proxy through which all requests go, `off` for none, None
    for those of the environment.

    `proxy_of(address)` is the URL of the proxy for a backend, None for none. Behind one the backend
    goes by its name alone: nobody but the proxy may be able to look it up.
    """

    def __init__(
        self,
        connect_timeout: float,
        pool_size: int,
        verify: bool | str = True,
        outbound_proxy: str | None = None,
    ) -> None:
        self.connect_timeout = connect_timeout
        self.verify = verify
        self._adapter = _Adapter(pool_connections=_POOLS, pool_maxsize=pool_size)
        self._proxies = _environment() if outbound_proxy is None else {}
        self._proxy = None if outbound_proxy == "off" else outbound_proxy
        self.proxy_of = lru_cache(maxsize=256)(self._proxy_of)

    def _proxy_of(self, address: Address) -> str | None:
        if self._proxy is not None or not self._proxies:
            return self._proxy
        named = address._replace(host=address.name or address.host)
        if _is_loopback(named.host) or should_bypass_proxies(named.url, no_proxy=None):
            return None
        found = select_proxy(named.url, self._proxies)
        return found if found is None or "://" in found else f"http://{found}"

    def send(self, call: HttpCall, timeout: float) -> requests.Response:
        """The response to a call, its body unread; raises the errors of requests."""
        proxy = self.proxy_of(call.address)
        if proxy is not None and not _is_spoken_to(proxy):
            raise BackendUnreached(_NOT_SPOKEN_TO)
        _calling.call = call
        try:
            return self._adapter.send(
                _prepared(call, proxy is not None),
                stream=True,
                timeout=(min(self.connect_timeout, timeout), timeout),
                verify=self.verify,
                proxies=None if proxy is None else {"all": proxy},
            )
        finally:
            _calling.call = None

    def probe(self, address: Address) -> BackendUnreached | None:
        """Why a backend cannot be connected to, None if it can; no request is sent.

        One with TLS has to shake hands as for a call. Of one behind an outbound proxy only the
        proxy is known.
        """
        proxy = self.proxy_of(address)
        if proxy is not None and not _is_spoken_to(proxy):
            found = BackendUnreached(_NOT_SPOKEN_TO)
            found.detail = f"{address.shown}: {_NOT_SPOKEN_TO}"
            return found
        try:
            if proxy is None and address.scheme == "https":
                self._shake_hands(address)
            else:
                origin = (address.host, address.port) if proxy is None else _origin_of(proxy)
                socket.create_connection(origin, self.connect_timeout).close()
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            found = _unreached(error, error) if proxy is None else BackendUnreached(_NO_PROXY)
            words = _words_of_the_system(error) or _LINE_OF_SOURCE.sub("", str(error))
            found.detail = f"{self.way_to(address)}: {words}"
            return found
        return None

    def _shake_hands(self, address: Address) -> None:
        """Connects with TLS and hangs up, within `connect_timeout`."""
        request = _prepared(HttpCall(self, address, "GET", "/", {}, b""), is_proxied=False)
        adapter: Any = self._adapter
        pool = adapter.get_connection_with_tls_context(request, self.verify)
        adapter.cert_verify(pool, address.url, self.verify, None)
        pool.shake_hands(self.connect_timeout)

    def way_to(self, address: Address) -> str:
        """What is connected to for a backend, in words for the log."""
        proxy = self.proxy_of(address)
        if proxy is None:
            return address.shown
        where = urlsplit(proxy).netloc.rpartition("@")[2]  # without a password
        return f"the outbound proxy http://{where} of {address.shown}"

    def close(self) -> None:
        """Closes idle connections."""
        self._adapter.close()


class HttpCall:
    """One request to one backend, and its response.

    `send` and `pieces` belong to one thread; `abort` and `close` may come from any. `target` is
    path and query; anything else raises InvalidRequest, since it would change the host. A fresh
    call is sent over a new connection.

    The answer must have ended when the timeout given to `send` is over, however its bytes arrive,
    unless `limit_silence` or `wait_for_ever` says otherwise.
    """

    def __init__(
        self,
        client: HttpClient,
        address: Address,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        is_fresh: bool = False,
    ) -> None:
        if not target.startswith("/"):
            raise InvalidRequest("The path of a request must begin with /")
        self.address = address
        #: The backend that was asked at first: a redirect may have led on from there.
        self.tried = address
        self.method = method
        self.target = target
        self.request_headers = headers
        self.request_body = body
        self.is_fresh = is_fresh
        #: Of the response; 0 and empty before `send`.
        self.status = 0
        self.headers: Headers = []
        self.media_type = ""
        self.sets_cookie = False
        self._client = client
        self._hops = 0
        self._ahead: list[bytes] = []
        self._timeout = 0.0
        self._until: float | None = None  # when the answer must have ended, by the monotonic clock
        self._connect_until = 0.0  # when a proxy must have led to the backend
        self._read_timeout: float | None = None
        self._head_size = 0
        self._response: requests.Response | None = None
        self._lock = threading.Lock()  # guards the fields below
        self._socket: socket.socket | None = None
        self._was_connected = False
        self._abort_reason: ProxyError | None = None
        self._on_close: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        url = self.address.url + self.target
        return f"<HttpCall {self.method} {url} {self.status or 'unsent'}>"

    @property
    def host(self) -> str:
        """The Host header: the address's, unless the request has one."""
        return self.request_headers.get("Host", self.address.host_header)

    def send(self, timeout: float) -> None:
        """Sends the request and receives status and headers.

        Raises the reason given to `abort` when the call was aborted, BackendUnreached when the
        backend got nothing of the request, BackendTimeout when its head is not whole within
        `timeout` seconds, BadAnswer when that cannot be used, ConnectionBroken otherwise. A call
        that follows a redirect has the time that is left of the first one's.
        """
        self._timeout = self._read_timeout = timeout
        now = time.monotonic()
        self._until = self._until or now + timeout
        self._connect_until = now + min(timeout, self._client.connect_timeout)
        try:
            self._response = self._client.send(self, timeout)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            _clear_frames(error)
            raise self._failure_of(error, timeout) from error
        raw = self._response.raw
        self.status = raw.status
        self.headers = list(raw.headers.iteritems())
        self.media_type = media_type(self.header("Content-Type") or "")
        self.sets_cookie = "Set-Cookie" in raw.headers

    def _failure_of(
        self, error: requests.RequestException | urllib3.exceptions.HTTPError, timeout: float
    ) -> ProxyError:
        if self._abort_reason is not None:
            return self._abort_reason
        found = _translated(error, timeout, self._was_connected)
        if isinstance(found, BackendUnreached):
            way = self._client.way_to(self.address)
            found.detail = f"{way}: {_words_of_the_system(error) or found}"
        return found

    def header(self, name: str) -> str | None:
        """The first value of a response header, None where it is absent."""
        assert self._response is not None
        values = self._response.raw.headers.getlist(name)
        return values[0] if values else None

    def limit_silence(self) -> None:
        """Limits the time without a byte from now on, no longer the whole: for a stream."""
        self._until = None
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.settimeout(self._read_timeout)

    def wait_for_ever(self) -> None:
        """Removes every time limit, for an event stream.

        TCP keepalive breaks the stream within a minute if the backend's host no longer responds.
        """
        self._until = self._read_timeout = None
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.settimeout(None)
                for level, option, value in _KEEPALIVE:
                    self._socket.setsockopt(level, option, value)

    def limit_trailers(self) -> None:
        """Gives what follows a body the time that its head had: nobody waits for it."""
        self._until = self._until or time.monotonic() + self._timeout

    def receive(self, sock: socket.socket, buffer: bytearray) -> int:
        """Reads what is there, or comes before the deadline, for the connection's reader.

        Raises TimeoutError, and _BadHead when the head is too long.
        """
        until = self._until if self._was_connected else self._connect_until
        if until is not None and sock.gettimeout() != 0:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the time for the answer is over")
            sock.settimeout(left)
        size = sock.recv_into(buffer)
        if not self.status:
            self._head_size += size
            if self._head_size > _MAX_HEAD:
                raise _BadHead
        return size

    @property
    def whole(self) -> bytes | None:
        """The body where all of it has been read ahead, or there is none; None otherwise."""
        assert self._response is not None
        return b"".join(self._ahead) if self._response.raw.isclosed() else None

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the body is that of the connection, so that a break looks like one."""
        assert self._response is not None
        raw = self._response.raw
        return raw.length_remaining is None and not raw.chunked

    def pieces(self, pulse: float | None = None) -> Iterator[bytes]:
        """The body, each piece as soon as it arrives, its content encoding unchanged.

        An empty piece says that nothing came for another `pulse` seconds, where that is given.
        Raises BadAnswer when it ends before it is complete, BackendTimeout when it stalls, and
        the reason given to `abort` when the call was aborted.
        """
        assert self._response is not None
        raw = self._response.raw
        while self._ahead:
            yield self._ahead.pop(0)
        try:
            while not raw.isclosed():
                self._acknowledge()
                if pulse is not None:
                    yield from self._silence(raw, pulse)
                piece = raw.read1(MAX_PIECE)
                if not piece:
                    break
                yield piece
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            if self._abort_reason is not None:
                raise self._abort_reason from error
            if isinstance(error, urllib3.exceptions.ReadTimeoutError):
                raise self._stopped() from error
            if missing := raw.length_remaining:
                raise BadAnswer(f"The server closed {missing} bytes too early") from error
            raise BadAnswer("The server broke off in the middle of its answer") from error
        # What has neither length nor chunks ends without an error, even after an abort.
        if self.ends_with_connection and self._abort_reason is not None:
            raise self._abort_reason

    def _stopped(self) -> BackendTimeout:
        if self._until is None:
            return BackendTimeout("The server stopped in the middle of its answer")
        return BackendTimeout(f"The server's answer did not end within {in_seconds(self._timeout)}")

    def _silence(self, raw: Any, pulse: float) -> Iterator[bytes]:
        """An empty piece each `pulse` seconds until something can be read.

        Raises BackendTimeout after the read timeout: each of these waits is shorter than that.
        """
        limit, waited = self._read_timeout, 0.0
        while not self._is_readable(raw, pulse if limit is None else min(pulse, limit - waited)):
            waited += pulse
            if limit is not None and waited >= limit:
                raise self._stopped()
            yield b""

    def _is_readable(self, raw: Any, seconds: float) -> bool:
        """Whether there is something to read within that many seconds, or the connection broke."""
        sock, reader = self._socket, getattr(raw._fp, "fp", None)
        if sock is None or reader is None:
            return True
        try:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            return bool(
                poll.poll(0)
                or (isinstance(sock, ssl.SSLSocket) and sock.pending())
                or len(_buffered(sock, reader)) > (len(b"\r\n") if raw.chunked else 0)
                or poll.poll(seconds * 1000)
            )
        except (OSError, ValueError):
            return True  # reading will say what is wrong

    def has_more(self) -> bool:
        """Whether `pieces` would not wait: for a piece, for the end, or to say what is wrong."""
        assert self._response is not None
        return bool(self._ahead) or self._is_readable(self._response.raw, 0)

    def fileno(self) -> int:
        """The connection's file, to be watched while `has_more` is False; raises ValueError where
        there is none any more.
        """
        sock = self._socket
        if sock is None:
            raise ValueError("the connection is closed")
        return sock.fileno()

    def _acknowledge(self) -> None:
        """Has the kernel acknowledge the received bytes at once.

        A server that writes headers and body separately, with Nagle's algorithm on, waits for the
        acknowledgement, which the kernel delays by 40 ms (measured with uvicorn's streams).
        """
        sock = self._socket
        if _QUICKACK is not None and sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def read(self, limit: int) -> bytes:
        """The whole body; raises as `pieces` does, and BadAnswer over `limit` bytes."""
        found = self.read_ahead(limit)
        if found is None:
            raise BadAnswer(f"The server answered with more than {limit} bytes")
        return found

    def read_ahead(self, limit: int) -> bytes | None:
        """The whole body, None over `limit` bytes; `pieces` still has all of it.

        Raises as `pieces` does.
        """
        length = self.header("Content-Length") or ""
        if length.isdigit() and int(length) > limit:
            return None
        read: list[bytes] = []
        size = 0
        for piece in self.pieces():
            read.append(piece)
            size += len(piece)
            if size > limit:
                break
        self._ahead = [*read, *self._ahead]  # more may have been read before than now
        return b"".join(read) if size <= limit else None

    def redirected(self) -> HttpCall | None:
        """The call that follows this response's redirect; None where it is no redirect.

        Followed are 307 and 308, which keep method and body (RFC 9110 section 15.4), on the same
        host, from http to https too, but never back. Raises RedirectRefused for all others.
        """
        if self.status not in _REDIRECTS:
            return None
        location = self.header("Location")
        try:
            there = parse_target(urljoin(self._named_url(), location)) if location else None
        except ValueError:
            there = None
        ours = self.address.name or self.address.host
        is_told = self.host != self.address.host_header
        if there is not None and is_told and is_host(there, self.host):
            # as the server was told that it is called
            there = there._replace(scheme=self.address.scheme, host=ours, port=self.address.port)
        if there is None:
            raise RedirectRefused(f"The server redirects ({self.status}) to what is no usable URL")
        if why := self._refusal_of(there):
            where = there.path[:_MAX_SHOWN] or "/"  # the query may have a secret
            if (there.host, there.port) != (ours, self.address.port):  # else ours is no client's
                where = f"{there.scheme}://{there.address.host_header}{where}"
            raise RedirectRefused(
                f"The server redirects ({self.status}) to {where}, which is not followed: {why}"
            )
        address = self.address._replace(scheme=there.scheme, port=there.port)
        if self._client.proxy_of(address) is not None:
            address = address._replace(host=ours, name=None)
        target = f"{there.path or '/'}?{there.query}" if there.query else there.path or "/"
        call = HttpCall(
            self._client, address, self.method, target, self.request_headers, self.request_body
        )
        call.tried = self.tried
        call._hops = self._hops + 1
        call._until = self._until
        return call

    def _refusal_of(self, there: Target) -> str:
        """Why a redirect is not followed, empty where it is."""
        if self.status not in _KEEPING:
            return f"after a {self.status} a POST may become a GET"
        if self._hops >= _MAX_HOPS:
            return f"it came after {_MAX_HOPS} redirects"
        if there.host != (self.address.name or self.address.host):
            return "that is another host"
        if (self.address.scheme, there.scheme) == ("https", "http"):
            return "it would go on without TLS"
        if there.scheme == self.address.scheme and there.port != self.address.port:
            # Another server on that host, which must not get Authorization.
            return "that is another port, maybe another server"
        return ""

    def _named_url(self) -> str:
        return self.address._replace(host=self.address.name or self.address.host).url + self.target

    def connected(self, sock: socket.socket, is_through: bool = True) -> None:
        """Registers the socket of the call; shuts it down if the call was aborted already.

        Until it `is_through`, a proxy or a handshake has yet to make it one to the backend.
        """
        with self._lock:
            self._socket = sock
            self._was_connected = is_through
        if self._abort_reason is not None:
            self._shut_down()

    def disconnected(self) -> None:
        """Unregisters the socket: another call may use it from now on."""
        with self._lock:
            self._socket = None

    def abort(self, reason: ProxyError | None = None) -> None:
        """Makes `send` and `pieces` raise `reason`, by default ClientLeft. The first one counts."""
        with self._lock:
            self._abort_reason = self._abort_reason or reason or ClientLeft()
        self._shut_down()

    def _shut_down(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def on_close(self, act: Callable[[], object]) -> None:
        """Has `act` called when the call is closed, in reverse order of registration."""
        with self._lock:
            self._on_close.append(act)

    def close(self) -> None:
        """Frees the connection and calls the functions of `on_close`; logs their errors.

        Called by who reads, once nothing is read any more.
        """
        with self._lock:
            acts, self._on_close = self._on_close, []
            # Where it was raised, its traceback holds the call: only the collector would free both.
            self._abort_reason = None
        for act in (self._free_connection, *reversed(acts)):
            try:
                act()
            except Exception:
                log.exception("the cleanup after a response failed")

    def _free_connection(self) -> None:
        """Keeps the connection if the response was read to its end, closes it otherwise."""
        if self._response is not None:
            is_read = self._response.raw.isclosed()
            self._response.close() if is_read else self._response.raw.close()


def _clear_frames(error: BaseException) -> None:
    """Clears what has raised an error, and those before it, of its local variables.

    urllib3's `urlopen` has one of them in a local variable, and that has the frame of `urlopen` in
    its traceback, with those of whoever called: only the collector would free all of that.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


def _buffered(sock: socket.socket, reader: Any) -> bytes:
    """What was received and not read yet, a chunk's own line end included; never waits."""
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        found: bytes = reader.peek(1)
        return found
    except (BlockingIOError, ssl.SSLWantReadError):
        return b""
    finally:
        sock.settimeout(timeout)


class _Prepared(requests.PreparedRequest):
    """A request that is sent unchanged. The certificate must be for `server_name`, if given."""

    server_name: str | None = None


def _prepared(call: HttpCall, is_proxied: bool) -> _Prepared:
    request = _Prepared()
    request.method = call.method
    address = call.address
    if is_proxied:
        address = address._replace(host=address.name or address.host, name=None)
    request.url = address.url + call.target
    request.headers = CaseInsensitiveDict(
        {"User-Agent": SKIP_HEADER, "Accept-Encoding": SKIP_HEADER}
    )
    request.headers.update(call.request_headers)
    if "Host" not in request.headers:
        request.headers["Host"] = call.address.host_header
    if call.request_body or call.method in ("POST", "PUT", "PATCH"):
        request.headers["Content-Length"] = str(len(call.request_body))
    request.body = call.request_body or None
    request.hooks = requests.hooks.default_hooks()
    request.server_name = address.name
    return request


# --- outbound proxies ----------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """The proxies in the environment by scheme."""
    found = getproxies()
    return {key: found[key] for key in ("http", "https", "all") if found.get(key)}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").rpartition(".")[2] == "localhost"


def _is_spoken_to(proxy: str) -> bool:
    return proxy.lower().startswith("http://")


def _origin_of(proxy: str) -> tuple[str, int]:
    """Host and port in the URL of a proxy; raises ValueError."""
    parts = urlsplit(proxy)
    return parts.hostname or "", parts.port or 80


# --- connections ---------------------------------------------------------------------------------


class _Adapter(HTTPAdapter):
    """requests' adapter with our pools; a certificate must be for the name, not the address."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **proxy_kwargs)
        manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
        return manager

    def build_connection_pool_key_attributes(
        self, request: Any, verify: Any, cert: Any = None
    ) -> Any:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if request.server_name is None or host["scheme"] != "https":
            return host, pool
        return host, {**pool, "server_hostname": request.server_name}


class _BadHead(http.client.HTTPException):
    """The head of a response cannot be used."""


class _Response(http.client.HTTPResponse):
    """A response that skips informational ones (1xx) before it, read as its call allows.

    `begin` raises _BadHead where the end of the body cannot be known: RFC 9112 section 6.3.
    """

    _call: Callable[[], HttpCall | None] | None = None  # weak: the call has the response

    def begin(self) -> None:
        super().begin()
        lengths = [] if self.chunked else self.headers.get_all("Content-Length", [])
        is_sound = len(set(lengths)) < 2 and all(map(_LENGTH.fullmatch, lengths))
        # A line that is no header hides those behind it, the length among them.
        if self.status < 200 or not is_sound or self.headers.defects:
            raise _BadHead

    def _read_status(self) -> Any:
        call = getattr(_calling, "call", None)
        if call is not None:
            self._call = weakref.ref(call)
            # The reader asks for more until it has a line: only below it can time be limited.
            raw: Any = self.fp.raw
            raw.readinto = partial(call.receive, call._socket)
        for _ in range(_MAX_INFORMATIONAL + 1):
            line = super()._read_status()  # type: ignore[misc]
            if not 100 <= line[1] < 200 or line[1] == http.client.SWITCHING_PROTOCOLS:
                return line
            http.client.parse_headers(self.fp)
        raise _BadHead

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if not 0 <= size <= sys.maxsize:
            raise ValueError("a chunk cannot have that size")
        return size

    def _read_and_discard_trailer(self) -> None:
        if self._call is not None and (call := self._call()) is not None:
            call.limit_trailers()
        left = _MAX_TRAILERS
        while (line := self.fp.readline(left + 1)) not in (b"\r\n", b"\n", b""):
            left -= len(line)
            if left < 0:
                raise http.client.LineTooLong("trailer")


class _KnownToTheCall:
    """A connection that registers its socket with the call of its thread.

    The socket, not the connection: a connection that is closed after the response gives its socket
    away, and the call must still be able to shut that down.
    """

    idle_since = 0.0
    call: HttpCall | None = None
    connect_until: float | None = None  # where one time limit counts for the handshake, too
    sock: Any
    timeout: Any

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        if self.connect_until is not None:
            sock.settimeout(max(self.connect_until - time.monotonic(), 0.001))
        if self.call is not None:
            self.call.connected(sock, is_through=False)
        return sock

    def _tunnel(self) -> None:
        super()._tunnel()  # type: ignore[misc]
        self.sock.settimeout(self.timeout)

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        if self.call is not None:
            self.call.connected(self.sock)


class _HttpConnection(_KnownToTheCall, HTTPConnection):
    response_class = _Response


class _HttpsConnection(_KnownToTheCall, HTTPSConnection):
    response_class = _Response


class _FreshConnections:
    """Reopens connections that were idle too long, and registers each with its call."""

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)  # type: ignore[misc]
        call = connection.call = getattr(_calling, "call", None)
        if connection.sock is not None and (
            time.monotonic() - connection.idle_since > MAX_IDLE or (call and call.is_fresh)
        ):
            connection.close()
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

    def shake_hands(self, timeout: float) -> None:
        """Makes a connection that serves no call, and closes it; `timeout` is for all of that."""
        connection: Any = self._new_conn()
        connection.timeout = timeout
        connection.connect_until = time.monotonic() + timeout
        try:
            connection.connect()
        finally:
            connection.close()


def _translated(
    error: requests.RequestException | urllib3.exceptions.HTTPError,
    timeout: float,
    was_connected: bool,
) -> BackendLost | BackendTimeout:
    """The error of ours for an error of requests."""
    reason = getattr(error.args[0], "reason", error.args[0]) if error.args else None
    if not was_connected:
        return _unreached(error, reason)
    if any(isinstance(cause, _BadHead) for cause in getattr(reason, "args", ())):
        return BadAnswer("The server answered with a head that is not valid HTTP")
    if isinstance(error, requests.Timeout):
        return BackendTimeout(f"The server did not answer within {in_seconds(timeout)}")
    if isinstance(reason, urllib3.exceptions.ProtocolError) and _is_nonsense(reason.args[-1]):
        return BadAnswer("The server answered something that is not HTTP")
    return ConnectionBroken("The server closed the connection before it answered")


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind another one, None where it said nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error
        error = error.__cause__ or error.__context__
    return None


def _words_of_the_system(error: BaseException) -> str:
    """What the system said, such as `Connection refused`; empty where it said nothing."""
    found = _system_error(error)
    return "" if found is None else str(found.strerror)


def _unreached(error: Exception, reason: Any) -> BackendUnreached:
    """The error where nothing of the request was sent; `reason` is what requests found, if any."""
    cause = str(getattr(reason, "original_error", ""))
    if cause.startswith(_TUNNEL_REFUSED):
        status = cause.removeprefix(_TUNNEL_REFUSED).strip()
        return BackendUnreached(f"The outbound proxy does not connect: {status}")
    if isinstance(error, requests.exceptions.SSLError | ssl.SSLError):
        return BackendUnreached(f"The server's certificate or TLS is not acceptable: {reason}")
    if isinstance(error, requests.exceptions.ProxyError):
        return BackendUnreached(_NO_PROXY)
    if isinstance(error, requests.Timeout | TimeoutError | urllib3.exceptions.ConnectTimeoutError):
        return BackendUnreached("The server cannot be reached in time")
    if isinstance(reason, urllib3.exceptions.NameResolutionError | socket.gaierror):
        return BackendUnreached("The server cannot be reached: its name cannot be resolved")
    if isinstance(reason, urllib3.exceptions.ProtocolError):
        return BackendUnreached("The server cannot be reached: the connection broke off")
    return BackendUnreached(f"The server cannot be reached{_in_plain_words(error)}")


def _in_plain_words(error: Exception) -> str:
    """The end of the sentence that a server cannot be reached, as the system gives the reason."""
    found = _system_error(error)
    if found is None:
        return ""
    words = str(found.strerror)
    return _REASONS.get(found.errno or 0, f": {words[0].lower()}{words[1:]}")


def _is_nonsense(cause: object) -> bool:
    is_silent = isinstance(cause, http.client.RemoteDisconnected | http.client.IncompleteRead)
    return isinstance(cause, http.client.HTTPException) and not is_silent
