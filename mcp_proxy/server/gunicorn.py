"""gunicorn as this project runs it: settings, hooks, the start, and the banner.

Imported in gunicorn's master, so it must not import anything that a worker class may still patch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import random
import re
import resource
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mcp_proxy.config import (
    GEVENT_CONNECTIONS,
    PREFIX,
    ProxyConfig,
    is_malloc_told,
    set_in_environment,
)
from mcp_proxy.edge.guard import is_loopback, url_host
from mcp_proxy.edge.log_writer import LogWriter
from mcp_proxy.edge.logs import configure, start_writing
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.deadlines import DEADLINES
from mcp_proxy.server.leaving import Leaving
from mcp_proxy.servers import Server, StdioServer

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger(__name__)

# Files that a worker may have open, if the system allows it.
_FILES = 16_384

# Files that are neither a connection's nor a session's: code, logs, Redis, HTTP servers.
_OTHER_FILES = 64

# Files of a stdio session: three pipes, and one for what is being done with it.
_FILES_OF_A_SESSION = 4

# The longest request line that gunicorn can be set to.
_LONGEST_LINE = 8_190

# Connections that a worker may have, if there are files for them.
_CONNECTIONS = 4_096

# Memory that is a file system: writable in most containers whose file system is not.
_SHARED_MEMORY = "/dev/shm"

# As mallopt of glibc calls it.
_M_ARENA_MAX = -8

# Our classes behind the setting `worker_class`.
_WORKER_CLASSES = {
    "gthread": "mcp_proxy.server.worker.KeepaliveWorker",
    "gevent": "mcp_proxy.server.gevent_worker.GeventWorker",
}

# Which of them is meant by a class that gunicorn is told on its own command line.
_KINDS = {
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.sync.SyncWorker": "gthread",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    **{path: kind for kind, path in _WORKER_CLASSES.items()},
}


def settings_of_environment() -> dict[str, Any]:
    """As `gunicorn_settings` by the environment; ends with a sentence where they do not fit."""
    try:
        return gunicorn_settings(ProxyConfig.from_env())
    except ConfigError as error:
        sys.exit(f"mcp-wsgi-proxy: {error}")


def gunicorn_settings(config: ProxyConfig, hooks: Hooks | None = None) -> dict[str, Any]:
    """All settings for gunicorn, hooks included; raises ConfigError."""
    hooks = hooks or Hooks(config)
    require_worker_class(config)
    return {
        # gunicorn's own class logs its first line before any hook is called.
        **({"logger_class": _json_logger(hooks)} if config.log_format == "json" else {}),
        "bind": config.bind,
        "workers": config.workers,
        "threads": config.threads,
        "worker_class": _WORKER_CLASSES[config.worker_class],
        "loglevel": config.log_level,
        "worker_connections": connections(config),
        # What an application, and a worker, that read their own settings find in the environment.
        "raw_env": [
            f"{PREFIX}MAX_SESSIONS={within_files(config).max_sessions}",
            *(f"{PREFIX}{name.upper()}={getattr(config, name)}" for name in DEADLINES),
        ],
        # gunicorn would check every header against these; `trusted_proxies` decides instead.
        "forwarded_allow_ips": "*",
        "forwarder_headers": "",
        "secure_scheme_headers": {},
        # A limit for the main loop's heartbeat, not for requests.
        "timeout": 60,
        # What calls get of it when a worker is told to stop: `leaving` says.
        "graceful_timeout": 20,
        "worker_tmp_dir": heartbeat_directory(),
        "keepalive": max(1, round(config.http_keepalive)),
        "limit_request_line": min(_LONGEST_LINE, config.max_header_bytes),
        "limit_request_field_size": config.max_header_bytes,
        # Two instances on one machine would claim the same path.
        "control_socket_disable": True,
        "on_starting": hooks.on_starting,
        "on_reload": hooks.on_reload,
        "when_ready": hooks.when_ready,
        "pre_fork": hooks.pre_fork,
        "post_fork": hooks.post_fork,
        "post_worker_init": hooks.post_worker_init,
        "worker_int": hooks.worker_int,
        "worker_exit": hooks.worker_exit,
    }


def _json_logger(hooks: Hooks) -> type:
    """gunicorn's class of the log, whose lines are JSON from the first one on."""
    from gunicorn.glogging import Logger

    class JsonLogger(Logger):  # type: ignore[misc]
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            hooks.begin_log()

    return JsonLogger


