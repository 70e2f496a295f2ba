"""The steps of the Dockerfile, and its result on a file system that is read-only.

No daemon runs where the tests do: what pip does in the image is done in a directory, and a mount
namespace has the read-only file system.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.fronts import DEPLOY
from tests.deploy.test_files import environment_of_the_image
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ROOT, ProxyProcess

_PREFIX = "/opt/mcp-wsgi-proxy"
_CACHE = "/var/cache/mcp-wsgi-proxy"
_DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")

# Everything is read-only but for two directories, as in the container.
_NAMESPACE = """
set -e
mount --make-rprivate /
mount --bind {volume} {volume}
mount --bind {temporary} {temporary}
mount -o remount,bind,ro /
exec "$@"
"""


def steps() -> list[str]:
    """The commands that pip is part of, of the plain image and of the one with tools."""
    runs = re.findall(r"^RUN ((?:.*\\\n)*.*)$", _DOCKERFILE, re.MULTILINE)
    return [each.replace("\\\n", "") for each in runs if "/bin/pip" in each]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the image has at /opt, with the tools."""
    directory = tmp_path_factory.mktemp("image")
    context = directory / "source"
    context.mkdir()
    for name in re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.M):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name)
        else:
            shutil.copy(ROOT / name, context / name)
    for step in steps():
        done = subprocess.run(
            ["sh", "-ec", step.replace(_PREFIX, str(directory / "opt"))],
            cwd=context,
            env={**os.environ, "EXTRAS": "gevent"},
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "opt"


@pytest.fixture(scope="module")
def container(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    """The proxy with the servers of deploy/servers.json, which npx and uvx start."""
    directory = tmp_path_factory.mktemp("container")
    volume, temporary = directory / "volume", directory / "tmp"
    volume.mkdir()
    temporary.mkdir()
    script = _NAMESPACE.format(volume=volume, temporary=temporary)
    (directory / "enter").write_text(script, encoding="utf-8")
    image = environment_of_the_image()
    told = {
        name: value.replace(_CACHE, str(volume)).replace(_PREFIX, str(made))
        for name, value in image.items()
        if name not in ("PATH", "MCP_PROXY_BIND")
    }
    way = ("-c", f"import os; os.execvp('unshare', {_entering(directory, made)!r})")
    settings = {
        **told,
        "PATH": f"{made}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "TMPDIR": str(temporary),
        "MCP_PROXY_CONFIG": str(DEPLOY / "servers.json"),
    }
    with ProxyProcess(way=way, environment=settings) as process:
        yield process


def _entering(directory: Path, made: Path) -> list[str]:
    program = str(made / "bin" / "mcp-wsgi-proxy")
    return ["unshare", "--mount", "sh", str(directory / "enter"), program]


@pytest.mark.timeout(500)
def test_the_steps_make_a_proxy_with_tools(made: Path) -> None:
    assert len(steps()) == 2
    for program in ("mcp-wsgi-proxy", "npx", "node", "uvx"):
        assert (made / "bin" / program).exists(), program


@pytest.mark.timeout(500)
@pytest.mark.parametrize("server", json.loads((DEPLOY / "servers.json").read_text())["mcpServers"])
def test_npx_and_uvx_start_servers_where_only_the_volume_can_be_written_to(
    container: ProxyProcess, server: str
) -> None:
    client = McpClient(HttpFront(container.base), f"/servers/{server}/mcp")
    answer = client.initialize()
    assert "result" in answer.message(), container.log()
    client.notify("notifications/initialized")
    assert client.result("tools/list")["tools"]
    client.delete().close()


def test_the_file_system_of_these_servers_is_read_only(container: ProxyProcess) -> None:
    """Else the tests before have shown nothing."""
    (root,) = [
        line
        for line in Path(f"/proc/{container.master_pid}/mounts").read_text().splitlines()
        if shlex.split(line)[1] == "/"
    ]
    assert "ro" in root.split()[3].split(",")
