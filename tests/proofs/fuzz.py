"""Two hundred thousand cases that are almost right: no 500, nothing unforeseen, no hang, no growth.

Each case has a number; it and the seed, which is printed, make the case again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from mcp_proxy import create_app
from mcp_proxy.app import Application
from mcp_proxy.config import from_values
from mcp_proxy.relay import protocol
from mcp_proxy.storage.mailboxes import Envelope, LocalMailboxes
from mcp_proxy.wire.jsonrpc import Request
from tests.proofs.mutation import VALUES, changed_bytes, changed_json, changed_value
from tests.proofs.worker import footprint
from tests.relay.scene import Scene
from tests.servers.http_backend import HttpBackend, Turn
from tests.support.front import SCRIPTED, HttpFront, McpClient, WsgiFront
from tests.support.proxy_process import ProxyProcess
from tests.support.redis_server import RedisServer

CASES = 200_000

#: Seconds that a case may take.
HANG = 10.0

#: What our own process, or the worker, may grow by after the first fifth of the cases, in MB.
GROWTH = 24.0

_REQUEST_TIMEOUT = 3
_SHOWN = 12
_LINES = 20  # of a server, in one case of its reader
_BAD_WORDS = ("unexpectedly", "not foreseen", "Traceback")

Environ = dict[str, Any]


class Finding(NamedTuple):
    """A case that did what none may do."""

    part: str
    number: int
    what: str
    case: str

    def __str__(self) -> str:
        return f"  {self.part} {self.number}: {self.what}\n    {self.case[:600]}"


class Watch(logging.Handler):
    """What the log says that it must not."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.exc_info or any(word in text for word in _BAD_WORDS):
            self.said.append(text)

    def taken(self) -> str:
        """What was said since the last look."""
        said, self.said = self.said, []
        return "\n".join(said)


class Run:
    """One part of the cases, and what was found in it."""

    def __init__(self, name: str, seed: int, count: int, watch: Watch) -> None:
        self.name = name
        self.seed = seed
        self.count = count
        self.findings: list[Finding] = []
        self.outcomes: Counter[str] = Counter()
        self._watch = watch

    def cases(self) -> Iterator[tuple[int, random.Random]]:
        """The numbers of the cases, each with its chance."""
        for number in range(self.count):
            yield number, random.Random(f"{self.seed} {self.name} {number}")

    def note(self, number: int, what: str, case: object) -> None:
        """A finding."""
        self.findings.append(Finding(self.name, number, what, repr(case)))

    def judge(self, number: int, case: object, act: Callable[[], str]) -> None:
        """Runs a case; `act` says how it came out: `500` is a finding, as is what the log says."""
        began = time.monotonic()
        try:
            outcome = act()
        except Exception as error:
            outcome = f"raised {type(error).__name__}"
            self.note(number, f"raised {error!r}", case)
        self.outcomes[outcome] += 1
        if outcome.startswith("500"):
            self.note(number, "500", case)
        if (seconds := time.monotonic() - began) > HANG:
            self.note(number, f"took {seconds:.1f} s", case)
        if said := self._watch.taken():
            self.note(number, said[-1500:], case)


def fuzz(count: int = CASES, seed: int | None = None) -> None:
    """All parts, each with its share of `count`."""
    seed = random.randrange(2**32) if seed is None else seed
    print(f"seed {seed}, {count} cases", flush=True)
    watch = Watch()
    logging.getLogger().addHandler(watch)
    findings: list[Finding] = []
    try:
        for name, (share, part) in PARTS.items():
            run = Run(name, seed, max(10, int(count * share)), watch)
            began = time.monotonic()
            part(run)
            seconds = time.monotonic() - began
            print(
                f"  {name:<8} {run.count:7} cases in {seconds:5.1f} s: "
                f"{dict(run.outcomes.most_common(9))}, {len(run.findings)} findings",
                flush=True,
            )
            findings += run.findings
    finally:
        logging.getLogger().removeHandler(watch)
    for finding in findings[:_SHOWN]:
        print(finding)
    print(end="", flush=True)
    assert findings == [], f"{len(findings)} findings"


