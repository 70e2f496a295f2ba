"""Clients for each form of Redis, and the one place where redis-py's errors become ours."""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import AbstractConnection, SSLConnection, parse_url
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
)
from redis.retry import Retry
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from mcp_proxy import metrics
from mcp_proxy.errors import ConfigError, StorageError, StorageUnavailable

log = logging.getLogger(__name__)

# Unlimited in practice: each thread uses one connection at a time.
_CONNECTIONS = 1 << 20

_DEFAULT_PORT = 6379
_SENTINEL_PORT = 26379

# Seconds between two log lines about one outage, how many lines as many seconds have for all of
# them, and characters of what the server says.
_LOG_PAUSE = 60.0
_MAX_LINES = 5
_MAX_WORDS = 300

# Seconds that a blocking command waits at most.
_MAX_BLOCK = 2.0

#: A redis-py client, made by `Connection` or passed in by the user.
Client = redis.Redis | RedisCluster

#: A command's name and its arguments.
Command = Sequence[bytes | str | int]

#: The forms of a URL, shown in the error about an invalid one.
FORMS = (
    "redis://USER:PASSWORD@HOST:PORT/DB, rediss://... (TLS), unix://PATH, "
    "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB or redis+cluster://HOST:PORT,HOST:PORT"
)

# Redis's errors for a missing permission; the second is that of scripts in Redis 6.2.
_DENIAL = re.compile(r"no permissions|can't run this command", re.IGNORECASE)
_UNUSABLE_CODE = re.compile(r"(?:^|[ -])(READONLY|OOM|MISCONF) ")
_UNKNOWN_COMMAND = re.compile(r"unknown command .?([A-Za-z]+)", re.IGNORECASE)
_DENIED_COMMAND = re.compile(r"the '([^' ]+)' command")


# What redis-py puts before the error of one command of a pipeline: it shows keys.
_OF_PIPELINE = re.compile(r"Command # \d+ \(.*?\) of pipeline caused error: ", re.DOTALL)

# The error of a command that waits at a server which becomes a replica, as at a failover.
_UNBLOCKED = re.compile(r"UNBLOCKED .*", re.DOTALL)
_FAILED_OVER = "it was a primary until now (UNBLOCKED)"

# What follows where reading works, which restarts a session's time to live, and where it does not.
_FULL = (
    "sessions that have begun are served, those of a stdio server by the worker that has it; none "
    "begins or is taken over, and no request goes to another worker"
)
_FROZEN = "no request of a session is served"


class Use(enum.IntEnum):
    """What a block of commands has done when it succeeds; a server may refuse all from one on."""

    READ = 0
    WRITE = 1  #: something was written that takes no memory, such as a time to live
    GROW = 2


class _Unusable(NamedTuple):
    """Why a server that answers takes no writes, and what follows; `kind` is redis-py's class.

    `proof` is the least that it does not do meanwhile.
    """

    kind: type[redis.ResponseError] | None
    why: str
    effect: str
    proof: Use


# By the first word of the error.
_UNUSABLE = {
    "READONLY": _Unusable(
        ReadOnlyError, "it is a replica, or was a primary until now", _FROZEN, Use.WRITE
    ),
    "OOM": _Unusable(OutOfMemoryError, "its memory is used up", _FULL, Use.GROW),
    "MISCONF": _Unusable(None, "it cannot write its own snapshots to disk", _FROZEN, Use.WRITE),
}


class _Refusal(NamedTuple):
    """What a client is told, what follows, for the operator, and what shows that it is over."""

    message: str
    effect: str = ""
    proof: Use = Use.GROW


class _Outage(NamedTuple):
    """Since when the server is not usable, and what shows that it is again.

    `logged` is what a client is told of the cause that the log has named last, empty where it has
    named none; `next_line` is when it names one again.
    """

    since: float
    proof: Use
    logged: str = ""
    next_line: float = float("-inf")


