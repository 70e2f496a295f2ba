"""Redis in each form that a deployment may have, as real processes on 127.0.0.1.

In every form the proxy is a user who may do no more than it needs to.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import redis
from redis.cluster import ClusterNode, RedisCluster
from redis.sentinel import Sentinel

from mcp_proxy.redis.client import Client
from tests.support.redis_server import RedisServer, SentinelServer
from tests.support.tls import Certificates, TlsGate
from tests.support.waiting import eventually

USER = "proxy"
PASSWORD = "p@ss:w/rd?#%"
ADMIN_PASSWORD = "of-the-admin"
SENTINEL_PASSWORD = "of-the-s@ntinels"
SERVICE = "my sessions"

#: What the user of a proxy may do, on keys that begin with the prefix.
COMMANDS = (
    "getex", "get", "set", "exists", "del", "eval", "evalsha", "xadd", "xread", "xrange",
    "xrevrange", "xtrim", "xdel", "pexpire", "ping", "info",
)  # fmt: skip
#: What it needs besides for `rate_limit_scope=deployment`, and where Redis is a Cluster.
COUNTER_COMMANDS = ("incrby", "pttl", "rename", "script|load")
CLUSTER_COMMANDS = ("cluster|slots", "command")

_SLOTS = 16384
_PATIENCE = 30.0


def limited_user(*commands: str, name: str = USER) -> str:
    """The line of the configuration for a user who may do this much on the keys of tests."""
    rights = " ".join(f"+{command}" for command in commands)
    return f"user {name} on >{PASSWORD} resetkeys ~test-* resetchannels -@all {rights}"


def admin_of(server: RedisServer) -> redis.Redis:
    """A client that may do everything; the caller closes it."""
    return server.client()


class Form(ABC):
    """A deployment of Redis, running inside of `with`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.certificates: Certificates | None = None
        self.gates: list[TlsGate] = []

    @property
    @abstractmethod
    def url(self) -> str:
        """The address with the limited user and everything else that is needed."""

    @abstractmethod
    def client(self, **options: Any) -> AbstractContextManager[Client]:
        """A client of redis-py's as a program makes it that has one already."""

    @property
    @abstractmethod
    def servers(self) -> Sequence[RedisServer]:
        """Those that have data."""

    @abstractmethod
    def start(self) -> None:
        """Starts everything and waits until it can be used."""

    def __enter__(self) -> Form:
        try:
            self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _make_certificates(self) -> None:
        directory = tempfile.mkdtemp(prefix="certificates-")
        self._stack.callback(shutil.rmtree, directory)
        self.certificates = Certificates(Path(directory))

    def _gate_to(self, server: RedisServer) -> int:
        assert self.certificates is not None
        self.gates.append(self._stack.enter_context(TlsGate(server.port, self.certificates)))
        return self.gates[-1].port

    @property
    def _tls_options(self) -> dict[str, Any]:
        return {} if self.certificates is None else {"ssl": True, **self.certificates.files}


def _credentials(user: str = USER, password: str = PASSWORD) -> str:
    return f"{quote(user, safe='')}:{quote(password, safe='')}@"


class OneServer(Form):
    """One server, reached by TCP, TLS or a unix socket (`way`)."""

    def __init__(
        self, way: str = "tcp", commands: Sequence[str] = (*COMMANDS, *COUNTER_COMMANDS)
    ) -> None:
        super().__init__()
        self._way = way
        self.server = RedisServer(
            password=ADMIN_PASSWORD,
            unix_socket=way == "unix",
            settings=[limited_user(*commands, "select")],
        )

    def start(self) -> None:
        self._stack.enter_context(self.server)
        if self._way == "tls":
            self._make_certificates()
            self._gate_to(self.server)

    @property
    def url(self) -> str:
        if self._way == "unix":
            return f"unix://{_credentials()}{self.server.socket_path}?db=0"
        if self.certificates is not None:
            query = self.certificates.query
            return f"rediss://{_credentials()}127.0.0.1:{self.gates[0].port}/0?{query}"
        return f"redis://{_credentials()}127.0.0.1:{self.server.port}/1"

    @contextmanager
    def client(self, **options: Any) -> Iterator[Client]:
        with redis.Redis.from_url(self.url, **options) as client:
            yield client

    @property
    def servers(self) -> Sequence[RedisServer]:
        return [self.server]


