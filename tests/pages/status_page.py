"""The page `/status` in a browser, in front of a real gunicorn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import running_browser
from tests.support.front import HttpFront, McpClient
from tests.support.proxy_process import ProxyProcess
from tests.support.reloads import ENTRY, client_of, write
from tests.support.scrapes import ADMIN, admin_port

_PATIENCE = 30_000  # milliseconds

# What the console has where the proxy has ended.
_NOBODY_ANSWERS = re.compile("net::ERR_(CONNECTION_|EMPTY_RESPONSE)")

_HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as made:
        yield made


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ProxyProcess]:
    """A proxy of two workers with two servers, and one that cannot be started."""
    file = tmp_path / "servers.json"
    write(file, one=ENTRY, two=ENTRY, broken={"command": "/no/such/server"})
    with ProxyProcess(options=[*ADMIN, "--workers", "2", "--config", str(file)]) as made:
        yield made


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Browser, process: ProxyProcess) -> Iterator[Page]:
    """The page, in which nothing may go wrong; its policy forbids whatever is not written in it."""
    scheme: Literal["light", "dark"] = request.param
    wrong: list[str] = []
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(_PATIENCE)
    made = context.new_page()
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda message: wrong.append(message.text))
    made.goto(f"http://127.0.0.1:{admin_port(process)}/status")
    yield made
    context.close()
    assert [each for each in wrong if not _NOBODY_ANSWERS.search(each)] == []


def test_an_operator_sees_what_goes_on_and_finds_a_session(
    page: Page, process: ProxyProcess
) -> None:
    client = client_of(process, "one").open()
    client.call("complain", {"lines": 1, "length": 20})
    client.call("die")
    client_of(process, "broken").initialize()
    states = page.locator("#servers tbody td:nth-child(2)")
    expect(states.filter(has_text=re.compile("^ok$"))).to_have_count(2, timeout=_PATIENCE)
    expect(page.locator("#servers .bad")).to_have_text("failed", timeout=_PATIENCE)
    expect(page.locator("#workers tbody tr")).to_have_count(2, timeout=_PATIENCE)
    expect(page.locator("#failures pre")).to_have_text("!" * 20, timeout=_PATIENCE)
    session = client.session or ""
    found = page.locator("#asked tbody")
    page.get_by_label("by its whole id").fill(session)
    expect(found).to_contain_text("worker://", timeout=_PATIENCE)
    expect(found).to_contain_text(session[-8:])
    page.get_by_label("by its whole id").fill(session[-8:])
    expect(found).to_have_text("no such session", timeout=_PATIENCE)
    page.get_by_label("by its whole id").fill("")
    expect(page.locator("#found")).to_be_hidden(timeout=_PATIENCE)
    assert session not in page.content()


def test_what_a_client_calls_itself_is_text(page: Page, process: ProxyProcess) -> None:
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": _HOSTILE, "version": "1"},
        },
    }
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
    }
    answer = HttpFront(process.base).request(
        "POST", "/servers/one/mcp", headers, json.dumps(body).encode()
    )
    assert answer.status == 200
    expect(page.locator("#sessions tbody")).to_contain_text(_HOSTILE, timeout=_PATIENCE)
    assert page.locator("img").count() == 0
    assert page.title() == "mcp-wsgi-proxy"


def test_the_page_says_when_nobody_answers_any_more(page: Page, process: ProxyProcess) -> None:
    McpClient(HttpFront(process.base), "/servers/one/mcp").open()
    expect(page.locator("#sessions tbody td.code")).to_have_count(1, timeout=_PATIENCE)
    process.stop()
    expect(page.get_by_role("status")).to_contain_text("not reached", timeout=_PATIENCE)
    expect(page.locator("#sessions tbody td.code")).to_have_count(1)


def test_a_narrow_screen_scrolls_its_tables_and_not_the_page(page: Page) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    expect(page.locator("#workers tbody tr")).to_have_count(2, timeout=_PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
