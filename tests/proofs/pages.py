"""The pages of the proxy in a real browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1] / "pages" / "status_page.py"


def pages() -> None:
    """Clicks through `/status` in Debian's Chromium; AssertionError where a step is not as said."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", str(_TESTS)], check=False)
    assert done.returncode == 0, "the page is not as it should be"
    print("the status page: every step as said")