class Connection:
    """A redis-py client, made at its first use if a URL was given. Thread-safe.

    Storage, event log and mailboxes of a replica share one. `timeout`, in seconds, is for each
    answer. Raises ConfigError when the URL cannot be read, and for any other client.
    """

    def __init__(
        self,
        client: Client | str,
        timeout: float = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(client, str | redis.Redis | RedisCluster):
            kind = type(client).__name__
            raise ConfigError(
                f"client must be a redis-py client, and none of asyncio, or a URL, not {kind}"
            )
        self._clock = clock
        self._timeout = timeout
        self._lock = threading.Lock()  # guards _connecting
        self._connecting: threading.Event | None = None  # set when the thread that connects is done
        self._outages = threading.Lock()  # guards _outage and _lines; held by nobody who waits
        self._outage: _Outage | None = None
        # When outages were logged: one of several servers that is away begins one at each command.
        self._lines: deque[float] = deque(maxlen=_MAX_LINES)
        self._url = client if isinstance(client, str) else None
        self._closed = 0  # how often
        #: Whether the server was seen to know GETEX.
        self.has_getex = False
        self._spare: deque[Any] = deque()  # connections of the pool that `ask` keeps
        self._owns_client = isinstance(client, str)
        self._client: Any = None if isinstance(client, str) else client
        self._make = _maker(client, timeout) if isinstance(client, str) else None
        self._pool: Any = (
            None  # of our own client: a user's asks its connections in ways of its own
        )

    def __repr__(self) -> str:
        return f"<Connection {type(self._client).__name__}>"

    @property
    def client(self) -> Any:
        """The client; raises StorageUnavailable when it has to reach a Cluster and cannot.

        One thread connects; the others wait for that, as long as for an answer.
        """
        if self._client is not None:
            return self._client
        with self._lock:
            connecting, is_ours = self._connecting, self._connecting is None
            if connecting is None:
                connecting = self._connecting = threading.Event()
        if is_ours:
            self._connect(connecting)
        elif not connecting.wait(self._timeout) or self._client is None:
            raise StorageUnavailable
        return self._client

    def _connect(self, done: threading.Event) -> None:
        """Makes the client, unless the thread before this one has made it."""
        assert self._make is not None
        try:
            with self.mapped_errors():
                if self._client is None:
                    client = self._make()
                    self._pool = _pool_of(client)
                    self._client = client
        finally:
            with self._lock:
                self._connecting = None
            done.set()

    def run(self, script: str, key: str, arguments: Sequence[bytes | str | int]) -> Any:
        """Runs a Lua script on one key and returns its result; a server gets its text once.

        Texts in it are bytes, even with a client that decodes its other responses.
        """
        try:
            return self.ask([("EVALSHA", _digest(script), 1, key, *arguments)])[0]
        except NoScriptError:
            return self.ask([("EVAL", script, 1, key, *arguments)])[0]

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands, in one round trip; raises redis-py's errors, also that of one
        command.

        Texts in them are bytes, even with a client that decodes its other responses. What redis-py
        does around each command (looks at the connection, statistics) takes longer than the
        command itself, so connections are kept here. Like redis-py's they are asked first when
        they were idle, and replaced when they are lost. A Cluster's client finds the server of
        each key.
        """
        client, pool = self.client, self._pool
        if pool is None:
            return _asked_by_client(client, commands)
        connection = self._spare_connection() or pool.get_connection()
        is_kept = False
        try:
            answers: list[Any] = connection.retry.call_with_retry(
                partial(_asked, connection, commands), lambda error: connection.disconnect()
            )
            is_kept = pool.owns_connection(connection) and not connection.should_reconnect()
        finally:
            if is_kept:
                self._spare.append(connection)
            else:
                pool.release(connection)
        refusal = next((one for one in answers if isinstance(one, redis.ResponseError)), None)
        if refusal is not None:
            raise refusal
        return answers

    def _spare_connection(self) -> Any:
        """A connection that this process has kept; None where there is none."""
        while self._spare:
            with suppress(IndexError):  # another thread was faster
                connection = self._spare.pop()
                if connection.pid == os.getpid():
                    return connection
        return None

    def ping(self) -> None:
        """Pings every primary; raises redis-py's errors."""
        client = self.client
        if isinstance(client, RedisCluster):
            client.ping(target_nodes=RedisCluster.PRIMARIES)
        else:
            client.ping()

    def info(self, section: str = "server") -> list[dict[str, Any]]:
        """The `server` or `memory` section of every primary's INFO; raises redis-py's errors."""
        client = self.client
        if not isinstance(client, RedisCluster):
            return [client.info(section)]
        answer: dict[str, Any] = client.info(section, target_nodes=RedisCluster.PRIMARIES)
        is_by_node = all(isinstance(value, dict) for value in answer.values())  # not for one alone
        return list(answer.values()) if is_by_node else [answer]

    @contextmanager
    def mapped_errors(self, use: Use = Use.READ) -> Iterator[None]:
        """Turns redis-py's errors into StorageUnavailable, and invalid text into StorageError.

        The log says of each outage when it begins, once a minute, and when it is over: where the
        server has refused to write only after a block whose `use` is what it refused, or more.
        """
        closed = self._closed
        counters = metrics.current()
        if counters is not None:
            counters.count(metrics.STORE_COMMANDS)
        try:
            yield
        except (redis.RedisError, RedisClusterException, OSError) as error:
            if counters is not None:
                counters.count(metrics.STORE_ERRORS)
            raise self._unavailable(error) from error
        except UnicodeDecodeError as error:  # from a client with `decode_responses=True`
            raise StorageError(f"The session record cannot be read: {error}") from error
        finally:
            if self._closed != closed:  # the command ran on when that was done
                self._close_idle()
        self.succeeded(use)

    def succeeded(self, use: Use) -> None:
        """The server has done as much as `use`, which may show that it is usable again."""
        if self._outage is not None and use >= self._outage.proof:
            self._end_outage()

    def _unavailable(self, error: Exception) -> StorageUnavailable:
        refusal = _refusal(error)
        words = self._without_secrets(str(error)) or type(error).__name__
        detail = f"{self._where()}: {words[:_MAX_WORDS]}"
        if refusal is None:
            found = StorageUnavailable(None, detail)
            proof = Use.WRITE if _FAILED_OVER in words else Use.READ
        else:
            proof = refusal.proof
            effect = f"; {refusal.effect}" if refusal.effect else ""
            found = StorageUnavailable(refusal.message, f"{refusal.message} ({detail}){effect}")
        self._begin_outage(found, proof)
        return found

    def _begin_outage(self, error: StorageUnavailable, proof: Use) -> None:
        now, message = self._clock(), str(error)
        with self._outages:
            outage = self._outage or _Outage(now, proof)
            outage = outage._replace(proof=max(proof, outage.proof))
            is_news = message != outage.logged or now >= outage.next_line
            has_room = len(self._lines) < _MAX_LINES or now - self._lines[0] >= _LOG_PAUSE
            if is_due := is_news and has_room:
                self._lines.append(now)
                outage = outage._replace(logged=message, next_line=now + _LOG_PAUSE)
            self._outage = outage
        if is_due:
            log.warning("[pid=%d] the session store is not usable: %s", os.getpid(), error.detail)

    def _end_outage(self) -> None:
        with self._outages:
            outage, self._outage = self._outage, None
        if outage is not None and outage.logged:
            seconds = self._clock() - outage.since
            log.warning(
                "[pid=%d] the session store is usable again after %.0f s", os.getpid(), seconds
            )

    def _where(self) -> str:
        """The server, or the servers, without user and password."""
        if self._url is not None:
            scheme, _, rest = self._url.partition("?")[0].partition("://")
            return f"{scheme}://{rest.rpartition('@')[2]}"
        if isinstance(self._client, RedisCluster):
            return "the Cluster"
        options = self._client.connection_pool.connection_kwargs
        return str(options.get("path") or f"{options.get('host')}:{options.get('port')}")

    def _without_secrets(self, text: str) -> str:
        """What redis-py says of an error, in one line, without keys and the URL's passwords."""
        text = _UNBLOCKED.sub(_FAILED_OVER, _OF_PIPELINE.sub("", text))
        for secret in passwords_in(self._url or ""):
            text = text.replace(secret, "***")
        return " ".join(text.split())

    @property
    def block_time(self) -> float:
        """Seconds that a blocking command may wait, at most half of the time for an answer."""
        limit = self._connection_settings().get("socket_timeout")
        return _MAX_BLOCK if limit is None else min(_MAX_BLOCK, limit / 2)

    def _connection_settings(self) -> dict[str, Any]:
        client = self.client
        if isinstance(client, RedisCluster):
            settings: dict[str, Any] = client.nodes_manager.connection_kwargs
        else:
            settings = client.connection_pool.connection_kwargs
        return settings

    def close(self) -> None:
        """Closes idle connections; running commands still get their answers, and close theirs.

        A client that was passed in stays open.
        """
        self._closed += 1
        self._close_idle()

    def _close_idle(self) -> None:
        while self._pool is not None and (connection := self._spare_connection()) is not None:
            self._pool.release(connection)
        client = self._client if self._owns_client else None
        for pool in [] if client is None else _pools(client):
            pool.disconnect(inuse_connections=False)


def _pool_of(client: Client) -> Any:
    """The pool of a client whose commands may take any of its connections; None for the others."""
    if isinstance(client, RedisCluster) or client.connection is not None:
        return None
    return client.connection_pool


def _asked(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """The answers on one connection; one that is an error stands among them."""
    connection.send_packed_command(connection.pack_commands(commands))
    answers = []
    for _ in commands:
        try:
            answers.append(connection.read_response(disable_decoding=True))
        except redis.ResponseError as error:
            answers.append(error)
    return answers


def _asked_by_client(client: Any, commands: Sequence[Command]) -> list[Any]:
    """The same by redis-py's own ways; its answers have the form that it gives them."""
    if len(commands) == 1:
        return [client.execute_command(*commands[0], NEVER_DECODE=True)]
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command, NEVER_DECODE=True)
    return list(pipeline.execute())


@cache
def _digest(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _pools(client: Client) -> list[Any]:
    """Every connection pool of a client."""
    if isinstance(client, RedisCluster):
        nodes = [node.redis_connection for node in client.get_nodes()]  # type: ignore[no-untyped-call]
        return [node.connection_pool for node in nodes if node is not None]
    pool = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        return [pool, *(sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)]
    return [pool]


def _maker(url: str, timeout: float) -> Callable[[], Client]:
    """A function that makes the client for a URL in one of the `FORMS`; sends nothing.

    Raises ConfigError when the URL cannot be read; its message does not show the URL.
    """
    try:
        scheme = url.partition("://")[0].lower()
        if scheme in ("redis+sentinel", "rediss+sentinel"):
            return _sentinel(url, timeout)
        if scheme in ("redis+cluster", "rediss+cluster"):
            return _cluster(url, timeout)
        return _server(url, timeout)
    except (ValueError, TypeError, redis.RedisError):
        # Without its cause, which may show a part of the password.
        raise ConfigError(
            f"The URL of Redis (redis_url) cannot be read; it has the form {FORMS}, with special "
            "characters in the password percent-encoded and options of redis-py's in the query"
        ) from None


# Firewalls forget idle connections: the first command on such a one would wait in vain. TCP keeps
# most of them known; one that has been idle for `_IDLE` seconds is asked first all the same.
_IDLE = 10
_PING_TIME = 1.0
_KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        getattr(socket, name): seconds
        for name, seconds in {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}.items()
        if hasattr(socket, name)
    },
}


