"""The sockets for operators: metrics and probes, whatever the threads for clients are doing.

One is a TCP socket, for whoever watches; the other a unix socket for the command `ctl`. gunicorn's
master makes them and gives them to no worker's main loop. Each worker serves a duplicate of each
by one thread, which waits for no client: whoever is slow is cut off. A master that
is begun by SIGUSR2 gets the socket, and says when its first worker serves; from then on the workers
of the old one leave it alone, for as long as the new one lives.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mcp_proxy.background import SelectorWorker, Workers
from mcp_proxy.config import given_sockets, set_given_sockets, take_from_environment
from mcp_proxy.errors import ConfigError
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.server.answers import answer, refusal

log = logging.getLogger(__name__)

#: Where a new master finds the descriptors of a socket, and of its news, in its environment.
ADMIN_VARIABLE = "MCP_ADMIN_SOCKET"
CTL_VARIABLE = "MCP_CTL_SOCKET"

# The name of the admin socket among those that systemd hands over, and the descriptor of the first
# of these (sd_listen_fds(3)).
_GIVEN_NAME = "admin"
_FIRST_GIVEN = 3

# Seconds for which a client may take to send its request and to read the answer.
_TIME_LIMIT = 5.0

# Connections at a time; the oldest is closed for the next.
_MOST = 64

_LARGEST_HEAD = 16 * 1024
_PIECE = 64 * 1024
_LONGEST_ID = 512

# Seconds between looks at whether another master has taken over, and who is late.
_LOOK = 0.5


class AdminSocket:
    """The listening socket, as a master has it, and the way to tell of a new master."""

    def __init__(self, listen: Callable[[], socket.socket], variable: str) -> None:
        """Takes the socket that an old master has left in a variable, or listens.

        Raises ConfigError.
        """
        self._variable = variable
        handed_on = take_from_environment(variable)
        if handed_on:
            listener, news = map(int, handed_on.split(","))
            self.listener = socket.socket(fileno=listener)
            # The other end of what the workers of the old master read.
            self._old: socket.socket | None = socket.socket(fileno=news)
            self.listener.set_inheritable(False)
            self._old.set_inheritable(False)
        else:
            self.listener = listen()
            self._old = None
        self.listener.setblocking(False)
        self._replica = Replica()
        self._master = self._replica.id
        kind = socket.SOCK_DGRAM
        self.news, self._writer = socket.socketpair(socket.AF_UNIX, kind)
        self.news.setblocking(False)

    def __repr__(self) -> str:
        return f"<AdminSocket {self.url}>"

    @property
    def url(self) -> str:
        """The address for those who ask."""
        if self.listener.family == socket.AF_UNIX:
            return f"unix:{self.listener.getsockname()}"
        return f"http://{address_of(self.listener)}"

    def hand_on(self, environ: dict[str, str]) -> None:
        """In the process that becomes a new master: leaves it the socket."""
        self.listener.set_inheritable(True)
        self._writer.set_inheritable(True)
        environ[self._variable] = f"{self.listener.fileno()},{self._writer.fileno()}"

    def take_over(self) -> None:
        """In a worker of a new master, which serves from now on: tells those of the old one."""
        if self._old is not None:
            with contextlib.suppress(OSError):  # there are none any more, or they know
                self._old.send(self._master.encode(), socket.MSG_DONTWAIT)

    @property
    def is_taken_over(self) -> bool:
        """Whether a newer master serves the socket, which has not ended."""
        try:
            master = self.news.recv(_LONGEST_ID, socket.MSG_PEEK)
        except OSError:
            return False
        if not has_ended(master.decode("utf-8", "replace")):
            return True
        with contextlib.suppress(OSError):
            self.news.recv(_LONGEST_ID)
        return False


def address_of(listener: socket.socket) -> str:
    """HOST:PORT of a TCP socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def given_by_systemd() -> socket.socket | None:
    """The socket that systemd hands over under the name `admin`; None where there is none.

    gunicorn would take it for one for clients, so it is taken out, and those behind it move up.
    Raises ConfigError where it is no TCP socket.
    """
    names = given_sockets()
    if _GIVEN_NAME not in names:
        return None
    at = names.index(_GIVEN_NAME)
    given = socket.socket(fileno=os.dup(_FIRST_GIVEN + at))
    for number in range(_FIRST_GIVEN + at, _FIRST_GIVEN + len(names) - 1):
        os.dup2(number + 1, number, inheritable=False)
    os.close(_FIRST_GIVEN + len(names) - 1)
    set_given_sockets(names[:at] + names[at + 1 :])
    if given.family not in (socket.AF_INET, socket.AF_INET6):
        given.close()
        raise ConfigError("the socket that systemd hands over as admin is no TCP socket")
    return given


