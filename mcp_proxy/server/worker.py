"""gunicorn's thread worker, made faster for small requests, and patient with slow clients.

What differs from `gunicorn.workers.gthread.ThreadWorker`:

- A thread is given to a request that has arrived. Until head and body are whole, the poller waits
  for the rest, with a deadline (`arriving`, `connection`). What has a shape that is not followed
  gets a thread at once, which reads with the same deadline; at most a quarter of the threads do.
- A connection that is not kept is shut down and then read by the poller until the client has closed
  it, for two seconds at most; gunicorn's main loop would wait for each such client in turn.
- An answer is written in pieces, each of which the client has to take in time. The head and the
  first piece are sent in one write.
- A thread that has answered waits at the connection for a moment while enough others are free: the
  next request of a busy client then need not go through the main loop, its queues and its poller.
- A request for which no thread is free waits for one, for `request_timeout` at most; a client that
  leaves meanwhile is forgotten. A worker without a free thread lets others accept first.
- Beyond `worker_connections` connections are accepted all the same, and as many others closed that
  have been silent for longest (`crowd`). Where requests alone are so many, the next are refused.
- What an application `answers_at_once` is answered in the main thread, so that health is told
  whatever holds the threads.
- A worker that has served `max_requests` goes on until it can end without harm to any call.
- SIGQUIT and SIGINT end the worker in the main loop, not in the middle of something.
- All threads are started before the first request, and a worker that gets fewer serves with those.
- Where the system has no file for another connection, or none beside those that are kept back,
  accepting pauses for a moment.
- TLS handshakes are done in steps, by two threads that wait for no client; one that fails is a line
  in the log. Afterwards requests arrive as they do without TLS. HTTP/2 is not offered.
- What is refused before the application sees it is a JSON-RPC error.
- A request that another worker should answer is given to that, with its connection, where the
  application asks for it (`passing`); this one takes what others give while it has a thread free.
- Settings are plain attributes once the worker runs; gunicorn looks one up in a registry fifty
  times per request.

A connection is *arriving*, *queued* (for a thread), *served*, *kept*, *given* (to another worker,
which may not have begun) or *closing*.
The main thread moves it from one to the next, and counts it in `nr_conns` until it is closed.

It relies on this in gunicorn, 27.0 or later. The main loop calls `accept`, `enqueue_req`,
`finish_request`, each time around `murder_pending`, and `set_accept_enabled` while the worker
should accept and does not, which it should below `worker_connections`; it hands what happens on a
socket to the callback with which that is registered in `poller`; a worker that stops waits for
`nr_conns`. `keepalived_conns` are closed when their `timeout` is over. `handle` makes the socket
blocking and calls `TConn.init`, then reads from `parser.unreader`, whose `take_buffered` gives what
was read too far; it returns True for a connection that is to be kept, as `_keepalive_after` says,
False for another. `handle_error` writes to the socket that it is given. `wsgi.create` takes a
`response_class`, whose `write` sends head and body by `sock.sendall`; an attribute of `cfg` hides
the setting of that name. `handle_request` is gunicorn's own with that class. gunicorn handles
signals, timeouts and bad requests. `TConn.init` begins no handshake where there is a parser;
`ssl_context` makes what gunicorn is set to.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from types import FrameType
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers import gthread

from mcp_proxy.edge.forwarded import join_cookies
from mcp_proxy.edge.request import ADMIT, CANCEL, PASS_TO, WAS_COUNTED, WAS_PASSED
from mcp_proxy.errors import Overloaded, ProxyError
from mcp_proxy.server.answers import (
    PIECE,
    JoinedResponse,
    answer,
    not_read,
    refusal,
    refusal_of,
    send,
)
from mcp_proxy.server.arriving import ArrivingRequest, Shape
from mcp_proxy.server.connection import Connection
from mcp_proxy.server.crowd import SURE, SWEEP, Bound
from mcp_proxy.server.deadlines import require_deadlines, set_deadlines
from mcp_proxy.server.forking import release_signals
from mcp_proxy.server.giving import LOOK, Giving
from mcp_proxy.server.passing import Held, Records, Taken, take
from mcp_proxy.server.shares import Shares
from mcp_proxy.server.slot import Slot
from mcp_proxy.server.tls import HandshakeFailures

# Seconds for which a connection that was shut down is read: closed with unread bytes it would be
# reset, and the client might lose the end of its answer (RFC 9112 section 9.6).
_CLOSING_TIME = 2.0

# Seconds for which a worker does not accept when the system has no file for a connection, unless
# one is free sooner.
_PAUSE = 0.5

# Seconds for which a worker without a free thread leaves connections to others, and within which it
# accepts them afterwards.
_YIELD = 0.05

# Threads that do TLS handshakes, whose milliseconds of arithmetic are too long for the main loop.
_HANDSHAKE_THREADS = 2

# Seconds after which a queued request is not begun if its client has ended its side.
_HALF_CLOSED = 1.0

# Seconds after which a call is old: a worker that has served `max_requests` waits for no other.
_OLD = 5.0

# Passed requests that are taken at once, before the main loop has another look.
_TAKEN_AT_ONCE = 8

_NO_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class KeepaliveWorker(gthread.ThreadWorker):  # type: ignore[misc]
    """The worker class behind the setting `gthread`."""

    alive: bool
    max_requests: int
    tpool: ThreadPoolExecutor

    #: Seconds within which a client sends its head, and makes progress with the rest.
    client_timeout = 30.0
    #: The largest head of a request.
    max_header_bytes = 32 * 1024
    #: Seconds for which a request that has arrived waits for a thread.
    request_timeout = 600.0
    #: The largest body for which a client is told to go on that has asked for that.
    max_body_bytes = sys.maxsize
    #: The bytes of all requests that are arriving.
    max_arriving_bytes = 64 * 1024 * 1024

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn before there is a worker; exits where a deadline does not fit."""
        super().check_config(cfg, log)
        require_deadlines()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_deadlines(self)
        #: Connections that have a thread; counted by the main thread.
        self.busy = 0
        self.served: set[Connection] = set()
        #: Connections whose requests wait for a thread, and since when; the oldest first.
        self.queued: dict[Connection, float] = {}
        #: The threads that there are.
        self.threads: int = self.cfg.threads
        #: How many connections there may be; gunicorn's loop is to accept however many there are.
        self.bound = Bound(self.cfg.worker_connections, self.log)
        self.worker_connections = sys.maxsize
        # When accepting goes on for which there was no file, None if there was one.
        self._pauses_until: float | None = None
        # Whether the system had none.
        self._found_no_file = False
        # When connections have been left to others for long enough, None if none are.
        self._yields_until: float | None = None
        # Whether the application answers a GET of a path without waiting for anything.
        self._answers_at_once: Callable[[str], bool] = lambda path: False
        # How many standing streams there may still be.
        self._free_streams: Callable[[], int] = lambda: 0
        # How many there are.
        self._open_streams: Callable[[], int] = lambda: 0
        # Whether it has had calls since before a time that came by no connection of ours.
        self._has_call_since: Callable[[float], bool] = lambda before: False
        #: Connections on which a request is arriving.
        self.arriving: dict[Connection, None] = {}
        # Those of them that wait for one of the threads for slow requests, and how many of these
        # are taken.
        self._waiting: dict[Connection, None] = {}
        self._slow_count = 0
        self._arriving_bytes = 0
        self._next_sweep = 0.0
        # When the worker ends at the latest, once it has served `max_requests`.
        self._ends_at: float | None = None
        #: Connections that were shut down and are read until their time is over, oldest first.
        self.closing: dict[Connection, None] = {}
        #: What this worker has to do with the others of its master; None where nothing is passed.
        self.slot: Slot | None = None
        self._reads_slot = False
        #: What it gives to those, and may have to take back.
        self.giving: Giving | None = None
        #: What the calls of one session may have of the threads.
        self.shares = Shares(self._most_calls, partial(self._defer, self._read_again))
        # The sessions that are in memory, where workers move them; and the homes last shown of it.
        self._memory: Any = None
        self._homes_shown: Any = ()
        self._session_count: Callable[[], int] = lambda: 0
        self._is_draining: Callable[[], bool] = lambda: False
        # Where this worker and the others of its master accept connections.
        self._addresses: list[Any] = []
        self._handshakes = ThreadPoolExecutor(_HANDSHAKE_THREADS)
        self._handshake_failures = HandshakeFailures(self.log)
        if "h2" in self.cfg.http_protocols:
            self.log.warning("This worker class does not offer HTTP/2 over TLS")
            self.cfg.set("http_protocols", "h1")

    # --- in the main thread ----------------------------------------------------------------------

    def init_signals(self) -> None:
        """As gunicorn's; SIGHUP is the master's, and one that reaches a worker does nothing.

        It is not ignored: children of the worker would inherit that.
        """
        super().init_signals()
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        signal.siginterrupt(signal.SIGHUP, False)
        release_signals()

    def run(self) -> None:
        """Runs the main loop until the worker stops."""
        settings = (name for name in self.cfg.settings if not hasattr(type(self.cfg), name))
        self.cfg.__dict__.update({name: getattr(self.cfg, name) for name in settings})
        self._addresses = [listener.getsockname() for listener in self.sockets]
        self._start_threads()
        self._answers_at_once = getattr(self.wsgi, "answers_at_once", self._answers_at_once)
        self._free_streams = getattr(self.wsgi, "free_streams", self._free_streams)
        self._open_streams = getattr(self.wsgi, "open_streams", self._open_streams)
        self._has_call_since = getattr(self.wsgi, "has_call_since", self._has_call_since)
        if self.slot is not None:
            self._begin_passing(self.slot)
        super().run()

    def _start_threads(self) -> None:
        """Starts all threads of the pool; a quarter fewer than there can be, if that is too few.

        That quarter is left to the application.
        """
        if self.cfg.is_ssl:
            _start_all(self._handshakes, _HANDSHAKE_THREADS)
        started = _start_all(self.tpool, self.threads)
        if started == self.threads:
            return
        self.tpool.shutdown()
        wanted, self.threads = self.threads, max(1, started * 3 // 4)
        self.log.warning(
            "Only %d of %d threads can be started; %d are used", started, wanted, self.threads
        )
        self.tpool = ThreadPoolExecutor(self.threads)
        _start_all(self.tpool, self.threads)

    def accept(self, listener: Any) -> None:
        """Accepts a connection, but after other workers where no thread is free.

        Where there is no file for it, or for another one, accepting pauses.
        """
        if self._is_full and not self._has_yielded():
            return
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in _NO_FILE:
                self._pause_without_file(error)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self._pauses_until = None
        if self._found_no_file:
            self._found_no_file = False
            self.log.info("Accepting goes on")
        if not self.bound.has_files_after(sock.fileno()):
            self._pause()
        self.nr_conns += 1
        limits = (self.client_timeout, self.max_header_bytes)
        conn = Connection(limits, self.cfg, sock, address, listener.getsockname())
        if conn.is_plain:
            self._receive(conn)
        else:
            self._wait_for_more(conn)

    @property
    def _is_full(self) -> bool:
        return self.busy >= self.threads

    def _has_yielded(self) -> bool:
        """Whether other workers have just had their time to accept; if not, it begins.

        One connection at a time: what this worker accepts waits here, while another may be idle.
        """
        if self.cfg.workers == 1:
            return True
        now, until = time.monotonic(), self._yields_until
        if until is not None and until <= now < until + _YIELD:
            self._yields_until = None
            return True
        if until is None or now >= until:
            self._yields_until = now + _YIELD
        self.set_accept_enabled(False)
        return False

    def _pause_without_file(self, error: OSError) -> None:
        if not self._found_no_file:
            self.log.warning("Accepting pauses: %s", error)
        self._found_no_file = self.bound.lacks_files = True
        self._pause()

    def _pause(self) -> None:
        self._pauses_until = time.monotonic() + _PAUSE
        self.set_accept_enabled(False)

    def enqueue_req(self, conn: Connection) -> None:
        """Hands a connection to a thread; without a free one its request is queued."""
        if self._is_full:
            if self.busy + len(self.queued) + self.shares.waiting >= self.bound.connections:
                self._give_no_thread(conn, "As many requests wait as there may be connections")
                return
            self.queued[conn] = time.monotonic()
            if conn.is_followed:  # else what comes is not for us to read
                self._watch(conn, self._look_at_queued)
            return
        self.busy += 1
        self.served.add(conn)
        try:
            super().enqueue_req(conn)
        except RuntimeError as error:
            self.busy -= 1
            self.served.discard(conn)
            self._give_no_thread(conn, f"No thread can be started: {error}")

    def finish_request(self, conn: Connection, fs: Future[Any]) -> None:
        """Takes a connection back from a thread, which gets the request that is queued first."""
        self.busy -= 1
        self._count_slow_out(conn)
        self.served.discard(conn)
        while self.queued and not self._is_full:
            first = next(iter(self.queued))
            self._unqueue(first)
            self.enqueue_req(first)
        if conn.offer is not None and self.giving is not None:
            self.giving.add(conn, conn.offer)
        elif conn.held is not None:
            self._hold(conn, conn.held)
        elif fs.cancelled() or fs.exception() or not fs.result():
            self._shut_down(conn)
        else:
            self._await_next(conn)

    def _await_next(self, conn: Connection) -> None:
        """The next request of a connection may have begun to arrive."""
        conn.sock.setblocking(False)
        if conn.has_unread_bytes:
            self._go_on(conn)
        else:
            self._keep(conn)

    def _keep(self, conn: Connection) -> None:
        """Waits for the next request of a connection."""
        conn.set_timeout()
        if not self.alive:
            conn.timeout = min(conn.timeout, time.monotonic() + gthread.STOP_KEEPALIVE_LINGER)
        self.keepalived_conns.append(conn)
        self._watch(conn, self.on_client_socket_readable)

    def on_client_socket_readable(self, conn: Connection, client: Any) -> None:
        """The next request of a kept connection begins."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        conn.begin()
        self._receive(conn)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Starts or stops accepting; does not start while that pauses.

        A worker that ends closes its listeners: once all have, nobody is left waiting unaccepted.
        """
        super().set_accept_enabled(enabled and not self._pause_left())
        if not self.alive:
            for listener in self.sockets:
                listener.close()

    def _pause_left(self) -> float:
        """Seconds for which this worker does not accept."""
        yields_until = self._yields_until if self._is_full else None
        until = max(self._pauses_until or 0.0, yields_until or 0.0)
        return max(0.0, until - time.monotonic())

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Waits for what happens next; not beyond a pause in accepting, nor long in a crowd."""
        if self.queued or self._is_crowded:
            timeout = min(timeout, SWEEP)
        if self.slot is not None:
            self._show_state(self.slot)
            self._read_slot(self.slot)
        if self.giving:
            timeout = min(timeout, LOOK)
        super().wait_for_and_dispatch_events(min(self._pause_left() or timeout, timeout))

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Ends at once, but in the main loop: what the signal has interrupted may hold a lock."""
        self.method_queue.defer(super().handle_quit, sig, frame)

    # --- requests for which no thread is free ----------------------------------------------------

    def _unqueue(self, conn: Connection) -> None:
        del self.queued[conn]
        self._unwatch(conn)

    def _look_at_queued(self, conn: Connection, _client: Any) -> None:
        """The client of a queued request has sent more, or ended its side."""
        conn.has_left = not conn.receive()
        self._unwatch(conn)

    def _look_through_queue(self, now: float) -> None:
        """Forgets queued requests whose clients have left, and answers those that waited long.

        Those, too, that the application has been able to answer at once since they came.
        """
        for conn, since in list(self.queued.items()):
            if conn.has_left and now > since + _HALF_CLOSED:
                self._unqueue(conn)
                self._count_slow_out(conn)
                self._close(conn)
            elif now > since + self.request_timeout:
                self._unqueue(conn)
                self._give_no_thread(conn, "No thread became free in time")
            elif self._is_answered_here(conn.request):
                self._unqueue(conn)
                self._answer_here(conn, self.wsgi)

    # --- requests that wait for calls of their session -------------------------------------------

    def _most_calls(self) -> int:
        """How many calls of one session may have a thread: half of what streams leave."""
        return max(1, (self.threads - self._open_streams()) // 2)

    def _hold(self, conn: Connection, held: Held) -> None:
        size = self.shares.waiting_bytes + len(held.request.data)
        others = self.busy + len(self.queued) + self.shares.waiting
        if size <= self.max_arriving_bytes and others < self.bound.connections:
            self.shares.add(conn, held)
        else:
            conn.take_back(held.request)
            self._give_no_thread(conn, "Too many calls wait for others of their sessions")

    def _defer(self, call: Callable[[Connection], object], conn: Connection) -> None:
        self.method_queue.defer(call, conn)

    def _read_again(self, conn: Connection) -> None:
        assert conn.held is not None
        has_waited = time.monotonic() > conn.held.since + _HALF_CLOSED
        conn.take_back(conn.held.request)
        if has_waited and conn.is_left():
            self._close(conn)
        else:
            self._go_on(conn)

    def _give_up_held(self, now: float) -> None:
        for conn in self.shares.take_expired(now - self.request_timeout):
            assert conn.held is not None
            conn.take_back(conn.held.request)
            self._give_no_thread(conn, "No call of its session ended in time")

    def _give_no_thread(self, conn: Connection, why: str) -> None:
        """Answers a request in place of a thread, and gives back what it has taken."""
        self._count_slow_out(conn)
        overloaded = getattr(self.wsgi, "overloaded", None)
        if overloaded is None or conn.request.shape is not Shape.WHOLE:
            self._refuse(conn, "503 Service Unavailable", why, Overloaded.kind)
        else:
            self.log.warning("A request is refused: %s", why)
            self._answer_here(conn, overloaded)

    # --- what is answered in the main thread -----------------------------------------------------

    def _is_answered_here(self, request: ArrivingRequest) -> bool:
        path = request.simple_path
        return path is not None and self._answers_at_once(path)

    def _answer_here(self, conn: Connection, app: Any) -> None:
        """Answers a whole request with an application that does not wait."""
        is_kept = False
        try:
            may_keep = self._may_keep and app is self.wsgi  # else more may have come with it
            written, is_kept = answer(conn, app, self.cfg, may_keep)
            is_kept &= conn.sock.send(written) == len(written)
        except OSError as error:
            self.log.debug("A request was not answered: %s", error)
        except Exception as error:
            self.handle_error(None, conn.sock, conn.client, error)
        if is_kept:
            conn.begin()
            self._keep(conn)
        else:
            self._shut_down(conn)

    # --- requests that are arriving --------------------------------------------------------------

    def _receive(self, conn: Connection, _client: Any = None) -> None:
        """Takes what a client has sent."""
        before = len(conn.request.data)
        has_left = conn.is_followed and not conn.receive()
        if conn in self.arriving:
            self._arriving_bytes += len(conn.request.data) - before
        if has_left:
            self._forget(conn)
            self._close(conn)
        else:
            self._go_on(conn)

    def _go_on(self, conn: Connection) -> None:
        """Gives a request that can be read to a thread, and waits for more of any other."""
        request = conn.request
        if request.expects_continue and request.content_length > self.max_body_bytes:
            self._forget(conn)
            self._refuse(conn, "413 Content Too Large", "The body is larger than allowed")
        elif conn.is_slow and self._slow_count >= max(1, self.threads // 4):
            self._wait_for_more(conn)
            self._unwatch(conn)
            self._waiting[conn] = None
        elif self._is_answered_here(request):
            self._forget(conn)
            self._answer_here(conn, self.wsgi)
        elif conn.is_for_a_thread:
            self._forget(conn)
            conn.counts_as_slow = conn.is_slow
            self._slow_count += conn.counts_as_slow
            self.enqueue_req(conn)
        elif request.shape is Shape.TOO_LONG:
            self._forget(conn)
            self._refuse(conn, "431 Request Header Fields Too Large", "The head is too long")
        else:
            self._wait_for_more(conn)

    def _wait_for_more(self, conn: Connection) -> None:
        if conn not in self.arriving:
            self.arriving[conn] = None
            self._arriving_bytes += len(conn.request.data)
            self._watch(conn, self._shake_hands if conn.needs_handshake else self._receive)
        if conn.expects_continue:
            conn.is_continued = True
            with contextlib.suppress(OSError):
                conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _spare_memory(self, before: float) -> None:
        """Gives up requests that take too many bytes together, unless progress has come since."""
        holding = [conn for conn in self.arriving if conn.request.data]
        for conn in sorted(holding, key=lambda one: one.progress):
            if self._arriving_bytes <= self.max_arriving_bytes or conn.progress >= before:
                return
            self._give_up(conn)

    def _count_slow_out(self, conn: Connection) -> None:
        """A request is no longer slow: its body has come, or it is over."""
        if not conn.counts_as_slow:
            return
        conn.counts_as_slow = False
        self._slow_count -= 1
        if self._waiting:
            self._go_on(next(iter(self._waiting)))

    def _forget(self, conn: Connection) -> None:
        """A connection is arriving no longer."""
        if conn in self.arriving:
            del self.arriving[conn]
            self._waiting.pop(conn, None)
            self._arriving_bytes -= len(conn.request.data)
            self._unwatch(conn)

    def _give_up(self, conn: Connection) -> None:
        """Ends a connection on which a request did not arrive in time."""
        self._forget(conn)
        if conn.request.data:
            self._refuse(conn, "408 Request Timeout", "The request did not arrive in time")
            return
        if conn.is_in_handshake:
            self._handshake_failures.add(conn.client, "the handshake did not end in time")
        self._close(conn)

    # --- TLS handshakes --------------------------------------------------------------------------

    def _shake_hands(self, conn: Connection, _client: Any) -> None:
        """Has a thread go on with a handshake; until then nobody else touches the connection."""
        self._forget(conn)
        step = self._handshakes.submit(conn.shake_hands)
        step.add_done_callback(partial(self.method_queue.defer, self._after_step, conn))

    def _after_step(self, conn: Connection, step: Future[bool]) -> None:
        error = step.exception()
        if error is not None:
            self._handshake_failures.add(conn.client, error)
            self._shut_down(conn)
        elif step.result():
            self._wait_for_more(conn)
        else:
            self._close(conn)

    # --- requests that are passed from one worker to another -------------------------------------

    def _begin_passing(self, slot: Slot) -> None:
        limits = (self.client_timeout, self.max_header_bytes)
        self.giving = Giving(slot, *limits, self._go_on, self._give_no_thread, self._close)
        self.shares.slot = slot
        self._memory = getattr(self.wsgi, "memory", None)
        self._session_count = getattr(self.wsgi, "session_count", self._session_count)
        self._is_draining = getattr(self.wsgi, "is_draining", self._is_draining)

    def _show_state(self, slot: Slot) -> None:
        """Lets the other workers see whether this one can be given something."""
        if not self.alive:
            slot.leave()
        line = slot.line
        line.heartbeat = time.monotonic()
        free = self.threads - self.busy - len(self.queued)
        line.free_threads = 0 if self._pause_left() else max(0, free)
        line.free_streams = max(0, self._free_streams())
        line.connections = self.nr_conns
        line.sessions = self._session_count()
        if self._memory is not None:
            homes = self._memory.homes()
            if homes != self._homes_shown:
                self._homes_shown = homes
                slot.set_homes(homes)

    def _read_slot(self, slot: Slot) -> None:
        """Has the poller look at what others pass, while there is somebody to answer it.

        A worker that leaves looks for requests of sessions that it still has in memory, and for
        records, which it sends on.
        """
        is_open = not slot.is_leaving or self._memory is not None
        wanted = is_open and not (self._is_full or self._pause_left())
        if wanted == self._reads_slot:
            return
        self._reads_slot = wanted
        if wanted:
            self.poller.register(slot.reader, selectors.EVENT_READ, self._take_passed)
        else:
            self.poller.unregister(slot.reader)

    def _take_passed(self, reader: socket.socket) -> None:
        for _ in range(_TAKEN_AT_ONCE):
            if self._is_full:
                return
            try:
                taken = take(reader, begins=self._begins_passed)
            except BlockingIOError:
                return
            except OSError as error:
                self._pause_without_file(error)
                return
            if isinstance(taken, Records):
                self._inherit(taken)
            elif taken is not None:
                self._begin_passed(taken)

    @property
    def _begins_passed(self) -> bool:
        """Whether this worker answers what others pass; one that leaves while it has sessions, and
        does not only wait for the calls that are under way.
        """
        if self.slot is not None and not self.slot.is_leaving:
            return True
        has_sessions = self._memory is not None and self._memory.session_count > 0
        return has_sessions and not self._is_draining()

    def _inherit(self, records: Records) -> None:
        """Has the sessions of a worker that leaves."""
        if self._memory is not None:
            ids = self._memory.put_in(records.data)
            self.log.info("%d sessions of a worker that leaves are here now", len(ids))

    def _begin_passed(self, taken: Taken) -> None:
        """Answers a request of another worker as one that has arrived here."""
        sock = socket.socket(fileno=taken.connection)
        limits = (self.client_timeout, self.max_header_bytes)
        try:
            server = self._accepted_at(sock.getsockname())
            conn = Connection(limits, self.cfg, sock, sock.getpeername(), server)
        except OSError:  # the client has left
            sock.close()
            return
        if not self.bound.has_files_after(taken.connection):
            self._pause()
        self.nr_conns += 1
        conn.may_have_copies = True
        conn.take_over(taken.passed)
        self._go_on(conn)

    def _accepted_at(self, own: Any) -> Any:
        """The listener's address of a connection that another worker has accepted."""
        if own in self._addresses or not isinstance(own, tuple):
            return own
        for address in self._addresses:
            if isinstance(address, tuple) and address[1] == own[1]:
                return address
        return own

    # --- connections whose time is over ----------------------------------------------------------

    def murder_pending(self) -> None:
        """Closes connections whose time is over, and the most idle ones if there are too many."""
        now = time.monotonic()
        if self.giving is not None:
            self.giving.look(now)
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP
        for conn in [conn for conn in self.arriving if self._is_over(conn, now)]:
            self._give_up(conn)
        self._look_through_queue(now)
        self._give_up_held(now)
        self._handshake_failures.report()
        for conn in [conn for conn in self.closing if conn.timeout <= now]:
            self._drop(conn)
        self._make_room(now)
        if self._arriving_bytes > self.max_arriving_bytes:
            self._spare_memory(now - SURE)
        if self._ends_at is not None and (now > self._ends_at or not self._has_old_call(now)):
            self.alive = False

    def _has_old_call(self, now: float) -> bool:
        before = now - _OLD
        if any(conn.is_called_since(before) for conn in self.served):
            return True
        return self._has_call_since(before)

    @property
    def has_clients(self) -> bool:
        """Whether a request may be, or come, on a connection. Any thread."""
        return bool(self.nr_conns > len(self.closing))

    def _is_over(self, conn: Connection, now: float) -> bool:
        """Whether a request has had its time; a worker that stops does not wait for its rest."""
        if self.alive:
            return conn.deadline <= now
        return bool(conn.progress + gthread.STOP_KEEPALIVE_LINGER <= now)

    @property
    def _is_crowded(self) -> bool:
        count = self.nr_conns - len(self.closing)
        return bool(count > self.bound.connections or self.bound.lacks_files)

    def _make_room(self, now: float) -> None:
        """Closes connections that are too many: of those without progress for a second the oldest.

        Those that are closing take files, but do not count otherwise: they soon are gone.
        """
        lacks_files = self.bound.lacks_files
        wanted = self.bound.excess(self.nr_conns - len(self.closing))
        self._close_silent(wanted - len(self.closing) if lacks_files else wanted, now - SURE)
        if lacks_files:
            self._pauses_until = None
            for conn in list(self.closing)[:wanted]:
                self._drop(conn)

    def _close_silent(self, count: int, before: float) -> None:
        """Closes so many of the connections that have been silent since before that time."""
        if count <= 0:
            return
        silent = [conn for conn in self.arriving if conn.progress < before]
        silent.sort(key=lambda conn: conn.progress)
        for conn in silent[:count]:
            self._give_up(conn)
        for _ in range(count - len(silent)):
            if not self._close_longest_kept(before):
                return

    def _close_longest_kept(self, before: float) -> bool:
        """Closes the connection that has been idle for longest, if it was before that time."""
        if not self.keepalived_conns:
            return False
        kept = self.keepalived_conns[0]
        if kept.timeout - self.cfg.keepalive >= before:
            return False
        self.keepalived_conns.popleft()
        self._unwatch(kept)
        self._close(kept)
        return True

    def _watch(self, conn: Connection, callback: Callable[[Connection, Any], None]) -> None:
        self.poller.register(conn.sock, conn.waits_for, partial(callback, conn))

    def _unwatch(self, conn: Connection) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.poller.unregister(conn.sock)

    def _close(self, conn: Connection) -> None:
        self.shares.leave(conn)
        self.nr_conns -= 1
        conn.close()

    def _refuse(self, conn: Connection, status: str, message: str, kind: str = "") -> None:
        """Answers a request in place of a thread, as far as that goes at once, and ends it."""
        self.log.warning("A request is answered with %s: %s", status, message)
        with contextlib.suppress(OSError):
            conn.sock.setblocking(False)
            conn.sock.send(refusal(status, message, kind))
        self._shut_down(conn)

    def _shut_down(self, conn: Connection) -> None:
        """Ends our side of a connection; the poller reads the other side to its end."""
        self.shares.leave(conn)
        conn.timeout = time.monotonic() + _CLOSING_TIME
        self.closing[conn] = None
        try:
            conn.end()
            self._watch(conn, self._read_on_and_forget)
        except (OSError, ValueError):  # the client has left, or the socket is closed already
            self._drop(conn)

    def _read_on_and_forget(self, conn: Connection, _client: Any) -> None:
        try:
            is_over = not conn.sock.recv(PIECE)
        except (BlockingIOError, ssl.SSLWantReadError):
            is_over = False
        except OSError:
            is_over = True
        if is_over:
            self._drop(conn)

    def _drop(self, conn: Connection) -> None:
        """Closes a connection that was shut down."""
        del self.closing[conn]
        self._unwatch(conn)
        self._close(conn)

    # --- in a thread of the pool -----------------------------------------------------------------

    def handle(self, conn: Connection) -> Any:
        """Answers requests of a connection for as long as this thread may wait for the next one."""
        while self._answer(conn):
            if not self._can_stay(conn):
                return True
            if not conn.receive():
                return False
            if conn.request.shape is not Shape.WHOLE:
                return True
        return False

    def _answer(self, conn: Connection) -> bool:
        """Answers a request; whether the connection is to be kept for the next one."""
        is_kept: bool = super().handle(conn)
        if is_kept:
            conn.finish()
        elif conn.is_late and conn.has_begun:
            with contextlib.suppress(OSError):
                conn.sock.sendall(refusal("408 Request Timeout", "The head did not arrive in time"))
        return is_kept

    def _can_stay(self, conn: Connection) -> bool:
        """Whether this thread may wait for the connection's next request.

        Enough other threads must be free, and no bytes may have been read already.
        """
        is_quiet = conn.is_plain and not conn.has_unread_bytes
        return self.alive and is_quiet and self.busy <= self.threads // 2

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        """Whether a connection can be kept: nobody waits for a body that was not asked for."""
        return keepalive and conn.skip_body()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answers a request that gunicorn refuses, or that has failed, with a JSON-RPC error."""
        written = refusal_of(partial(super().handle_error, req), addr, exc)
        with contextlib.suppress(OSError):
            client.sendall(written)

    def handle_request(self, req: Any, conn: Connection) -> bool:
        """Answers one request; whether the connection is to be kept."""
        try:
            return self._answer_request(req, conn)
        except Exception:
            if not conn.is_put_off:
                raise
            self.log.exception("Error after a request was put off")
            return False

    def _add_seams(
        self, environ: dict[str, Any], req: Any, conn: Connection, response: Any
    ) -> None:
        """Tells the application what it can ask of this worker, and how the request has come."""
        if conn.was_passed:
            environ[WAS_PASSED] = True
        if conn.was_counted:
            environ[WAS_COUNTED] = True
        if self.giving is not None and conn.is_plain:
            environ[PASS_TO] = self.giving.seam(conn, req, response)
        if conn.is_plain:
            environ[ADMIT] = self.shares.seam(conn, req, response)
            environ[CANCEL] = self.shares.cancel

    def _answer_request(self, req: Any, conn: Connection) -> bool:
        environ: dict[str, Any] = {}
        response: Any = None
        try:
            conn.begin_body()
            req._expected_100_continue &= not conn.is_continued
            self.cfg.pre_request(self, req)
            begin = datetime.now()
            response, environ = wsgi.create(
                req, conn.sock, conn.client, conn.server, self.cfg, response_class=JoinedResponse
            )
            environ["wsgi.multithread"] = True
            conn.on_late_body = response.force_close
            join_cookies(req.headers, environ)
            self._decide_on_keeping(response)
            self._add_seams(environ, req, conn, response)
            self._notice_end_of_body(req, conn)
            body = self.wsgi(environ, response.start_response)
            self._body_has_come(conn)
            conn.is_standing = getattr(body, "is_standing", False)
            try:
                send(body, response, environ)
            finally:
                if not conn.is_put_off:
                    self.log.access(response, req, environ, datetime.now() - begin)
                if hasattr(body, "close"):
                    body.close()
            return not conn.is_put_off and not response.should_close()
        except TimeoutError:
            if not conn.is_put_off:
                self._say_late(req, conn, response)
            raise StopIteration from None
        except OSError:
            raise
        except (Exception, SystemExit) as error:
            if response is None or not response.headers_sent:
                raise
            # The client would take an error page for the rest of the response that has begun.
            if not isinstance(error, ProxyError):  # else broken off on purpose: the edge says why
                self.log.exception("Error handling request")
            raise StopIteration from None
        finally:
            self.shares.leave(conn)
            if not conn.is_put_off:
                self._call_post_request(req, environ, response)
            else:
                self.nr -= 1  # it is the other worker's, or comes again

    def _say_late(self, req: Any, conn: Connection, response: Any) -> None:
        """The client has not sent its body in time, or does not read."""
        if response is not None and response.is_late:
            line = not_read(req, conn.client, response.taken, self.client_timeout)
            self.log.warning("%s", line)
        elif response is None or not response.headers_sent:
            late = refusal("408 Request Timeout", "The body did not arrive in time")
            conn.sock.sendall(late)

    def _notice_end_of_body(self, req: Any, conn: Connection) -> None:
        """Has a request that counts as slow count so no longer once its body has come."""
        if getattr(req.body.reader, "length", None) == 0:
            self._body_has_come(conn)
        elif conn.counts_as_slow:
            req.body.reader = _Noticed(req.body.reader, partial(self._body_has_come, conn))

    def _body_has_come(self, conn: Connection) -> None:
        if conn.counts_as_slow:
            self.method_queue.defer(self._count_slow_out, conn)

    def _decide_on_keeping(self, response: Any) -> None:
        self.nr += 1
        if self.nr >= self.max_requests and self._ends_at is None:
            self.log.info("The worker has served %d requests: it ends soon", self.max_requests)
            self._ends_at = time.monotonic() + self.request_timeout
        if not self._may_keep:
            response.force_close()

    @property
    def _may_keep(self) -> bool:
        has_room = len(self.keepalived_conns) < self.max_keepalived
        return bool(self.alive and self.cfg.keepalive and has_room)

    def _call_post_request(self, req: Any, environ: dict[str, Any], response: Any) -> None:
        try:
            self.cfg.post_request(self, req, environ, response)
        except Exception:
            self.log.exception("Exception in post_request hook")


class _Noticed:
    """The source of a body, which tells when it is at its end."""

    def __init__(self, reader: Any, on_end: Callable[[], None]) -> None:
        self.inner = reader
        self._on_end = on_end

    def read(self, size: int) -> bytes:
        """What gunicorn's own reader gives."""
        data: bytes = self.inner.read(size)
        if not data or getattr(self.inner, "length", None) == 0:
            self._on_end()
        return data


def _start_all(pool: ThreadPoolExecutor, count: int) -> int:
    """Starts the threads of a new pool of that size; how many could be started."""
    is_over = threading.Event()
    try:
        for started in range(count):
            try:
                pool.submit(is_over.wait)  # no thread is idle meanwhile, so each starts another
            except RuntimeError:
                return started
        return count
    finally:
        is_over.set()
