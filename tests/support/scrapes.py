"""What stands at an admin socket: where it is, how soon it answers, its metrics as numbers."""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

#: The setting for an admin socket at a port that the system chooses.
ADMIN = ("--admin-bind", "127.0.0.1:0")

_SAID = re.compile(r"metrics and probes at http://127\.0\.0\.1:(\d+)/metrics")

_TIMEOUT = 20.0


def admin_port(process: ProxyProcess) -> int:
    """Where a proxy has its admin socket, as its log says."""
    found = eventually(lambda: _SAID.search(process.log()))
    return int(found[1])


def get(
    port: int, path: str, headers: Mapping[str, str] | None = None, timeout: float = _TIMEOUT
) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def seconds_for(port: int, path: str) -> float:
    """How long the answer to a GET takes, which is 200."""
    began = time.monotonic()
    assert get(port, path)[0] == 200
    return time.monotonic() - began


def has_free_thread(port: int) -> bool:
    """Whether a proxy answers what is no probe, and needs a thread."""
    try:
        return get(port, "/nothing", timeout=1.0)[0] == 404
    except TimeoutError:
        return False


def sum_of(text: bytes, name: str, **labels: str) -> float:
    """The samples of this name that have these labels, added up."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def series_of(text: bytes, name: str) -> list[dict[str, str]]:
    """The labels of every sample of this name."""
    families = text_string_to_metric_families(text.decode())
    return [s.labels for family in families for s in family.samples if s.name == name]
