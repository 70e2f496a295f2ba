"""The access line: who has asked for what, where it was answered, how long that took, and how it
has ended.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy import Principal, ProxyConfig, TransparentProxy, create_app
from mcp_proxy.app import Application
from mcp_proxy.edge import logs
from mcp_proxy.wire.outcomes import Outcome, outcomes_in
from tests.support.front import SCRIPTED, McpClient, WsgiFront
from tests.support.modern_client import PREFIX, ModernClient
from tests.support.redis_server import RedisServer
from tests.support.sse_client import SseClient

_OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"

Fields = dict[str, Any]


class Lines:
    """The access lines of this process, as their fields and as texts."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def records(self) -> list[logging.LogRecord]:
        return [each for each in self._caplog.records if each.name == "mcp_proxy.access"]

    def last(self) -> Fields:
        """The last line, of the form for programs."""
        found: Fields = json.loads(logs.JsonFormatter().format(self.records[-1]))
        return found

    def last_text(self) -> str:
        """The last line, of the form for people."""
        return logs.TextFormatter().format(self.records[-1])


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "mcp_proxy.access")
    return Lines(caplog)


@pytest.fixture
def app() -> Iterator[Application]:
    with create_app(ProxyConfig(command=SCRIPTED)) as made:
        yield made


def test_a_line_says_who_what_and_where(app: Application, lines: Lines) -> None:
    client = McpClient(WsgiFront(app)).open()
    client.result("tools/call", {"name": "echo"})
    found = lines.last()
    assert (found["rpc"], found["tool"], found["client_name"]) == ("tools/call", "echo", "test 1")
    assert (found["server"], found["way"]) == ("default", "local")
    assert re.fullmatch(r"pid:[0-9]+", found["backend"])
    assert found["session"] == (client.session or "")[-8:]
    assert (found["status"], found["outcome"], found["code"]) == (200, "ok", None)
    assert found["ms"] >= 0
    text = lines.last_text()
    assert ' server="default" tool="echo" client_name="test 1"' in text
    assert "outcome" not in text
    assert "way" not in text


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_the_code_of_an_error_in_a_200_is_in_the_line(
    app: Application, lines: Lines, accept: str
) -> None:
    client = McpClient(WsgiFront(app)).open()
    answer = client.call("fail", {"code": -32602}, Accept=accept)
    error = answer.error()
    answer.close()
    found = lines.last()
    assert found["status"] == 200
    assert (found["outcome"], found["code"]) == (str(error["code"]), error["code"])
    assert f"outcome={error['code']}" in lines.last_text()


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_failure_is_told_by_its_kind_and_its_code(
    app: Application, lines: Lines, accept: str
) -> None:
    client = McpClient(WsgiFront(app)).open()
    answer = client.call("die", Accept=accept)
    assert answer.error()["code"] == -32000
    answer.close()
    found = lines.last()
    assert (found["status"], found["outcome"], found["code"]) == (200, "server-exited", -32000)
    assert "outcome=server-exited code=-32000" in lines.last_text()


def test_a_client_that_leaves_is_told(app: Application, lines: Lines) -> None:
    client = McpClient(WsgiFront(app)).open()
    answer = client.call("progress", {"count": 1, "_meta": {"progressToken": 1}})
    held = client.call("hold", {"name": "x", "_meta": {"progressToken": 2}})
    next(held.stream())
    held.close()
    assert lines.last()["outcome"] == "client-left"
    client.result("release", {"name": "x"})
    answer.messages()
    assert lines.last()["outcome"] == "ok"


def test_of_a_batch_the_first_failure_is_told(app: Application, lines: Lines) -> None:
    client = McpClient(WsgiFront(app)).open("2025-03-26")
    calls = [
        {"jsonrpc": "2.0", "id": 1, "method": "echo"},
        {"jsonrpc": "2.0", "id": 2, "method": "fail", "params": {"code": -32602}},
        {"jsonrpc": "2.0", "id": 3, "method": "fail", "params": {"code": -32603}},
    ]
    client.post(calls, Accept="application/json").messages()
    assert (lines.last()["rpc"], lines.last()["outcome"]) == ("batch of 3", "-32602")


def test_a_refused_request_has_the_code_that_its_client_reads(
    app: Application, lines: Lines
) -> None:
    client = McpClient(WsgiFront(app))
    client.session = "unknown"
    assert client.call("tools/list").error()["code"] == -32001
    found = lines.last()
    assert (found["status"], found["outcome"], found["code"]) == (400, "session-unknown", -32001)


