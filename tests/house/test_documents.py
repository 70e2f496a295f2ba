"""The README says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from mcp_proxy.config import settings

ROOT = Path(__file__).parents[2]


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
    assert found[1] == table(), f"put this between the marks:\n{table()}"


def test_every_local_link_of_the_documents_leads_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_script_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in set(re.findall(r"^(scripts/\w+)$", text, re.MULTILINE)):
        assert (ROOT / script).stat().st_mode & 0o111, script
