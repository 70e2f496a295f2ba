"""The examples as their README says to run them, each in a process of its own."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.proxy_process import ROOT, ProxyProcess
from tests.support.waiting import eventually

README = ROOT / "examples" / "README.md"
CONFORMANCE = ROOT / "tests" / "servers" / "conformance.py"

FRAMEWORKS = {
    "examples.flask_app:app": "flask",
    "examples.django_app:application": "django",
    "examples.pyramid_app:app": "pyramid",
}
SERVERS = {"gunicorn": "gunicorn", "waitress-serve": "waitress"}

_LISTENING = re.compile(rb"listening on (\S+)")


def commands() -> list[str]:
    """Every command of the README that serves."""
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^(?:{'|'.join(SERVERS)}) .+$", text, re.MULTILINE)


def uwsgi_commands() -> list[str]:
    """The README's commands for uWSGI."""
    return re.findall(r"^uwsgi .+$", README.read_text(encoding="utf-8"), re.MULTILINE)


def command_for(program: str, application: str) -> str:
    """The README's command for an application, or for another one in its place."""
    found = [line for line in commands() if line.startswith(f"{program} ")]
    exact = [line for line in found if line.endswith(f" {application}")]
    return exact[0] if exact else " ".join([*found[0].split(" ")[:-1], application])


def served(command: str, environment: Mapping[str, str] | None = None) -> ProxyProcess:
    """The command as it is, but at a port that the system chooses."""
    program, *arguments = shlex.split(command)
    require(SERVERS[program])
    if (framework := FRAMEWORKS.get(arguments[-1])) is not None:
        require(framework)
    assert any(":8080" in argument for argument in arguments), command
    at_any_port = [argument.replace("127.0.0.1:8080", "127.0.0.1:0") for argument in arguments]
    script = Path(sys.executable).parent / program
    if not script.exists():
        pytest.fail(f"{program} is not beside {sys.executable}: `pip install {SERVERS[program]}`")
    return ProxyProcess(way=(str(script), *at_any_port), environment=environment)


def require(module: str) -> None:
    """Fails with what to install; a test that was skipped has proved nothing."""
    if importlib.util.find_spec(module) is None:
        pytest.fail(f"{module} is missing: `pip install {module}`, or `pip install .[test]`")


@contextmanager
def http_server(log: Path) -> Iterator[str]:
    """The URL of an MCP server of the official SDK that speaks HTTP; it writes to `log`."""
    require("mcp")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(CONFORMANCE), "--http", "0"], stderr=output, stdout=output
        )
        try:
            yield eventually(lambda: _address(process, log), 20, "the HTTP server does not listen")
        finally:
            process.terminate()
            process.wait(10)


def _address(process: subprocess.Popen[bytes], log: Path) -> str | None:
    written = log.read_bytes()
    assert process.poll() is None, f"the HTTP server ended: {written.decode()}"
    found = _LISTENING.search(written)
    return found[1].decode() if found else None
