"""The MCP Inspector in a browser, whose page calls the proxy itself ("Direct").

That is a page of another origin: what the browser asks before it sends anything, and may read
afterwards, is the proxy's word. The Inspector is the one of npm, which a server of ours shows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import running_browser
from tests.support.callers import KeyFile
from tests.support.proxy_process import ROOT, ProxyProcess

_INSPECTOR = ROOT / ".inspector" / "package" / "dist"
_PATIENCE = 30_000  # milliseconds


class _Files(SimpleHTTPRequestHandler):
    """Files, without a word in the log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """The origin of the Inspector's page."""
    if not _INSPECTOR.exists():
        pytest.fail("the Inspector is missing: scripts/prove pages fetches it from npm")
    handler = functools.partial(_Files, directory=str(_INSPECTOR))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as made:
        yield made


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys")


@contextmanager
def opened(browser: Browser, origin: str, url: str, header: tuple[str, str]) -> Iterator[Page]:
    """The page, filled in as a user does, once it was told to connect."""
    context = browser.new_context(viewport={"width": 1400, "height": 1200})
    context.set_default_timeout(_PATIENCE)
    page = context.new_page()
    page.goto(f"{origin}/?transport=streamable-http&serverUrl={url}")
    page.get_by_label("Connection Type").click()
    page.get_by_role("option", name="Direct").click()
    page.get_by_test_id("auth-button").click()
    page.get_by_test_id("header-name-input-0").fill(header[0])
    page.get_by_test_id("header-value-input-0").fill(header[1])
    page.get_by_role("switch").first.click()
    page.get_by_role("button", name="Connect", exact=True).click()
    yield page
    context.close()


def require_use(page: Page) -> None:
    """Lists the tools and calls one."""
    expect(page.get_by_text("Connected", exact=True)).to_be_visible(timeout=_PATIENCE)
    page.get_by_role("tab", name="Tools").click()
    page.get_by_role("button", name="List Tools").click()
    page.get_by_text("echo", exact=True).first.click()
    page.get_by_role("button", name="Run Tool").click()
    expect(page.get_by_text("Tool Result: Success")).to_be_visible(timeout=_PATIENCE)


@pytest.mark.parametrize("way", ["Authorization", "X-API-Key"])
def test_the_inspector_connects_with_a_key(
    browser: Browser, origin: str, keys: KeyFile, way: str
) -> None:
    key = keys.add("alice")
    options = ["--api-keys", keys.text, "--allowed-origins", origin]
    shown = f"Bearer {key}" if way == "Authorization" else key
    with (
        ProxyProcess(options=options) as process,
        opened(browser, origin, process.url, (way, shown)) as page,
    ):
        require_use(page)


def test_a_page_on_the_same_machine_needs_no_setting(
    browser: Browser, origin: str, keys: KeyFile
) -> None:
    key = keys.add("alice")
    with (
        ProxyProcess(options=["--api-keys", keys.text]) as process,
        opened(browser, origin, process.url, ("X-API-Key", key)) as page,
    ):
        require_use(page)


@pytest.mark.parametrize("what", ["the origin", "the key"])
def test_without_its_origin_or_its_key_it_does_not_connect(
    browser: Browser, origin: str, keys: KeyFile, what: str
) -> None:
    key = keys.add("alice")
    allowed = "https://elsewhere.example" if what == "the origin" else origin
    options = ["--api-keys", keys.text, "--allowed-origins", allowed]
    shown = "mcpk_somebody-elses" if what == "the key" else key
    with (
        ProxyProcess(options=options) as process,
        opened(browser, origin, process.url, ("X-API-Key", shown)) as page,
    ):
        expect(page.get_by_text("Connection Error").first).to_be_visible(timeout=_PATIENCE)
