"""The command line: the same settings as options, over those of the environment."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from mcp_proxy import __version__
from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import ConfigError
from mcp_proxy.server.cli import main, read_config, read_ctl
from tests.config.samples import NEED_COMMAND, SAMPLES
from tests.support.proxy_process import GUNICORN, children_of
from tests.support.waiting import eventually

ADDRESS = "bind: expected HOST:PORT, with a port up to 65535, or unix:PATH, got "
CPUS = sorted(os.sched_getaffinity(0))
AFFINITY = (
    "cpu_affinity: expected auto, off or CPUs that this process may use "
    f"({', '.join(map(str, CPUS))}), got "
)


def spelled(name: str, dash: str) -> str:
    return "--" + name.replace("_", dash)


# --- options -------------------------------------------------------------------------------------


def test_without_arguments_and_environment_the_defaults_hold() -> None:
    assert read_config([]) == ProxyConfig()


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_is_an_option_in_both_spellings(name: str, dash: str) -> None:
    sample = SAMPLES[name]
    options = [part for word in sample.words for part in (spelled(name, dash), word)]
    command = ["--", "server"] if name in NEED_COMMAND else []
    assert getattr(read_config([*options, *command]), name) == sample.value


def test_an_option_and_its_value_may_be_one_word() -> None:
    made = read_config(["--session-ttl=5", "--redis_prefix=a=b:"])
    assert (made.session_ttl, made.redis_prefix) == (5.0, "a=b:")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-keys", "keys", "status", "-of-a-session"],
        ["status", "-of-a-session", "--api-keys", "keys"],
        ["status", "--api-keys=keys", "-of-a-session"],
    ],
)
def test_what_ctl_is_told_may_stand_before_and_behind_its_options(arguments: list[str]) -> None:
    config, words = read_ctl(arguments)
    assert (config.api_keys, words) == ("keys", ["status", "-of-a-session"])


def test_a_value_of_an_option_is_nothing_that_ctl_is_told() -> None:
    config, words = read_ctl(["keys", "--ctl-socket", "status", "--api-keys", "keys"])
    assert (config.ctl_socket, config.api_keys, words) == ("status", "keys", ["keys"])


def test_a_switch_alone_means_on() -> None:
    assert read_config(["--preserve-host", "--threads", "8"]).preserve_host
    assert not read_config(["--preserve-host", "off"]).preserve_host


def test_the_last_of_several_values_counts() -> None:
    assert read_config(["--threads", "8", "--threads", "9"]).threads == 9


@pytest.mark.parametrize(
    "arguments",
    [
        ["server"],
        ["--no-such", "1"],
        ["--command", "server"],
        ["--threads"],
        ["--thread", "8"],
        ["--redis", "redis://127.0.0.1"],
        ["--threads", "8", "check"],
    ],
)
def test_what_is_no_option_is_refused_with_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(arguments)
    assert caught.value.code == 2
    assert "mcp-wsgi-proxy: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--threads", "3"], "^threads: expected a whole number of at least 4, got '3'$"),
        (["--unknown-session-status", "500"], "^unknown_session_status: "),
        (["--cpu_affinity", "some"], "^cpu_affinity "),
        (["--config", "file", "--", "server"], "only one of"),
        (["--env", "A=1"], "belong to a command"),
        (["--env", "A", "--", "server"], "NAME=VALUE"),
    ],
)
def test_what_an_option_cannot_be_is_a_config_error(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_config(arguments)


# --- the command ---------------------------------------------------------------------------------


def test_everything_after_two_dashes_is_the_command_word_for_word() -> None:
    command = ["npx", "-y", "a b", "--threads", "5", "--", "--version", "", "*", "'"]
    made = read_config(["--threads", "8", "--", *command])
    assert made.command == tuple(command)
    assert made.threads == 8


def test_values_of_env_keep_their_commas() -> None:
    made = read_config(["--env", "A=1,2", "--env", "B=x=y", "--", "server"])
    assert made.servers()[0].env == {"A": "1,2", "B": "x=y"}


# --- options and environment ---------------------------------------------------------------------


def test_an_option_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_PROXY_THREADS", "9")
    monkeypatch.setenv("MCP_PROXY_WORKERS", "2")
    made = read_config(["--threads", "8"])
    assert (made.threads, made.workers) == (8, 2)


def test_a_list_of_options_takes_the_place_of_the_list_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCP_PROXY_ALLOWED_ORIGINS", "http://a,http://b")
    assert read_config([]).allowed_origins == ("http://a", "http://b")
    assert read_config(["--allowed-origins", "http://c"]).allowed_origins == ("http://c",)


@pytest.mark.parametrize(
    "inherited",
    [
        {"COMMAND": "other --flag", "ENV": "A=1", "CWD": "/other"},
        {"CONFIG": "other.json"},
    ],
)
@pytest.mark.parametrize("arguments", [["--", "mine"], ["--config", "mine.json"]])
def test_servers_that_are_named_here_take_the_place_of_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, inherited: dict[str, str], arguments: Sequence[str]
) -> None:
    for name, value in inherited.items():
        monkeypatch.setenv(f"MCP_PROXY_{name}", value)
    monkeypatch.setenv("MCP_PROXY_THREADS", "9")
    made = read_config(arguments)
    assert made.threads == 9
    assert (made.env, made.cwd) == ((), None)
    assert [made.command, made.config].count(None) + [made.command, made.config].count(()) == 1
    assert "mine" in (made.config or made.command[0])


def test_the_command_of_the_environment_can_be_given_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCP_PROXY_COMMAND", "server 'a b'")
    made = read_config(["--env", "A=1", "--cwd", "/srv"])
    assert (made.command, made.env, made.cwd) == (("server", "a b"), ("A=1",), "/srv")


def test_an_unknown_variable_is_refused_on_the_command_line_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCP_PROXY_THREAD", "9")
    with pytest.raises(ConfigError, match=r"MCP_PROXY_THREAD; MCP_PROXY_THREADS is meant,"):
        read_config(["--threads", "8"])


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [[], ["check"]], ids=["serve", "check"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--threads", "3"], "threads: expected a whole number of at least 4, got '3'"),
        (["--config", "{tmp}/absent.json"], "{tmp}/absent.json: No such file or directory"),
        (["--config", "{tmp}"], "{tmp}: Is a directory"),
        (
            ["--cwd", "{tmp}/absent", "--", "server"],
            "cwd: expected a directory that exists, got '{tmp}/absent'",
        ),
        (["--bind", "foo"], f"{ADDRESS}'foo'"),
        (["--bind", ":99999"], f"{ADDRESS}':99999'"),
        (["--bind", "127.0.0.1:0,::1"], f"{ADDRESS}'::1'"),
        (["--bind", "9000"], f"{ADDRESS}'9000'; 127.0.0.1:9000 is meant, it seems"),
        (["--bind", "99999"], f"{ADDRESS}'99999'"),
        (["--cpu-affinity", f"{CPUS[0]},99999"], f"{AFFINITY}'{CPUS[0]},99999'"),
    ],
)
def test_a_configuration_that_cannot_be_served_ends_with_code_2_and_a_sentence(
    first: list[str],
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*first, *(word.replace("{tmp}", str(tmp_path)) for word in arguments)]) == 2
    expected = f"mcp-wsgi-proxy: {complaint}\n".replace("{tmp}", str(tmp_path))
    assert capsys.readouterr() == ("", expected)


def test_the_arguments_of_the_process_are_what_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mcp-wsgi-proxy", "--threads", "3"])
    assert main() == 2
    assert "threads" in capsys.readouterr().err


def test_more_workers_than_can_share_their_sessions_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--workers", "2", "--passing", "off"]) == 2
    assert capsys.readouterr().err.startswith("mcp-wsgi-proxy: 2 workers ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mcp-wsgi-proxy {__version__}\n"


def test_the_help_names_every_setting_and_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    options = re.findall(r"^  (--\S+) (\S+)", printed, re.MULTILINE)
    assert [option for option, _ in options] == [spelled(name, "-") for name in SAMPLES]
    shown = dict(options)
    assert shown["--preserve-host"] == "[on|off]"
    assert shown["--failure-status"] == "http|json-rpc"
    assert shown["--unknown-session-status"] == "400|404|ask"
    assert shown["--stdio-transports"] == "sse|streamable"
    assert (shown["--session-ttl"], shown["--idle-timeout"]) == ("SECONDS", "SECONDS")
    assert (shown["--max-body-bytes"], shown["--threads"]) == ("BYTES", "NUMBER")
    one_line = " ".join(printed.split())
    assert "(default: 7200)" in one_line
    assert "(default: streamable,sse)" in one_line
    assert "(default: off)" in one_line
    assert "((" not in one_line


def test_the_help_has_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    groups = dict(re.findall(r"^([a-zA-Z][\w ]+):\n((?:  .*\n)+)", printed, re.MULTILINE))
    assert list(groups) == [
        *("options", "servers", "sessions", "answers", "limits and processes", "who is served"),
        *("HTTP servers", "access tokens", "log", "gunicorn"),
    ]
    for group, option in (
        ("servers", "--target-url"),
        ("servers", "--stdio-transports"),
        ("sessions", "--session-ttl"),
        ("answers", "--request-timeout"),
        ("limits and processes", "--threads"),
        ("who is served", "--trusted-proxies"),
        ("HTTP servers", "--public-url"),
        ("access tokens", "--jwt-issuer"),
        ("log", "--log-level"),
        ("gunicorn", "--workers"),
    ):
        assert f"  {option} " in groups[group]
    assert "--" not in groups["options"].replace("--help", "").replace("--version", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["python", "-m", "x"], "python -m x (the command of a server stands behind --)"),
        (
            ["server", "--token=hunter2"],
            "server --token=*** (the command of a server ",
        ),
        (["--session-tll", "5"], "--session-tll 5 (--session-ttl is meant, it seems)"),
        (["--port", "80"], "--port 80 (--bind HOST:PORT says where to listen)"),
        (["--host=0.0.0.0"], "--host=0.0.0.0 (--bind HOST:PORT says where to listen)"),
    ],
)
def test_what_is_no_option_is_named_with_what_is_meant(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_config(arguments)
    assert f"unrecognized arguments: {complaint}" in capsys.readouterr().err


def test_the_package_is_the_program() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "mcp_proxy", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert printed.stdout == f"mcp-wsgi-proxy {__version__}\n"


def test_nothing_after_the_dashes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--"]) == 2
    assert "command" in capsys.readouterr().err


def test_a_bad_redis_url_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--redis-url", "http://x:hunter2@h"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("mcp-wsgi-proxy: The URL of Redis (redis_url) cannot be read")
    assert "hunter2" not in complaint


def test_choices_may_be_written_in_capital_letters() -> None:
    made = read_config(["--log-level", "INFO", "--stdio-transports", "SSE,Streamable"])
    assert (made.log_level, made.stdio_transports) == ("info", ("sse", "streamable"))


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("CWD", "/no/such/directory", "cwd: expected a directory"),
        ("BIND", ":99999", "bind: expected HOST:PORT"),
        ("CPU_AFFINITY", "99999", "cpu_affinity: expected auto, off or CPUs"),
    ],
)
def test_gunicorn_is_not_started_with_what_cannot_be_here(
    setting: str, value: str, complaint: str
) -> None:
    settings = {"MCP_PROXY_COMMAND": "server", "MCP_PROXY_BIND": "127.0.0.1:0"}
    refused = subprocess.run(
        [sys.executable, *GUNICORN],
        env={**os.environ, **settings, f"MCP_PROXY_{setting}": value},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert refused.returncode != 0
    assert complaint in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("missing", ["gevent", "packaging"])
@pytest.mark.parametrize("way", [["mcp_proxy"], [*GUNICORN[1:]]], ids=["command", "gunicorn"])
def test_without_gevent_a_sentence_has_the_pip_line(
    tmp_path: Path, missing: str, way: list[str]
) -> None:
    """Without pytest, which brings packaging along, as in a fresh environment."""
    (tmp_path / "sitecustomize.py").write_text(_HIDES.format(missing))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {"PYTHONPATH": path, "MCP_PROXY_WORKER_CLASS": "gevent"}
    refused = subprocess.run(
        [sys.executable, "-m", *way],
        env={**os.environ, **environment, "MCP_PROXY_BIND": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert refused.returncode != 0
    assert f"needs {missing}: pip install 'mcp-wsgi-proxy[gevent]'" in refused.stderr
    assert "Traceback" not in refused.stderr


_HIDES = """
import sys
from importlib.abc import MetaPathFinder

class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{}":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(
    ("closed", "descriptors"),
    [("<&-", [0]), (">&-", [1]), ("2>&-", [2]), ("<&- >&- 2>&-", [0, 1, 2])],
)
def test_who_starts_it_may_have_closed_the_standard_streams(
    closed: str, descriptors: list[int], tmp_path: Path
) -> None:
    """Their numbers are nobody's: what a library prints would go to a client or another worker."""
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "mcp_proxy", "--bind", f"unix:{path}", "--", sys.executable]
    run = ["bash", "-c", f'exec "$@" {closed}', "bash", *command]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(path.exists, 20)
            with closing(socket.socket(socket.AF_UNIX)) as client:
                client.connect(str(path))
                client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert client.makefile("rb").read().startswith(b"HTTP/1.0 200 OK\r\n")
            for pid in (process.pid, *children_of(process.pid)):
                found = [os.readlink(f"/proc/{pid}/fd/{number}") for number in descriptors]
                assert found == [os.devnull] * len(descriptors), pid
        finally:
            process.terminate()
        assert process.wait(20) == 0
