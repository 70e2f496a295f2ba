"""Debian's Chromium without windows, driven by Playwright."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.support.system_programs import ROOT, find_program, with_libraries

_NAME = "chromium-headless-shell"


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser until the block ends; the test fails where there is none."""
    program = find_program(_NAME, _NAME)
    environment = with_libraries(program)
    unpacked = ROOT / f".{_NAME}"
    if Path(program).is_relative_to(unpacked):  # a script there names the program by its whole path
        program = str(unpacked / "usr" / "lib" / "chromium" / _NAME)
    with sync_playwright() as playwright:
        # Its sandbox is not for root, and it sees pages of ours alone.
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"], env=dict(environment)
        )
        try:
            yield browser
        finally:
            browser.close()