def serve(config: ProxyConfig) -> None:
    """Runs gunicorn with `config` until it is told to stop; raises SystemExit then."""
    from gunicorn.app.base import BaseApplication

    hooks = Hooks(config)

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            for name, value in gunicorn_settings(config, hooks).items():
                self.cfg.set(name, value)

        def load(self) -> WSGIApplication:
            from mcp_proxy.app import create_app

            return create_app(within_files(hooks.config))

    Server().run()


def require_shared_sessions(config: ProxyConfig, worker_count: int) -> None:
    """Raises ConfigError where several workers could not serve each other's sessions."""
    if worker_count > 1 and config.redis_url is None:
        raise ConfigError(
            f"{worker_count} workers do not know each other's sessions while those are in memory: "
            "set redis_url, or set workers to 1 and raise threads instead"
        )


def require_directory_and_cpus(config: ProxyConfig) -> None:
    """Raises ConfigError where `cwd`, or a CPU of `cpu_affinity`, does not exist here."""
    if config.directory is not None and not os.path.isdir(config.directory):
        raise ConfigError(f"cwd: expected a directory that exists, got {config.cwd!r}")
    if config.cpu_affinity in ("auto", "off") or not hasattr(os, "sched_getaffinity"):
        return
    ours = sorted(os.sched_getaffinity(0))
    if not set(config.cpus()) <= set(ours):
        listed = ", ".join(map(str, ours))
        raise ConfigError(
            f"cpu_affinity: expected auto, off or CPUs that this process may use ({listed}), "
            f"got {config.cpu_affinity!r}"
        )