@contextmanager
def unchanged(run: Run, pid: int | None = None) -> Iterator[Callable[[int], None]]:
    """Compares our process, or `pid`, after the first fifth of the cases with it in the end."""
    begun: list[tuple[float, int]] = []

    def now() -> tuple[float, int]:
        measured = footprint(pid or os.getpid())
        return measured.memory, measured.threads

    def at(number: int) -> None:
        if number == run.count // 5:
            begun.append(now())

    yield at
    memory, threads = now()
    if begun:
        print(
            f"    {run.name}: {begun[0][0]:.1f} MB and {begun[0][1]} threads "
            f"after a fifth, {memory:.1f} MB and {threads} threads in the end"
        )
        if memory - begun[0][0] > GROWTH:
            run.note(-1, f"grown by {memory - begun[0][0]:.1f} MB", "")
        if threads > begun[0][1] + 4:
            run.note(-1, f"{threads - begun[0][1]} more threads", "")


# --- the HTTP edge -------------------------------------------------------------------------------

_MESSAGES: list[Any] = [
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "e", "arguments": {}}},
    {"jsonrpc": "2.0", "id": "a", "method": "echo", "params": {"_meta": {"progressToken": 5}}},
    {"jsonrpc": "2.0", "id": 1, "method": "ping"},
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
    {
        "jsonrpc": "2.0",
        "method": "notifications/cancelled",
        "params": {"requestId": 1, "reason": "so"},
    },
    {"jsonrpc": "2.0", "id": 1, "result": {}},
    {"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": "no"}},
    [{"jsonrpc": "2.0", "id": 1, "method": "ping"}, {"jsonrpc": "2.0", "id": 2, "method": "echo"}],
    {
        "jsonrpc": "2.0",
        "id": 0,
        "method": "server/discover",
        "params": {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}},
    },
]
_INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "fuzz", "version": "1"},
    },
}
_PATHS = ("/mcp", "/messages", "/sse", "/healthz", "/readyz", "/x", "/.well-known/y")
_HEADERS = {
    "HTTP_ACCEPT": "application/json, text/event-stream",
    "CONTENT_TYPE": "application/json",
    "HTTP_HOST": "127.0.0.1:8080",
    "HTTP_ORIGIN": "http://127.0.0.1:8080",
    "HTTP_MCP_PROTOCOL_VERSION": "2025-06-18",
    "HTTP_LAST_EVENT_ID": "1-1",
    "HTTP_X_FORWARDED_FOR": "10.0.0.1, 10.0.0.2",
    "HTTP_X_FORWARDED_HOST": "a.example",
    "HTTP_X_REQUEST_ID": "r-1",
    "HTTP_CONTENT_ENCODING": "identity",
    "HTTP_COOKIE": "a=b; c=d",
    "HTTP_FORWARDED": "for=10.0.0.1;proto=https",
    "HTTP_EXPECT": "100-continue",
    "HTTP_TRANSFER_ENCODING": "chunked",
    "HTTP_CONNECTION": "keep-alive, x-a",
}


def _edge(run: Run, app: Application, mounts: dict[str, str]) -> None:
    """Requests through the test client's way in; `mounts` have a session each."""
    with unchanged(run) as at:
        for number, chance in run.cases():
            at(number)
            environ = _environ(chance, mounts)
            run.judge(number, environ, partial(_served, app, environ))


