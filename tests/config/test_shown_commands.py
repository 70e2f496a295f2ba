"""What is printed of a command shows no argument that looks like a secret."""

from __future__ import annotations

import re
import sys
from contextlib import closing

import pytest

from mcp_proxy.config import ProxyConfig
from mcp_proxy.errors import BackendNotStarted, ConfigError
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.server.check import check
from mcp_proxy.servers import StdioServer
from mcp_proxy.shown_commands import shown_command

TOKEN = "hunter2-of-mine"
RANDOM = "q7Rk2mZx9LwPb4Tn8VsY"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--token", TOKEN], "--token ***"),
        (["--token", "-x"], "--token ***"),
        (["--token", "--verbose"], "--token --verbose"),
        (["--api-key", TOKEN, "--port", "80"], "--api-key *** --port 80"),
        ([f"--openai_api_key={TOKEN}"], "--openai_api_key=***"),
        ([f"--password={TOKEN} and more"], "--password=***"),
        ([f"--db.passwd={TOKEN}"], "--db.passwd=***"),
        (["-token", TOKEN], "-token ***"),
        ([f"key={TOKEN}"], "key=***"),
        ([f"apikey:{TOKEN}"], "apikey:***"),
        (["-H", f"X-Any: {TOKEN}"], "-H ***"),
        (["--header", f"Authorization: Bearer {TOKEN}"], "--header ***"),
        ([f"Authorization: Bearer {TOKEN}"], "'Authorization: ***'"),
        (["Bearer", TOKEN], "Bearer ***"),
        ([f"say bearer {TOKEN}"], "'say bearer ***'"),
        (["-e", f"any={TOKEN}"], "-e any=***"),
        (["--env", f"ANY={TOKEN}"], "--env ANY=***"),
        ([f"--env=ANY={TOKEN}"], "--env=ANY=***"),
        ([f"-eANY={TOKEN}"], "-eANY=***"),
        ([f"ANY={TOKEN} x"], "ANY=***"),
        (["-c", f"exec env ANY={TOKEN} x --token {TOKEN}"], "-c 'exec env ANY=*** x --token ***'"),
        ([f'{{"apiKey": "{TOKEN}", "port": 80}}'], """'{"apiKey": "***", "port": 80}'"""),
        ([f"postgres://me:{TOKEN}@h/db"], "postgres://***@h/db"),
        ([f"http://h/mcp?t={TOKEN}"], "'http://h/mcp?***'"),
        ([RANDOM], "***"),
        ([f"sk-live_{RANDOM}"], "***"),
        ([f"--any={RANDOM}"], "--any=***"),
        (["0f8fad5b-d9cb-469f-a165-70867728950e"], "***"),
        (["d41d8cd98f00b204e9800998ecf8427e"], "***"),
        (["AKIAIOSFODNN7EXAMPLE"], "***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(arguments: list[str], shown: str) -> None:
    assert shown_command(["server", *arguments, "-v"]) == f"server {shown} -v"


@pytest.mark.parametrize(
    "command",
    [
        "npx -y @modelcontextprotocol/server-everything@2026.1.14",
        "python -m mcp_server_time --local-timezone=Europe/Berlin",
        "uvx --from git+https://github.com/some/repository some-server --port 8080",
        "docker run -i --rm -v /srv/Files2026/of-the-Company:/data mcp/filesystem:1.2 /data",
        "/opt/Python3.11-of-the-Company/bin/python -I /home/me/MyServers2026-and-more/server.py",
        "server 'a b' --mode=read-only x=1",
    ],
)
def test_what_does_not_is_shown_as_a_shell_would_take_it(command: str) -> None:
    config = ProxyConfig.from_env({"MCP_PROXY_COMMAND": command})
    assert shown_command(config.command) == command


def test_check_prints_no_secret_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    repeats = "import sys; sys.exit(f'unknown: {sys.argv[2]}, {sys.argv[3]}')"
    command = (sys.executable, "-c", repeats, "--token", TOKEN, f"--key={RANDOM}")
    assert check(ProxyConfig(command=command)) == 1
    printed = capsys.readouterr().out
    assert "unknown: ***, --key=***" in printed
    assert not re.search(f"{TOKEN}|{RANDOM}", printed)
    assert printed.count("--token") == 2  # in the configuration, and beside the failure


def test_the_log_shows_no_secret_of_a_command(caplog: pytest.LogCaptureFixture) -> None:
    server = StdioServer("x", ("/no/such/program", "--token", TOKEN))
    with closing(Supervisor(Replica())) as supervisor, pytest.raises(BackendNotStarted):
        supervisor.spawn(server, 1024, lambda status: None)
    assert "cannot start /no/such/program --token ***: " in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("command", [f"server --token={TOKEN}", ["server", f"--token={TOKEN}", 1]])
def test_a_complaint_shows_no_secret_of_a_command(command: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ProxyConfig(command=command)  # type: ignore[arg-type]
    assert TOKEN not in str(caught.value)


def test_a_configuration_shows_no_secret_of_a_command() -> None:
    made = ProxyConfig(command=("server", "--token", TOKEN, "-v"))
    assert repr(made) == "ProxyConfig(command=('server', '--token', '***', '-v'))"