def require_worker_class(config: ProxyConfig) -> None:
    """Raises ConfigError where what gunicorn's worker of this kind imports is not installed."""
    needed = ("gevent", "packaging") if config.worker_class == "gevent" else ()
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        what = " and ".join(missing)
        raise ConfigError(f"worker_class gevent needs {what}: pip install 'mcp-wsgi-proxy[gevent]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class Hooks:
    """gunicorn's server hooks, with the parameter names that gunicorn requires."""

    def __init__(self, config: ProxyConfig) -> None:
        self._given = self.config = config
        self._offset = random.randrange(1024)
        self._log: LogWriter | None = None

    def begin_log(self) -> LogWriter:
        """Has the process write its log lines as the settings want; harmless when repeated."""
        if self._log is None:
            self._log = configure(self.config.log_format, self.config.log_level)
        return self._log

    def on_starting(self, server: Any) -> None:
        """Exits before anything listens if this cannot be served here."""
        self.begin_log()
        self._use_our_worker_class(server)
        _allow_many_files()
        lowered = within_files(self.config).max_sessions
        if lowered != self.config.max_sessions:
            log.warning(
                "max_sessions is %d instead of %d: a worker may have %d files open",
                *(lowered, self.config.max_sessions, files_to_have()),
            )
        try:
            require_shared_sessions(self.config, server.cfg.workers)
            require_directory_and_cpus(self.config)
        except ConfigError as error:
            sys.exit(f"mcp-wsgi-proxy: {error}")
        for sentence in self.config.ignored():
            log.warning("%s", sentence)
        _answer_signals(server, self.config)

    def on_reload(self, server: Any) -> None:
        """The class is gunicorn's again, as its command line says."""
        self._use_our_worker_class(server)

    def _use_our_worker_class(self, server: Any) -> None:
        """Has workers be of our class where gunicorn's own of that kind is set, as by `-k gevent`.

        The command line goes before a configuration file, and gunicorn has looked up the class
        when it calls the first hook; it makes no worker before the hook has ended.
        """
        chosen = f"{server.worker_class.__module__}.{server.worker_class.__qualname__}"
        kind = _KINDS.get(chosen)
        if kind is None:
            return  # somebody's own: the first request says what it lacks
        if kind != self.config.worker_class:
            try:
                self.config = msgspec.structs.replace(self.config, worker_class=kind)
            except ConfigError as error:
                sys.exit(f"mcp-wsgi-proxy: {error}")
            set_in_environment("worker_class", kind)
        if server.cfg.worker_connections == connections(self._given):
            server.cfg.set("worker_connections", connections(self.config))
        if chosen != _WORKER_CLASSES[kind]:
            log.info("worker_class %s: %s is used", chosen, _WORKER_CLASSES[kind])
            server.cfg.set("worker_class", _WORKER_CLASSES[kind])
            server.worker_class = server.cfg.worker_class

    def when_ready(self, server: Any) -> None:
        """Prints the banner once the sockets listen; a JSON log has the URLs in a line of it."""
        addresses = [str(listener) for listener in server.LISTENERS]
        if self.config.log_format == "json":
            urls = server_urls(self.config, base_url(self.config, addresses))
            log.info("serving %s", urls, extra={"fields": {"servers": urls}})
        else:
            self.begin_log().write(banner(self.config, addresses))

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Chooses the worker's CPU, in the master, which knows the CPUs of the other workers."""
        cpus = cpus_to_share(self.config, server.cfg.workers)
        taken = [other.cpu for other in server.WORKERS.values() if other.cpu is not None]
        worker.cpu = least_used(cpus, taken, self._offset) if cpus else None

    def post_fork(self, server: Any, worker: Any) -> None:
        """Has a worker that finds a mistake in the file of servers use what was in it before."""
        use_one_arena()
        if self.config.config is None or getattr(server, "good_servers", None) is None:
            return
        try:
            self.config.servers()
        except ConfigError as error:
            log.error("%s; this worker starts with what was in the file before", error)
            path = f"/proc/self/fd/{server.good_servers}"
            set_in_environment("config", path)
            self.config = msgspec.structs.replace(self.config, config=path)

    def post_worker_init(self, worker: Any) -> None:
        """Sets up the worker, pins it to its CPU, and has SIGTERM drain its application."""
        start_writing()
        app = worker.wsgi
        worker.max_header_bytes = self.config.max_header_bytes
        worker.max_body_bytes = self.config.max_body_bytes
        if worker.cpu is not None and hasattr(app, "parts"):
            app.parts.supervisor.cpu_affinity = frozenset(os.sched_getaffinity(0))
            pin(worker.cpu)
        if hasattr(app, "drain"):
            worker.leaving = Leaving(worker, app)
            worker.leaving.start()

    def worker_int(self, worker: Any) -> None:
        """SIGINT or SIGQUIT: closes the application, and so its children, at once."""
        if hasattr(worker, "leaving"):
            worker.leaving.leave_at_once()

    def worker_exit(self, server: Any, worker: Any) -> None:
        """Waits for the end of the application, which may still serve other replicas' clients."""
        if hasattr(worker, "leaving"):
            worker.leaving.wait()


# --- signals to the master -----------------------------------------------------------------------


def _answer_signals(server: Any, config: ProxyConfig) -> None:
    """Has SIGHUP and SIGTTIN refused, in a sentence, where gunicorn would end or harm sessions."""
    reload, add_worker = server.handle_hup, server.handle_ttin

    def handle_hup() -> None:
        try:
            config.servers()
        except ConfigError as error:
            log.error("nothing is reloaded, and everything goes on as before: %s", error)
            return
        for sentence in config.ignored():
            log.warning("%s", sentence)
        before, server.good_servers = server.good_servers, _copy_of(config)
        if before is not None:
            os.close(before)  # workers have descriptors of their own
        reload()

    def handle_ttin() -> None:
        try:
            require_shared_sessions(config, server.num_workers + 1)
        except ConfigError as error:
            log.error("no worker is added: %s", error)
            return
        add_worker()

    server.good_servers = _copy_of(config)
    server.handle_hup, server.handle_ttin = handle_hup, handle_ttin


def _copy_of(config: ProxyConfig) -> int | None:
    """A file in memory with what is in the file of servers; None where there is none.

    It is inherited by workers, and by no child of theirs.
    """
    if config.config is None or not hasattr(os, "memfd_create"):
        return None
    try:
        text = Path(config.config).read_bytes()
    except OSError:  # it was there a moment ago
        return None
    descriptor = os.memfd_create("mcp-servers")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    return descriptor


# --- the limit of files --------------------------------------------------------------------------


def heartbeat_directory() -> str | None:
    """Where gunicorn's workers have the files of their heartbeat; None: where temporary files are.

    Raises ConfigError where nothing can be written.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        if os.access(_SHARED_MEMORY, os.W_OK):
            return _SHARED_MEMORY
        raise ConfigError(
            "No directory for temporary files can be written to: set TMPDIR to one that can"
        ) from error
    return None


def files_to_have() -> int:
    """The files that a worker may have open, once the limit is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    return wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)


