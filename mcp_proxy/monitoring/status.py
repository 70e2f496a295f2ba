"""What goes on just now, for an operator's page: servers, workers, sessions, failures.

Each worker writes its part into memory that the workers share, once a second while somebody looks.
Whoever is asked puts the parts together. What clients and servers say of themselves is cut where it
is noted; the page shows it as text and never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from mcp_proxy.errors import ClientError
from mcp_proxy.metrics import (
    BOUNDS,
    CHILDREN,
    OPERATIONS,
    SESSIONS,
    STREAMS,
    STREAMS_LEFT,
    Counters,
    Health,
    Metric,
    MetricsPage,
)
from mcp_proxy.monitoring.orders import Result
from mcp_proxy.recent import FailureNote, SessionNote, shortened
from mcp_proxy.shared_texts import LONGEST
from mcp_proxy.storage.session import INIT_BODY, Session
from mcp_proxy.wire import jsonrpc
from mcp_proxy.wire.headers import Headers
from mcp_proxy.wire.jsonrpc import Request

#: Seconds after a look for which workers write.
LOOKED = 10.0

# Sessions and failures of a worker that are shown, and fewer where their texts are long.
_SHOWN = (50, 20, 5, 0)

_SHOWN_AT_ONCE = 100  # sessions on the page

_PAGE = Path(__file__).parent / "page.html"
_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


class ServerPart(msgspec.Struct):
    """A server as one worker sees it; `reason` says what is wrong with it."""

    name: str
    what: str
    state: str
    reason: str = ""


class WorkerPart(msgspec.Struct):
    """What one worker says of itself. `began` is in seconds since 1970."""

    pid: int
    began: float
    threads: int
    numbers: dict[str, float]
    servers: list[ServerPart]
    sessions: list[SessionNote]
    failures: list[FailureNote]


_parts = msgspec.json.Decoder(WorkerPart)


def write(counters: Counters, part: WorkerPart) -> None:
    """Has other workers see the part of this one, with as many sessions and failures as there is
    room for.
    """
    for shown in _SHOWN:
        part.sessions = counters.recent.sessions(shown)
        part.failures = part.failures[:shown]
        text = msgspec.json.encode(part)
        if len(text) <= LONGEST:
            counters.page.texts.write(counters.number, text)
            return


def note_of(record: Session, server: str, note: SessionNote | None) -> SessionNote:
    """What is known of a session with this record; `note` is what this worker has noted of it."""
    client = "" if note is None else note.client
    try:
        asked = jsonrpc.parse(record.metadata.get(INIT_BODY, "").encode())
    except ClientError:  # a kind of session that begins with something else
        asked = None
    if not client and isinstance(asked, Request):
        client = shortened(jsonrpc.names_in(asked.params)[1])
    return SessionNote(
        record.id[-8:],
        server,
        record.created_at,
        record.created_at if note is None else note.last,
        client,
        0 if note is None else note.calls,
        "" if note is None else note.error,
        shortened(record.backend_url or "-"),
    )


def numbers_of(gauges: Mapping[Metric, float]) -> dict[str, float]:
    """The gauges that the page shows, by short names."""
    names = {SESSIONS: "sessions", STREAMS: "streams", STREAMS_LEFT: "streams_left"}
    names[CHILDREN] = "children"
    return {name: gauges.get(metric, 0) for metric, name in names.items()}


def document(page: MetricsPage, version: str, asked: Result | None = None) -> bytes:
    """Everything that the workers say, and what they have counted so far, as JSON.

    Those of other gunicorns that share the store are in it. `silent` is how many of this one have
    not said how they are: workers look once somebody has begun to. `asked` is what they know of one
    session.
    """
    told = _own(page, version, _SHOWN_AT_ONCE)
    others = _others(page)
    shown = [told, *others]
    everything: dict[str, Any] = {
        **told,
        "hosts": [each["host"] for each in shown],
        "workers": [worker for each in shown for worker in each["workers"]],
        "servers": _merged([server for each in shown for server in each["servers"]]),
    }
    for name, moment in (("sessions", "last"), ("failures", "at")):
        notes = [note for each in shown for note in each[name]]
        notes.sort(key=lambda note: float(note[moment]), reverse=True)
        everything[name] = notes[:_SHOWN_AT_ONCE]
    if asked is not None:
        everything["asked"] = asked
    return msgspec.json.encode(everything)


def for_others(page: MetricsPage, version: str) -> bytes:
    """What this gunicorn shows to others: as much as there is room for."""
    for shown in _SHOWN:
        text = msgspec.json.encode(_own(page, version, shown))
        if len(text) <= LONGEST:
            return text
    return b"{}"


def note_others(page: MetricsPage, slot: int, texts: list[str]) -> None:
    """Has all workers know what others have shown, but for a text that is too long to be ours."""
    short = [text for text in texts if len(text.encode()) <= LONGEST]
    page.hosts.write(slot, msgspec.msgpack.encode(_Others(time.monotonic(), short)))


class _Others(msgspec.Struct):
    """The texts of other gunicorns, and when they were read by the machine's monotonic clock."""

    at: float
    texts: list[str]


