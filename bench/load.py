"""The load: `tools/call` over persistent connections, one at a time on each, every answer checked.

    python load.py JOB        (JOB is the JSON of a `Job`)

One thread, raw sockets and epoll, requests made by filling two holes in bytes that are ready: this
must not be what is measured. Prints the JSON of a `Measurement`; a wrong or failed answer ends the
run with exit status 1 and a sentence on stderr.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import select
import socket
import sys
import time
from array import array
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import msgspec
from machine import cpu_seconds, processes_under
from measuring import Wrong

#: Seconds without any answer at all after which the run is void.
PATIENCE = 20.0

_VERSION = b"2025-06-18"
_MODERN = b"2026-07-28"
_FIRST_ID = 1_000_000_000  # ids, and so bodies, all have the same length
_PIECE = 256 * 1024

#: What a legacy client begins with.
INITIALIZE = (
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18",'
    b'"capabilities":{},"clientInfo":{"name":"bench","version":"1"}}}'
)
_INITIALIZED = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
_CALL = (
    b'{"jsonrpc":"2.0","id":%d,"method":"tools/call",'
    b'"params":{"name":"echo","arguments":{"text":"%s"}}}'
)

_META = (
    b'"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",'
    b'"io.modelcontextprotocol/clientInfo":{"name":"bench","version":"1"},'
    b'"io.modelcontextprotocol/clientCapabilities":{}}'
)
_MODERN_CALL = _CALL[:-2] + b"," + _META + b"}}"

_CALLED = b"Mcp-Method: tools/call\r\nMcp-Name: %s\r\n"
_LISTS_TOOLS = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'

_LISTEN = (
    b'{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen",'
    b'"params":{"notifications":{"toolsListChanged":true},%s}}' % _META
)
_ACKNOWLEDGED = b"notifications/subscriptions/acknowledged"

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_SESSION = re.compile(rb"\r\nmcp-session-id: *([\x21-\x7e]+)", re.IGNORECASE)
_COMMANDS = re.compile(rb"total_commands_processed:(\d+)\r")
_DATA = re.compile(rb"^data: ?(.+?)\r?$", re.MULTILINE)


class Job(msgspec.Struct):
    """What to do: times are in seconds.

    With `modern` the calls are those of 2026-07-28. They have no sessions: who has none of its own
    has no Authorization, and so the same server process behind it as all others.

    `tool` is called at `path`.

    `proxy` is the process whose CPU time, with that of what it has started but for `scripts`, is
    told, and so is that of `redis`, which listens on `redis_port`.
    """

    port: int
    connections: int = 16
    one_session: bool = False
    warm_up: float = 1.0
    seconds: float = 4.0
    modern: bool = False
    proxy: int | None = None
    scripts: tuple[str, ...] = ()
    redis: int | None = None
    redis_port: int = 0
    path: str = "/mcp"
    tool: str = "echo"


class Measurement(msgspec.Struct):
    """How it went: latencies in milliseconds, `load` the share of a CPU that this program used.

    `reconnects` says how often a server announced that it closes a connection after its answer.
    The rest is for each call: CPU time of proxy and Redis in microseconds, commands that Redis got.
    """

    calls: int
    rate: float
    p50: float
    p99: float
    worst: float
    load: float
    reconnects: int
    cpu: float
    redis_cpu: float
    commands: float


class _Text(msgspec.Struct):
    text: str


class _Result(msgspec.Struct):
    content: list[_Text]


class _Answer(msgspec.Struct):
    id: int
    result: _Result


class _Tool(msgspec.Struct):
    name: str


class _Tools(msgspec.Struct):
    tools: list[_Tool]


class _ToolList(msgspec.Struct):
    result: _Tools


_answer = msgspec.json.Decoder(_Answer)
_tool_list = msgspec.json.Decoder(_ToolList)


# --- reading HTTP ---------------------------------------------------------------------------------


class Reply(msgspec.Struct):
    """A complete HTTP response; `head` ends before the empty line."""

    status: int
    head: bytes
    body: bytes


def reply_in(data: bytes) -> Reply | None:
    """The response that `data` is, None while some of it is missing."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    status = int(data[9:12])
    length = _LENGTH.search(data, 0, end)
    if length is not None:
        body = data[end + 4 :]
        missing = int(length[1]) - len(body)
        if missing < 0:
            raise Wrong(f"more bytes than Content-Length says: {data[:500]!r}")
        return Reply(status, data[:end], body) if missing == 0 else None
    if _CHUNKED.search(data, 0, end):
        # Nothing is pipelined, so what ends the last chunk ends the data.
        if not data.endswith(b"0\r\n\r\n"):
            return None
        body_or_none = _join_chunks(data, end + 4)
        return None if body_or_none is None else Reply(status, data[:end], body_or_none)
    if status in (202, 204):
        return Reply(status, data[:end], b"")
    raise Wrong(f"an answer of unknown length: {data[:500]!r}")


