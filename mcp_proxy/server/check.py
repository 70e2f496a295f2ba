"""`mcp-wsgi-proxy check`: tries everything that a deployment needs, and prints a table.

Each server is initialized as a client would do it, and the session that this makes is ended.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple
from urllib.parse import urljoin

from mcp_proxy import __version__, metrics, rate_buckets, traces
from mcp_proxy.app import storage_of
from mcp_proxy.auth.access_tokens import require_libraries
from mcp_proxy.auth.keys import read
from mcp_proxy.backends import handshake
from mcp_proxy.backends.bridge import Bridge
from mcp_proxy.backends.http import HttpCall, HttpClient
from mcp_proxy.backends.modern_switchboard import ModernSwitchboard
from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.forwarded import HeaderPolicy
from mcp_proxy.eras import probing
from mcp_proxy.eras.initial import InitialSwitchboard
from mcp_proxy.errors import (
    BackendError,
    BackendTimeout,
    BadAnswer,
    ClientError,
    ConfigError,
    ProxyError,
    RedirectRefused,
    StorageUnavailable,
    in_seconds,
)
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.replica import Replica
from mcp_proxy.server.banner import is_open_to_all, refuses_strangers
from mcp_proxy.server.binding import InUse, Unbindable, try_address
from mcp_proxy.server.gunicorn import require_keys, require_shared_sessions, require_worker_class
from mcp_proxy.server.masking import Mask, masked_log
from mcp_proxy.server.session_files import require_private
from mcp_proxy.servers import HttpServer, ServerGroup, StdioServer, UnservedServer
from mcp_proxy.wire import jsonrpc, revisions, sse
from mcp_proxy.wire.handshake import INITIALIZE
from mcp_proxy.wire.headers import EVENT_STREAM, JSON, PROTOCOL_VERSION, SESSION_ID
from mcp_proxy.wire.jsonrpc import Request, Response
from mcp_proxy.wire.urls import Address, Target, parse_target, request_target

#: Seconds for a server to answer initialize, where calls may take as long; `npx` and `uvx` may have
#: to fetch it first.
ANSWER_TIME = 60.0

# Seconds for a server that has just been initialized to say whether it speaks 2026-07-28.
_ERA_TIME = 5.0

_FALL_BACK = (
    "knows sessions alone: clients of 2026-07-28 from elsewhere that send no Authorization are "
    "answered so that they fall back to them; stateless_children=shared has them share a process"
)

_OPEN = (
    "nobody is asked who they are: whoever reaches the address can call every tool; set api_keys "
    "or jwt_issuer, unless something in front authenticates"
)

_DROPS = (
    "Redis {} drops records of sessions that are in use once its memory is full (maxmemory-policy "
    "{}): their clients have to begin anew; noeviction has new ones refused instead"
)

# The exit code of a command that SIGINT has ended, as shells have it.
_INTERRUPTED = 128 + signal.SIGINT

_PULSE = 1.0
_MAX_ANSWER = 1024 * 1024

# What a server answers to a POST whose wire is the older one (MCP 2025-11-25, transports,
# "Backwards Compatibility").
_NOT_THIS_WIRE = (400, 404, 405)


class Row(NamedTuple):
    """One line of the table. A warning is what may be meant, so `is_good` is true of it.

    `kind` is that of a server, `stderr` what one that failed wrote there last; one that is
    disabled is off.
    """

    what: str
    is_good: bool
    finding: str
    is_warning: bool = False
    kind: str = ""
    stderr: Sequence[str] = ()
    is_off: bool = False

    @property
    def verdict(self) -> str:
        """What the line begins with."""
        if not self.is_good:
            return "FAIL"
        return "WARN" if self.is_warning else "off" if self.is_off else "ok"


def check(config: ProxyConfig) -> int:
    """Prints the table and returns 0 if everything is in order, 130 after SIGINT, else 1.

    What is waited for is said on stderr, where the log lines of this process go, too. Raises
    ConfigError where the file of servers cannot be read.
    """
    mask = Mask(config)
    return _printed(_rows(config, mask), mask)


def check_offline(config: ProxyConfig) -> int:
    """As `check`, of what files say alone: nothing is started, and nothing connected to."""
    return _printed(_rows_of_files(config), Mask(config))


def _printed(rows: Iterator[Row], mask: Mask) -> int:
    is_good = True
    try:
        with masked_log(mask):
            for row in rows:
                is_good = is_good and row.is_good
                kind = f"{row.kind:<6}" if row.kind else ""
                print(f"{row.verdict:<4}  {row.what:<24} {kind}{mask(row.finding)}", flush=True)
                for line in row.stderr:
                    print(f"      stderr: {mask(line)}", flush=True)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0 if is_good else 1


def _rows_of_files(config: ProxyConfig) -> Iterator[Row]:
    yield from _settings(config)
    yield from _keys(config)
    yield _workers(config)
    for server in config.listed():
        if isinstance(server, UnservedServer):
            yield _unserved(server)
        elif isinstance(server, ServerGroup):
            yield _group(server)
        else:
            kind = "http" if isinstance(server, HttpServer) else "stdio"
            yield Row(f"server {server.name}", True, str(server), kind=kind)


def _settings(config: ProxyConfig) -> Iterator[Row]:
    yield Row("configuration", True, repr(config))
    for require in _required(config):
        try:
            require()
        except ConfigError as error:
            yield Row("extras", False, str(error))
    for sentence in config.ignored():
        yield Row("configuration", True, sentence, is_warning=True)


def _required(config: ProxyConfig) -> Iterator[Callable[[], None]]:
    """What raises ConfigError where an extra of the package that a setting needs is missing."""
    yield partial(require_worker_class, config)
    if config.jwt_issuer is not None:
        yield require_libraries
    if config.counts:
        yield metrics.require_library
    if config.traces:
        yield traces.require_library
    if config.rate_limit_scope == "deployment":
        yield rate_buckets.require_library


def _unserved(server: UnservedServer) -> Row:
    is_off = server.is_disabled
    return Row(f"server {server.name}", is_off, server.reason, kind="-", is_off=is_off)


def _group(group: ServerGroup) -> Row:
    return Row(f"group {group.name}", True, str(group), kind="group")


def _rows(config: ProxyConfig, mask: Mask) -> Iterator[Row]:
    yield from _settings(config)
    yield from map(_bind, config.bind.split(","))
    if is_open_to_all(config, _addresses(config)):
        yield Row("bind", True, _OPEN, is_warning=True)
    if config.jwt_issuer is not None:
        yield _issuer(config, config.jwt_issuer)
    yield from _keys(config)
    yield _workers(config)
    yield _store(config)
    if config.session_dir is not None:
        yield _kept(config.session_dir)
    supervisor = Supervisor(Replica())
    client = HttpClient(config.connect_timeout, 1, config.ca_file or True, config.backend_proxy)
    try:
        for server in config.listed():
            if isinstance(server, UnservedServer):
                yield _unserved(server)
                continue
            if isinstance(server, ServerGroup):
                yield _group(server)
                continue
            limit = min(ANSWER_TIME, server.timeout or config.request_timeout)
            if isinstance(server, HttpServer):
                for url in server.urls:
                    _announce(mask, f"server {server.name}: asking {url.partition('?')[0]}", limit)
                    yield _backend(config, client, server, url, limit)
            else:
                _announce(mask, f"server {server.name}: starting {server}", limit)
                row = _server(config, server, supervisor, limit)
                yield row
                if row.is_good and refuses_strangers(config, _addresses(config)):
                    yield from _strangers(config, server, supervisor)
    finally:
        client.close()
        supervisor.close()


def _keys(config: ProxyConfig) -> Iterator[Row]:
    """Who may call, where there is a file that says so."""
    if config.api_keys is None:
        return
    try:
        require_keys(config)
        keys = read(config.api_keys)
    except ConfigError as error:
        yield Row("api_keys", False, str(error))
        return
    yield Row("api_keys", True, f"{len(keys)} keys of {len({key.name for key in keys})} callers")
    named = frozenset[str]().union(*(key.servers or () for key in keys))
    for name in sorted(named - {server.name for server in config.listed()}):
        yield Row("api_keys", True, f"a key is for {name}, which is no server", is_warning=True)


def _issuer(config: ProxyConfig, url: str) -> Row:
    """Whether the keys of the issuer of tokens can be had."""
    try:
        from mcp_proxy.auth.issuer import Issuer, IssuerError
    except ImportError as error:
        return Row("jwt_issuer", False, f"its keys cannot be read: {error}")

    issuer = Issuer(url, config.jwt_jwks_url, config.ca_file or True, config.connect_timeout)
    try:
        return Row("jwt_issuer", True, f"{len(issuer.keys())} keys of {url}")
    except IssuerError as error:
        return Row("jwt_issuer", False, str(error))


def _announce(mask: Mask, what: str, limit: float) -> None:
    """Says on stderr what is done now, and for how long at most."""
    print(mask(f"{what}, up to {in_seconds(limit)}"), file=sys.stderr, flush=True)


def _bind(address: str) -> Row:
    try:
        return Row("bind", True, try_address(address.strip()))
    except InUse as error:
        return Row("bind", True, str(error), is_warning=True)
    except Unbindable as error:
        return Row("bind", False, str(error))


def _workers(config: ProxyConfig) -> Row:
    try:
        require_shared_sessions(config, config.workers)
    except ConfigError as error:
        return Row("workers", False, str(error))
    return Row("workers", True, f"{config.workers} with {config.threads} threads")


def _kept(directory: str) -> Row:
    try:
        require_private(directory)
    except ConfigError as error:
        return Row("session_dir", False, str(error))
    return Row("session_dir", True, directory)


def _store(config: ProxyConfig) -> Row:
    if config.redis_url is None and config.workers > 1:
        is_good = _workers(config).is_good
        reached = "which the others reach" if is_good else "unknown to the others"
        return Row("sessions", is_good, f"in the memory of the worker of each, {reached}")
    if config.redis_url is None:
        return Row("sessions", True, "in the memory of the one worker")
    try:
        store = storage_of(config)
        assert isinstance(store, RedisStorage)
        try:
            store.check()
            version = ".".join(map(str, store.version()))
            eviction = store.eviction()
        finally:
            store.close()
    except StorageUnavailable as error:
        return Row("sessions", False, error.detail)
    except ProxyError as error:
        return Row("sessions", False, str(error))
    if eviction:
        return Row("sessions", True, _DROPS.format(version, eviction), is_warning=True)
    return Row("sessions", True, f"Redis {version}, which takes writes")


def _backend(
    config: ProxyConfig, client: HttpClient, server: HttpServer, url: str, limit: float
) -> Row:
    """Initializes one replica of an HTTP server, as a client would through the proxy."""
    what = f"server {server.name}"
    target = parse_target(url)
    assert target is not None
    policy = HeaderPolicy(changes=(*config.forward_headers, *server.headers))
    headers = policy.outbound({"wsgi.url_scheme": "http"})
    try:
        found = _greet(_Asked(client, target, headers, limit))
        return Row(what, True, f"{found} ({_shown(target)})", kind="http")
    except ProxyError as error:
        return Row(what, False, f"{error} ({_shown(target)})", kind="http")


def _shown(target: Target) -> str:
    return target.address.url + target.path


def _server(config: ProxyConfig, server: StdioServer, supervisor: Supervisor, limit: float) -> Row:
    what = f"server {server.name}"
    try:
        limit_bytes = config.max_message_bytes
        bridge = Bridge(supervisor, server, limit_bytes, lambda lost: None, InitialSwitchboard())
    except ProxyError as error:
        return Row(what, False, f"{error} ({server})", kind="stdio")
    try:
        return Row(what, True, _greet_child(bridge, limit), kind="stdio")
    except ProxyError as error:
        tail = bridge.stderr_tail[-5:]
        return Row(what, False, f"{error} ({server})", kind="stdio", stderr=tail)
    finally:
        bridge.close()


def _addresses(config: ProxyConfig) -> list[str]:
    """What is listened at, as URLs where it is no socket of another kind."""
    listed = [address.strip().removeprefix("tcp://") for address in config.bind.split(",")]
    return [each if each.startswith("unix:") else f"http://{each}" for each in listed]


def _strangers(config: ProxyConfig, server: StdioServer, supervisor: Supervisor) -> Iterator[Row]:
    """A warning where a server knows sessions alone, so that not everybody may share it."""
    try:
        bridge = Bridge(
            supervisor, server, config.max_message_bytes, lambda lost: None, ModernSwitchboard()
        )
    except ProxyError:
        return
    try:
        probing.discovered(bridge, _ERA_TIME)
    except ProxyError:
        yield Row(f"server {server.name}", True, _FALL_BACK, is_warning=True, kind="stdio")
    finally:
        bridge.close()


# --- what is said to a server --------------------------------------------------------------------


def _greet_child(bridge: Bridge, limit: float) -> str:
    """The name, version and revision of a stdio server; raises ProxyError."""
    return handshake.describe(handshake.ask(bridge, _initialize(), limit))


class _Asked(NamedTuple):
    """An HTTP server, the headers that each request to it has, and seconds for each answer."""

    client: HttpClient
    target: Target
    headers: Mapping[str, str]
    limit: float

    def call(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, at: Address
    ) -> HttpCall:
        """A call that is not sent yet."""
        return HttpCall(self.client, at, method, path, {**headers, **self.headers}, body)


def _greet(server: _Asked) -> str:
    """The name, version and revision of an HTTP server; raises ProxyError.

    One that wants credentials is in order where our headers have none: its clients have them.
    """
    endpoint = request_target(server.target, None, "/mcp", "")
    try:
        return _greet_streamable(server, endpoint)
    except _Refused as refusal:
        if refusal.status == 401 and "authorization" not in map(str.lower, server.headers):
            return "wants credentials of each client (401), so it was not initialized"
        if refusal.status not in _NOT_THIS_WIRE:
            raise
        older = request_target(server.target, None, "/sse", "")
        for path in dict.fromkeys((endpoint, older)):
            found = _greet_older(server, path)
            if found is not None:
                return found
        raise


class _Refused(BackendError):
    """The server has answered a POST with a status that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"The server answers initialize with HTTP status {status}")
        self.status = status


