"""What an operator sees of this worker, and of the others of its gunicorn: metrics and health.

A WSGI application for the admin socket; `/metrics` may be served at the main one, too. A thread
writes once a second what others are to see of this worker: its gauges, and while somebody asks for
it, whether it is ready.
"""

from __future__ import annotations

import hmac
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs

import msgspec

from mcp_proxy import metrics
from mcp_proxy.background import Periodic, Workers
from mcp_proxy.edge.edge import Edge, Handler
from mcp_proxy.edge.guard import is_local
from mcp_proxy.edge.readiness import Part, Readiness, State, Weight, state_of
from mcp_proxy.edge.reply import Reply, json_reply
from mcp_proxy.edge.request import ClientRequest
from mcp_proxy.errors import InvalidRequest, MethodNotAllowed, NotFound
from mcp_proxy.metrics import Counters, Health, Metric
from mcp_proxy.monitoring import status
from mcp_proxy.monitoring.hosts import Hosts
from mcp_proxy.monitoring.key_uses import KeyUses
from mcp_proxy.monitoring.orders import Orders, Task
from mcp_proxy.recent import shortened
from mcp_proxy.storage.records import Storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_INTERVAL = 1.0  # seconds between two writes
_ASKED = 60.0  # seconds after a question for which workers say how they are
_LONGEST_ABOUT = 512  # characters of what an operator names: a session, a server
#: Seconds at most, at the end, for what is still to be written.
WRITTEN = 1.0

_HEALTH = {
    "ready": Health.READY,
    "degraded": Health.DEGRADED,
    "not ready": Health.NOT_READY,
    "draining": Health.DRAINING,
}

_REASONS = {
    Health.DEGRADED: "degraded",
    Health.NOT_READY: "not ready",
    Health.DRAINING: "shutting down",
}

Gauges = Callable[[], Mapping[Metric, float]]


class About(NamedTuple):
    """What an operator is told of the configuration: the servers, each with what it is, and the
    names of those that are disabled.
    """

    threads: int
    servers: Mapping[str, str]
    disabled: frozenset[str]