def _environ(chance: random.Random, mounts: dict[str, str]) -> Environ:
    mount, session = chance.choice(list(mounts.items()))
    method = chance.choice(("POST",) * 12 + ("GET", "DELETE", "HEAD", "OPTIONS", "PUT", "Patch"))
    is_begin = chance.random() < 0.02
    message = _INITIALIZE if is_begin else chance.choice(_MESSAGES)
    body = changed_json(chance, message)
    path = mount + chance.choice(("/mcp",) * 24 + _PATHS)
    given = {"HTTP_ACCEPT": _HEADERS["HTTP_ACCEPT"], "CONTENT_TYPE": "application/json"}
    given |= {name: _HEADERS[name] for name in chance.sample(list(_HEADERS), chance.randrange(4))}
    if not is_begin and method != "DELETE":
        given["HTTP_MCP_SESSION_ID"] = session
    for name in list(given):
        if chance.random() < 0.12:
            changed = changed_bytes(chance, given[name].encode())
            given[name] = changed.replace(b"\r", b"").replace(b"\n", b"").decode("latin-1")
    if chance.random() < 0.1:
        shown = changed_bytes(chance, path.encode()).decode("latin-1")
        path = "/" + re.sub("[\x00-\x20\x7f]", "", shown)  # as gunicorn lets through
    if method in ("GET", "HEAD"):
        given["HTTP_ACCEPT"] = chance.choice(("application/json", "*/*", given["HTTP_ACCEPT"]))
    query = changed_bytes(chance, b"session_id=abc&x=%41") if chance.random() < 0.1 else b""
    length = str(len(body)) if chance.random() < 0.95 else str(chance.choice(VALUES))
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote(path, "latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "CONTENT_LENGTH": length,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8080",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "RAW_URI": path,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        "body": body,
        **given,
    }


def _served(app: Application, environ: Environ) -> str:
    """The status of the answer; of a stream the beginning is read, and a session is ended."""
    seen: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: object) -> Any:
        seen[:] = [status.split()[0], {name.lower(): value for name, value in headers}]
        return lambda data: None

    given = {**environ, "wsgi.input": io.BytesIO(environ["body"])}
    del given["body"]
    body = app(given, start_response)
    try:
        is_standing = environ["REQUEST_METHOD"] != "POST"
        for number, _ in enumerate(body):
            if is_standing or number > 50:
                break
    finally:
        if hasattr(body, "close"):
            body.close()
    status, headers = seen
    if "initialize" in environ["body"].decode("latin-1") and "mcp-session-id" in headers:
        ended = {**environ, "REQUEST_METHOD": "DELETE", "body": b"", "CONTENT_LENGTH": "0"}
        ended["HTTP_MCP_SESSION_ID"] = headers["mcp-session-id"]
        if environ.get("HTTP_MCP_SESSION_ID") != ended["HTTP_MCP_SESSION_ID"]:
            _served(app, ended)
    return str(status)


@contextmanager
def application(stack: ExitStack, **settings: Any) -> Iterator[Application]:
    """An application with these settings and short limits."""
    app = create_app(from_values({"request_timeout": _REQUEST_TIMEOUT, **settings}))
    stack.callback(app.close)
    yield app


def edge_before_stdio(run: Run) -> None:
    """In front of a stdio server."""
    with ExitStack() as stack, application(stack, command=SCRIPTED) as app:
        client = McpClient(WsgiFront(app)).open()
        _edge(run, app, {"": client.session or ""})


def edge_before_http(run: Run) -> None:
    """In front of an HTTP server."""
    with (
        _Tolerant() as backend,
        ExitStack() as stack,
        application(stack, target_url=[f"{backend.url}/mcp"]) as app,
    ):
        client = McpClient(WsgiFront(app)).open()
        _edge(run, app, {"": client.session or ""})


class _Tolerant(HttpBackend):
    """A server that refuses what it does not understand, and does not remember what it has seen."""

    def serve(self, sock: socket.socket, number: int) -> None:
        try:
            super().serve(sock, number)
        except (ValueError, RecursionError):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _answer(self, turn: Turn) -> None:
        self.seen.clear()
        message = turn.seen.json
        is_request = isinstance(message, dict) and isinstance(message.get("method"), str)
        params = message.get("params") if is_request else None
        names_version = isinstance(params, dict) and "protocolVersion" in params
        is_begin = is_request and message["method"] == "initialize"
        if turn.seen.method == "POST" and (not is_request or (is_begin and not names_version)):
            turn.reply(400)
        else:
            super()._answer(turn)


# --- real connections ----------------------------------------------------------------------------


