"""The reverse proxies of deploy/ as they stand there, but for addresses and certificates."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import urllib3

from tests.support.front import Answer, Json
from tests.support.startable import Startable
from tests.support.system_programs import ROOT, find_program, with_libraries
from tests.support.tls import Certificates
from tests.support.waiting import eventually

DEPLOY = ROOT / "deploy"

#: What clients of the examples call the proxy.
HOST = "mcp.example.com"

_STOP_TIME = 10.0

# The http block that nginx.conf is included in, for whoever may not write to the usual places.
_NGINX = """
user root;
daemon off;
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
    include {directory}/mcp.conf;
}}
"""


class _Kind(NamedTuple):
    """One of them: its file, the changes to it, how it is checked and run."""

    file: str
    changes: Callable[[int, Certificates], dict[str, str]]
    check: tuple[str, ...]
    run: tuple[str, ...]


KINDS = {
    "nginx": _Kind(
        "nginx.conf",
        lambda port, certificates: {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "/etc/ssl/certs/mcp.example.com.pem": certificates.path("server.pem"),
            "/etc/ssl/private/mcp.example.com.key": certificates.path("server.key"),
        },
        ("-e", "stderr", "-p", "{directory}", "-c", "{directory}/outer.conf", "-t"),
        ("-e", "stderr", "-p", "{directory}", "-c", "{directory}/outer.conf"),
    ),
    "haproxy": _Kind(
        "haproxy.cfg",
        lambda port, certificates: {
            "bind :443": f"bind 127.0.0.1:{port}",
            "/etc/haproxy/mcp.example.com.pem": certificates.path("both.pem"),
        },
        ("-c", "-f", "{directory}/mcp.conf"),
        ("-db", "-f", "{directory}/mcp.conf"),
    ),
    "caddy": _Kind(
        "Caddyfile",
        lambda port, certificates: {
            f"\n{HOST} {{\n": f"\nhttps://{HOST}:{port} {{\n\tbind 127.0.0.1\n"
            f"\ttls {certificates.path('server.pem')} {certificates.path('server.key')}\n",
        },
        ("validate", "--adapter", "caddyfile", "--config", "{directory}/mcp.conf"),
        ("run", "--adapter", "caddyfile", "--config", "{directory}/mcp.conf"),
    ),
}


class Front(Startable):
    """A reverse proxy of deploy/ with TLS at a port of 127.0.0.1, before what is at `target`."""

    def __init__(self, name: str, directory: Path, target: int) -> None:
        self._kind = KINDS[name]
        self._directory = directory
        self._program = find_program(name, name)
        self.port = _free_port()
        self.certificates = Certificates(directory, HOST)
        self._process: subprocess.Popen[bytes] | None = None
        both = [
            Path(self.certificates.path(f"server.{kind}")).read_text() for kind in ("pem", "key")
        ]
        (directory / "both.pem").write_text("".join(both))
        (directory / "outer.conf").write_text(_NGINX.format(directory=directory))
        (directory / "mcp.conf").write_text(self._configuration(target))

    def check(self) -> subprocess.CompletedProcess[str]:
        """What the program itself says of its configuration."""
        return subprocess.run(
            self._command(self._kind.check),
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def start(self) -> None:
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(self._kind.run), env=self._environment(), stdout=log, stderr=log
            )
        eventually(self._is_listening, message="the reverse proxy does not listen")

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_STOP_TIME)

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _configuration(self, target: int) -> str:
        text = (DEPLOY / self._kind.file).read_text(encoding="utf-8")
        changes = self._kind.changes(self.port, self.certificates)
        for old, new in {"127.0.0.1:8080": f"127.0.0.1:{target}", **changes}.items():
            assert old in text, f"{self._kind.file} has no {old!r}"
            text = text.replace(old, new)
        if self._kind.file == "Caddyfile":  # its administration listens at a port of everybody's
            text = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text
        return text

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [self._program, *(each.format(directory=self._directory) for each in arguments)]

    def _environment(self) -> dict[str, str]:
        home = {"HOME": str(self._directory), "XDG_DATA_HOME": str(self._directory)}
        return {**with_libraries(self._program), **home}

    def _is_listening(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the reverse proxy ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


def _free_port() -> int:
    """A port that nobody has: not every one of them can be handed a socket."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class TlsFront:
    """A way in for the clients of `tests.support.front`, by TLS and under the public name."""

    def __init__(self, front: Front, host: str = HOST) -> None:
        self._host = host
        self._pool = urllib3.HTTPSConnectionPool(
            "127.0.0.1",
            front.port,
            ca_certs=front.certificates.path("ca.pem"),
            server_hostname=HOST,
            timeout=30,
            retries=False,
        )

    def request(self, method: str, path: str, headers: Json, body: bytes | None) -> Answer:
        """Sends a request and returns its answer as it comes."""
        response = self._pool.urlopen(
            method, path, body, {**headers, "Host": self._host}, preload_content=False
        )
        pieces = iter(lambda: response.read1(), b"")
        return Answer(response.status, response.headers, pieces, response.close)
