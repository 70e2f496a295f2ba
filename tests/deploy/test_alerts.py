"""The alert rules: Prometheus takes them, and each is raised by what it is for alone."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcp_proxy.metrics import METRICS
from tests.deploy.fronts import DEPLOY
from tests.support.system_programs import ROOT, find_program

_FILE = DEPLOY / "prometheus" / "alerts.yaml"
_RULES: list[dict[str, Any]] = yaml.safe_load(_FILE.read_text("utf-8"))["groups"][0]["rules"]
_ALERTS = {rule["alert"]: rule for rule in _RULES}

_COUNT = 'mcp_server_operation_duration_seconds_count{instance="i",mcp_server="s",error_type='

#: Series of a minute a value: those that raise an alert, and those that are no reason for it.
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "McpProxyDown": (
        {'up{job="mcp-proxy",instance="i"}': "0x30"},
        {'up{job="mcp-proxy",instance="i"}': "1x30", 'up{job="other",instance="i"}': "0x30"},
    ),
    "McpServerFails": (
        {f'{_COUNT}""}}': "0+50x30", f'{_COUNT}"-32603"}}': "0+10x30"},
        {f'{_COUNT}""}}': "0+50x30", f'{_COUNT}"client-left"}}': "0+50x30"},
    ),
    "McpServerKeepsEnding": (
        {'mcp_proxy_restarts_total{instance="i",mcp_server="s"}': "0+1x30"},
        {'mcp_proxy_restarts_total{instance="i",mcp_server="s"}': "0 0 1x28"},
    ),
    "McpProxyPlacesNearlyGone": (
        {
            'mcp_proxy_streams_left{instance="i"}': "2x30",
            'mcp_proxy_streams{instance="i"}': "62x30",
        },
        {
            'mcp_proxy_streams_left{instance="i"}': "64x30",
            'mcp_proxy_streams{instance="i"}': "0x30",
        },
    ),
    "McpProxyOverloaded": (
        {'mcp_proxy_refused_total{instance="i",reason="overloaded"}': "0+1x30"},
        {'mcp_proxy_refused_total{instance="i",reason="session-ended"}': "0+1x30"},
    ),
    "McpProxyReloadFailed": (
        {'mcp_config_last_reload_successful{instance="i",worker="0"}': "0x30"},
        {'mcp_config_last_reload_successful{instance="i",worker="0"}': "1x30"},
    ),
    "McpProxyStoreFails": (
        {'mcp_proxy_store_errors_total{instance="i"}': "0+1x30"},
        {'mcp_proxy_store_errors_total{instance="i"}': "3x30"},
    ),
    "McpTargetsLeftOut": (
        {'mcp_proxy_targets_left_out{instance="i"}': "1x30"},
        {'mcp_proxy_targets_left_out{instance="i"}': "0x30"},
    ),
}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What Prometheus's own tool says."""
    return subprocess.run(
        [find_program("promtool", "prometheus"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", str(_FILE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(_RULES)} rules found" in done.stdout


def test_each_alert_has_its_series_here_and_its_line_in_the_documents() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    documented = re.findall(r"^\| `(Mcp\w+)` \|", text, re.MULTILINE)
    assert documented == list(_ALERTS) == list(SERIES)


@pytest.mark.parametrize("name", _ALERTS)
def test_an_alert_is_about_metrics_that_there_are(name: str) -> None:
    named = set(
        re.findall(r"\bmcp_(?:proxy|server|config)_[a-z_]+(?=[{)\[])", _ALERTS[name]["expr"])
    )
    known = {metric.name for metric in METRICS}
    assert {each.removesuffix("_count") for each in named} <= known
    assert named or name == "McpProxyDown"


@pytest.mark.parametrize("name", _ALERTS)
@pytest.mark.parametrize("is_raised", [True, False], ids=["raised", "not raised"])
def test_an_alert_is_raised_by_what_it_is_for(name: str, is_raised: bool, tmp_path: Path) -> None:
    series = SERIES[name][0 if is_raised else 1]
    test = {
        "interval": "1m",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
                "eval_time": "30m",
                "exp_samples": [{"labels": "{}", "value": 1 if is_raised else 0}],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(_FILE)], "tests": [test]}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