def connections(run: Run) -> None:
    """Bytes to a real gunicorn; who sends half a request says that there is no more."""
    options = ["--client-timeout", "2", "--request-timeout", str(_REQUEST_TIMEOUT)]
    options += ["--keepalive-interval", "1"]  # a standing stream looks then whether all have left
    with ProxyProcess(SCRIPTED, options=[*options, "--log-level", "error"]) as process:
        client = McpClient(HttpFront(process.base)).open()
        (worker,) = process.worker_pids()
        with unchanged(run, worker) as at, ThreadPoolExecutor(8) as pool:

            def one(case: tuple[int, random.Random]) -> None:
                number, chance = case
                at(number)
                data = _request_bytes(chance, client.session or "")
                run.judge(number, data, lambda: _exchanged(process.port, data))

            list(pool.map(one, run.cases()))
        if any(word in process.log() for word in _BAD_WORDS):
            run.note(-1, process.log()[-3000:], "")
        if client.call("ping").status != 200:
            run.note(-1, "the session does not answer in the end", "")


def _request_bytes(chance: random.Random, session: str) -> bytes:
    body = json.dumps(chance.choice(_MESSAGES[:-1])).encode()
    path = chance.choice(("/mcp",) * 6 + _PATHS)
    method = chance.choice(("POST",) * 6 + ("GET", "HEAD", "OPTIONS"))
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Mcp-Session-Id: {session}"]
    lines += ["Accept: application/json, text/event-stream", "Content-Type: application/json"]
    framed = f"Content-Length: {len(body)}"
    if chance.random() < 0.3:
        framed = "Transfer-Encoding: chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    if method == "GET":
        lines[3], framed, body = "Accept: application/json", "X-None: 1", b""
    whole = "\r\n".join([*lines, framed]).encode() + b"\r\n\r\n" + body
    return changed_bytes(chance, whole * chance.choice((1, 1, 2)))


def _exchanged(port: int, data: bytes) -> str:
    got = b""
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=HANG) as sock,
    ):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(65536):
            got = (got + piece)[-65536:]
    found = [part[:3].decode("latin-1") for part in got.split(b"HTTP/1.1 ")[1:]]
    return "500" if "500" in found else found[-1] if found else "closed"


# --- the reader of a stdio server's output -------------------------------------------------------

