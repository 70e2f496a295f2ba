"""A real nginx in front of something, with the configuration that a user would write."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import requests

from tests.support.startable import Startable
from tests.support.system_programs import find_program
from tests.support.waiting import eventually

_STOP_TIME = 10.0

# Everything that is not said here is as nginx comes: buffering, timeouts, sizes.
_CONFIGURATION = """
user root;
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
    server {{
        listen 127.0.0.1:{port};
        location {prefix}/ {{
            proxy_pass {target}/;
            proxy_http_version 1.1;
            proxy_set_header X-Forwarded-Prefix {prefix};
            {more}
        }}
    }}
}}
"""


class Nginx(Startable):
    """An nginx process that passes what is below `prefix` on to `target`, without the prefix."""

    def __init__(self, directory: Path, target: str, prefix: str, more: str = "") -> None:
        self._program = find_program("nginx", "nginx")
        self._directory = directory
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        fields = {"directory": directory, "port": self.port, "prefix": prefix, "target": target}
        text = _CONFIGURATION.format(more=more, **fields)
        self._file("nginx.conf").write_text(text, encoding="utf-8")

    @property
    def base(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        file = str(self._file("nginx.conf"))
        command = [self._program, "-p", str(self._directory), "-c", file, "-e", "stderr"]
        # The way of an nginx that replaces another one: it is given the sockets by number.
        listening = self._socket.fileno()
        with self._file("log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "NGINX": f"{listening};"},
                pass_fds=[listening],
            )
        eventually(self._is_serving, message="nginx does not serve")

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_STOP_TIME)
        self._socket.close()

    def log(self) -> str:
        return self._file("log").read_text(errors="replace")

    def _file(self, name: str) -> Path:
        return self._directory / name

    def _is_serving(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "nginx ended"
        try:
            return requests.get(self.base, timeout=_STOP_TIME).status_code == 404
        except requests.ConnectionError:
            return False
