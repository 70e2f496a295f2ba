"""What is uploaded: it is whole, a package index takes it, and it runs on each Python there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

from mcp_proxy import __version__
from tests.support.system_programs import ROOT

# What a checkout has and a source distribution has not.
_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "node_modules", ".nginx", ".haproxy", ".caddy", ".systemd", "*.egg-info",
    *(".prometheus", ".chromium*"),
    *("build", "dist", "results", "__pycache__", ".*_cache", ".hypothesis", ".coverage*"),
)  # fmt: skip

_SERVED = ("3.11", "3.12", "3.13", "3.14")
_PYENV = Path.home() / ".pyenv" / "versions"


class Release(NamedTuple):
    """The two files, and where they were made."""

    sdist: Path
    wheel: Path
    tree: Path


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; one that fails fails the test with it."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreters() -> dict[str, str]:
    """The Pythons of this machine that are served, by their version."""
    own = ".".join(map(str, sys.version_info[:2]))
    found = {own: sys.executable}
    for version in _SERVED:
        folders = [str(path / "bin") for path in sorted(_PYENV.glob(f"{version}.*"))]
        program = next(filter(None, (shutil.which("python", path=each) for each in folders)), None)
        program = program or shutil.which(f"python{version}")
        if program is not None and _is_there(program, version):
            found.setdefault(version, program)
    return found


def _is_there(program: str, version: str) -> bool:
    """Whether this is that Python, and no name that leads nowhere, as pyenv's may."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.startswith(f"Python {version}.")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A source distribution, and a wheel that is made from it."""
    directory = tmp_path_factory.mktemp("release")
    tree = directory / "tree"
    shutil.copytree(ROOT, tree, ignore=_NOT_COPIED)
    run(sys.executable, "-m", "build", "--outdir", directory / "dist", tree)
    (sdist,) = (directory / "dist").glob("*.tar.gz")
    (wheel,) = (directory / "dist").glob("*.whl")
    return Release(sdist, wheel, tree)


def members(release: Release) -> set[str]:
    """The files of the source distribution, as paths of a checkout."""
    with tarfile.open(release.sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_an_index_takes_both_files(release: Release) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", release.sdist, release.wheel)
    assert said.count("PASSED") == 2


def test_the_source_distribution_has_everything_that_a_checkout_has(release: Release) -> None:
    tree = {
        path.relative_to(release.tree).as_posix()
        for path in release.tree.rglob("*")
        if path.is_file() and not path.is_relative_to(release.tree / "mcp_wsgi_proxy.egg-info")
    }
    assert {"CHANGELOG.md", "tests/conftest.py", "docs/architecture.md", "scripts/test"} <= tree
    made = {"dist", "build"}
    assert {name for name in tree - members(release) if name.partition("/")[0] not in made} == set()


def test_the_wheel_has_the_package_alone(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        names = archive.namelist()
    assert "mcp_proxy/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "mcp_proxy",
        f"mcp_wsgi_proxy-{__version__}.dist-info",
    }
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mcp_proxy").rglob("*.py")}
    assert sources <= set(names)


def test_the_version_stands_in_one_place(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        text = archive.read(f"mcp_wsgi_proxy-{__version__}.dist-info/METADATA").decode()
    assert Parser().parsestr(text)["Version"] == __version__
    for name in ("setup.py", "pyproject.toml"):
        assert f'"{__version__}"' not in (ROOT / name).read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(__version__)}\]? - ", changes, re.MULTILINE)


@pytest.mark.parametrize("script", ["serve", "environment"])
def test_a_python_that_is_too_old_is_said_before_anything_is_made(
    script: str, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / script],
        env={**os.environ, "PYTHON": "/bin/false"},  # as one that finds itself too old
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "Python 3.11 or later is needed; set PYTHON to one\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def test_an_index_has_no_dead_link_to_show() -> None:
    """There the README stands alone: a link to a file of the repository leads nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", interpreters())
def test_the_wheel_runs_on_each_python_that_is_here(
    version: str, release: Release, tmp_path: Path
) -> None:
    assert_runs(interpreters()[version], release.wheel, tmp_path)


@pytest.mark.timeout(600)
def test_the_source_distribution_is_installed_and_runs(release: Release, tmp_path: Path) -> None:
    assert_runs(sys.executable, release.sdist, tmp_path)


def assert_runs(python: str, file: Path, directory: Path) -> None:
    """In an environment of its own it says its version, and finds that it can serve."""
    run(python, "-m", "venv", directory / "venv")
    bin_ = directory / "venv" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "--quiet", file, cwd=directory)
    program = bin_ / "mcp-wsgi-proxy"
    assert run(program, "--version", cwd=directory).strip() == f"mcp-wsgi-proxy {__version__}"
    said = run(program, "check", "--bind", "127.0.0.1:0", cwd=directory)
    assert "demo" in said