def _join_chunks(data: bytes, at: int) -> bytes | None:
    pieces: list[bytes] = []
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        size = int(data[at:end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def message_in(reply: Reply) -> bytes:
    """The JSON-RPC message of an answer: the body, or the last event of a stream that has data."""
    if reply.body.startswith(b"{"):
        return reply.body
    events: list[bytes] = _DATA.findall(reply.body)
    if not events:
        raise Wrong(f"no message in {reply.body[:500]!r}")
    return events[-1]


# --- a client -------------------------------------------------------------------------------------


class Client:
    """One connection with at most one call on its way.

    What a `session` is to a legacy client a token in its Authorization is to a modern one.
    """

    def __init__(
        self, port: int, is_modern: bool = False, path: str = "/mcp", tool: str = "echo"
    ) -> None:
        self._port = port
        self._is_modern = is_modern
        self._path = path.encode()
        self._called = _CALLED % tool.encode()
        call = _MODERN_CALL if is_modern else _CALL
        self._call = call.replace(b'"echo"', b'"%s"' % tool.encode())
        self.socket = self._connect()
        self.is_closing = False
        self.session: bytes | None = None
        self.partial = b""
        self.template = b""
        self.id = 0
        self.text = b""
        self.sent_at = 0.0

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def reconnect(self) -> None:
        """A new connection in place of one that the server closes, as it has announced."""
        self.socket.close()
        self.socket = self._connect()
        self.is_closing = False

    def open_session(self) -> None:
        """Initializes a session of its own; a modern client only calls, under a name of its own."""
        if self._is_modern:
            self.session = secrets.token_hex(16).encode()
            self.first_call()
            return
        self.initialize()
        accepted = self._ask(_INITIALIZED).status
        if accepted != 202:
            raise Wrong(f"notifications/initialized was answered by {accepted}")

    def initialize(self) -> None:
        """Only asks for a session."""
        reply = self._ask(INITIALIZE)
        found = _SESSION.search(reply.head)
        if reply.status != 200 or b'"result"' not in reply.body:
            raise Wrong(f"initialize was answered by {reply.status} {reply.body[:500]!r}")
        self.session = found[1] if found else None

    def list_tools(self) -> list[str]:
        """Asks for the names of the tools, in a session."""
        reply = self._ask(_LISTS_TOOLS)
        try:
            return [tool.name for tool in _tool_list.decode(message_in(reply)).result.tools]
        except msgspec.DecodeError as error:
            raise Wrong(f"tools/list was answered by {reply.body[:500]!r}") from error

    def first_call(self) -> None:
        """A call that starts what is to be measured."""
        text = b"first"
        self.id, self.text = _FIRST_ID, text
        self._check(self._ask(self._call % (_FIRST_ID, text)))

    def close_session(self) -> None:
        """Tells the server that the session is over, whatever it says to that."""
        if self.session is not None and not self._is_modern:
            self._ask(b"", b"DELETE")

    def open_stream(self) -> None:
        """Has the server send what it has to say; a modern client asks to listen.

        The head of the answer is read, and of a modern one its first event.
        """
        if self._is_modern:
            listens = b"Mcp-Method: subscriptions/listen\r\n"
            head = self._head(b"POST").replace(self._called, listens)
            request = b"%sContent-Length: %d\r\n\r\n%s" % (head, len(_LISTEN), _LISTEN)
        else:
            request = self._head(b"GET") + b"\r\n"
        self.socket.sendall(request)
        end = _ACKNOWLEDGED if self._is_modern else b"\r\n\r\n"
        data = b""
        while end not in data:
            piece = self.socket.recv(_PIECE)
            data += piece
            if not piece or not data.startswith(b"HTTP/1.1 200"):
                raise Wrong(f"a stream was answered by {data[:500]!r}")

    def prepare(self, nonce: bytes) -> None:
        """Makes everything of a call that is always the same; `nonce` is as long as each text."""
        body = self._call % (_FIRST_ID, nonce)
        head = b"%sContent-Length: %d\r\n\r\n" % (self._head(b"POST"), len(body))
        self.template = head + self._call

    def call(self, number: int, text: bytes) -> None:
        """Sends a call."""
        self.id, self.text = number, text
        request = self.template % (number, text)
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Reads what has come; true once the answer is complete, which is then the right one."""
        piece = self.socket.recv(_PIECE)
        if not piece:
            raise Wrong(f"the connection was closed on call {self.id}, after {self.partial!r}")
        data = self.partial + piece
        reply = reply_in(data)
        if reply is None:
            self.partial = data
            return False
        self.partial = b""
        self.is_closing = _CLOSE.search(reply.head) is not None
        self._check(reply)
        return True

    def _check(self, reply: Reply) -> None:
        if reply.status != 200:
            raise Wrong(f"call {self.id} was answered by {reply.status} {reply.body[:500]!r}")
        try:
            answer = _answer.decode(message_in(reply))
        except msgspec.DecodeError as error:
            raise Wrong(f"call {self.id}: {error}: {reply.body[:500]!r}") from error
        if answer.id != self.id or [part.text.encode() for part in answer.result.content] != [
            self.text
        ]:
            raise Wrong(f"call {self.id} with {self.text!r} was answered by {reply.body[:500]!r}")

    def _ask(self, body: bytes, method: bytes = b"POST") -> Reply:
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        self.socket.sendall(self._head(method) + length + body)
        data = b""
        while (reply := reply_in(data)) is None:
            piece = self.socket.recv(_PIECE)
            if not piece:
                raise Wrong(f"the connection was closed after {data[:500]!r}")
            data += piece
        if _CLOSE.search(reply.head):
            self.reconnect()
        return reply

    def _head(self, method: bytes) -> bytes:
        if self._is_modern:
            version, session = _MODERN, self._called
            if self.session:
                session += b"Authorization: Bearer %s\r\n" % self.session
        else:
            version = _VERSION
            session = b"Mcp-Session-Id: %s\r\n" % self.session if self.session else b""
        return (
            b"%s %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Accept: application/json, text/event-stream\r\nMCP-Protocol-Version: %s\r\n%s"
            % (method, self._path, self._port, version, session)
        )


# --- the run --------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """What has been used so far: CPU time in seconds, and commands of Redis."""

    own: float
    proxy: float
    redis: float
    commands: float

    @classmethod
    def of(cls, job: Job) -> Spent:
        """Up to now."""
        proxy = processes_under(job.proxy, job.scripts) if job.proxy else []
        return cls(
            own=cpu_seconds([os.getpid()]),
            proxy=cpu_seconds(proxy),
            redis=cpu_seconds([job.redis] if job.redis else []),
            commands=redis_commands(job.redis_port) if job.redis_port else 0,
        )

    def since(self, before: Spent) -> Spent:
        """What came to it."""
        return Spent(*(now - then for now, then in zip(self, before, strict=True)))


def redis_commands(port: int) -> int:
    """The commands that a Redis has had so far."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(b"INFO stats\r\n")
        data = b""
        while (found := _COMMANDS.search(data)) is None:
            data += connection.recv(_PIECE)
    return int(found[1])


class Run:
    """All clients, from the first call to the last answer."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients: dict[int, Client] = {}
        self._ids = count(_FIRST_ID)
        self._nonce = secrets.token_hex(8).encode()
        self._poll = select.epoll()
        self._reconnects = 0
        for client in clients:
            client.prepare(b"%s-%d" % (self._nonce, _FIRST_ID))
            self._watch(client)

    def measure(self, job: Job) -> Measurement:
        """Calls for the whole time; what ends within it, after the warm-up, counts."""
        for client in list(self._clients.values()):
            self._call(client)
        self._go_on_until(time.perf_counter() + job.warm_up)
        self._reconnects, before, begin = 0, Spent.of(job), time.perf_counter()
        ordered = sorted(self._go_on_until(begin + job.seconds))
        seconds, reconnects = time.perf_counter() - begin, self._reconnects
        spent = Spent.of(job).since(before)
        self._finish()
        if not ordered:
            raise Wrong("no call was answered in time")
        return Measurement(
            calls=len(ordered),
            rate=len(ordered) / seconds,
            p50=1000 * ordered[len(ordered) // 2],
            p99=1000 * ordered[len(ordered) * 99 // 100],
            worst=1000 * ordered[-1],
            load=spent.own / seconds,
            reconnects=reconnects,
            cpu=1e6 * spent.proxy / len(ordered),
            redis_cpu=1e6 * spent.redis / len(ordered),
            commands=spent.commands / len(ordered),
        )

    def _watch(self, client: Client) -> None:
        self._clients[client.socket.fileno()] = client
        self._poll.register(client.socket, select.EPOLLIN)

    def _call(self, client: Client) -> None:
        if client.is_closing:
            self._reconnects += 1
            self._poll.unregister(client.socket)
            del self._clients[client.socket.fileno()]
            client.reconnect()
            self._watch(client)
        number = next(self._ids)
        client.call(number, b"%s-%d" % (self._nonce, number))

    def _go_on_until(self, end: float) -> array[float]:
        """Answers are followed by the next call, at once; returns how long each call took."""
        latencies = array("d")
        while time.perf_counter() < end:
            for client in self._answered():
                latencies.append(time.perf_counter() - client.sent_at)
                self._call(client)
        return latencies

    def _finish(self) -> None:
        """Waits for the calls that are still on their way: too late to count, still to be right."""
        waiting = len(self._clients)
        while waiting:
            for client in self._answered():
                self._poll.unregister(client.socket)
                waiting -= 1

    def _answered(self) -> Iterator[Client]:
        """The clients whose answers are complete now."""
        events = self._poll.poll(PATIENCE)
        if not events:
            raise Wrong(f"no answer within {PATIENCE:g} seconds")
        for number, _ in events:
            client = self._clients[number]
            if client.receive():
                yield client


def opened(job: Job) -> list[Client]:
    """The clients of a job, with their sessions.

    A session is not used over the connection that has opened it: where several processes serve the
    port, its calls arrive at any of them. Each has called once: what starts with that has started.
    """
    clients = [Client(job.port, job.modern, job.path, job.tool) for _ in range(job.connections)]
    for client in clients:
        if job.one_session and job.modern:
            client.first_call()
        elif job.one_session and client is not clients[0]:
            client.session = clients[0].session
        else:
            client.open_session()
    sessions = [client.session for client in clients]
    random.shuffle(sessions)
    for client, session in zip(clients, sessions, strict=True):
        client.session = session
        client.first_call()
    return clients


def close_sessions(clients: list[Client], job: Job) -> None:
    """Ends what `opened` has opened."""
    for client in clients:
        if client.is_closing:
            client.reconnect()
    for client in clients[: 1 if job.one_session else None]:
        client.close_session()


def main() -> int:
    """Does the job and prints the outcome."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    try:
        clients = opened(job)
        outcome = Run(clients).measure(job)
        close_sessions(clients, job)
    except (Wrong, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(outcome).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
