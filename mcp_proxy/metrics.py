"""Counters, histograms and gauges: cells of memory that gunicorn's master shares with its workers.

Each worker counts in the part that belongs to its slot: no lock and no system call is shared
between processes. A worker that is started in a slot goes on in the cells of the one before it, so
nothing that was counted is lost; gauges alone begin anew. A series is a row: the text of its name
and labels, then its cells. Who reads adds up the rows of all slots that have the same text.

Without our gunicorn hooks the memory is this process's own. Nothing is counted until somebody asks
for metrics: then `current` is None.
"""

from __future__ import annotations

import enum
import importlib.util
import mmap
import os
import secrets
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mcp_proxy.errors import ConfigError
from mcp_proxy.last_uses import LastUses
from mcp_proxy.recent import Recent
from mcp_proxy.shared_texts import SharedTexts

#: The upper bounds of the buckets (seconds), as the OpenTelemetry conventions for MCP name them;
#: one more bucket has what took longer.
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

#: What a label says for which there is no room.
OTHER = "other"

#: Tools of one server, and names of clients, that get series of their own in a worker.
MAX_TOOLS = 100
MAX_CLIENTS = 50

# The bytes of a cell, and the cells of a row: the text, the buckets, and a sum. A counter uses the
# first bucket, a gauge the sum.
_CELL = 8
_TEXT = 256
_TEXT_CELLS = _TEXT // _CELL
_BUCKETS = len(BOUNDS) + 1
_ROW = _TEXT_CELLS + _BUCKETS + 1
_ROWS = 1024

# The cells before the rows of a slot: how many rows there are, how its worker is, and room.
_HEAD = 16
_COUNT, _STATE = 0, 1
_SLOT = _HEAD + _ROWS * _ROW

# Before the slots: when somebody last asked for what workers write for that alone: whether they are
# ready, and what they are doing.
_PAGE_HEAD = 16

# The bytes of what other hosts say of themselves: sixteen texts.
_HOSTS = 512 * 1024

_BETWEEN = "\x1f"


class Kind(enum.Enum):
    """What a metric counts."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


class Metric(NamedTuple):
    """The definition of a metric. A gauge has one series in each worker, told by its slot."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()


OPERATIONS = Metric(
    "mcp_server_operation_duration_seconds",
    Kind.HISTOGRAM,
    "Requests and notifications of clients, from their arrival to their answer",
    ("mcp_server", "mcp_method_name", "gen_ai_tool_name", "error_type"),
)
SESSIONS_ENDED = Metric(
    "mcp_server_session_duration_seconds",
    Kind.HISTOGRAM,
    "Sessions that their clients have ended, from their beginning",
    ("mcp_server",),
)
CALLS = Metric(
    "mcp_proxy_calls_total",
    Kind.COUNTER,
    "Requests by their way to the server: local, passed or relayed",
    ("mcp_server", "way"),
)
SESSIONS_STARTED = Metric(
    "mcp_proxy_sessions_started_total",
    Kind.COUNTER,
    "Sessions that were begun by initialize, by the name of the client",
    ("mcp_server", "client_name"),
)
REFUSED = Metric(
    "mcp_proxy_refused_total",
    Kind.COUNTER,
    "Requests that the proxy has refused, by the reason",
    ("mcp_server", "reason"),
)
BACKEND_ERRORS = Metric(
    "mcp_proxy_backend_errors_total",
    Kind.COUNTER,
    "Requests that have failed at the server, by the kind of the failure",
    ("mcp_server", "kind"),
)
CHILDREN_STARTED = Metric(
    "mcp_proxy_children_started_total",
    Kind.COUNTER,
    "Processes of stdio servers that were started",
    ("mcp_server",),
)
RESTARTED = Metric(
    "mcp_proxy_restarts_total",
    Kind.COUNTER,
    "Sessions whose server was started again after it was lost",
    ("mcp_server",),
)
STORE_COMMANDS = Metric(
    "mcp_proxy_store_commands_total", Kind.COUNTER, "Commands to Redis, those that failed included"
)
STORE_ERRORS = Metric("mcp_proxy_store_errors_total", Kind.COUNTER, "Commands to Redis that failed")
SESSIONS = Metric("mcp_proxy_sessions", Kind.GAUGE, "Sessions that are at the worker")
STREAMS = Metric("mcp_proxy_streams", Kind.GAUGE, "Standing streams that are open")
STREAMS_LEFT = Metric(
    "mcp_proxy_streams_left", Kind.GAUGE, "Standing streams that the worker can still have"
)
CHILDREN = Metric("mcp_proxy_children", Kind.GAUGE, "Processes of stdio servers that run")
TARGETS_LEFT_OUT = Metric(
    "mcp_proxy_targets_left_out", Kind.GAUGE, "Addresses of HTTP servers that are left out for now"
)
RELOADED = Metric(
    "mcp_config_last_reload_successful",
    Kind.GAUGE,
    "Whether the file of servers is served as it is",
)
RESIDENT = Metric("mcp_proxy_worker_resident_bytes", Kind.GAUGE, "Memory of the worker")
THREADS = Metric("mcp_proxy_worker_threads", Kind.GAUGE, "Threads of the worker, of every purpose")
FILES = Metric("mcp_proxy_worker_open_files", Kind.GAUGE, "Files that the worker has open")

