"""Many replicas in one process: each with its lease, its mailbox, its sessions and its look-ups.

    python replicas.py JOB        (JOB is the JSON of a `Job`)

What runs is the relay's own: the listener, the sender and the lease of every replica, its
connections to Redis, and the records of its sessions. Only the stdio servers are missing: each
session is answered at once, where a server would. Prints a line when all mailboxes are open; then
does what each line of its input says (the JSON of a `Task`), and prints how that went (the JSON of
an `Outcome`). Ends with its input.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from mcp_proxy.backends.exchange import Backend, Exchange, ServerMessage
from mcp_proxy.errors import BackendUnreached, ProxyError
from mcp_proxy.redis.storage import RedisStorage
from mcp_proxy.relay.relay import Relay
from mcp_proxy.replica import Replica, has_ended
from mcp_proxy.sessions import claims
from mcp_proxy.sessions.manager import SessionManager
from mcp_proxy.storage.session import BACKEND_URL, Session, new_session
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.jsonrpc import Notification, Request, Response
from mcp_proxy.wire.urls import WorkerUrl, parse_worker_url

# Callers of a process, at least: those that call as fast as it goes.
_CALLERS = 8

# Seconds that a call may take; it ends earlier where its replica is lost.
_TIMEOUT = 60.0

_INITIALIZE = (
    '{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18",'
    '"capabilities":{"sampling":{},"elicitation":{}},"clientInfo":{"name":"bench","version":"1"}}}'
)
_PARAMS = jsonrpc.as_payload({"name": "echo", "arguments": {"text": "x" * 100}})
_RESULT = jsonrpc.as_payload({"content": [{"type": "text", "text": "x" * 100}]})


class Job(msgspec.Struct):
    """The replicas from `first` on, of `all` that there are; each has as many `sessions`."""

    redis_url: str
    first: int
    replicas: int
    all: int
    sessions: int


class Task(msgspec.Struct):
    """Calls for some seconds, so many a second (0: as fast as it goes).

    Without `relays` their records are loaded only. With `listens` nothing but this: each replica
    opens as many standing streams as it has sessions.
    """

    seconds: float = 0.0
    rate: float = 0.0
    relays: bool = False
    listens: bool = False


class Outcome(msgspec.Struct):
    """What became of the calls. Times are in seconds.

    `latencies` are those of relayed calls that were answered, with when each began; `lost` those of
    calls that failed since the replica was lost; `taken_over` those of calls that found it gone,
    with the take-over.
    """

    looked_up: int = 0
    latencies: list[tuple[float, float]] = []
    lost: list[tuple[float, float]] = []
    taken_over: list[tuple[float, float]] = []
    failed: list[str] = []

    def add(self, other: Outcome) -> None:
        """What became of other calls at the same time."""
        self.looked_up += other.looked_up
        self.latencies += other.latencies
        self.lost += other.lost
        self.taken_over += other.taken_over
        self.failed += other.failed


def replica_id(number: int) -> str:
    """A replica as from another host: whether it is gone its lease alone tells."""
    return f"replica-{number}"


def session_id(replica: int, number: int) -> str:
    """A session that a replica has in the beginning."""
    return f"mcp-{replica:08x}-{number:032x}"


class _Named(Replica):
    """A replica with an id of our choice."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._name = replica_id(number)

    @property
    def id(self) -> str:
        return self._name


class _Answering(Backend):
    """Answers each request at once, in the place of a server."""

    def send(self, exchange: Exchange) -> None:
        exchange.attach(self)
        for request in exchange.requests:
            data = jsonrpc.encode(Response(request.id, _RESULT))
            exchange.offer(ServerMessage(data, is_response=True))

    def submit(
        self, request: Request, timeout: float, has_left: Callable[[], bool] | None = None
    ) -> None:
        raise NotImplementedError

    def notify(
        self, notification: Notification, has_left: Callable[[], bool] | None = None
    ) -> None:
        raise NotImplementedError

    def respond(self, response: Response, has_left: Callable[[], bool] | None = None) -> None:
        raise NotImplementedError

    def listen(self, exchange: Exchange, after: str | None = None) -> None:
        exchange.attach(self)

    def close(self) -> None:
        pass

    def stream_begun(self, exchange: Exchange) -> None:
        pass

    def expire(self, exchange: Exchange, failure: ProxyError) -> None:
        pass

    def leave(self, exchange: Exchange) -> None:
        pass


