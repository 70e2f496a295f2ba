"""The official SDKs over HTTP+SSE through real gunicorn, their messages at any worker."""

from __future__ import annotations

import pytest

from tests.proofs import sse


def test_sessions_of_both_sdks_at_once_never_fail_and_never_cross(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The small one of `scripts/prove sse-load`: plain calls, progress, sampling, equal ids."""
    sse.load(sessions=6, workers=2, seconds=2)
    assert "0 failed, 0 crossed" in capsys.readouterr().out