def connections(config: ProxyConfig) -> int:
    """The connections of a worker: with threads half of the files, and more than it has threads."""
    if config.worker_class == "gevent":
        return GEVENT_CONNECTIONS
    return max(config.threads + 1, min(_CONNECTIONS, (files_to_have() - _OTHER_FILES) // 2))


def within_files(config: ProxyConfig) -> ProxyConfig:
    """The configuration with as many sessions as half of the files are enough for."""
    fit = max(1, (files_to_have() - _OTHER_FILES) // 2 // _FILES_OF_A_SESSION)
    if config.target_url or config.max_sessions <= fit:
        return config
    return msgspec.structs.replace(config, max_sessions=fit)


def use_one_arena() -> None:
    """Has the threads of this process share one heap, unless the environment says otherwise.

    glibc gives them up to eight for each CPU, and each keeps what its largest messages have taken:
    a worker with 64 threads grew to twice its size. The interpreter runs one thread at a time, so
    that they do not wait for each other here. Without glibc nothing happens.
    """
    if not is_malloc_told():
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _allow_many_files() -> None:
    """Raises the limit of open files: a stdio session takes four, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files_to_have():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_to_have(), hard))


# --- the banner ----------------------------------------------------------------------------------


def banner(config: ProxyConfig, addresses: list[str]) -> str:
    """The URLs and a client configuration block for the servers at `addresses`."""
    address = addresses[0] if addresses else config.bind
    if address.startswith("unix:"):
        return _unix_banner(config, address)
    base = base_url(config, addresses)
    urls = server_urls(config, base)
    block = {"mcpServers": {name: _entry(url) for name, url in urls.items()}}
    lines = [
        *(f"  {name}: {url}" for name, url in urls.items()),
        *_older(config, base),
        "",
        "  For a client's configuration:",
        *(f"    {line}" for line in json.dumps(block, indent=2).splitlines()),
        "",
        f"  Health: {base}/healthz and {base}/readyz",
        *_warnings(config, addresses),
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def _unix_banner(config: ProxyConfig, address: str) -> str:
    """The same for a socket that no client can be given the URL of."""
    paths = server_urls(config, "")
    lines = [
        *(f"  {name}: {path} on {address}" for name, path in paths.items()),
        *_older(config, ""),
        "",
        "  Health: /healthz and /readyz",
    ]
    return "\n".join(["", "mcp-wsgi-proxy serves", *lines, ""])


def _warnings(config: ProxyConfig, addresses: list[str]) -> list[str]:
    """What whoever starts this should know, with an empty line before it."""
    hosts = [host for host in map(url_host, addresses) if host and not is_loopback(host)]
    if not hosts or config.allowed_hosts is not None:
        return []
    return [
        "",
        "  Every Host is served beyond this machine: a web page can reach this address under a",
        "  name of its own (DNS rebinding). Set allowed_hosts to the names that clients use.",
    ]


def base_url(config: ProxyConfig, addresses: list[str]) -> str:
    """The URL of the proxy that listens at `addresses`, without a path."""
    return _reachable(addresses[0]) if addresses else f"http://{config.bind}"


def server_urls(config: ProxyConfig, base: str) -> dict[str, str]:
    """The MCP endpoint of each server under `base`, by the server's name."""
    return {server.name: _url(config, base, server) for server in config.servers()}


def _url(config: ProxyConfig, base: str, server: Server) -> str:
    path = "/sse" if _is_old(config, server) else "/mcp"
    return f"{_mount(config, base, server)}{path}"


def _mount(config: ProxyConfig, base: str, server: Server) -> str:
    return f"{base}/servers/{server.name}" if config.config else base


def _is_old(config: ProxyConfig, server: Server) -> bool:
    """Whether a server is served over HTTP+SSE (2024-11-05) only."""
    return isinstance(server, StdioServer) and "streamable" not in config.stdio_transports


def _older(config: ProxyConfig, base: str) -> list[str]:
    """The HTTP+SSE URLs (2024-11-05) of servers that have both transports, one a line."""
    if set(config.stdio_transports) != {"streamable", "sse"}:
        return []
    servers = [server for server in config.servers() if isinstance(server, StdioServer)]
    urls = (f"{_mount(config, base, server)}/sse" for server in servers)
    return [f"  {url} for clients of 2024-11-05 (HTTP+SSE)" for url in urls]


def _entry(url: str) -> dict[str, str]:
    return {"type": "sse" if url.endswith("/sse") else "http", "url": url}


def _reachable(address: str) -> str:
    """An address to connect to: the loopback one where it names all interfaces."""
    return re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", address)


# --- one CPU for each gthread worker -------------------------------------------------------------
#
# A CPython process uses one core at a time; if the kernel spreads its threads over two, the
# interpreter lock moves between cores at every system call. Pinned to one CPU a gthread worker
# answers about twice as many small calls (`bench/throughput` measures it).
#
# On one CPU a thread that wakes another is often preempted by it at once, and the other then waits
# for the interpreter lock. Under the kernel's batch policy (sched(7)) a woken thread waits for its
# turn, which almost halves the switches. Children get all CPUs and the normal policy.

_QUOTA_FILE = "/sys/fs/cgroup/cpu.max"


def cpus_to_share(config: ProxyConfig, workers: int) -> tuple[int, ...]:
    """The CPUs among which workers are spread; empty where workers are not pinned.

    `auto` pins when each worker can have a CPU of its own and no CPU quota applies; otherwise the
    kernel's freedom to move a worker is worth more.
    """
    if config.cpu_affinity == "off" or config.worker_class != "gthread":
        return ()
    if not hasattr(os, "sched_setaffinity"):
        return ()
    if config.cpu_affinity != "auto":
        return config.cpus()
    available = tuple(sorted(os.sched_getaffinity(0)))
    return available if workers <= len(available) and not _has_quota(len(available)) else ()


def least_used(cpus: tuple[int, ...], taken: Iterable[int], offset: int) -> int:
    """The CPU with the fewest workers; among equals the first one from `offset` on.

    A random offset keeps several small deployments on one machine from all choosing the first CPU.
    """
    used = list(taken)
    turned = cpus[offset % len(cpus) :] + cpus[: offset % len(cpus)]
    return min(turned, key=used.count)


def pin(cpu: int) -> None:
    """Binds this thread, and threads that it starts later, to one CPU under the batch policy."""
    os.sched_setaffinity(0, {cpu})
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it; that only costs speed
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _has_quota(cpus: int) -> bool:
    """Whether this control group has a quota of less than `cpus` CPUs."""
    try:
        with open(_QUOTA_FILE, encoding="ascii") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return False
    return quota != "max" and int(quota) < cpus * int(period)