def _options(timeout: float) -> dict[str, Any]:
    return {
        "socket_connect_timeout": timeout,
        "socket_timeout": timeout,
        "max_connections": _CONNECTIONS,
        **_KEEPALIVE,
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }


class _AskedWhenIdle(AbstractConnection):
    """A connection that is asked (PING) before a command if it has been idle for `_IDLE` seconds.

    One that is silent for a second, or for a quarter of the time for an answer, is replaced by a
    new one, once. The command is sent after that, so it is never executed twice.
    """

    def _send_ping(self) -> None:
        if not self.next_health_check:
            return  # the connection is new
        self.send_command("PING", check_health=False)  # type: ignore[no-untyped-call]
        limit = self.socket_timeout
        if limit is not None and not self.can_read(min(_PING_TIME, limit / 4)):
            raise redis.ConnectionError("An idle connection does not answer")
        with suppress(redis.ResponseError):  # a user without a right to PING is answered, too
            self.read_response()


class _TcpConnection(_AskedWhenIdle, redis.Connection):
    """A connection over TCP."""


class _TlsConnection(_AskedWhenIdle, SSLConnection):
    """The same with TLS."""


def _server(url: str, timeout: float) -> Callable[[], redis.Redis]:
    """A client for one server."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("no path")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/[0-9]+/?", parts.path):
        raise ValueError("no database")  # redis-py would take the first one
    options = _options(timeout)
    if parts.scheme == "unix":
        options = {name: value for name, value in options.items() if name not in _KEEPALIVE}
    else:
        options["connection_class"] = _TlsConnection if parts.scheme == "rediss" else _TcpConnection
        options["health_check_interval"] = _IDLE
    client: redis.Redis = redis.Redis.from_url(url, **options)
    _try_options(client)
    return lambda: client


def _sentinel(url: str, timeout: float) -> Callable[[], redis.Redis]:
    """A client for the current master of a service; user and password are the master's.

    `sentinel_username` and `sentinel_password` in the query are for the sentinels. A connection is
    tried twice and asks each sentinel in turn, so the time limit is divided among them.
    """
    parts, hosts = _split(url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service")
    given = {"db": int(db or 0), **_given(parts)}
    own = {name: given.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in given.items() if name.startswith("ssl")}
    kind = _QuickTlsConnection if given.pop("ssl", False) else _QuickConnection
    addresses = _addresses(hosts, _SENTINEL_PORT)
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        addresses,
        sentinel_kwargs={
            **_options(timeout / len(addresses) / 2),
            **{name: value for name, value in own.items() if value},
            **tls,
        },
        **{
            **_options(timeout),
            "health_check_interval": _IDLE,
            **given,
            "connection_class": kind,
        },
    )
    client: redis.Redis = sentinels.master_for(unquote(service))  # type: ignore[no-untyped-call]
    _try_options(client)
    return lambda: client


class _QuickConnection(_AskedWhenIdle, SentinelManagedConnection):
    """A connection that is closed when an answer is late, as redis-py closes its other kinds.

    Otherwise it would stay with a master that was frozen and then replaced.
    """

    def read_response(self, *args: Any, **options: Any) -> Any:
        return super().read_response(*args, **{"disconnect_on_error": True, **options})


class _QuickTlsConnection(_QuickConnection, SentinelManagedSSLConnection):
    """The same with TLS."""


def _cluster(url: str, timeout: float) -> Callable[[], RedisCluster]:
    """A client for a Cluster, which asks for the Cluster's slots as soon as it is made.

    redis-py sends a command a second time also after a timeout, so each of the two attempts gets
    half of the time.
    """
    parts, hosts = _split(url)
    addresses = _addresses(hosts, _DEFAULT_PORT)
    given = _given(parts)
    if parts.path.strip("/") not in ("", "0") or given.pop("db", 0) != 0:
        raise ValueError("a Cluster has one database")
    options = {**_options(timeout / 2), **given}
    _try_options(redis.Redis(**options))

    def make() -> RedisCluster:
        nodes: list[Any] = [ClusterNode(*address) for address in addresses]  # type: ignore[no-untyped-call]
        client = RedisCluster.__new__(RedisCluster)
        try:
            client.__init__(startup_nodes=nodes, **options)  # type: ignore[misc]
        except BaseException:  # redis-py leaves the connections open that it had made by then
            manager = getattr(client, "nodes_manager", None)
            for node in [*nodes, *(manager.nodes_cache.values() if manager else ())]:
                if node.redis_connection is not None:
                    node.redis_connection.close()
            raise
        client.commands_parser = _Keys(client.commands_parser)  # type: ignore[assignment]
        return client

    return make


class _Keys:
    """Finds the key of an XREAD. redis-py would ask a node each time, even an unreachable one.

    Replaces the parser of a RedisCluster.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def get_keys(self, redis_conn: Any, *args: Any) -> Any:
        """The keys of a command."""
        if args[0] != "XREAD":
            return self._parser.get_keys(redis_conn, *args)
        streams = args[args.index(b"STREAMS" if b"STREAMS" in args else "STREAMS") + 1 :]
        return streams[: len(streams) // 2]


def _try_options(client: redis.Redis) -> None:
    """Raises redis-py's error for an unknown option; sends nothing."""
    pool = client.connection_pool
    pool.connection_class(**pool.connection_kwargs)


def _split(url: str) -> tuple[SplitResult, list[str]]:
    """The parts of a URL with its first host alone, and each HOST:PORT of its list.

    Later versions of Python refuse an IPv6 address behind the first of several hosts.
    """
    scheme, _, rest = url.partition("://")
    netloc = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, listed = netloc.rpartition("@")
    hosts = listed.split(",")
    return urlsplit(f"{scheme}://{user}{at}{hosts[0]}{rest[len(netloc) :]}"), hosts


def passwords_in(url: str) -> list[str]:
    """The passwords in a URL and in its query, as they stand there and as they are meant."""
    parts, _ = _split(url)
    found = [parts.netloc.rpartition("@")[0].partition(":")[2]]
    found += [value for name, value in parse_qsl(parts.query) if "password" in name]
    return [password for password in (*found, *map(unquote, found)) if password]


def _given(parts: SplitResult) -> dict[str, Any]:
    """User, password and the options in the query, as redis-py reads them in a simple URL."""
    scheme = parts.scheme.partition("+")[0]
    given = dict(parse_url(f"{scheme}://localhost?{parts.query}"))  # type: ignore[no-untyped-call]
    for name in ("host", "port", "connection_class"):
        given.pop(name, None)
    if scheme == "rediss":
        given["ssl"] = True
    for name, value in (("username", parts.username), ("password", parts.password)):
        if value:
            given[name] = unquote(value)
    return given


def _addresses(hosts: Sequence[str], default_port: int) -> list[tuple[str, int]]:
    addresses = []
    for address in hosts:
        parts = urlsplit(f"//{address}")
        if not parts.hostname:
            raise ValueError("no host")
        addresses.append((parts.hostname, parts.port or default_port))
    return addresses


def _refusal(error: BaseException | None) -> _Refusal | None:
    """For a refused login, a missing permission or an unusable server; None for other errors."""
    if error is None:
        return None
    if isinstance(error, redis.AuthenticationError):
        return _Refusal("The session store refuses the user name or password of this proxy")
    text = str(error)
    if isinstance(error, redis.ResponseError) and (refused := _unusable(error, text)):
        return refused
    if isinstance(error, redis.ResponseError) and _DENIAL.search(text):
        command = _DENIED_COMMAND.search(text)
        keys = "the keys with its prefix" if "key" in text else "a command that it needs"
        what = f"the command {command[1].upper()}" if command else keys
        return _Refusal(f"The session store denies the user of this proxy {what}")
    return _refusal(error.__cause__ or error.__context__)


def _unusable(error: redis.ResponseError, text: str) -> _Refusal | None:
    """For a server that takes no writes, or is too old; None for other errors."""
    code_of_script = _UNUSABLE_CODE.search(text)
    for code, (kind, why, effect, proof) in _UNUSABLE.items():
        is_named = code_of_script is not None and code_of_script[1] == code
        if is_named or (kind is not None and isinstance(error, kind)):
            return _Refusal(f"The session store refuses writes ({code}): {why}", effect, proof)
    unknown = _UNKNOWN_COMMAND.search(text)
    if unknown is None:
        return None
    needed = "Redis 6.2 or later is needed"
    return _Refusal(f"The session store does not know {unknown[1].upper()}: {needed}")


def as_bytes(value: bytes | str) -> bytes:
    """`value` as bytes; a client with `decode_responses=True` returns text."""
    return value.encode() if isinstance(value, str) else value


def field_of(fields: Any) -> Any:
    """The value in an entry of a Stream that has one field, as the server gives it or redis-py."""
    return fields[1] if isinstance(fields, list) else next(iter(fields.values()))


def entries_of(answer: Any) -> list[Any]:
    """The entries in the answer to an XREAD of one Stream, of RESP2 or RESP3.

    As the server gives it, or redis-py, which has one list more around those of RESP3.
    """
    if not answer:
        return []
    found = next(iter(answer.values())) if isinstance(answer, dict) else answer[0][1]
    is_nested = bool(found) and not (found[0] and isinstance(found[0][0], bytes | str))
    return list(found[0] if is_nested else found)