class Monitoring:
    """The operator's endpoints of one worker. Thread-safe.

    `gauges` tells the numbers of this worker and waits for nothing, `about` what there is.
    Nothing starts before `keep`.
    """

    def __init__(
        self,
        edge: Edge,
        readiness: Readiness,
        gauges: Gauges,
        about: Callable[[], About],
        orders: Orders,
        storage: Storage,
        workers: Workers | None = None,
    ) -> None:
        #: The version of the package, for the page.
        self.version = ""
        #: Who knows this sees the page at the main address; empty: nobody.
        self.token = ""
        self._edge = edge
        self._readiness = readiness
        self._gauges = gauges
        self._about = about
        self._orders = orders
        self._began = time.time()
        self._thread = Periodic("mcp-monitoring", _INTERVAL, self._look, workers)
        self._thread.is_essential = False
        self._hosts = Hosts(storage, self._shown_to_others, workers) if storage.is_shared else None
        self._shared_uses: KeyUses | None = None
        if storage.is_shared and edge.authenticator is not None:
            self._shared_uses = KeyUses(storage, edge.authenticator.key_digests, workers)
        self._writing = threading.Lock()  # held while the text of this worker is written
        self._endpoints: dict[str, Handler] = {
            "/metrics": self.metrics,
            "/healthz": alive,
            "/readyz": self.ready,
            "/health": self.ready,
            "/status.json": self.status,
            "/status": self.page,
            "/": self.page,
        }
        self._ctl: dict[tuple[str, str], Handler] = {
            ("GET", "/status"): self.status,
            ("POST", "/orders"): self._order,
            ("GET", "/orders"): self._outcome,
            ("GET", "/keys"): self._key_uses,
        }

    def __repr__(self) -> str:
        return f"<Monitoring {metrics.current()!r}>"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self._endpoints.get(environ.get("PATH_INFO", ""), _nothing)
        return self.serve(environ, start_response, answer)

    def serve(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        answer: Handler,
    ) -> Iterable[bytes]:
        """Answers a GET or HEAD of one of our own endpoints."""

        def handle(request: ClientRequest) -> Reply:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET, HEAD")
            return answer(request)

        return self._edge.serve(environ, start_response, handle, is_own=True)

    def serve_ctl(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answers what an operator says over `ctl_socket`."""
        answer = self._ctl.get((environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")), _nothing)
        return self._edge.serve(environ, start_response, answer, is_own=True)

    def keep(self) -> None:
        """Has other workers see how this one is, from now on."""
        self._thread.start()
        for shared in (self._hosts, self._shared_uses):
            if shared is not None:
                shared.start()

    def close(self) -> None:
        """Ends the threads; harmless when repeated. Waits a second at most for what one writes."""
        self._thread.stop()
        if self._hosts is not None:
            self._hosts.stop()
        if self._shared_uses is not None:
            self._shared_uses.stop(WRITTEN)

    def may_leave(self) -> bool:
        """Whether this worker is ending, and another one can answer in its place."""
        counters = metrics.current()
        if counters is None or not self._edge.is_draining:
            return False
        others = counters.page.health()
        others.pop(counters.number, None)
        return any(health is not Health.DRAINING for health in others.values())

    def _look(self) -> None:
        self.write()
        counters = metrics.current()
        if counters is not None:
            self._orders.look(counters.page, counters.number)

    def write(self) -> None:
        """Writes what others are to see of this worker. Waits for nothing."""
        counters = metrics.current()
        if counters is None:
            return
        gauges = self._gauges()
        for metric, value in gauges.items():
            counters.set(metric, value)
        now = time.monotonic()
        looked_at = max(counters.page.looked_at(), counters.page.looked_from_afar_at())
        is_looked_at = now - looked_at < status.LOOKED
        is_asked = is_looked_at or now - counters.page.asked_at() < _ASKED
        state = self._readiness.current() if is_asked or self._edge.is_draining else None
        counters.say(Health.UNKNOWN if state is None else _HEALTH[state.summary])
        if is_looked_at:
            self._write_status(counters, gauges, state)

    def _write_status(
        self, counters: Counters, gauges: Mapping[Metric, float], state: State | None
    ) -> None:
        checks = {} if state is None else msgspec.json.decode(state.document)["checks"]
        servers = []
        about = self._about()
        for name, what in about.servers.items():
            check = checks.get(f"server {name}", {})
            unknown = "disabled" if name in about.disabled else "unknown"
            known, reason = check.get("state", unknown), check.get("reason", "")
            servers.append(status.ServerPart(name, what, known, shortened(reason)))
        part = status.WorkerPart(
            os.getpid(),
            self._began,
            about.threads,
            status.numbers_of(gauges),
            servers,
            [],
            counters.recent.failures(),
        )
        with self._writing:
            status.write(counters, part)

    def _shown_to_others(self) -> bytes:
        return status.for_others(_counters().page, self.version)

    # --- the endpoints ---------------------------------------------------------------------------

    def metrics(self, request: ClientRequest) -> Reply:
        """/metrics: what all workers have counted, and the gauges of each."""
        from mcp_proxy.edge.exposition import expose

        self._edge.require_allowed(request.environ)
        counters = metrics.current()
        if counters is None:
            raise NotFound
        self.write()
        document, media_type = expose(counters.page, request.header("Accept") or "")
        length = ("Content-Length", str(len(document)))
        return Reply(200, [("Content-Type", media_type), length], document)

    def ready(self, request: ClientRequest) -> Reply:
        """/readyz of the instance: 200 while one of its workers can serve something, else 503."""
        own = self._readiness.wait_for_current()
        counters = metrics.current()
        state = own if counters is None else self._state_of_all(counters, own)
        if state.status >= 400:
            request.reason = state.summary
        return json_reply(state.body(self._edge.allows_host(request.environ)), state.status)

    def status(self, request: ClientRequest) -> Reply:
        """/status.json: what all workers are doing, which they write from now on for a while.

        Of a session whose id is in the header it says what they know, too, once all have looked.
        """
        self._edge.require_allowed(request.environ)
        counters = metrics.current()
        if counters is None:
            raise NotFound
        counters.page.look(time.monotonic())
        self.write()
        never_kept = [("Cache-Control", "no-store")]
        asked = None
        if request.session_id and len(request.session_id) <= _LONGEST_ABOUT:
            order = self._orders.show(counters.page, counters.number, request.session_id)
            asked = Orders.shown(counters.page, order)
        return json_reply(status.document(counters.page, self.version, asked), 200, never_kept)

    def page(self, request: ClientRequest) -> Reply:
        """/status: a page that shows the same."""
        self._edge.require_allowed(request.environ)
        text = status.html()
        length = ("Content-Length", str(len(text)))
        return Reply(200, [*status.html_headers(), length], text)

    def with_token(self, answer: Handler) -> Handler:
        """`answer`, at the main address: for who is on this machine and knows the token."""

        def require(request: ClientRequest) -> Reply:
            given = parse_qs(request.environ.get("QUERY_STRING", "")).get("token", [""])[0]
            is_known = self.token and hmac.compare_digest(given.encode(), self.token.encode())
            if not is_known or not is_local(request.environ):
                raise NotFound
            return answer(request)

        return require

    def _order(self, request: ClientRequest) -> Reply:
        """Tells all workers to do the task that the query names."""
        counters = _counters()
        task = _named(request, "task")
        if task not in list(Task):
            raise InvalidRequest("no such task")
        about = "" if task == Task.RELOAD else _named(request, "about")
        if len(about) > _LONGEST_ABOUT:
            raise InvalidRequest("about is too long")
        order_id = self._orders.give(counters.page, counters.number, Task(task), about)
        return json_reply(msgspec.json.encode({"order": order_id}), 202)

    def _outcome(self, request: ClientRequest) -> Reply:
        """What became of the order that the query names."""
        result = Orders.result(_counters().page, _named(request, "order"))
        return json_reply(msgspec.json.encode(result))

    def _key_uses(self, request: ClientRequest) -> Reply:
        """When the API keys were last used, here and on the hosts that share the store."""
        here = _counters().page.key_uses
        uses = here.read() if self._shared_uses is None else self._shared_uses.read(here)
        return json_reply(msgspec.json.encode(uses))

    def _state_of_all(self, counters: Counters, own: State) -> State:
        """The workers are parts, those left out that have not looked at themselves yet."""
        counters.page.ask(time.monotonic())
        counters.say(_HEALTH[own.summary])
        parts = []
        for number, health in counters.page.health().items():
            if health is Health.UNKNOWN:
                continue
            reason = _REASONS.get(health)
            if number == counters.number and reason is not None:
                reason = _reasons_of(own) or reason
            weight = Weight.USABLE if health is Health.DEGRADED else Weight.ONE_OF_MANY
            parts.append(Part(f"worker {number}", reason, weight))
        return state_of(parts)


def _reasons_of(state: State) -> str:
    """Why the parts of a worker fail, in one line."""
    checks = msgspec.json.decode(state.document)["checks"]
    return "; ".join(
        f"{name}: {check['reason']}" for name, check in checks.items() if "reason" in check
    )


def _counters() -> Counters:
    """Where this process counts; raises NotFound where it does not."""
    counters = metrics.current()
    if counters is None:
        raise NotFound
    return counters


def _named(request: ClientRequest, name: str) -> str:
    """What a query names; raises InvalidRequest where it names nothing."""
    query: str = request.environ.get("QUERY_STRING", "")
    given = parse_qs(query).get(name, [""])[0]
    if not given:
        raise InvalidRequest(f"{name} is missing")
    return given


def alive(request: ClientRequest) -> Reply:
    """/healthz: the process serves requests. Touches nothing, so nothing else can fail it."""
    return json_reply(b'{"status":"ok"}')


def _nothing(request: ClientRequest) -> Reply:
    raise NotFound
