"""The page of an operator, and what stands in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from werkzeug.test import Client

from mcp_proxy import Principal, ProxyConfig, create_app, metrics
from mcp_proxy.app import Application
from mcp_proxy.metrics import MetricsPage
from mcp_proxy.monitoring.status import WorkerPart, document, html, html_headers, write
from mcp_proxy.recent import MAX_FAILURES, MAX_SESSIONS, Recent
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[31m\u202e'


@pytest.fixture(autouse=True)
def page() -> Iterator[MetricsPage]:
    """Where this process counts while a test runs."""
    made = MetricsPage(3)
    metrics.use(made.take(0))
    yield made
    metrics.use(None)


@pytest.fixture
def app() -> Iterator[Application]:
    with create_app(ProxyConfig(command=SCRIPTED)) as made:
        yield made


def status_of(app: Application) -> Any:
    answer = Client(app.monitoring).get("/status.json", base_url="http://127.0.0.1")
    assert answer.status_code == 200
    return answer.json


# --- what it says --------------------------------------------------------------------------------


def test_it_shows_servers_workers_and_sessions(app: Application) -> None:
    client = McpClient(WsgiFront(app), "/mcp").open()
    session = client.session
    assert session is not None
    client.call("tools/call", {"name": "echo"})
    told = status_of(app)
    (server,), (worker,), (shown,) = told["servers"], told["workers"], told["sessions"]
    assert server["name"] == "default"
    assert server["what"].endswith("scripted.py")
    assert server["calls"] == 3
    assert (worker["worker"], worker["children"], worker["sessions"]) == (0, 1, 1)
    assert shown["id"] == session[-8:]
    assert session not in json.dumps(told), "a session id is a credential"
    assert shown["calls"] == 3
    client.delete()
    assert status_of(app)["sessions"] == []


def test_a_session_is_shown_by_its_whole_id_alone(app: Application, page: MetricsPage) -> None:
    client = McpClient(WsgiFront(app), "/mcp").open()
    session = client.session or ""
    for number in range(MAX_SESSIONS):
        metrics.use_own().recent.note_call(f"other-{number:08d}", "default")

    def asked(session_id: str) -> Any:
        def look() -> Any:
            headers = {"Mcp-Session-Id": session_id}
            answer = Client(app.monitoring).get(
                "/status.json", base_url="http://127.0.0.1", headers=headers
            )
            found = answer.json["asked"]  # type: ignore[index]
            return found if found["outcome"] != "pending" else None

        return eventually(look, 20)

    app.monitoring.keep()
    shown = asked(session)["session"]
    assert (shown["id"], shown["server"]) == (session[-8:], "default")
    assert shown["backend"].startswith("worker://")
    assert "test" in shown["client"]
    for unknown in (session[-8:], "never-issued", session + "0"):
        assert asked(unknown) == {"outcome": "unknown", "reason": "", "session": None}
    assert "asked" not in status_of(app)


@pytest.mark.parametrize("limit", [None, "3/minute"])
def test_nobody_elses_requests_are_shown_for_a_session(limit: str | None) -> None:
    def named(environ: WSGIEnvironment) -> Principal:
        return Principal(environ["HTTP_X_USER"])

    config = ProxyConfig(command=SCRIPTED, rate_limit=limit)
    with create_app(config, authenticate=named) as app:
        client = McpClient(WsgiFront(app))
        client.initialize(**{"X-User": "alice"})
        session = client.session or ""
        for made_up in (session, "x" * 32, session[:-8] + "00000000", "y" * 32):
            headers = {"X-User": "bob", "Mcp-Session-Id": made_up}
            ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
            assert "result" not in Client(app).post("/mcp", json=ping, headers=headers).text
        (shown,) = status_of(app)["sessions"]
        assert (shown["id"], shown["calls"], shown["error"]) == (session[-8:], 1, "")


def test_a_server_that_exits_is_a_failure_with_the_end_of_its_stderr(app: Application) -> None:
    client = McpClient(WsgiFront(app), "/mcp").open()
    client.call("complain", {"lines": 3, "length": 20})
    client.call("die")
    told = status_of(app)
    (failure,) = told["failures"]
    assert failure["server"] == "default"
    assert "exit code 1" in failure["reason"]
    assert failure["stderr"] == ["!" * 20] * 3
    assert "exit code 1" in told["sessions"][0]["error"]


def test_a_server_that_cannot_be_started_is_a_failure() -> None:
    with create_app(ProxyConfig(command=("/no/such/server",))) as app:
        McpClient(WsgiFront(app), "/mcp").initialize()
        (failure,) = status_of(app)["failures"]
        assert failure["reason"] == "The server cannot be started: No such file or directory"


def test_secrets_of_a_command_are_not_shown() -> None:
    command = (sys.executable, "server.py", "--api-key", "s3cr3t-value")
    with create_app(ProxyConfig(command=command)) as app:
        assert "s3cr3t" not in json.dumps(status_of(app))


def test_workers_write_only_while_somebody_looks(app: Application, page: MetricsPage) -> None:
    app.monitoring.write()
    assert page.texts.read(0) == b""
    status_of(app)
    assert page.texts.read(0) != b""


def test_it_is_for_our_own_hosts_and_origins(app: Application) -> None:
    for path in ("/status", "/status.json", "/"):
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            answer = Client(app.monitoring).get(path, headers=headers)
            assert answer.status_code == 403, (path, headers)


def test_the_main_address_does_not_serve_it_unasked() -> None:
    with create_app(ProxyConfig(command=SCRIPTED, metrics=True)) as app:
        for path in ("/status", "/status.json", "/"):
            assert Client(app).get(path, base_url="http://127.0.0.1").status_code == 404


# --- of several workers --------------------------------------------------------------------------


def part(counters: metrics.Counters, failures: int = 0) -> WorkerPart:
    for number in range(failures):
        counters.recent.note_failure("s", f"failure {number} {HOSTILE}", [HOSTILE * 100] * 50)
    failed = counters.recent.failures()
    return WorkerPart(1000 + counters.number, 0.0, 64, {"sessions": 1}, [], [], failed)


def test_the_parts_of_all_workers_are_put_together(page: MetricsPage) -> None:
    for slot in range(3):
        counters = page.take(slot)
        counters.recent.note_call(f"session-{slot:08d}", "s", HOSTILE)
        write(counters, part(counters))
    page.free(1)
    told = json.loads(document(page, "1"))
    assert [worker["pid"] for worker in told["workers"]] == [1000, 1002]
    assert {session["worker"] for session in told["sessions"]} == {0, 2}


def test_workers_that_have_not_said_how_they_are_are_counted(page: MetricsPage) -> None:
    taken = [page.take(slot) for slot in range(3)]
    for counters in taken[:2]:
        write(counters, part(counters))
    taken[0].say(metrics.Health.READY)
    assert json.loads(document(page, "1"))["silent"] == 2


def test_much_that_was_said_is_cut_until_it_fits(page: MetricsPage) -> None:
    counters = page.take(0)
    for number in range(1000):
        counters.recent.note_call(f"session-{number:08d}", "s" * 100, HOSTILE * 100, HOSTILE * 100)
    write(counters, part(counters, failures=100))
    told = json.loads(document(page, "1"))
    assert len(told["failures"]) <= MAX_FAILURES
    assert told["workers"][0]["pid"] == 1000


# --- what is noted -------------------------------------------------------------------------------


def test_the_latest_sessions_are_remembered_and_the_oldest_go() -> None:
    recent = Recent()
    for number in range(MAX_SESSIONS + 10):
        recent.note_call(f"{number:08d}", "s")
    recent.note_call("00000100", "s", error="it failed")
    latest = recent.sessions(2)
    assert [note.id for note in latest] == ["00000100", f"{MAX_SESSIONS + 9:08d}"]
    assert (latest[0].calls, latest[0].error) == (2, "it failed")
    assert len(recent.sessions(1000)) == MAX_SESSIONS


def test_what_others_say_is_one_visible_line() -> None:
    recent = Recent()
    recent.note_call("x" * 8, "s", client=HOSTILE * 100 + "\n")
    recent.note_failure("s", HOSTILE, [HOSTILE, "\n" * 1000])
    (note,), (failure,) = recent.sessions(1), recent.failures()
    for text in (note.client, failure.reason, *failure.stderr):
        assert text.isprintable()
        assert len(text) < 400


# --- the page ------------------------------------------------------------------------------------


def test_the_page_loads_and_runs_nothing_but_what_is_written_in_it() -> None:
    text, headers = html().decode(), dict(html_headers())
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (written,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"<(link|img|iframe)|\bsrc=|url\(|@import|\bon\w+=|style=", text)
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert markup not in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_is_served(app: Application) -> None:
    for path in ("/status", "/"):
        answer = Client(app.monitoring).get(path, base_url="http://127.0.0.1")
        assert answer.status_code == 200
        assert answer.data == html()


# --- at the main address -------------------------------------------------------------------------


@pytest.fixture
def counting() -> Iterator[Application]:
    """An application whose main address has the page, for who knows the token."""
    with create_app(ProxyConfig(command=SCRIPTED, metrics=True)) as made:
        made.monitoring.token = "known"
        yield made


def status_code(app: Application, path: str, **headers: str) -> int:
    environ = {"SERVER_NAME": "127.0.0.1", "REMOTE_ADDR": "127.0.0.1"}
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return (
        Client(app)
        .get(path, base_url="http://127.0.0.1", headers=given, environ_overrides=environ)
        .status_code
    )


@pytest.mark.parametrize("path", ["/status", "/status.json"])
def test_at_the_main_address_the_page_is_for_who_knows_the_token(
    counting: Application, path: str
) -> None:
    assert status_code(counting, f"{path}?token=known") == 200
    for query in ("", "?token=", "?token=unknown", "?token=k%C3%A4"):
        assert status_code(counting, path + query) == 404
    counting.monitoring.token = ""
    assert status_code(counting, f"{path}?token=") == 404


@pytest.mark.parametrize(
    "headers",
    [{"X_Forwarded_For": "10.0.0.1"}, {"X_Forwarded_Proto": "https"}, {"Via": "1.1 a"}],
    ids=str,
)
def test_behind_another_proxy_the_page_is_not_there(
    counting: Application, headers: dict[str, str]
) -> None:
    assert status_code(counting, "/status?token=known", **headers) == 404
    assert status_code(counting, "/", Accept="text/html", **headers) == 404


@pytest.mark.parametrize(
    "setting",
    [
        {"public_url": "https://a.example"},
        {"allowed_hosts": ("127.0.0.1",)},
        {"allowed_origins": ("http://a.example",)},
        {"trusted_proxies": ("127.0.0.1",)},
    ],
    ids=str,
)
def test_where_others_come_from_elsewhere_the_page_is_not_there(setting: Any) -> None:
    with create_app(ProxyConfig(command=SCRIPTED, metrics=True, **setting)) as app:
        app.monitoring.token = "known"
        assert status_code(app, "/status?token=known") == 404
        assert status_code(app, "/", Accept="text/html") == 404


# --- the root ------------------------------------------------------------------------------------


def test_a_browser_is_told_at_the_root_where_the_endpoints_are(tmp_path: Any) -> None:
    entry = {"command": SCRIPTED[0], "args": list(SCRIPTED[1:])}
    http = {"url": "http://127.0.0.1:9/mcp"}
    file = tmp_path / "servers.json"
    file.write_text(json.dumps({"mcpServers": {"one": entry, "two": http}}))
    with create_app(ProxyConfig(config=str(file))) as app:
        answer = Client(app).get("/", base_url="http://127.0.0.1", headers={"Accept": "text/html"})
        assert answer.status_code == 200
        found = re.findall(r"<dd>(.*?)</dd>", answer.text)
        assert found == ["/servers/one/mcp", "/servers/one/sse", "/servers/two/mcp", "/readyz"]
        (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in answer.headers["Content-Security-Policy"]


def test_at_the_root_there_is_nothing_for_anybody_else(counting: Application) -> None:
    assert status_code(counting, "/", Accept="text/html") == 200
    assert status_code(counting, "/") == 404
    assert status_code(counting, "/", Accept="text/html", Origin="http://evil.example") == 403
    posted = Client(counting).post(
        "/", base_url="http://127.0.0.1", headers={"Accept": "text/html"}
    )
    assert posted.status_code == 404
