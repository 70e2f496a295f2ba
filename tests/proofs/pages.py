"""Pages in a real browser: that of the proxy, and that of the MCP Inspector, which calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PAGES = Path(__file__).resolve().parents[1] / "pages"
_TESTS = [str(_PAGES / name) for name in ("status_page.py", "inspector_page.py")]


def pages() -> None:
    """Clicks through them in Debian's Chromium; AssertionError where a step is not as said."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", *_TESTS], check=False)
    assert done.returncode == 0, "a page is not as it should be"
    print("the status page and the Inspector: every step as said")
