"""gunicorn as this project runs it: its settings, its hooks, and the command that starts it.

Imported in gunicorn's master, so it must stay free of anything that a worker class may still patch.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from mcp_proxy.config import ProxyConfig
from mcp_proxy.edge.logs import configure
from mcp_proxy.errors import ConfigError
from mcp_proxy.server import cpu_affinity as affinity
from mcp_proxy.server.banner import banner

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

# Seconds between looks at whether the worker is ending without a signal.
_LOOK = 1.0

# Seconds in which a worker that accepts nothing new still answers on connections that it has kept:
# gunicorn closes those two seconds after it was told to stop.
LINGER = 2.5

# Files that a worker may have open, if the system lets it.
_FILES = 16_384

# Connections of a worker beyond its threads: kept alive, between two requests. Sessions need file
# descriptors, too.
_KEPT_ALIVE = 128

_STAYING_WORKER = "mcp_proxy.server.worker.StayingWorker"


def gunicorn_settings(config: ProxyConfig) -> dict[str, Any]:
    """Everything that gunicorn is told, hooks included."""
    hooks = Hooks(config)
    is_gthread = config.worker_class == "gthread"
    return {
        "bind": config.bind,
        "workers": config.workers,
        "threads": config.threads,
        "worker_class": _STAYING_WORKER if is_gthread else config.worker_class,
        "loglevel": config.log_level,
        "worker_connections": config.threads + _KEPT_ALIVE if is_gthread else 10_000,
        # gunicorn looks at every header for these; X-Forwarded-* is believed by `trusted_proxies`.
        "forwarded_allow_ips": "*",
        "forwarder_headers": "",
        "secure_scheme_headers": {},
        # The main loop beats this heartbeat whatever the threads do: it is no limit for requests.
        "timeout": 60,
        "graceful_timeout": 20,
        "keepalive": 30,
        # Two instances on one machine would claim the same path.
        "control_socket_disable": True,
        "on_starting": hooks.on_starting,
        "when_ready": hooks.when_ready,
        "pre_fork": hooks.pre_fork,
        "post_worker_init": hooks.post_worker_init,
        "worker_int": hooks.worker_int,
        "worker_exit": hooks.worker_exit,
    }


def serve(config: ProxyConfig) -> None:
    """Runs gunicorn with `config` until it is told to stop; leaves by SystemExit."""
    from gunicorn.app.base import BaseApplication

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            for name, value in gunicorn_settings(config).items():
                self.cfg.set(name, value)

        def load(self) -> WSGIApplication:
            from mcp_proxy.app import create_app

            return create_app(config)

    Server().run()


def require_shared_sessions(config: ProxyConfig, worker_count: int) -> None:
    """Raises ConfigError where several workers could not serve each other's sessions."""
    if worker_count > 1 and config.redis_url is None:
        raise ConfigError(
            f"{worker_count} workers do not know each other's sessions while those are in memory: "
            "set redis_url, or set workers to 1 and raise threads instead"
        )


class Hooks:
    """What happens at the stations of gunicorn's life; gunicorn wants its own parameter names."""

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._offset = random.randrange(1024)

    def on_starting(self, server: Any) -> None:
        """Refuses what cannot work before anything listens."""
        configure(self._config.log_format, self._config.log_level)
        _allow_many_files()
        try:
            require_shared_sessions(self._config, server.cfg.workers)
        except ConfigError as error:
            sys.exit(f"mcp-wsgi-proxy: {error}")

    def when_ready(self, server: Any) -> None:
        """Says where the servers are, once the sockets listen."""
        addresses = [str(listener) for listener in server.LISTENERS]
        print(banner(self._config, addresses), file=sys.stderr, flush=True)

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Chooses the worker's CPU, in the master, which knows those of the others."""
        cpus = affinity.cpus_to_share(self._config, server.cfg.workers)
        taken = [other.cpu for other in server.WORKERS.values() if other.cpu is not None]
        worker.cpu = affinity.least_used(cpus, taken, self._offset) if cpus else None

    def post_worker_init(self, worker: Any) -> None:
        """Pins the worker and makes SIGTERM end its streams."""
        app = worker.wsgi
        if worker.cpu is not None and hasattr(app, "replica"):
            app.replica.affinity = frozenset(os.sched_getaffinity(0))
            affinity.pin(worker.cpu)
        if hasattr(app, "drain"):
            _drain_at_the_end(worker, app)

    def worker_int(self, worker: Any) -> None:
        """SIGINT or SIGQUIT: the worker leaves at once, and so do its children."""
        _close(worker)

    def worker_exit(self, server: Any, worker: Any) -> None:
        """The last word of a worker: it may still be working for clients of other replicas."""
        drain = getattr(getattr(worker, "wsgi", None), "drain", None)
        if drain is not None:
            drain()


def _allow_many_files() -> None:
    """Each stdio session takes four descriptors, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _drain_at_the_end(worker: Any, app: Any) -> None:
    """Has the application drained when gunicorn's worker is to end.

    gunicorn tells nobody that a worker is to end, and then waits for open streams. Where other
    replicas serve the same sessions the worker stops accepting first, and answers on the
    connections that it has. Otherwise it goes on accepting until it is drained, to say that it is
    shutting down. The ends without a signal, `max_requests` and a master that is gone, are looked
    for.
    """
    told = threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        told.set()

    def leave() -> None:
        if told.is_set() and callable(before):
            before(signal.SIGTERM, None)

    def watch() -> None:
        while not told.wait(_LOOK) and worker.alive and os.getppid() == worker.ppid:
            pass
        if app.is_shared:
            leave()
            app.drain(linger=LINGER)
        else:
            app.drain()
            leave()

    signal.signal(signal.SIGTERM, handle)
    signal.siginterrupt(signal.SIGTERM, False)
    threading.Thread(target=watch, name="mcp-drain", daemon=True).start()


def _close(worker: Any) -> None:
    close = getattr(getattr(worker, "wsgi", None), "close", None)
    if close is not None:
        close()