def _initialize() -> Request:
    params = {
        "protocolVersion": revisions.LEGACY[-1],
        "capabilities": {},
        "clientInfo": {"name": "mcp-wsgi-proxy check", "version": __version__},
    }
    return Request("check", INITIALIZE, jsonrpc.as_payload(params))


def _greet_streamable(server: _Asked, endpoint: str) -> str:
    typed = {"Accept": f"{JSON}, {EVENT_STREAM}", "Content-Type": JSON}
    body = jsonrpc.encode(_initialize())
    call = _sent(server.call("POST", endpoint, typed, body, server.target.address), server.limit)
    try:
        if not 200 <= call.status < 300:
            raise _Refused(call.status)
        if call.media_type == EVENT_STREAM:
            answer = _response_among(_events(call, server.limit))
        else:
            answer = _response_in(call.read(_MAX_ANSWER))
        found = handshake.describe(answer)
        session = call.header(SESSION_ID)
    finally:
        call.close()
    if session is not None:
        version = jsonrpc.protocol_version_of(answer.result) or revisions.ASSUMED
        named = {SESSION_ID: session, PROTOCOL_VERSION: version}
        with closing(server.call("DELETE", call.target, named, b"", call.address)) as end:
            end.send(server.limit)
    return found


def _greet_older(server: _Asked, path: str) -> str | None:
    """As `_greet` over HTTP+SSE (2024-11-05); None where there is no such stream."""
    target, accepted = server.target, {"Accept": EVENT_STREAM}
    try:
        stream = _sent(server.call("GET", path, accepted, b"", target.address), server.limit)
    except RedirectRefused:
        return None  # a page for browsers, say
    try:
        if stream.status != 200 or stream.media_type != EVENT_STREAM:
            return None
        events = _events(stream, server.limit)
        first = next(events, None)
        if first is None or first.event != b"endpoint":
            return None
        uri = (first.data or b"").decode("utf-8", "replace")
        there = parse_target(urljoin(stream.address.url + stream.target, uri))
        if there is None or there.origin != target.origin:
            raise BadAnswer("The server's endpoint event names another server, or none")
        endpoint = f"{there.path or '/'}?{there.query}" if there.query else there.path or "/"
        typed = {"Content-Type": JSON, "Accept": JSON}
        body = jsonrpc.encode(_initialize())
        with closing(server.call("POST", endpoint, typed, body, stream.address)) as post:
            post.send(server.limit)
        if not 200 <= post.status < 300:
            raise _Refused(post.status)
        return handshake.describe(_response_among(events))
    finally:
        stream.close()