class _Simulated:
    """One replica, with the store that only it uses."""

    def __init__(self, number: int, redis_url: str) -> None:
        self.number = number
        self.id = replica_id(number)
        self._storage = RedisStorage(redis_url)
        self.manager = SessionManager(self._storage.scoped("bench"))
        answering = _Answering()
        self.relay = Relay(self._storage.mailboxes(), _Named(number))
        self.relay.serve(lambda child, begins: answering, on_lapse=lambda: None)
        self._streams: list[Exchange] = []

    def begin(self, sessions: int) -> None:
        self.relay.start()
        for number in range(sessions):
            self.manager.create(record(session_id(self.number, number), self.number))

    def close(self) -> None:
        self.relay.close()
        self._storage.close()

    def listen(self, all_replicas: int, count: int) -> None:
        """Opens standing streams of others' sessions, as for clients that reach any worker."""
        for _ in range(count if all_replicas > 1 else 0):
            far = random.randrange(all_replicas - 1)
            exchange = Exchange()
            backend = self.relay.backend(replica_id(far + (far >= self.number)), "1")
            backend.listen(exchange)
            self._streams.append(exchange)

    def call(self, session_id: str, outcome: Outcome) -> None:
        """One call on a session, wherever that is."""
        began = time.monotonic()
        session = self.manager.load(session_id)
        url = parse_worker_url(session.backend_url)
        assert url is not None
        if url.replica == self.id:
            outcome.looked_up += 1
            return
        exchange = Exchange([Request(1, "tools/call", _PARAMS)], False, _TIMEOUT)
        try:
            self.relay.backend(*url).send(exchange)
            message = exchange.receive(_TIMEOUT)
        except BackendUnreached:
            if self._takes_over(session):
                outcome.taken_over.append((began, time.monotonic() - began))
            return
        finally:
            exchange.close()
        found = outcome.latencies
        if message is None or message.failure is not None:
            found = outcome.lost
        found.append((began, time.monotonic() - began))

    def _takes_over(self, session: Session) -> bool:
        claimed = claims.claim(self.manager, session, self.id, has_ended)
        if claimed is None:
            return False
        return claims.settle(self.manager, claimed, **{BACKEND_URL: str(WorkerUrl(self.id, "1"))})


def record(session: str, replica: int) -> Session:
    """The record of a stdio session, as large as they are."""
    url = str(WorkerUrl(replica_id(replica), "1"))
    return new_session(
        session,
        "streamable",
        **{BACKEND_URL: url, "init_body": _INITIALIZE, "protocol_version": "2025-06-18"},
    )


class _Caller(threading.Thread):
    """Makes calls at replicas of this process, on sessions of all, in an even rhythm."""

    def __init__(self, job: Job, here: list[_Simulated], task: Task, interval: float) -> None:
        super().__init__(daemon=True)
        self.outcome = Outcome()
        self._job = job
        self._here = here
        self._task = task
        self._interval = interval

    def run(self) -> None:
        due = time.monotonic() + random.random() * self._interval
        until = due + self._task.seconds
        while max(due, time.monotonic()) < until:
            if self._interval:
                time.sleep(max(0.0, due - time.monotonic()))
            due += self._interval
            self._call_once()

    def _call_once(self) -> None:
        near = random.choice(self._here)
        far = random.randrange(self._job.all)
        session = session_id(far, random.randrange(self._job.sessions))
        try:
            if self._task.relays:
                near.call(session, self.outcome)
            else:
                near.manager.load(session)
                self.outcome.looked_up += 1
        except ProxyError as error:
            self.outcome.failed.append(f"{type(error).__name__}: {error}")


def done(job: Job, here: list[_Simulated], task: Task) -> Outcome:
    """Does a task with as many callers as keep its rhythm where some calls have to wait."""
    if task.listens:
        for replica in here:
            replica.listen(job.all, job.sessions)
        return Outcome()
    callers = max(_CALLERS, round(task.rate / 10))
    interval = callers / task.rate if task.rate else 0.0
    threads = [_Caller(job, here, task, interval) for _ in range(callers)]
    for thread in threads:
        thread.start()
    whole = Outcome()
    for thread in threads:
        thread.join()
        whole.add(thread.outcome)
    return whole


def main() -> int:
    """Begins the replicas, and does what the input says."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    here = [
        _Simulated(number, job.redis_url) for number in range(job.first, job.first + job.replicas)
    ]
    for one in here:
        one.begin(job.sessions)
    print("ready", flush=True)
    for line in sys.stdin:
        outcome = done(job, here, msgspec.json.decode(line, type=Task))
        print(msgspec.json.encode(outcome).decode(), flush=True)
    for one in here:
        one.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