#: Every metric, in the order in which they are shown.
METRICS = (
    *(OPERATIONS, SESSIONS_ENDED, CALLS, SESSIONS_STARTED, REFUSED, BACKEND_ERRORS),
    *(CHILDREN_STARTED, RESTARTED, STORE_COMMANDS, STORE_ERRORS),
    *(
        SESSIONS,
        STREAMS,
        STREAMS_LEFT,
        CHILDREN,
        TARGETS_LEFT_OUT,
        RELOADED,
        RESIDENT,
        THREADS,
        FILES,
    ),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


class Health(enum.IntEnum):
    """What the worker of a slot says of itself for /readyz."""

    #: Nobody has the slot.
    FREE = 0
    #: It has not looked yet, as nobody has asked.
    UNKNOWN = 1
    READY = 2
    DEGRADED = 3
    NOT_READY = 4
    DRAINING = 5


class Key(NamedTuple):
    """What tells a series from others: its metric, its labels, and for a gauge its slot."""

    metric: Metric
    labels: tuple[str, ...]
    slot: int | None = None


class MetricsPage:
    """The memory of so many slots; several processes share it if it is made before their fork.

    What is never written costs nothing but addresses: 580 KiB for each slot.
    """

    def __init__(self, slot_count: int) -> None:
        size = (_PAGE_HEAD + slot_count * _SLOT) * _CELL
        self._memory = mmap.mmap(-1, size)
        self.bytes = memoryview(self._memory)
        self.cells = self.bytes.cast("Q")
        self.numbers = self.bytes.cast("d")
        self.slot_count = slot_count
        #: What each worker says of itself while somebody looks.
        self.texts = SharedTexts(slot_count)
        #: What workers are told to do, and what came of it.
        self.orders = SharedTexts(slot_count)
        self.outcomes = SharedTexts(slot_count)
        #: What others know this gunicorn by, and what they say of themselves.
        self.id = secrets.token_hex(8)
        self.hosts = SharedTexts(slot_count, _HOSTS)
        #: When the API keys were last used.
        self.key_uses = LastUses()

    def __repr__(self) -> str:
        taken = sum(health is not Health.FREE for health in self.health().values())
        return f"<MetricsPage {taken}/{self.slot_count}>"

    def lowest_free(self, taken: Iterator[int | None]) -> int | None:
        """The number of the slot for the next worker; None where others have them all."""
        return min(set(range(self.slot_count)).difference(taken), default=None)

    def take(self, number: int) -> Counters:
        """In the process that counts: the series of a slot. No other process may have taken it."""
        return Counters(self, number)

    def free(self, number: int) -> None:
        """In the master: the slot's worker has ended. What it has counted stays."""
        self.cells[self.start_of(number) + _STATE] = Health.FREE

    @staticmethod
    def start_of(number: int) -> int:
        """The first cell of a slot."""
        return _PAGE_HEAD + number * _SLOT

    def read(self) -> Mapping[Key, list[float]]:
        """The series of all slots, those with the same labels added up.

        A counter and a gauge have one number, a histogram those of its buckets and then its sum.
        Nothing waits for the workers, which go on counting.
        """
        found: dict[Key, list[float]] = {}
        for number in range(self.slot_count):
            for key, numbers in self._rows_of(number):
                known = found.setdefault(key, [0.0] * len(numbers))
                for at, value in enumerate(numbers):
                    known[at] += value
        return found

    def _rows_of(self, number: int) -> Iterator[tuple[Key, list[float]]]:
        start = self.start_of(number)
        is_free = self.cells[start + _STATE] == Health.FREE
        for metric, labels, at in rows(self, number):
            if metric.kind is Kind.GAUGE:
                if not is_free:
                    yield Key(metric, labels, number), [self.numbers[at + _BUCKETS]]
            elif metric.kind is Kind.COUNTER:
                if self.cells[at] or OTHER not in labels:
                    yield Key(metric, labels), [float(self.cells[at])]
            else:
                buckets = [float(self.cells[at + bucket]) for bucket in range(_BUCKETS)]
                if any(buckets) or OTHER not in labels:
                    yield Key(metric, labels), [*buckets, self.numbers[at + _BUCKETS]]

    # --- health ----------------------------------------------------------------------------------

    def health(self) -> dict[int, Health]:
        """What the workers say of themselves, by the numbers of their slots."""
        found = {
            number: Health(self.cells[self.start_of(number) + _STATE])
            for number in range(self.slot_count)
        }
        return {number: health for number, health in found.items() if health is not Health.FREE}

    def asked_at(self) -> float:
        """When somebody last asked how the workers are, by the machine's monotonic clock."""
        return float(self.numbers[0])

    def ask(self, now: float) -> None:
        """Has workers look at themselves for a while from now on."""
        self.numbers[0] = now

    def looked_at(self) -> float:
        """When somebody last looked at what the workers do, by the machine's monotonic clock."""
        return float(self.numbers[1])

    def look(self, now: float) -> None:
        """Has workers say what they do for a while from now on."""
        self.numbers[1] = now

    def looked_from_afar_at(self) -> float:
        """As `looked_at`, of somebody who looks at another gunicorn that shares the store."""
        return float(self.numbers[3])

    def look_from_afar(self, now: float) -> None:
        """As `look`, for somebody who looks at another gunicorn."""
        self.numbers[3] = now

    def ordered_at(self) -> float:
        """When the workers were last told to do something, by the machine's monotonic clock."""
        return float(self.numbers[2])

    def note_order(self, now: float) -> None:
        """Has workers look for what they are told to do."""
        self.numbers[2] = now


def rows(page: MetricsPage, number: int) -> Iterator[tuple[Metric, tuple[str, ...], int]]:
    """The rows of a slot: metric, labels, and the first cell of the row's buckets."""
    start = page.start_of(number)
    for row in range(min(_ROWS, page.cells[start + _COUNT])):
        at = start + _HEAD + row * _ROW
        text = bytes(page.bytes[at * _CELL : at * _CELL + _TEXT]).rstrip(b"\0").decode()
        name, *labels = text.split(_BETWEEN)
        yield _BY_NAME[name], tuple(labels), at + _TEXT_CELLS


class Counters:
    """What one worker counts, in the cells of its slot. Thread-safe.

    Every label is given as a text, in the order in which the metric has them.
    """

    def __init__(self, page: MetricsPage, number: int) -> None:
        self.page = page
        self.number = number
        #: What is shown of this process besides.
        self.recent = Recent()
        self._cells, self._numbers = page.cells, page.numbers
        self._start = page.start_of(number)
        self._lock = threading.Lock()  # guards the cells against other threads, and what follows
        self._rows: dict[tuple[str, ...], int] = {}
        self._tools: dict[str, set[str]] = {}
        self._clients: set[str] = set()
        self._begin()

    def __repr__(self) -> str:
        return f"<Counters {self.number} series={len(self._rows)}>"

    def _begin(self) -> None:
        """Goes on with the series that are there, gauges apart; without any, makes those that
        count what has no room.
        """
        for metric, labels, at in rows(self.page, self.number):
            self._rows[(metric.name, *labels)] = at
            if metric.kind is Kind.GAUGE:
                self._numbers[at + _BUCKETS] = 0.0
            if metric is OPERATIONS and labels[2] not in ("", OTHER):
                self._tools.setdefault(labels[0], set()).add(labels[2])
            if metric is SESSIONS_STARTED and labels[1] not in ("", OTHER):
                self._clients.add(labels[1])
        for metric in METRICS:
            self._row_of(metric, (metric.name, *[OTHER] * len(metric.labels)))
        for texts in (self.page.texts, self.page.orders, self.page.outcomes, self.page.hosts):
            texts.clear(self.number)
        self._cells[self._start + _STATE] = Health.UNKNOWN

    def count(self, metric: Metric, *labels: str) -> None:
        """Adds one to a counter."""
        key = (metric.name, *labels)
        at = self._rows.get(key) or self._row_of(metric, key)
        with self._lock:
            self._cells[at] += 1

    def observe(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Adds a time to a histogram."""
        key = (metric.name, *labels)
        at = self._rows.get(key) or self._row_of(metric, key)
        bucket = at + bisect_left(BOUNDS, seconds)
        with self._lock:
            self._cells[bucket] += 1
            self._numbers[at + _BUCKETS] += seconds

    def set(self, metric: Metric, value: float) -> None:
        """Sets a gauge of this worker."""
        key = (metric.name,)
        at = self._rows.get(key) or self._row_of(metric, key)
        self._numbers[at + _BUCKETS] = value

    @property
    def is_first(self) -> bool:
        """Whether this worker is the first one of its gunicorn that goes on."""
        going_on = [n for n, health in self.page.health().items() if health is not Health.DRAINING]
        return min(going_on, default=None) == self.number

    def say(self, health: Health) -> None:
        """Tells others how this worker is."""
        self._cells[self._start + _STATE] = health

    # --- labels that clients have given ----------------------------------------------------------

    def tool(self, server: str, name: str, is_proven: bool) -> str:
        """The label of a tool; empty for one that the server has not been seen to have.

        `is_proven` says that it has just answered a call of it. At most `MAX_TOOLS` of a server
        are told apart.
        """
        known = self._tools.get(server)
        if known is not None and name in known:
            return name
        if not is_proven or not name:
            return ""
        with self._lock:
            return _admitted(name, self._tools.setdefault(server, set()), MAX_TOOLS)

    def client(self, name: str) -> str:
        """The label of a client, whose name is its own word; at most `MAX_CLIENTS` are told
        apart.
        """
        with self._lock:
            return _admitted(name, self._clients, MAX_CLIENTS) if name else ""

    # --- rows ------------------------------------------------------------------------------------

    def _row_of(self, metric: Metric, key: tuple[str, ...]) -> int:
        """The first bucket of a series, which gets a row; that of `OTHER` where none is left."""
        text = _BETWEEN.join(part.replace(_BETWEEN, "?") for part in key).encode("utf-8", "replace")
        with self._lock:
            at = self._rows.get(key)
            if at is not None:
                return at
            count = self._cells[self._start + _COUNT]
            if count >= _ROWS or len(text) > _TEXT or b"\0" in text:
                return self._rows[(metric.name, *[OTHER] * len(metric.labels))]
            row = self._start + _HEAD + count * _ROW
            self.page.bytes[row * _CELL : row * _CELL + _TEXT] = text.ljust(_TEXT, b"\0")
            self._cells[self._start + _COUNT] = count + 1  # from now on others read it
            self._rows[key] = row + _TEXT_CELLS
            return row + _TEXT_CELLS


# Characters of a client's word that a label has at most.
_MAX_LABEL = 100


def _admitted(name: str, known: set[str], limit: int) -> str:
    """A name as a label, among at most so many of a kind."""
    shown = "".join(c if c.isprintable() else "?" for c in name[:_MAX_LABEL])
    if shown not in known:
        if len(known) >= limit:
            return OTHER
        known.add(shown)
    return shown


def require_library() -> None:
    """Raises ConfigError where what writes metrics is not installed."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            "metrics, admin_bind and ctl_socket need prometheus-client: "
            "pip install 'mcp-wsgi-proxy[metrics]'"
        )


def of_process() -> dict[Metric, float]:
    """What the system says of this process; nothing where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            threads = int(file.read().rpartition(")")[2].split()[17])
        files = len(os.listdir("/proc/self/fd")) - 1  # but for that of the listing
    except OSError:
        return {}
    return {RESIDENT: pages * os.sysconf("SC_PAGE_SIZE"), THREADS: threads, FILES: files}


# --- the counters of this process ----------------------------------------------------------------


class _Process:
    """Where this process counts; nowhere before it is told."""

    counters: Counters | None = None


def current() -> Counters | None:
    """Where this process counts; None where nobody has asked for metrics."""
    return _Process.counters


def use(counters: Counters | None) -> None:
    """Has this process count there from now on, or nowhere."""
    _Process.counters = counters


def use_own() -> Counters:
    """Has this process count in memory of its own, unless it counts already; returns where.

    A process that is forked from it has memory of its own, too, which begins at zero.
    """
    if _Process.counters is None:
        own = _Process.counters = MetricsPage(1).take(0)

        def begin_anew() -> None:
            if _Process.counters is own:
                use(MetricsPage(1).take(0))

        os.register_at_fork(after_in_child=begin_anew)
    return _Process.counters
