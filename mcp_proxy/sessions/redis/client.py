"""How Redis is reached, in each of its forms, and the seam where redis-py's errors become ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from mcp_proxy.errors import StorageError, StorageUnavailable

# As many as there are threads: each asks one thing at a time.
_CONNECTIONS = 1 << 20

_DEFAULT_PORT = 6379
_SENTINEL_PORT = 26379

# Seconds that a blocking command waits at the most.
_PATIENCE = 2.0

#: A client of redis-py, as `Access` makes it or as a user hands it in.
Client = redis.Redis | RedisCluster

#: The forms of a URL; also for the sentence that says why one cannot be read.
FORMS = (
    "redis://USER:PASSWORD@HOST:PORT/DB, rediss://... (TLS), unix://PATH, "
    "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB or redis+cluster://HOST:PORT,HOST:PORT"
)


class Access:
    """A client, made at its first use where a URL was given. Thread-safe.

    Storage, event log and mailboxes of a replica share one. `timeout`, in seconds, is how long to
    wait for an answer. Raises ValueError when the URL cannot be read.
    """

    def __init__(self, client: Client | str, timeout: float = 5) -> None:
        self._lock = threading.Lock()  # guards _client and _scripts
        self._scripts: dict[str, Any] = {}
        self._owns_client = isinstance(client, str)
        self._client: Any = None if isinstance(client, str) else client
        self._make = _maker(client, timeout) if isinstance(client, str) else None

    def __repr__(self) -> str:
        return f"<Access {type(self._client).__name__}>"

    @property
    def client(self) -> Any:
        """The client; raises StorageUnavailable when a Cluster cannot be reached to make it."""
        with self._lock:
            if self._client is None:
                assert self._make is not None
                with mapped_errors():
                    self._client = self._make()
            return self._client

    def run(self, script: str, key: str, arguments: Sequence[bytes | str | int]) -> Any:
        """What a Lua script returns that works on one key; Redis is sent its text once."""
        with self._lock:
            known = self._scripts.get(script)
        if known is None:
            known = self.client.register_script(script)
            with self._lock:
                self._scripts[script] = known
        return known(keys=[key], args=arguments)

    @property
    def patience(self) -> float:
        """Seconds that a blocking command may wait, well within the time for an answer."""
        limit = self._connection_settings().get("socket_timeout")
        return _PATIENCE if limit is None else min(_PATIENCE, limit / 2)

    def _connection_settings(self) -> dict[str, Any]:
        client = self.client
        if isinstance(client, RedisCluster):
            settings: dict[str, Any] = client.nodes_manager.connection_kwargs
        else:
            settings = client.connection_pool.connection_kwargs
        return settings

    def close(self) -> None:
        """Closes idle connections; calls that are under way get their answers.

        A client that was handed in is its owner's to close.
        """
        with self._lock:
            client = self._client if self._owns_client else None
        if isinstance(client, RedisCluster):
            client.close()
        elif client is not None:
            client.connection_pool.disconnect(inuse_connections=False)


def _maker(url: str, timeout: float) -> Callable[[], Client]:
    """What makes the client for one of the `FORMS`; everything is read, nothing is sent.

    Raises ValueError when the URL cannot be read; its message does not show the URL.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": timeout,
        "socket_timeout": timeout,
        "max_connections": _CONNECTIONS,
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    scheme = urlsplit(url).scheme
    try:
        if scheme in ("redis+sentinel", "rediss+sentinel"):
            return _sentinel(url, options)
        if scheme in ("redis+cluster", "rediss+cluster"):
            return _cluster(url, options)
        client = redis.Redis.from_url(url, **options)
    except ValueError:
        # Without its cause: that one may show a part of the password.
        raise ValueError(
            f"cannot be read; it has the form {FORMS}, with special characters in the password "
            "percent-encoded"
        ) from None
    return lambda: client


def _sentinel(url: str, options: dict[str, Any]) -> Callable[[], redis.Redis]:
    """A client for whoever is the master of a service; user and password are the master's.

    `sentinel_username` and `sentinel_password` in the query are the sentinels' own.
    """
    parts = urlsplit(url)
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service")
    given = _given(url)
    own = {name: given.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in given.items() if name.startswith("ssl")}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        _addresses(parts.netloc, _SENTINEL_PORT),
        sentinel_kwargs={
            "socket_connect_timeout": options["socket_connect_timeout"],
            "socket_timeout": options["socket_timeout"],
            **{name: value for name, value in own.items() if value},
            **tls,
        },
        **options,
        **given,
        db=int(db or 0),
    )
    client: redis.Redis = sentinels.master_for(service)  # type: ignore[no-untyped-call]
    return lambda: client


def _cluster(url: str, options: dict[str, Any]) -> Callable[[], RedisCluster]:
    """A client for a Cluster, which asks as soon as it is made who serves what."""
    addresses = _addresses(urlsplit(url).netloc, _DEFAULT_PORT)
    given = _given(url)

    def make() -> RedisCluster:
        nodes: list[Any] = [ClusterNode(*address) for address in addresses]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, **options, **given)

    return make


def _given(url: str) -> dict[str, Any]:
    """User, password and the options in the query, as redis-py reads them in a simple URL."""
    parts = urlsplit(url)
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


def _addresses(netloc: str, default_port: int) -> list[tuple[str, int]]:
    """Every HOST:PORT of the list behind the user and the password."""
    addresses = []
    for address in netloc.rpartition("@")[2].split(","):
        parts = urlsplit(f"//{address}")
        if not parts.hostname:
            raise ValueError("no host")
        addresses.append((parts.hostname, parts.port or default_port))
    return addresses


@contextmanager
def mapped_errors() -> Iterator[None]:
    """The seam where redis-py's errors become ours."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StorageUnavailable from error
    except UnicodeDecodeError as error:  # a client that decodes, and what is no text
        raise StorageError(f"The session record cannot be read: {error}") from error


def as_bytes(value: bytes | str) -> bytes:
    """What a client with `decode_responses=True` returns, as the bytes it was."""
    return value.encode() if isinstance(value, str) else value
