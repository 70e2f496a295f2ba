"""The README and the documents say what the code does."""

from __future__ import annotations

import re

import pytest

from mcp_proxy.config import settings
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


def test_every_test_that_is_named_as_holding_a_rule_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert named
    for name in named:
        assert f"def {name}(" in tests, name


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
