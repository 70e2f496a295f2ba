"""Fixtures of this room."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_outbound_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxies reach none of the servers of these tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
