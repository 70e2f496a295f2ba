"""gunicorn as this project runs it: its settings, its hooks, and the start.

Imported in gunicorn's master before the class of its workers is known, so it must not import
anything that one may still patch.
"""

from __future__ import annotations

import importlib.util
import logging
import mmap
import os
import random
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from mcp_proxy import __version__, metrics, rate_buckets, traces
from mcp_proxy.auth.access_tokens import require_libraries
from mcp_proxy.auth.authenticator import Authenticator
from mcp_proxy.auth.keys import read as read_keys
from mcp_proxy.auth.keys import use_copy
from mcp_proxy.config import (
    PREFIX,
    ProxyConfig,
    has_given_sockets,
    require_certificates,
    set_in_environment,
)
from mcp_proxy.edge.log_writer import LogWriter
from mcp_proxy.edge.logs import configure, start_writing, take_over
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.admin import (
    ADMIN_VARIABLE,
    CTL_VARIABLE,
    AdminServer,
    AdminSocket,
    address_of,
    given_by_systemd,
    listening_at,
    listening_for_user,
)
from mcp_proxy.server.banner import banner, base_url, server_urls
from mcp_proxy.server.binding import require_another, wait_for_ports
from mcp_proxy.server.deadlines import DEADLINES
from mcp_proxy.server.forking import hold_signals, release_signals
from mcp_proxy.server.last_good import LastGood
from mcp_proxy.server.leaving import Leaving
from mcp_proxy.server.machine import (
    allow_many_files,
    connections,
    cpus_to_share,
    files_to_have,
    heartbeat_directory,
    keep_heap_small,
    least_used,
    pin,
    within_files,
)
from mcp_proxy.server.passing import is_possible
from mcp_proxy.server.reloading import Reloading
from mcp_proxy.server.session_files import (
    caller_key,
    require_private,
    store,
    take,
    wait_for_others,
)
from mcp_proxy.server.slot import SlotTable
from mcp_proxy.servers import HttpServer, Server
from mcp_proxy.sessions.facts import process_key, use_key
from mcp_proxy.storage.session import minted_by

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from mcp_proxy.app import Application
    from mcp_proxy.ownership.memory import Memory

log = logging.getLogger(__name__)

# Workers that can be counted at least: those that are added, and replace others, among them.
_COUNTING = 64

# The longest request line that gunicorn can be set to.
_LONGEST_LINE = 8_190

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
        "pre_exec": hooks.pre_exec,
        "pre_fork": hooks.pre_fork,
        "post_fork": hooks.post_fork,
        "post_worker_init": hooks.post_worker_init,
        "worker_int": hooks.worker_int,
        "worker_exit": hooks.worker_exit,
        "child_exit": hooks.child_exit,
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


def require_shared_sessions(
    config: ProxyConfig,
    worker_count: int,
    has_tls: bool = False,
    has_page: bool = True,
    servers: Sequence[Server] | None = None,
) -> None:
    """Raises ConfigError where several workers could not serve each other's sessions.

    `has_page` says that all of them are of one master; `servers` are those that are served, where
    they are not as `config` says.
    """
    if worker_count == 1 or config.redis_url is not None:
        return
    reason = _not_passed_because(config, has_tls, servers)
    if reason is None and not has_page:
        reason = "they are not of the same master"
    if reason is not None:
        raise ConfigError(
            f"{worker_count} workers do not know each other's sessions while those are in memory "
            f"and {reason}: set redis_url, or set workers to 1 and raise threads instead"
        )


def _not_passed_because(
    config: ProxyConfig, has_tls: bool, servers: Sequence[Server] | None
) -> str | None:
    """Why workers cannot pass all requests to one another; None where they can."""
    if config.passing == "off":
        return "passing is off"
    if config.worker_class != "gthread":
        return f"worker_class is {config.worker_class}"
    if not is_possible():
        return "this system has no eventfd"
    if has_tls:
        return "TLS is in the worker"
    served = config.servers() if servers is None else servers
    if any(isinstance(server, HttpServer) for server in served):
        return "there is an HTTP server"
    return None


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