class WithSentinels(Form):
    """A master, a replica and three sentinels; with `tls` a master alone and one sentinel."""

    def __init__(self, tls: bool = False) -> None:
        super().__init__()
        self._has_tls = tls
        self.sentinels: list[SentinelServer] = []
        settings = [
            limited_user(*COMMANDS, *COUNTER_COMMANDS, "select"),
            f"masterauth {ADMIN_PASSWORD}",
            "repl-diskless-sync yes",
            "repl-diskless-sync-delay 0",
        ]
        self.master = RedisServer(password=ADMIN_PASSWORD, settings=settings)
        replica_of = f"replicaof 127.0.0.1 {self.master.port}"
        self.replica = RedisServer(password=ADMIN_PASSWORD, settings=[*settings, replica_of])

    def start(self) -> None:
        self._stack.enter_context(self.master)
        port = self.master.port
        if self._has_tls:
            self._make_certificates()
            port = self._gate_to(self.master)
        else:
            self._stack.enter_context(self.replica)
        for _ in range(1 if self._has_tls else 3):
            self.sentinels.append(self._stack.enter_context(self._sentinel(port)))
        if self._has_tls:
            self._gate_to(self.sentinels[0])
        for sentinel in self.sentinels:
            eventually(lambda it=sentinel: self._knows_all(it), _PATIENCE)

    def _sentinel(self, port: int) -> SentinelServer:
        quorum = 1 if self._has_tls else 2
        return SentinelServer(
            password=SENTINEL_PASSWORD,
            settings=[
                f'sentinel monitor "{SERVICE}" 127.0.0.1 {port} {quorum}',
                f'sentinel auth-pass "{SERVICE}" {ADMIN_PASSWORD}',
                f'sentinel down-after-milliseconds "{SERVICE}" 700',
                f'sentinel failover-timeout "{SERVICE}" 3000',
            ],
        )

    @property
    def _sentinel_ports(self) -> list[int]:
        if self._has_tls:
            return [self.gates[-1].port]
        return [sentinel.port for sentinel in self.sentinels]

    def _knows_all(self, sentinel: SentinelServer) -> bool:
        with sentinel.client() as client:
            state = client.sentinel_masters()[SERVICE]
        others, replicas = state["num-other-sentinels"], state["num-slaves"]
        return self._has_tls or (others == 2 and replicas == 1)

    @property
    def url(self) -> str:
        query = f"sentinel_password={quote(SENTINEL_PASSWORD, safe='')}"
        scheme = "redis+sentinel"
        if self.certificates is not None:
            scheme = "rediss+sentinel"
            query += f"&sentinel_username=default&{self.certificates.query}"
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)
        return f"{scheme}://{_credentials()}{hosts}/{quote(SERVICE)}/1?{query}"

    @contextmanager
    def client(self, **options: Any) -> Iterator[Client]:
        tls = self._tls_options
        sentinels = Sentinel(  # type: ignore[no-untyped-call]
            [("127.0.0.1", port) for port in self._sentinel_ports],
            sentinel_kwargs={"password": SENTINEL_PASSWORD, "socket_timeout": 2, **tls},
        )
        own = {"username": USER, "password": PASSWORD, "socket_timeout": 2, "db": 1}
        master: redis.Redis = sentinels.master_for(SERVICE, **own, **tls, **options)  # type: ignore[no-untyped-call]
        with closing(sentinels), master:
            yield master

    @property
    def servers(self) -> Sequence[RedisServer]:
        return [self.master] if self._has_tls else [self.master, self.replica]


class ThreeNodes(Form):
    """A Cluster of three nodes without replicas, whose nodes serve what they have on their own."""

    def __init__(self, tls: bool = False) -> None:
        super().__init__()
        self._has_tls = tls
        settings = [
            limited_user(*COMMANDS, *COUNTER_COMMANDS, *CLUSTER_COMMANDS),
            "cluster-node-timeout 2000",
            "cluster-require-full-coverage no",
        ]
        self.nodes = [
            RedisServer(password=ADMIN_PASSWORD, settings=settings, is_node=True) for _ in range(3)
        ]

    def start(self) -> None:
        if self._has_tls:
            self._make_certificates()
            for node in self.nodes:
                node.settings += [
                    "cluster-announce-ip 127.0.0.1",
                    f"cluster-announce-port {self._gate_to(node)}",
                    f"cluster-announce-bus-port {node.port + 10_000}",
                ]
        for number, node in enumerate(self.nodes):
            self._stack.enter_context(node)
            self._join(number, node)
        self.wait()

    def _join(self, number: int, node: RedisServer) -> None:
        with node.client() as admin:
            first, after = (_SLOTS * part // len(self.nodes) for part in (number, number + 1))
            admin.execute_command("CLUSTER ADDSLOTS", *range(first, after))
            admin.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number:
                admin.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)

    def wait(self) -> None:
        """Waits until every node finds the Cluster complete."""
        for node in self.nodes:
            eventually(lambda it=node: self._is_complete(it), _PATIENCE)

    def _is_complete(self, node: RedisServer) -> bool:
        with node.client() as admin:
            state = admin.execute_command("CLUSTER INFO")
            nodes = admin.execute_command("CLUSTER NODES")
        are_connected = all(entry["connected"] for entry in nodes.values())
        are_fine = not any("fail" in entry["flags"] for entry in nodes.values())
        is_complete = state["cluster_state"] == "ok" and state["cluster_slots_ok"] == str(_SLOTS)
        return is_complete and len(nodes) == len(self.nodes) and are_connected and are_fine

    @property
    def ports(self) -> list[int]:
        """Where clients reach the nodes, in the order of `nodes`."""
        return [one.port for one in (self.gates or self.nodes)]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        if self.certificates is not None:
            return f"rediss+cluster://{_credentials()}{hosts}?{self.certificates.query}"
        return f"redis+cluster://{_credentials()}{hosts}"

    @contextmanager
    def client(self, **options: Any) -> Iterator[Client]:
        nodes: list[Any] = [ClusterNode("127.0.0.1", port) for port in self.ports]  # type: ignore[no-untyped-call]
        own = {"username": USER, "password": PASSWORD, **self._tls_options}
        with RedisCluster(startup_nodes=nodes, **own, **options) as client:
            yield client

    @property
    def servers(self) -> Sequence[RedisServer]:
        return self.nodes