def listening_at(address: str) -> socket.socket:
    """A socket that listens at HOST:PORT; raises ConfigError."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=_MOST)
    except OSError as error:
        raise ConfigError(f"admin_bind: {address} cannot be used: {error.strerror}") from error


def listening_for_user(path: str) -> socket.socket:
    """A unix socket that this process's user alone can open; raises ConfigError.

    One that nobody listens at any more is replaced.
    """
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        if _is_left(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(_MOST)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise ConfigError(f"ctl_socket: {path} cannot be used: {reason}") from error
    finally:
        os.umask(before)
    return listener


def _is_left(path: str) -> bool:
    """Whether a socket is there, and nobody listens at it."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


class AdminServer(SelectorWorker):
    """The thread of one worker that answers at one of the sockets.

    `app` is asked in that thread, so it must not wait for long. A worker that ends leaves new
    connections to others, where `may_leave` says that there are some.
    """

    is_essential = False

    def __init__(
        self,
        name: str,
        admin: AdminSocket,
        app: Any,
        may_leave: Callable[[], bool],
        cfg: Any,
        workers: Workers | None = None,
    ) -> None:
        super().__init__(name, workers)
        self._admin = admin
        self._app = app
        self._may_leave = may_leave
        self._cfg = cfg
        self._is_listening = False
        self._connections: dict[_Connection, None] = {}

    def prepare(self) -> None:
        super().prepare()
        # One of its own: with gevent the class is another than in the master.
        self._listener = socket.socket(fileno=os.dup(self._admin.listener.fileno()))
        self._listener.setblocking(False)

    def timeout(self) -> float | None:
        return _LOOK

    def run_once(self) -> None:
        self._listen(not (self._admin.is_taken_over or self._may_leave()))
        super().run_once()
        now = time.monotonic()
        for conn in [each for each in self._connections if each.until <= now]:
            self._close(conn)

    def finish(self) -> None:
        for conn in list(self._connections):
            self._close(conn)
        self._listener.close()
        super().finish()

    def _listen(self, is_wanted: bool) -> None:
        if is_wanted and not self._is_listening:
            self.register(self._listener, self._accept)
        elif self._is_listening and not is_wanted:
            self.unregister(self._listener)
        self._is_listening = is_wanted

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:  # another worker was faster, or there is no file for it
            return
        sock.setblocking(False)
        if len(self._connections) >= _MOST:
            self._close(next(iter(self._connections)))
        conn = _Connection(sock, address)
        self._connections[conn] = None
        self.register(sock, partial(self._read, conn))

    def _read(self, conn: _Connection) -> None:
        try:
            data = conn.sock.recv(_LARGEST_HEAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        conn.data += data
        if not data or len(conn.data) > _LARGEST_HEAD:
            self._close(conn)
        elif b"\r\n\r\n" in conn.data:
            self.unregister(conn.sock)
            conn.answer = self._answer(conn)
            self._write(conn)

    def _answer(self, conn: _Connection) -> bytes:
        try:
            return answer(conn, self._app, self._cfg, may_keep=False)[0]
        except Exception as error:
            log.info("a request at the admin socket was refused: %s", type(error).__name__)
            return refusal("400 Bad Request", "The request cannot be read")

    def _write(self, conn: _Connection) -> None:
        try:
            sent = conn.sock.send(conn.answer[:_PIECE])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(conn)
            return
        conn.answer = conn.answer[sent:]
        if not conn.answer:
            self._close(conn)
        elif not conn.is_writing:
            conn.is_writing = True
            self._selector.register(conn.sock, selectors.EVENT_WRITE, partial(self._write, conn))

    def _close(self, conn: _Connection) -> None:
        self._connections.pop(conn, None)
        self.unregister(conn.sock)
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
        conn.sock.close()


class _Connection:
    """A client of the admin socket, as `answers.answer` wants one."""

    def __init__(self, sock: socket.socket, address: Any) -> None:
        self.sock = sock
        self.client = address
        self.server = sock.getsockname()
        self.request = self
        self.data = self.answer = b""
        self.is_writing = False
        self.until = time.monotonic() + _TIME_LIMIT

    def take(self) -> bytes:
        """What has come of the request."""
        return self.data
