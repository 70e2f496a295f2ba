"""How gunicorn's master makes workers: what they share, and what they are sent meanwhile."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest

from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.waiting import eventually

# Seconds that a worker needs before it sets its handlers, as on a busy machine.
SLOW = 2.0

OURS = "from mcp_proxy.server.gunicorn import settings_of_environment as ours\n"
OURS += "globals().update(ours())\n"


def way_with(folder: Path, settings: str) -> tuple[str, ...]:
    """gunicorn with a configuration file that has ours and then these."""
    file = folder / "gunicorn_settings.py"
    file.write_text(OURS + textwrap.dedent(settings), encoding="utf-8")
    return ("-m", "gunicorn", "-c", str(file), "mcp_proxy.wsgi:app")


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_worker_that_has_just_begun_is_stopped_with_the_others(
    tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    way = way_with(
        tmp_path,
        f"""
        import time
        prepare = post_fork
        def post_fork(server, worker):
            time.sleep({SLOW} if worker.age > 1 else 0)
            prepare(server, worker)
        """,
    )
    environment = {"MCP_PROXY_WORKER_CLASS": kind}
    with ProxyProcess(SCRIPTED, way=way, environment=environment) as proxy:
        (first,) = proxy.worker_pids()
        os.kill(first, signal.SIGKILL)
        eventually(lambda: proxy.worker_pids() not in ([], [first]))
        os.kill(proxy.master_pid, number)
        assert proxy.wait(20) == 0  # graceful_timeout is 30 s


def modules_of_a_worker(folder: Path, **environment: str) -> set[str]:
    """The modules that a worker of a proxy with these settings has when it begins."""
    found = folder / "modules"
    way = way_with(
        folder,
        f"""
        import pathlib, sys
        prepare = post_fork
        def post_fork(server, worker):
            pathlib.Path({str(found)!r}).write_text(" ".join(sys.modules))
            prepare(server, worker)
        """,
    )
    with ProxyProcess(SCRIPTED, way=way, environment=environment):
        return set(found.read_text(encoding="utf-8").split())


def test_workers_share_what_each_of_them_needs(tmp_path: Path, redis_url: str) -> None:
    modules = modules_of_a_worker(tmp_path, MCP_PROXY_REDIS_URL=redis_url)
    assert modules >= {"mcp_proxy.app", "mcp_proxy.transparent.proxy", "requests", "redis"}


def test_nothing_is_imported_before_gevent_patches_it(tmp_path: Path, redis_url: str) -> None:
    environment = {"MCP_PROXY_REDIS_URL": redis_url, "MCP_PROXY_WORKER_CLASS": "gevent"}
    modules = modules_of_a_worker(tmp_path, **environment)
    assert not modules & {"mcp_proxy.app", "requests", "redis"}


def test_a_reload_does_not_change_to_a_class_that_patches(tmp_path: Path) -> None:
    """The standard library is in use by what the workers share."""
    chosen = tmp_path / "chosen"
    chosen.write_text("gthread")
    way = way_with(
        tmp_path,
        f"""
        import pathlib
        worker_class = pathlib.Path({str(chosen)!r}).read_text()
        """,
    )
    with ProxyProcess(SCRIPTED, way=way) as proxy:
        before = proxy.worker_pids()
        chosen.write_text("gevent")
        os.kill(proxy.master_pid, signal.SIGHUP)
        eventually(lambda: "worker_class gevent needs a restart" in proxy.log(), 30)
        eventually(lambda: not set(before) & set(proxy.worker_pids()), 30)
        assert McpClient(HttpFront(proxy.base)).open().result("ping") == {}