def test_a_client_without_sessions_is_known_by_its_metadata(app: Application, lines: Lines) -> None:
    client = ModernClient(WsgiFront(app))
    about = {f"{PREFIX}clientInfo": {"name": "modern", "version": "3"}}
    client.call("tools/list", {"_meta": {**client.meta(), **about}}).body()
    assert lines.last()["client_name"] == "modern 3"


def test_over_http_sse_the_server_is_named(app: Application, lines: Lines) -> None:
    client = SseClient(WsgiFront(app))
    client.open()
    client.result("tools/call", {"name": "echo"})
    posts = [record.fields for record in lines.records]  # type: ignore[attr-defined]
    (call,) = [each for each in posts if each["tool"] == "echo"]
    assert call["backend"].startswith("pid:")
    client.close()


def test_a_relayed_call_names_the_worker_that_has_the_server(
    redis_server: RedisServer, lines: Lines
) -> None:
    config = ProxyConfig(command=SCRIPTED, redis_url=redis_server.url)
    with create_app(config) as owner, create_app(config) as other:
        client = McpClient(WsgiFront(owner)).open()
        client.at(WsgiFront(other)).result("tools/call", {"name": "echo"})
        found = lines.last()
        assert found["way"] == "relayed"
        assert found["backend"] == f"worker:{owner.parts.replica.id}"
        assert found["client_name"] == "test 1"
        assert "way=relayed" in lines.last_text()


def test_no_line_has_a_key_a_token_or_a_whole_session_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "mcp_proxy")
    config = ProxyConfig(command=SCRIPTED)
    with create_app(config, authenticate=lambda environ: Principal("alice")) as app:
        client = McpClient(WsgiFront(app)).open()
        client.call(
            "tools/call",
            {"name": "echo", "arguments": {"password": "hidden-1"}},
            Authorization="Bearer hidden-2",
            X_API_Key="hidden-3",
            Cookie="id=hidden-4",
        ).body()
        client.request("POST", b"{}", Content_Type="application/json").body()
        client.delete().body()
        client.call("tools/list").body()
        session = client.session
    assert session
    texts = [logs.JsonFormatter().format(record) for record in caplog.records]
    texts += [logs.TextFormatter().format(record) for record in caplog.records]
    assert any('principal="alice"' in text for text in texts)
    assert not [text for text in texts if "hidden-" in text or session in text]


def test_a_session_id_in_a_path_is_cut(lines: Lines) -> None:
    with TransparentProxy("http://127.0.0.1:9/mcp") as proxy:
        session = "0123456789abcdef"
        client = McpClient(WsgiFront(proxy), f"/messages/{session}")
        client.session = session
        client.call("ping").body()
    assert lines.last()["path"] == "/messages/...89abcdef"


def test_json_lines_can_have_anything_that_was_said() -> None:
    said = "half \udc80 of \ud83d"
    record = logging.LogRecord("x", logging.INFO, "", 0, said, (), None)
    record.fields = {"code": 2**80, "what": object()}
    found = json.loads(logs.JsonFormatter().format(record))
    assert (found["message"], found["code"]) == (said, 2**80)


def test_each_field_of_a_line_is_documented(app: Application, lines: Lines) -> None:
    client = McpClient(WsgiFront(app)).open()
    client.result("echo")
    section = _OPERATIONS.read_text(encoding="utf-8").partition("\n## The log\n")[2]
    rows = section.partition("\n## ")[0].splitlines()
    documented = {name for row in rows if row.startswith("| `") for name in names_of(row)}
    assert set(lines.last()) <= documented
    assert documented - set(lines.last()) == {"request", "exception", "servers", "left_out"}


def names_of(row: str) -> list[str]:
    """The fields that the first cell of a row names."""
    return re.findall(r"`([a-z_]+)`", row.split("|")[1])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"id": 1, "result": {}}, Outcome()),
        ({"id": 1, "result": {"isError": True}}, Outcome(1, "tool_error")),
        ({"id": "a", "error": {"code": -32602}}, Outcome("a", "-32602", -32602)),
        ({"error": {"code": "x"}}, Outcome(None, "other")),
        ({"id": 1, "result": {"text": '{"error": {"code": 1}}'}}, Outcome()),
    ],
)
def test_an_answer_says_how_its_request_has_ended(answer: Fields, expected: Outcome) -> None:
    assert outcomes_in(json.dumps(answer).encode()) == [expected]
