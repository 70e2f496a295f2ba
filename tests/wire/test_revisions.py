"""The eras of the protocol, told from a version string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_proxy.wire import revisions


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_the_released_revisions_with_sessions_are_legacy(version: str) -> None:
    assert revisions.is_legacy(version)
    assert not revisions.is_modern(version)


@pytest.mark.parametrize("version", ["2026-07-28", "2026-07-29", "2027-01-01", "9999-12-31"])
def test_the_first_stateless_revision_and_all_later_ones_are_modern(version: str) -> None:
    assert revisions.is_modern(version)
    assert not revisions.is_legacy(version)


@pytest.mark.parametrize(
    "version",
    [
        *("", "2026-07-27", "2024-10-07", "2025-12-01", "2026-7-28", "2026-07-28 ", "2026-07-28\n"),
        *("draft", "DRAFT-2026-v1", "20260728", "2026-07-28-rc", "v2026-07-28", "2026/07/28"),
        *("\uff12\uff10\uff12\uff16-07-28", "\u0662\u0660\u0662\u0667-07-28"),
    ],
)
def test_what_is_neither_belongs_to_no_era(version: str) -> None:
    assert not revisions.is_legacy(version)
    assert not revisions.is_modern(version)


def test_the_legacy_revisions_stand_oldest_first() -> None:
    assert list(revisions.LEGACY) == sorted(revisions.LEGACY)
    assert revisions.LEGACY[-1] < revisions.FIRST_MODERN


def test_a_request_that_names_no_version_is_taken_for_a_legacy_one() -> None:
    assert revisions.is_legacy(revisions.ASSUMED)


def test_one_revision_only_knows_batches() -> None:
    allowing = [version for version in revisions.LEGACY if revisions.allows_batches(version)]
    assert allowing == ["2025-03-26"]
    assert not revisions.allows_batches(revisions.FIRST_MODERN)


@given(st.text(max_size=12) | st.dates().map(str))
def test_no_version_belongs_to_both_eras(version: str) -> None:
    assert not (revisions.is_legacy(version) and revisions.is_modern(version))