def require_keys(config: ProxyConfig) -> None:
    """Raises ConfigError where what callers show cannot be checked, or does not fit the rest."""
    if config.jwt_issuer is not None:
        require_libraries()
    Authenticator.of(config, None, None)


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
        self._table: SlotTable | None = None
        self._metrics: metrics.MetricsPage | None = None
        self._admin: AdminSocket | None = None
        self._ctl: AdminSocket | None = None
        self._token = secrets.token_urlsafe(18)
        self._reloading: Reloading | None = None

    def begin_log(self) -> LogWriter:
        """Has the process write its log lines as the settings want; harmless when repeated.

        To be called whenever gunicorn has made its handlers: they would wait for who reads the log.
        """
        if self._log is None:
            self._log = configure(self.config.log_format, self.config.log_level)
        else:
            take_over(self.config.log_format)
        return self._log

    def on_starting(self, server: Any) -> None:
        """Exits before anything listens if this cannot be served here."""
        self.begin_log()
        self._use_our_worker_class(server)
        self._heed_worker_count(server)
        allow_many_files()
        lowered = within_files(self.config).max_sessions
        if lowered != self.config.max_sessions:
            log.warning(
                "max_sessions is %d instead of %d: a worker may have %d files open",
                *(lowered, self.config.max_sessions, files_to_have()),
            )
        try:
            given = self._given_admin_socket()
            require_shared_sessions(self.config, server.cfg.workers, server.cfg.is_ssl)
            require_directory_and_cpus(self.config)
            require_keys(self.config)
            if not (has_given_sockets() or server.master_pid or server.cfg.reuse_port):
                wait_for_ports(server.cfg.address)
            if self.config.session_dir is not None:
                require_private(self.config.session_dir)
            for broken in self.config.broken():
                log.error("%s: %s", self.config.config, broken)
            self._share_callers(server)
            self._begin_counting(server, given)
            if self.config.traces:
                traces.require_library()
            if self.config.config is not None:
                self._reloading = Reloading(self.config, server)
        except ConfigError as error:
            sys.exit(f"mcp-wsgi-proxy: {error}")
        for sentence in self.config.ignored():
            log.warning("%s", sentence)
        if self.config.session_dir is not None and self.config.redis_url is not None:
            log.warning("session_dir has no effect: the sessions are in Redis")
        if self._passes(server):
            self._table = SlotTable(server.cfg.workers)
            _note_stop(server, self._table)
        _answer_signals(server, self.config, self._table, self._reloading)
        os.register_at_fork(after_in_parent=release_signals)
        self._import_for_workers(server)

    def _import_for_workers(self, server: Any) -> None:
        """Imports once what each worker needs, so that one that comes later serves at once.

        Where workers patch the standard library, that must come first, in each of them.
        """
        if _path_of(server.worker_class) == _WORKER_CLASSES["gthread"]:
            importlib.import_module("mcp_proxy.app")
            if self.config.redis_url is not None:
                importlib.import_module("mcp_proxy.redis.storage")

    def _given_admin_socket(self) -> socket.socket | None:
        """The admin socket that systemd hands over; its address is that of the setting, too.

        Raises ConfigError.
        """
        given = given_by_systemd()
        if given is not None:
            address = address_of(given)
            self.config = msgspec.structs.replace(self.config, admin_bind=address)
            set_in_environment("admin_bind", address)
        return given

    def _begin_counting(self, server: Any, given: socket.socket | None) -> None:
        """Makes what workers share of metrics, and the admin socket, unless that is given.

        Raises ConfigError.
        """
        if not self.config.counts:
            return
        metrics.require_library()
        self._metrics = metrics.MetricsPage(max(_COUNTING, 2 * server.cfg.workers))
        if self.config.admin_bind is not None:
            address = self.config.admin_bind
            if given is None and not has_given_sockets():
                require_another(address, server.cfg.address)
            self._admin = AdminSocket(lambda: given or listening_at(address), ADMIN_VARIABLE)
        if self.config.ctl_socket is not None:
            listen = partial(listening_for_user, self.config.ctl_socket)
            self._ctl = AdminSocket(listen, CTL_VARIABLE)

    def pre_exec(self, server: Any) -> None:
        """In the process that becomes a second master, which gets the sockets for operators."""
        environ = server.cfg.env_orig
        environ.pop("LISTEN_FDNAMES", None)  # they are not those that gunicorn hands on
        if self.config.admin_bind is not None:
            environ[f"{PREFIX}ADMIN_BIND"] = self.config.admin_bind
        for each in (self._admin, self._ctl):
            if each is not None:
                each.hand_on(environ)

    def _share_callers(self, server: Any) -> None:
        """Has all workers know and count callers alike, also those that come later.

        Raises ConfigError.
        """
        directory = self.config.session_dir
        if directory is not None and self.config.redis_url is None:
            use_key(caller_key(directory))
        rate_buckets.share()
        if self.config.rate_limit_scope == "deployment":
            rate_buckets.require_library()
        process_key()  # before the first fork: it is the same in all workers
        if not hasattr(os, "memfd_create"):
            return
        if self.config.api_keys is not None:
            server.last_keys = LastGood(self.config.api_keys, read_keys, "mcp-keys")
            server.last_keys.look_each_turn(server)
        ca_file, is_used = self.config.ca_file, self.config.target_url or self.config.config
        if ca_file is not None and is_used and os.path.isfile(ca_file):
            require = partial(require_certificates, "ca_file")
            server.last_certificates = LastGood(ca_file, require, "mcp-certificates")
            server.last_certificates.look_each_turn(server)

    def _passes(self, server: Any) -> bool:
        """Whether workers pass requests to one another.

        One worker with sessions in memory passes them to the next, when it is replaced.
        """
        if self.config.passing == "off" or self.config.worker_class != "gthread":
            return False
        return is_possible() and not server.cfg.is_ssl

    def on_reload(self, server: Any) -> None:
        """The handlers of its log are gunicorn's again, and the class, as its command line says."""
        self.begin_log()
        patches = _KINDS.get(_path_of(server.worker_class)) == "gevent"
        if patches and "mcp_proxy.app" in sys.modules:
            log.error("worker_class gevent needs a restart: the new workers are of class gthread")
            self._set_worker_class(server, "gthread")
        self._use_our_worker_class(server)

    def _use_our_worker_class(self, server: Any) -> None:
        """Has workers be of our class where gunicorn's own of that kind is set, as by `-k gevent`.

        The command line goes before a configuration file, and gunicorn has looked up the class
        when it calls the first hook; it makes no worker before the hook has ended.
        """
        chosen = _path_of(server.worker_class)
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
            self._set_worker_class(server, kind)

    def _set_worker_class(self, server: Any, kind: str) -> None:
        server.cfg.set("worker_class", _WORKER_CLASSES[kind])
        server.worker_class = server.cfg.worker_class

    def _heed_worker_count(self, server: Any) -> None:
        """Has workers know how many they are, where gunicorn's own settings say so, as by `-w 2`.

        An HTTP server of the file is served accordingly.
        """
        if self.config.config is not None and server.cfg.workers != self.config.workers:
            self.config = msgspec.structs.replace(self.config, workers=server.cfg.workers)
            set_in_environment("workers", str(server.cfg.workers))

    def when_ready(self, server: Any) -> None:
        """Prints the banner once the sockets listen; a JSON log has the URLs in a line of it."""
        addresses = [str(listener) for listener in server.LISTENERS]
        if self.config.log_format == "json":
            urls = server_urls(self.config, base_url(self.config, addresses))
            log.info("serving %s", urls, extra={"fields": {"servers": urls}})
        else:
            token = self._token if self.config.counts else ""
            self.begin_log().write(banner(self.config, addresses, token))
        if self._admin is not None:
            log.info("metrics and probes at %s/metrics, /healthz and /readyz", self._admin.url)

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Chooses the worker's CPU and slot, in the master, which knows those of the others.

        The worker takes signals to stop once it has handlers of its own.
        """
        worker.slot_number = worker.metrics_slot = None
        if self._metrics is not None:
            others_have = (getattr(o, "metrics_slot", None) for o in server.WORKERS.values())
            worker.metrics_slot = self._metrics.lowest_free(others_have)
        if self._table is not None:
            others = server.WORKERS.values()
            worker.slot_number = self._table.lowest_free(map(_slot_number, others))
        cpus = cpus_to_share(self.config, server.cfg.workers)
        taken = [other.cpu for other in server.WORKERS.values() if other.cpu is not None]
        worker.cpu = least_used(cpus, taken, self._offset) if cpus else None
        if _path_of(server.worker_class) in _WORKER_CLASSES.values():
            hold_signals()

    def post_fork(self, server: Any, worker: Any) -> None:
        """Has a worker enter its slot, and know when another one is begun in its place."""
        keep_heap_small()
        if self._metrics is not None and getattr(worker, "metrics_slot", None) is not None:
            metrics.use(self._metrics.take(worker.metrics_slot))
        worker.has_kept_socket = getattr(server, "systemd", False)
        if self._table is not None:
            self._enter_slot(self._table, worker)
        reloads = getattr(server, "reloads", None)  # None: somebody has taken the first hook away
        if reloads is not None:
            current = reloads[:]
            worker.is_replaced = lambda: reloads[:] != current
        self._take_last_good(server)

    def _take_last_good(self, server: Any) -> None:
        """Has a worker start although there is a mistake in a file that it needs.

        Of certificates the copy is used at any rate: nobody looks at their file later.
        """
        keys: LastGood | None = getattr(server, "last_keys", None)
        if keys is not None:
            use_copy(keys.path)
        certificates: LastGood | None = getattr(server, "last_certificates", None)
        if certificates is not None:
            self.config = msgspec.structs.replace(self.config, ca_file=certificates.path)
            set_in_environment("ca_file", certificates.path)

    def _enter_slot(self, table: SlotTable, worker: Any) -> None:
        number = _slot_number(worker)
        if number is None or not hasattr(worker, "slot"):
            table.close()
        else:
            worker.slot = table.take(number)

    def post_worker_init(self, worker: Any) -> None:
        """Sets up the worker, pins it to its CPU, and has SIGTERM drain its application.

        Servers are started ahead from now on: a user who asks for that wants the first session
        to find one.
        """
        start_writing()
        app = worker.wsgi
        if hasattr(app, "follow"):  # it may have been made before the fork
            app.follow()
        worker.max_header_bytes = self.config.max_header_bytes
        worker.max_body_bytes = self.config.max_body_bytes
        if worker.cpu is not None and hasattr(app, "parts"):
            app.parts.supervisor.cpu_affinity = frozenset(os.sched_getaffinity(0))
            pin(worker.cpu)
        if getattr(worker, "slot", None) is not None:
            worker.slot.serve(getattr(app, "nonce", ""))
        self._bring_back(worker, getattr(app, "memory", None))
        if hasattr(app, "keep_spares"):
            app.keep_spares()
        if metrics.current() is not None and hasattr(app, "monitoring"):
            self._serve_operators(worker, app)
        if hasattr(app, "drain"):
            worker.leaving = Leaving(worker, app, self._keep)
            worker.leaving.start()

    def _serve_operators(self, worker: Any, app: Application) -> None:
        monitoring = app.monitoring
        monitoring.version = __version__
        monitoring.token = self._token
        monitoring.keep()
        sockets = (
            ("mcp-admin", self._admin, monitoring),
            ("mcp-ctl", self._ctl, monitoring.serve_ctl),
        )
        for name, each, asked in sockets:
            if each is not None:
                may_leave, workers = monitoring.may_leave, app.parts.workers
                AdminServer(name, each, asked, may_leave, worker.cfg, workers).start()
                each.take_over()

    def _bring_back(self, worker: Any, memory: Memory | None) -> None:
        """Has the sessions that were there when the last worker of the slot, or all, ended."""
        directory = self.config.session_dir
        if directory is None or memory is None:
            return
        number = _slot_number(worker) or 0
        with take(directory, number, worker.cfg.workers) as records:
            ids = memory.put_in(records)
            if getattr(worker, "slot", None) is not None:
                worker.slot.inherit({minted_by(each) for each in ids})
        if ids:
            log.info("%d sessions are here again, from session_dir", len(ids))
        wait_for_others(directory, number, worker.cfg.workers)

    def _keep(self, worker: Any, records: bytes) -> None:
        """Keeps the sessions that were in the memory of a worker that ends."""
        directory = self.config.session_dir
        if directory is not None:
            store(directory, _slot_number(worker) or 0, records)

    def worker_int(self, worker: Any) -> None:
        """SIGINT or SIGQUIT: closes the application, and so its children, at once."""
        if hasattr(worker, "leaving"):
            worker.leaving.leave_at_once()

    def worker_exit(self, server: Any, worker: Any) -> None:
        """Waits for the end of the application, which may still serve other replicas' clients."""
        if hasattr(worker, "leaving"):
            worker.leaving.wait()

    def child_exit(self, server: Any, worker: Any) -> None:
        """In the master: a worker has ended, and another one may come in its slot."""
        number = _slot_number(worker)
        if self._table is not None and number is not None:
            self._table.free(number)
        metrics_slot = getattr(worker, "metrics_slot", None)
        if self._metrics is not None and metrics_slot is not None:
            self._metrics.free(metrics_slot)


