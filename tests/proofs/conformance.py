"""The official conformance suite finds no difference between one worker and four."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.redis_server import RedisServer

REVISIONS = ("2025-06-18", "2025-11-25")
TIMES = 3

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "conformance"
_PATIENCE = 1200.0

Row = tuple[str, ...]


def through_replicas() -> None:
    """The suite through one worker, then three times through four workers over Redis."""
    with RedisServer() as redis:
        single = suite(["--through", "direct", "--through", "stdio"], [])
        options = ["--workers", "4", "--redis-url", redis.url]
        several = suite(["--through", "stdio", "--repeat", str(TIMES)], options)
    expected = {revision: rows(single, "stdio", revision)[0] for revision in REVISIONS}
    for revision in REVISIONS:
        found = rows(several, "stdio", revision)
        assert len(found) == TIMES, several
        assert set(found) == {expected[revision]}, (revision, expected[revision], found)


def suite(ways: Sequence[str], options: Sequence[str]) -> str:
    """Runs the suite for both revisions, prints and returns what was said; fails where it does."""
    revisions = [part for revision in REVISIONS for part in ("--spec-version", revision)]
    command = [sys.executable, str(_SCRIPT), *revisions, *ways, "--", *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    print(
        f"{' '.join(['scripts/conformance', *command[2:]])}\n{ran.stdout}{ran.stderr}", flush=True
    )
    assert ran.returncode == 0, f"ended with {ran.returncode}"
    return ran.stdout


def rows(printed: str, way: str, revision: str) -> list[Row]:
    """The scores of one way and revision: scenarios, passed, failed, warnings."""
    words = [line.split() for line in printed.splitlines()]
    return [tuple(row[2:]) for row in words if row[:2] == [way, revision]]