def _sent(call: HttpCall, limit: float) -> HttpCall:
    """The call, its answer begun, with redirects followed as the proxy follows them."""
    while True:
        try:
            call.send(limit)
            successor = call.redirected()
        except ProxyError:
            call.close()
            raise
        if successor is None:
            return call
        call.close()
        call = successor


def _events(call: HttpCall, limit: float) -> Iterator[sse.Event]:
    """The events of an answer, for as long as an answer may take."""
    deadline = time.monotonic() + limit
    decoder = sse.Decoder(_MAX_ANSWER)
    for piece in call.pieces(pulse=_PULSE):
        yield from decoder.feed(piece)
        if time.monotonic() > deadline:
            raise BackendTimeout(f"The server did not answer within {in_seconds(limit)}")


def _response_among(events: Iterator[sse.Event]) -> Response:
    """The first response in a stream; what the server says before that is not for us."""
    for event in events:
        if event.data:
            message = _parsed(event.data)
            if isinstance(message, Response):
                return message
    raise BadAnswer("The server's event stream ended without an answer to initialize")


def _response_in(body: bytes) -> Response:
    message = _parsed(body)
    if not isinstance(message, Response):
        raise BadAnswer("The server's answer to initialize is no JSON-RPC response")
    return message


def _parsed(data: bytes) -> jsonrpc.Message:
    try:
        return jsonrpc.parse_message(data)
    except ClientError as error:
        raise BadAnswer(f"The server's answer to initialize is not understood: {error}") from error
