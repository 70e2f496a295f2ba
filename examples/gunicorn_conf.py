"""gunicorn for an application that has the proxy in it: `gunicorn -c examples/gunicorn_conf.py`.

The first three settings could stand on the command line. The hooks are for the end: a standing MCP
stream never ends by itself, so gunicorn would wait for it until `graceful_timeout`.
"""

import importlib
import signal
import threading
from types import FrameType
from typing import Any

worker_class = "mcp_proxy.server.worker.KeepaliveWorker"  # threads, and patience with limits
threads = 16  # as in the application's ProxyOptions
workers = 1  # the sessions of a stdio server live in one process


def post_worker_init(worker: Any) -> None:
    """Has SIGTERM close the proxy: streams end, calls get some seconds; then gunicorn goes on."""
    mcp = _proxy_of(worker)
    stop = signal.getsignal(signal.SIGTERM)

    def close_and_stop() -> None:
        mcp.close(timeout=worker.cfg.graceful_timeout - 8)  # eight for servers and connections
        stop(signal.SIGTERM, None)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=close_and_stop).start()  # takes locks, so not in a handler

    signal.signal(signal.SIGTERM, on_sigterm)


def worker_int(worker: Any) -> None:
    """Ctrl-C: gunicorn waits for nobody, so everything ends."""
    _proxy_of(worker).close()


def _proxy_of(worker: Any) -> Any:
    """`mcp` of the module that is served. In a project of your own: import it from there."""
    module, _, _ = worker.app.app_uri.partition(":")
    return importlib.import_module(module).mcp
