"""The official conformance suite finds no difference between one worker and four, or none.

Its client mode starts a server for each scenario, where it needs one an authorization server, and a
client of ours: that scores the same where the transparent proxy stands between client and server.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.clients.programs import HERE, node, node_modules
from tests.support.redis_server import RedisServer

REVISIONS = ("2025-06-18", "2025-11-25", "2026-07-28")

#: What passes of the revision without sessions, and what fails.
MODERN = ("152", "0")
TIMES = 3

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "conformance"
_PATIENCE = 1200.0

_CLIENT = HERE / "conformance_client.py"
_CLIENT_PATIENCE = 60.0
_LISTED = re.compile(r"^  - (?:scenario: )?([a-z]\S+)$", re.MULTILINE)
_AUTHORIZED = re.compile(r"^  - (auth/\S+)$", re.MULTILINE)
_SHOWN = re.compile(r"^  - (\S+) \[", re.MULTILINE)

#: The checks that no proxy at a URL of its own can pass, and why.
BESIDE = {
    "Resource parameter matches protected resource metadata": "the suite wants its server's URL, "
    "and a client may only ask for what names the URL that it uses"
}

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
    assert expected[REVISIONS[-1]][1:3] == MODERN, expected


def of_a_group() -> None:
    """The suite scores the same through a group with one server, which has no prefix."""
    ran = suite([p for way in ("direct", "stdio", "group") for p in ("--through", way)], [])
    for revision in REVISIONS:
        alone, grouped = (rows(ran, way, revision) for way in ("stdio", "group"))
        assert len(alone) == 1, ran
        assert grouped == alone, (revision, alone, grouped)


def suite(ways: Sequence[str], options: Sequence[str], of: Sequence[str] = REVISIONS) -> str:
    """Runs the suite for these revisions, prints and returns what was said; fails where it does."""
    revisions = [part for revision in of for part in ("--spec-version", revision)]
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


# --- clients -------------------------------------------------------------------------------------


def of_clients() -> None:
    """Every client scenario: the same checks pass through the proxy, none less.

    Those with an authorization server are tried with the proxy in the place of the server, too: at
    the URL that this takes for its own.
    """
    lost: list[str] = []
    for revision in ("2025-11-25", "2026-07-28"):
        for scenario in client_scenarios(revision):
            direct = client_score(scenario, revision)
            assert direct, f"{scenario} made no checks"
            said = f"{shown(direct)} directly"
            is_authorized = scenario.startswith("auth/")
            for place in ("in-place", "beside") if is_authorized else ("beside",):
                found = client_score(scenario, revision, "--proxy", place)
                said += f"; {shown(found)} through one {place}"
                differing = {check for check, _ in (direct - found) + (found - direct)}
                excused = differing & BESIDE.keys() if place == "beside" else set()
                said += "".join(f" ({check}: {BESIDE[check]})" for check in sorted(excused))
                lost += [f"{scenario} {place}: {check}" for check in sorted(differing - excused)]
            print(f"{revision} {scenario}: {said}", flush=True)
    assert lost == [], lost


def client_scenarios(revision: str) -> list[str]:
    """What a revision requires of clients, or runs for information.

    Of authorization only what is required: the others belong to extensions, and the suite skips
    them.
    """
    suite = _suite()
    listed = subprocess.run(
        [node(), str(suite), "list"], capture_output=True, text=True, check=True
    )
    known = _SHOWN.findall(listed.stdout.partition("Client scenarios")[2].partition("\n\n")[0])
    file = suite.parents[1] / "requirements" / f"{revision}.yaml"
    text = file.read_text(encoding="utf-8")
    wanted = {each for each in _LISTED.findall(text) if not each.startswith("auth/")}
    wanted.update(_AUTHORIZED.findall(text))
    found = [each for each in known if each in wanted]
    assert found, "the suite lists its scenarios in another way than it did"
    return found


def client_score(scenario: str, revision: str, *options: str) -> Counter[tuple[str, str]]:
    """How the checks of a scenario come out, those apart that only tell."""
    client = [sys.executable, str(_CLIENT), *options, "--revision", revision]
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        command = [node(), str(_suite()), "client", "--command", shlex.join(client)]
        command += ["--scenario", scenario, "--spec-version", revision, "--output-dir", folder]
        command += ["--timeout", str(round(1000 * _CLIENT_PATIENCE))]
        patience = 2 * _CLIENT_PATIENCE
        ran = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
        checks = list(checks_in(Path(folder)))
    assert checks, ran.stdout[-3000:] + ran.stderr[-3000:]
    return Counter(check for check in checks if check[1] != "INFO")


def checks_in(folder: Path) -> Iterator[tuple[str, str]]:
    """The checks that were written to a folder: their names, and how they came out."""
    for file in folder.rglob("checks.json"):
        for check in json.loads(file.read_text()):
            yield check["name"] or check["id"], check["status"]


def shown(score: Counter[tuple[str, str]]) -> str:
    """A score in few words."""
    counts: Counter[str] = Counter()
    for (_, status), count in score.items():
        counts[status.lower()] += count
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _suite() -> Path:
    return node_modules() / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