def _path_of(worker_class: type) -> str:
    return f"{worker_class.__module__}.{worker_class.__qualname__}"


def _slot_number(worker: Any) -> int | None:
    """The slot of a worker; None where it has none, as where somebody has taken that hook away."""
    number: int | None = getattr(worker, "slot_number", None)
    return number


# --- signals to the master -----------------------------------------------------------------------


def _answer_signals(
    server: Any, config: ProxyConfig, table: SlotTable | None, reloading: Reloading | None
) -> None:
    """Has SIGHUP reload the file of servers, if there is one. Has SIGTTIN and SIGUSR2 refused, in a
    sentence, where gunicorn would end or harm sessions.
    """
    reload, add_worker, begin_master = server.handle_hup, server.handle_ttin, server.handle_usr2

    def handle_hup() -> None:
        """Without a file of servers all workers are replaced."""
        server.reloads[0] = (server.reloads[0] + 1) % 256
        if table is not None:
            table.page.replace_all()
        reload()

    def handle_ttin() -> None:
        try:
            servers = None if reloading is None else reloading.servers
            require_shared_sessions(
                config, server.num_workers + 1, server.cfg.is_ssl, servers=servers
            )
            if table is not None:
                table.require_room(server.num_workers + 1)
        except ConfigError as error:
            log.error("no worker is added: %s", error)
            return
        add_worker()

    def handle_usr2() -> None:
        try:
            require_shared_sessions(config, 2 * server.num_workers, has_page=False)
        except ConfigError as error:
            log.error("no second master is begun: %s", error)
            return
        server.START_CTX["args"] = _command_line(server.START_CTX["args"])
        begin_master()

    server.reloads = mmap.mmap(-1, 1)  # how many there were, which workers see as it changes
    server.handle_hup, server.handle_ttin = handle_hup, handle_ttin
    server.handle_usr2 = handle_usr2
    if reloading is not None:
        reloading.begin()


def _command_line(started: list[str]) -> list[str]:
    """The command line for a second master: after `python -m` by the name of the module, again.

    gunicorn would run its file, and the modules beside that would hide those that others mean.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return started
    return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def _note_stop(server: Any, table: SlotTable) -> None:
    """Has workers know that all of them are told to stop."""

    def stop(handle: Callable[[], object]) -> None:
        table.page.stop()
        handle()

    for name in ("handle_term", "handle_int", "handle_quit"):
        setattr(server, name, partial(stop, getattr(server, name)))
