"""The README and the documents say what the code does."""

from __future__ import annotations

import re
import shlex
from itertools import product

import pytest

from mcp_proxy.config import settings
from mcp_proxy.server import keys
from mcp_proxy.server.cli import read_config, read_ctl
from tests.clients.corner_steps import CLIENTS, LEGACY, MODERN
from tests.clients.test_corners import CELLS, PROXIED
from tests.house.imports import FILES, PACKAGE, ROOT
from tests.house.test_rules import layer_of, room_of


def table() -> str:
    """The settings as the README shows them."""
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for setting in settings():
        default = f"`{setting.default_text}`" if setting.default_text else ""
        rows.append(f"| `{setting.name}` | {default} | {setting.reason} |")
    return "\n".join(rows)


def test_the_settings_table_of_the_readme_is_the_one_in_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- settings -->\n(.*?)\n<!-- /settings -->", text, re.DOTALL)
    assert found is not None
    if found[1] != table():
        pytest.fail(f"put this between the marks:\n{table()}", pytrace=False)


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"]


def test_every_local_link_of_the_documents_leads_somewhere() -> None:
    links = [
        (document, target)
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    ]
    assert links
    for document, target in links:
        assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w./-]+/[\w-]+\.(?:py|md|txt))`", text):
            assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"{document.name}: {name}"


def commands() -> list[tuple[str, str]]:
    """Every command of ours that a document has, with the document's name."""
    return [
        (document.name, line.replace("\\\n", " "))
        for document in DOCUMENTS
        for block in re.findall(r"^```\n(.*?)^```", document.read_text("utf-8"), re.M | re.DOTALL)
        for line in re.findall(r"^(?:venv/bin/)?mcp-wsgi-proxy ((?:.*\\\n)*.*)$", block, re.M)
    ]


@pytest.mark.parametrize(("document", "command"), commands())
def test_every_command_of_the_documents_is_one(document: str, command: str) -> None:
    arguments = shlex.split(command)
    if arguments[0] == "key":
        keys.parse(arguments[1:])
    elif arguments[0] == "ctl":
        read_ctl(arguments[1:])
    elif arguments[0] != "serves":
        read_config(arguments[1:] if arguments[:1] == ["check"] else arguments)


def test_every_variable_of_the_documents_is_a_setting() -> None:
    known = {f"MCP_PROXY_{setting.name.upper()}" for setting in settings()}
    known |= {"MCP_PROXY_", "MCP_PROXY_PORT"}  # the prefix, and what Kubernetes may set
    for document in DOCUMENTS:
        if document.name != "CHANGELOG.md":
            named = set(re.findall(r"MCP_PROXY_[A-Z_]*", document.read_text(encoding="utf-8")))
            assert named <= known, document.name


def test_every_sentence_that_is_explained_stands_in_the_code() -> None:
    sources = [path.read_text(encoding="utf-8") for path in FILES]
    code = "".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sentences = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(sentences) > 20
    assert [sentence for sentence in sentences if sentence not in code] == []


def test_every_test_that_is_named_as_holding_a_rule_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert named
    for name in named:
        assert f"def {name}(" in tests, name


def held() -> dict[str, list[tuple[str, str]]]:
    """The requirements of docs/protocol.md, and the files and tests that hold each."""
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (T\d\d) \|.*\|$", text, re.MULTILINE)
    assert len(rows) == len(set(rows)), "a requirement has two rows"
    return {
        number: re.findall(r"`([\w/]+\.py)::(test_\w+)`", line)
        for number, line in re.findall(r"^\| (T\d\d) (\|.*\|)$", text, re.MULTILINE)
    }


def test_every_requirement_of_the_protocol_has_its_row() -> None:
    assert list(held()) == [f"T{number:02}" for number in range(1, 98)]


def test_every_test_that_holds_a_requirement_is_there() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    found = [(file, test) for tests in held().values() for file, test in tests]
    assert len(found) == text.count("::"), "a test is named in no row"
    for file, test in found:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{file}::{test}"


def test_a_requirement_that_no_test_holds_says_why() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    for number, tests in held().items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {number} "))
        reasons = ("not built yet", "does not apply", "by hand")
        assert tests or any(reason in line for reason in reasons), line


def test_every_script_that_the_documents_name_is_there() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    scripts = set(re.findall(r"^(scripts/\w+)", text, re.MULTILINE))
    assert {"scripts/test", "scripts/serve", "scripts/prove"} <= scripts
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script


def rooms() -> list[tuple[set[str], set[str]]]:
    """The table of rooms: for each row the rooms and files, and the modules that it names."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.search(r"\| room \| .*\n\| --- \|.*\n((?:\|.*\n)+)", text)
    assert found is not None
    cells = [line.split(" | ", 1) for line in found[1].splitlines()]
    return [
        (set(re.findall(r"`([^`]+)`", first)), set(re.findall(r"`([a-z_]+)`", second)))
        for first, second in cells
    ]


def test_the_table_of_rooms_names_every_module() -> None:
    rows = rooms()
    files = {path.name for path in FILES if path.parent == PACKAGE}
    folders = {path.parent.name + "/" for path in FILES if path.parent != PACKAGE}
    named = [name for first, _ in rows for name in first]
    assert sorted(named) == sorted(files | folders - {"demo/"})
    for first, modules in rows:
        stems = {
            path.stem
            for path in FILES
            if path.parent.name + "/" in first and path.name != "__init__.py"
        }
        assert modules == stems, first


def test_the_table_of_rooms_has_the_order_of_the_layers() -> None:
    layers = [{layer_of(room_of(name)) for name in first} for first, _ in rooms()]
    assert all(len(layer) == 1 for layer in layers)
    assert layers == sorted(layers, key=min)


def test_the_glossary_is_short_and_has_each_word_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    glossary = text.partition("## Glossary")[2].partition("\n## ")[0]
    words = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)[2:]
    assert 10 < len(words) <= 20
    assert len(set(words)) == len(words)


def test_the_corners_of_the_readme_are_those_that_are_tested() -> None:
    """`tests/clients/test_corners.py` has a test for each cell, over one worker and over four."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- corners -->\n(.*?)\n<!-- /corners -->", text, re.DOTALL)
    assert found is not None
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in found[1].splitlines()[2:]]
    modes = {"sessions": LEGACY, "auto": "auto", "2026-07-28": MODERN, "": LEGACY}
    clients = []
    for name, *cells in rows:
        sdk, _, mode = name.partition(", ")
        language, version = sdk.split()
        clients.append((language.lower(), version.partition(".")[0], modes[mode]))
        expected = ["session", "bridged"] if modes[mode] == LEGACY else ["bridged", "stateless"]
        assert cells == [*expected, *expected], name
    assert clients == list(CLIENTS.values())
    tested = {cell.values for cell in CELLS}
    for carrier, server, client in product(PROXIED, (LEGACY, MODERN), CLIENTS):
        assert ((carrier, server), client) in tested
