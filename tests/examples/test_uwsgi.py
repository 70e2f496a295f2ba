"""The example under uWSGI, by the commands of the README."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.clients.programs import HERE, run_client
from tests.examples import serving
from tests.examples.test_examples import assert_sees_the_demo
from tests.support.front import SCRIPTED, HttpFront, McpClient
from tests.support.proxy_process import ROOT, is_alive
from tests.support.waiting import eventually

_NOTE = "notifications/message"


class Uwsgi:
    """A uWSGI that serves the example at `base`."""

    def __init__(self, command: str, log: Path, server: str = "") -> None:
        program, *arguments = shlex.split(command)
        script = Path(sys.executable).with_name(program)
        if not script.exists():
            pytest.fail("uwsgi is missing: `pip install pyuwsgi`, or `pip install .[test]`")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [script, *(each.replace(":8080", f":{port}") for each in arguments)],
                cwd=ROOT,
                env={**os.environ, "EXAMPLE_COMMAND": server},
                stdout=output,
                stderr=output,
            )
        eventually(self._is_serving, 20, "uWSGI does not serve")

    def stop(self) -> int:
        """Ends it as a service manager does."""
        self._process.terminate()
        return self._process.wait(30)

    def _is_serving(self) -> bool:
        assert self._process.poll() is None, self.log.read_text(errors="replace")
        try:
            return requests.get(self.base, timeout=5).status_code == 200
        except requests.RequestException:
            return False


@pytest.fixture(params=serving.uwsgi_commands(), ids=lambda command: command.split()[1])
def uwsgi(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Uwsgi]:
    """Each of the README's commands."""
    uwsgi = Uwsgi(request.param, tmp_path / "log", shlex.join(SCRIPTED))
    yield uwsgi
    uwsgi.stop()


def test_an_official_client_sees_the_demo(tmp_path: Path) -> None:
    serving.require("mcp")
    for number, command in enumerate(serving.uwsgi_commands()):
        uwsgi = Uwsgi(command, tmp_path / f"log{number}")
        try:
            client = str(HERE / "python_client.py")
            assert_sees_the_demo(run_client(sys.executable, client, f"{uwsgi.base}/mcp", "auto"))
        finally:
            uwsgi.stop()


def test_nothing_is_held_back(uwsgi: Uwsgi) -> None:
    client = McpClient(HttpFront(uwsgi.base)).open()
    client.require_streaming()
    stream = client.listen()
    client.result("later", {"message": {"method": _NOTE, "params": {"n": 1}}})
    assert next(stream.stream())["params"] == {"n": 1}
    stream.close()
    assert client.delete().status == 204


def test_a_stop_ends_the_servers(uwsgi: Uwsgi) -> None:
    client = McpClient(HttpFront(uwsgi.base)).open()
    server = client.result("count")["pid"]
    uwsgi.stop()
    eventually(lambda: not is_alive(server), 5)