_SAID: list[Any] = [
    *_MESSAGES,
    {"jsonrpc": "2.0", "id": 900001, "result": {"content": []}},
    {"jsonrpc": "2.0", "id": 900001, "error": {"code": -1, "message": "x", "data": {}}},
    {
        "jsonrpc": "2.0",
        "method": "notifications/progress",
        "params": {"progressToken": 5, "progress": 1},
    },
    {"jsonrpc": "2.0", "id": "q", "method": "sampling/createMessage", "params": {}},
    {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info"}},
]


def stdio_reader(run: Run) -> None:
    """What a server says; each request has it say several lines before its answer."""
    with ExitStack() as stack, application(stack, command=SCRIPTED) as app:
        front = WsgiFront(app)
        client = McpClient(front).open()
        whole, run.count = run.count, max(10, run.count // _LINES)
        with unchanged(run) as at:
            for number, chance in run.cases():
                at(number)
                lines = [changed_json(chance, chance.choice(_SAID)) for _ in range(_LINES)]
                data = b"\n".join(lines) + b"\n"
                params = {"bytes": base64.b64encode(data).decode()}
                run.judge(number, data, partial(_said, client, params))
        run.count = whole
        if client.result("echo", {"a": 1}) != {"a": 1}:
            run.note(-1, "the session does not answer in the end", "")


def _said(client: McpClient, params: dict[str, str]) -> str:
    answer = client.call("raw", params)
    messages = answer.messages()
    if answer.status != 200 or not messages:
        return str(answer.status)
    return "answered" if "result" in messages[-1] else "failed in words"


# --- records in Redis ----------------------------------------------------------------------------


def records(run: Run) -> None:
    """Records that somebody else has written, for sessions in front of an HTTP server."""
    with (
        RedisServer() as redis,
        redis.client() as store,
        _Tolerant() as backend,
        ExitStack() as stack,
    ):
        settings = {"target_url": [f"{backend.url}/mcp"], "redis_url": redis.url}
        with application(stack, connect_timeout=1, **settings) as app:
            client = McpClient(WsgiFront(app)).open()
            key = f"mcp-proxy:default:session:{client.session}"
            right = json.loads(store.get(key) or b"{}")
            right["metadata"] |= {"resume": "{}", "backend_sid": client.session}
            with unchanged(run) as at:
                for number, chance in run.cases():
                    at(number)
                    record = changed_json(chance, right)
                    store.set(key, record, ex=60)
                    method = chance.choice(("POST", "POST", "POST", "GET", "DELETE"))
                    act = _routed(client, method)
                    run.judge(number, (method, record), act)
                    backend.sessions.add(client.session or "")


def _routed(client: McpClient, method: str) -> Callable[[], str]:
    def act() -> str:
        answer = client.call("echo", {"a": 1}) if method == "POST" else None
        if answer is None:
            answer = client.listen() if method == "GET" else client.delete()
        if answer.is_stream:
            answer.close()
        else:
            answer.body()
        return f"{answer.status} {answer.failure or ''}".strip()

    return act


# --- the relay's frames --------------------------------------------------------------------------


def frames(run: Run) -> None:
    """Envelopes for a replica, from a neighbour that is there and from nobody."""
    mailboxes = LocalMailboxes()
    line = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
    inside: list[Any] = [
        protocol.SendRequests("child", [line], True, 0.2),
        protocol.SendOneWay("child", line, 0.1),
        protocol.Listen("child", None),
        protocol.Close("no child"),
        protocol.StartStream(),
        protocol.Detach(),
        protocol.Message(line, True, "1-1", None),
        protocol.Message(line, True, None, ("BackendLost", "gone")),
        protocol.Ended(False),
        protocol.Refused(("BackendLost", "gone")),
        protocol.Done(),
    ]
    with Scene(mailboxes, mailboxes) as scene:
        owner, other = scene.nodes
        ping = Request(1, "ping")
        with unchanged(run) as at:
            for number, chance in run.cases():
                at(number)
                data = _envelope(chance, chance.choice(inside), other.replica.id)
                envelope = Envelope(owner.replica.id, data)
                run.judge(number, data, partial(_posted, mailboxes, envelope))
                if number % 500 == 499:
                    run.judge(number, "a call", lambda: _asked(other, owner, ping))
        run.judge(-1, "a call in the end", lambda: _asked(other, owner, ping))


def _envelope(chance: random.Random, inside: Any, sender: str) -> bytes:
    data = msgspec.msgpack.encode(inside)
    if chance.random() < 0.5:
        data = changed_bytes(chance, data)
    elif chance.random() < 0.6:
        data = msgspec.msgpack.encode(_shaken(chance, msgspec.msgpack.decode(data)))
    sender = chance.choice((sender, sender, "nobody", ""))
    kind = chance.choice((0, 0, 0, 0, 1, 2, 3, 4, 9, -1))
    number = chance.choice((1, 1, 1, 1, 2, 0, -1, 2**62))
    frame = [f"c{chance.randrange(10**6)}", sender, kind, number, chance.random() < 0.1, data]
    whole = msgspec.msgpack.encode(frame)
    return changed_bytes(chance, whole) if chance.random() < 0.2 else whole


def _shaken(chance: random.Random, value: Any) -> Any:
    """A value as msgpack can have it: no numbers beyond 64 bits, no lone surrogates."""
    changed = changed_value(chance, value)
    try:
        msgspec.msgpack.encode(changed)
    except (OverflowError, UnicodeEncodeError, TypeError):
        return value
    return changed


def _posted(mailboxes: LocalMailboxes, envelope: Envelope) -> str:
    return "posted" if mailboxes.post([envelope]) == [True] else "refused"


def _asked(node: Any, owner: Any, request: Request) -> str:
    node.ask(owner, request)
    return "called"


PARTS: dict[str, tuple[float, Callable[[Run], None]]] = {
    "edge": (0.3, edge_before_stdio),
    "edge of HTTP": (0.2, edge_before_http),
    "gunicorn": (0.05, connections),
    "reader": (0.2, stdio_reader),
    "records": (0.1, records),
    "frames": (0.15, frames),
}