def _others(page: MetricsPage) -> list[dict[str, Any]]:
    """What other gunicorns have shown lately; their times are those of this machine."""
    read = [
        msgspec.msgpack.decode(text, type=_Others)
        for text in map(page.hosts.read, page.health())
        if text
    ]
    latest = max(read, key=lambda each: each.at, default=None)
    passed = 0.0 if latest is None else time.monotonic() - latest.at
    if latest is None or passed > LOOKED:
        return []
    found = [_as_of_here(text, time.time() - passed) for text in latest.texts]
    return sorted(filter(None, found), key=lambda told: str(told["host"]))


def _as_of_here(text: str, read_at: float) -> dict[str, Any] | None:
    """What another gunicorn has shown, its times by the clock of this machine, where that is when
    it was read. None for what another version has shown in another form.
    """
    rows = (("workers", "began"), ("sessions", "began"), ("sessions", "last"), ("failures", "at"))
    try:
        told: dict[str, Any] = msgspec.json.decode(text)
        late = read_at - told["now"]
        for name, moment in rows:
            for row in told[name]:
                row[moment] += late
        _merged(told["servers"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return None
    return told


def _own(page: MetricsPage, version: str, shown: int) -> dict[str, Any]:
    """What the workers of this gunicorn say."""
    parts: dict[int, WorkerPart] = {}
    healths = page.health()
    for slot in healths:
        if text := page.texts.read(slot):
            parts[slot] = _parts.decode(text)
    host = socket.gethostname()
    sessions = [
        {"host": host, "worker": slot, **msgspec.structs.asdict(note)}
        for slot, part in parts.items()
        for note in part.sessions
    ]
    sessions.sort(key=lambda note: note["last"], reverse=True)
    failures = [
        {"host": host, "worker": slot, **msgspec.structs.asdict(note)}
        for slot, part in parts.items()
        for note in part.failures
    ]
    failures.sort(key=lambda note: note["at"], reverse=True)
    return {
        "host": host,
        "version": version,
        "now": time.time(),
        "workers": [
            {"host": host, **_worker(slot, healths[slot], part)}
            for slot, part in sorted(parts.items())
        ],
        "silent": sum(healths[slot] is Health.UNKNOWN or slot not in parts for slot in healths),
        "servers": _servers(parts, _counted(page)),
        "sessions": sessions[:shown],
        "failures": failures[:shown],
    }


def _merged(servers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each server once, in its worst state, with the counts of all gunicorns."""
    found: dict[str, dict[str, Any]] = {}
    for server in servers:
        known = found.setdefault(server["name"], server)
        if known is server:
            continue
        if known["state"] == "ok":
            known |= {name: server[name] for name in ("state", "reason")}
        for name in ("calls", "errors"):
            known[name] += server[name]
    return list(found.values())


def _worker(slot: int, health: Health, part: WorkerPart) -> dict[str, Any]:
    return {
        "worker": slot,
        "pid": part.pid,
        "began": part.began,
        "health": health.name.lower().replace("_", " "),
        "threads": part.threads,
        **part.numbers,
    }


def _servers(
    parts: Mapping[int, WorkerPart], counted: Mapping[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Each server once: its worst state, with the reason, and its counts since the start."""
    found: dict[str, ServerPart] = {}
    for part in parts.values():
        for server in part.servers:
            if server.name not in found or server.state != "ok":
                found[server.name] = server
    return [
        {**msgspec.structs.asdict(server), **counted.get(name, {"calls": 0, "errors": 0})}
        for name, server in found.items()
    ]


def _counted(page: MetricsPage) -> dict[str, dict[str, float]]:
    """Operations of each server, those that failed, and the seconds that all have taken."""
    found: dict[str, dict[str, float]] = {}
    for key, numbers in page.read().items():
        if key.metric is OPERATIONS:
            server, _, _, error_type = key.labels
            known = found.setdefault(server, {"calls": 0, "errors": 0, "seconds": 0})
            count = sum(numbers[: len(BOUNDS) + 1])
            known["calls"] += count
            known["errors"] += count if error_type else 0
            known["seconds"] += numbers[-1]
    return found


# --- the page ------------------------------------------------------------------------------------


@cache
def html() -> bytes:
    """The page, which has no external parts and asks for status.json again and again."""
    return _PAGE.read_bytes()


@cache
def html_headers() -> Headers:
    """Its headers: nothing runs or is loaded that is not written in it."""
    hashes: dict[str, str] = {}
    for kind, text in _INLINE.findall(html().decode()):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
    ]
