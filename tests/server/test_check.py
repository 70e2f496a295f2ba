"""`mcp-wsgi-proxy check`: every server is initialized, every failure told, no secret printed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from mcp_proxy import ProxyConfig
from mcp_proxy.auth import access_tokens
from mcp_proxy.config import from_values
from mcp_proxy.server.check import check, check_offline
from tests.servers.http_backend import HttpBackend, Turn, reply, silent
from tests.servers.old_server import OldServer
from tests.support.front import SCRIPTED
from tests.support.modern_client import server_of
from tests.support.outbound import OutboundProxy
from tests.support.redis_server import RedisServer
from tests.support.sse_servers import SseServer, python_2
from tests.support.tls import Certificates

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def backend() -> Iterator[HttpBackend]:
    with HttpBackend() as made:
        yield made


def checked(printed: Printed, **values: object) -> tuple[int, str]:
    """The exit code, and what was printed."""
    code = check(from_values(values))
    return code, printed.readouterr().out


def test_an_http_server_is_initialized_and_its_session_ended(
    backend: HttpBackend, capsys: Printed
) -> None:
    code, said = checked(capsys, target_url=[f"{backend.url}/mcp"])
    assert code == 0
    assert re.search(r"ok +server default +http +backend \S+, revision 2025-11-25 \(http://", said)
    assert len(backend.ended) == 1
    assert not backend.sessions


def test_an_answer_may_be_an_event_stream(backend: HttpBackend, capsys: Printed) -> None:
    def answer(turn: Turn) -> None:
        result = {"protocolVersion": "2025-06-18", "serverInfo": {"name": "s", "version": "7"}}
        said = {"jsonrpc": "2.0", "method": "notifications/message", "params": {}}
        found = {"jsonrpc": "2.0", "id": turn.seen.json["id"], "result": result}
        events = "".join(f"data: {json.dumps(each)}\n\n" for each in (said, found))
        turn.reply(200, events.encode(), "Content-Type: text/event-stream")

    backend.rpc["initialize"] = answer
    code, said = checked(capsys, target_url=[f"{backend.url}/mcp"])
    assert (code, "s 7, revision 2025-06-18" in said) == (0, True)


def test_headers_are_sent_and_no_secret_is_printed(backend: HttpBackend, capsys: Printed) -> None:
    def refuse(turn: Turn) -> None:
        assert turn.seen.header("Authorization") == "Bearer hunter22"
        turn.error(200, -32000, f"no: {turn.seen.header('Authorization')} {turn.seen.target}")

    backend.rpc["initialize"] = refuse
    url = f"{backend.url}/mcp?key=swordfish"
    changes = ["Authorization: Bearer hunter22"]
    code, said = checked(capsys, target_url=[url], forward_headers=changes)
    assert code == 1
    assert "FAIL  server default" in said
    assert "refused initialize" in said
    assert "hunter22" not in said
    assert "swordfish" not in said


def test_a_certificate_that_is_refused_is_told(tmp_path: Path, capsys: Printed) -> None:
    with HttpBackend(tls=Certificates(tmp_path).for_servers()) as backend:
        code, said = checked(capsys, target_url=[f"{backend.url}/mcp"])
    assert code == 1
    assert re.search("FAIL +server default +http +The server's certificate or TLS", said)


@pytest.mark.parametrize(("status", "code"), [(401, 0), (403, 1), (500, 1)])
def test_a_status_is_told(backend: HttpBackend, capsys: Printed, status: int, code: int) -> None:
    backend.rpc["initialize"] = lambda turn: turn.reply(status)
    found, said = checked(capsys, target_url=[f"{backend.url}/mcp"])
    assert (found, str(status) in said) == (code, True)


def test_credentials_of_ours_that_are_refused_are_a_failure(
    backend: HttpBackend, capsys: Printed
) -> None:
    backend.rpc["initialize"] = lambda turn: turn.reply(401)
    changes = ["authorization: Bearer hunter22"]
    assert checked(capsys, target_url=[backend.url], forward_headers=changes)[0] == 1


@pytest.mark.parametrize("path", ["", "/sse"])
def test_a_server_of_2024_11_05_is_initialized(capsys: Printed, path: str) -> None:
    with SseServer(python_2, "older") as server:
        code, said = checked(capsys, target_url=[f"{server.url}{path}"])
    assert code == 0, said
    assert "older" in said


def test_a_server_behind_an_outbound_proxy_is_initialized(
    backend: HttpBackend, capsys: Printed
) -> None:
    with OutboundProxy({"server.invalid": backend.port}, "user:secret-word") as outbound:
        values = {"target_url": ["http://server.invalid/mcp"], "backend_proxy": outbound.url}
        assert checked(capsys, **values)[0] == 0
        outbound.password = "user:another-word"
        code, said = checked(capsys, **values)
        assert code == 1
        assert "407" in said
        assert "secret-word" not in said


def test_every_server_is_tried(backend: HttpBackend, capsys: Printed, tmp_path: Path) -> None:
    python, *arguments = SCRIPTED
    entries = {
        "absent": {"command": "no-such-program"},
        "broken": {"command": python, "args": [*arguments, "--die-on-initialize"]},
        "closed": {"url": "http://127.0.0.1:1/mcp"},
        "good": {"command": python, "args": arguments},
        "http": {"url": f"{backend.url}/mcp"},
    }
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": entries}))
    code, said = checked(capsys, config=str(file))
    assert code == 1
    found = dict(re.findall(r"^(\S+) +server (\S+)", said, re.MULTILINE)[i][::-1] for i in range(5))
    assert found == {
        "absent": "FAIL",
        "broken": "FAIL",
        "closed": "FAIL",
        "good": "ok",
        "http": "ok",
    }


@pytest.mark.parametrize("era", ["legacy", "modern"])
@pytest.mark.parametrize(
    ("settings", "may_warn"),
    [
        ({"bind": "0.0.0.0:0"}, True),
        ({"bind": "127.0.0.1:0"}, False),
        ({"bind": "127.0.0.1:0", "allowed_hosts": ("www.example.com",)}, True),
        ({"bind": "0.0.0.0:0", "stateless_children": "one"}, False),
    ],
)
def test_who_falls_back_to_sessions_is_told(
    capsys: Printed, era: str, settings: dict[str, object], may_warn: bool
) -> None:
    code, said = checked(capsys, command=server_of(era), **settings)
    assert code == 0
    warned = re.search(r"^WARN +server default +stdio +(knows sessions alone)", said, re.MULTILINE)
    assert (warned is not None) is (may_warn and era == "legacy"), said


# Says what it got, in lines that are no messages, and exits.
_LOUD = """
import os, sys
said = os.environ["KEY"] + " \x1b[31m\x07 " + sys.argv[1]
print(said, flush=True)
print(said, file=sys.stderr, flush=True)
sys.exit(3)
"""


def test_what_a_server_says_is_masked_and_rings_no_bell(capfd: Printed, tmp_path: Path) -> None:
    """Also where the log of this process says it, on stderr."""
    arguments = ["-c", _LOUD, "--token=fishsword"]
    entry = {"command": sys.executable, "args": arguments, "env": {"KEY": 'sword"fish ü'}}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"loud": entry}}))
    assert check(from_values({"config": str(file)})) == 1
    out, err = capfd.readouterr()
    assert "stderr: ***" in out
    assert "a line on stdout is no message" in err
    for said in (out, err):
        assert "sword" not in said
        assert "\\x1b[31m\\x07" in said
        assert not {"\x1b", "\x07"} & set(said)


def test_the_names_that_a_server_gives_itself_are_masked_too(
    backend: HttpBackend, capsys: Printed
) -> None:
    def answer(turn: Turn) -> None:
        info = {"name": "\x1b]0;title\x07", "version": turn.seen.header("X-Key")}
        turn.result({"protocolVersion": "2025-06-18", "serverInfo": info})

    backend.rpc["initialize"] = answer
    code, said = checked(capsys, target_url=[backend.url], forward_headers=['X-Key: hunt"er22'])
    assert code == 0
    assert "\\x1b]0;title\\x07 ***, revision" in said
    assert "\x1b" not in said


def test_an_error_that_repeats_a_secret_in_json_is_masked(
    backend: HttpBackend, capsys: Printed
) -> None:
    backend.rpc["initialize"] = lambda turn: turn.error(200, -32000, turn.seen.header("X-Key"))
    said = checked(capsys, target_url=[backend.url], forward_headers=['X-Key: hunt"er22'])[1]
    assert "refused initialize" in said
    assert "er22" not in said


def test_passwords_in_the_options_of_the_url_of_redis_are_masked(
    backend: HttpBackend, capsys: Printed
) -> None:
    backend.rpc["initialize"] = lambda turn: turn.error(200, -32000, "no: hunter22")
    url = "redis+sentinel://127.0.0.1:1/main?sentinel_password=hunter22"
    said = checked(capsys, target_url=[backend.url], redis_url=url)[1]
    assert "no: ***" in said


def test_what_is_waited_for_is_said_at_once_and_for_how_long(
    capfd: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_proxy.server.check.ANSWER_TIME", 0.5)
    waiting = [sys.executable, "-c", "input(); input()", "--token=hunter22"]
    assert check(from_values({"command": waiting})) == 1
    out, err = capfd.readouterr()
    assert re.search(r"^server default: starting .*\*\*\*.*, up to 0.5 seconds", err, re.MULTILINE)
    assert "did not answer within 0.5 seconds" in out


def test_the_question_to_an_http_server_is_said_at_once(
    backend: HttpBackend, capfd: Printed
) -> None:
    check(from_values({"target_url": [f"{backend.url}/mcp?key=hunter22"]}))
    wanted = f"server default: asking {backend.url}/mcp, up to 60 seconds"
    assert wanted in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("is_stdio", [True, False])
def test_the_time_limit_of_calls_is_one_for_check_too(
    is_stdio: bool, backend: HttpBackend, capfd: Printed
) -> None:
    backend.rpc["initialize"] = silent
    server: Any = {"command": [sys.executable, "-c", "input(); input()"]}
    asked = server if is_stdio else {"target_url": [backend.url]}
    assert check(from_values({**asked, "request_timeout": 0.5})) == 1
    out, err = capfd.readouterr()
    assert "up to 0.5 seconds" in err
    assert "did not answer within 0.5 seconds" in out


def test_the_time_limit_of_a_server_in_the_file_is_one_for_check_too(
    tmp_path: Path, capfd: Printed
) -> None:
    entry = {"command": sys.executable, "args": ["-c", "input(); input()"], "timeout": 0.5}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"slow": entry}}))
    assert check(from_values({"config": str(file)})) == 1
    assert "did not answer within 0.5 seconds" in capfd.readouterr().out


def test_who_has_waited_enough_gets_no_traceback() -> None:
    waiting = [sys.executable, "-c", "input(); input()"]
    command = [sys.executable, "-m", "mcp_proxy", "check", "--", *waiting]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"server default: starting")
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(30) == 130


def test_extras_that_settings_need_and_that_are_missing_are_named(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it says that all is in order, and the proxy does not start."""
    config = from_values(
        {
            "admin_bind": "127.0.0.1:9100",
            "jwt_issuer": "https://id.example",
            "public_url": "https://mcp.example",
            "rate_limit": "5/second",
            "rate_limit_scope": "deployment",
            "redis_url": "redis://127.0.0.1",
            "traces": True,
        }
    )
    assert check_offline(config) == 0
    capsys.readouterr()

    def lacking(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", lacking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(access_tokens, "find_spec", lambda _: None)
    assert check_offline(config) == 1
    said = capsys.readouterr().out
    for extra in ("auth", "limits", "metrics", "otel"):
        assert re.search(rf"^FAIL +extras .*pip install 'mcp-wsgi-proxy\[{extra}\]'", said, re.M)


def test_a_store_that_takes_no_writes_is_no_store(capsys: Printed) -> None:
    code, said = checked(
        capsys, redis_url="redis://:hunter22@127.0.0.1:1", command=[sys.executable, "-c", ""]
    )
    assert code == 1
    assert "FAIL  sessions" in said
    assert "hunter22" not in said


def test_a_store_that_drops_sessions_is_a_warning(
    own_server: RedisServer, admin: redis.Redis, capsys: Printed
) -> None:
    given: dict[str, object] = {
        "redis_url": own_server.url,
        "command": [sys.executable, "-c", ""],
    }
    admin.config_set("maxmemory-policy", "volatile-lru")
    assert re.search("^ok +sessions", checked(capsys, **given)[1], re.MULTILINE)
    admin.config_set("maxmemory", "100mb")
    said = checked(capsys, **given)[1]
    assert re.search(r"^WARN +sessions .*\(maxmemory-policy volatile-lru\)", said, re.MULTILINE)
    admin.config_set("maxmemory-policy", "noeviction")
    assert re.search("^ok +sessions", checked(capsys, **given)[1], re.MULTILINE)


def test_memory_that_workers_do_not_share_is_not_in_order(
    backend: HttpBackend, capsys: Printed
) -> None:
    code, said = checked(capsys, target_url=[f"{backend.url}/mcp"], workers=3)
    assert code == 1
    rows = [line.split(maxsplit=2) for line in said.splitlines()]
    assert [verdict for verdict, what, _ in rows if what in ("workers", "sessions")] == ["FAIL"] * 2
    assert "the one worker" not in said


def test_a_directory_of_sessions_is_looked_at(tmp_path: Path, capsys: Printed) -> None:
    kept = tmp_path / "sessions"
    command = [sys.executable, "-c", ""]
    assert "ok    session_dir " in checked(capsys, command=command, session_dir=str(kept))[1]
    kept.chmod(0o755)
    said = checked(capsys, command=command, session_dir=str(kept))[1]
    assert "FAIL  session_dir " in said
    assert f"chmod 700 {kept}" in said


def test_a_configuration_shows_no_query_of_a_target() -> None:
    made = ProxyConfig(target_url=("http://h/mcp?key=swordfish",))
    assert "swordfish" not in repr(made)
    assert "http://h/mcp?***" in repr(made)
    assert "swordfish" not in repr(made.servers())


def test_a_page_for_browsers_does_not_hide_the_older_wire(capsys: Printed) -> None:
    with OldServer("older") as server:
        server.on("POST", "/mcp", reply(405))
        server.on("GET", "/mcp", reply(302, b"", "Location: https://elsewhere.invalid/"))
        checked(capsys, target_url=[server.url])
        assert [seen.target for seen in server.seen if seen.method == "GET"] == ["/mcp", "/sse"]


def test_a_redirect_that_is_not_followed_is_told(backend: HttpBackend, capsys: Printed) -> None:
    where = "Location: http://elsewhere.invalid/a?key=swordfish"
    backend.on("POST", "/mcp", reply(307, b"", where))
    code, said = checked(capsys, target_url=[backend.url])
    assert code == 1
    assert "The server redirects (307) to http://elsewhere.invalid/a, which is not" in said
    assert "swordfish" not in said
