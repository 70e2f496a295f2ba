"""What docs/embedding.md quotes stands in the files that the other tests run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples import serving
from tests.support.proxy_process import ROOT

_PAGE = ROOT / "docs" / "embedding.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SOURCES = (ROOT / "examples", ROOT / "tests" / "examples")

BLOCKS = _BLOCK.findall(_PAGE.read_text(encoding="utf-8"))


def files() -> list[Path]:
    """What may be quoted."""
    return [path for folder in _SOURCES for path in sorted(folder.glob("*.py"))]


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_quoted_code_stands_in_a_file_that_is_tested(block: str) -> None:
    quoting = [path for path in files() if block in path.read_text(encoding="utf-8")]
    assert quoting, f"no example has these lines:\n{block}"


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind != "python"])
def test_quoted_commands_are_those_of_the_readme(block: str) -> None:
    if block.startswith("WSGIDaemonProcess"):
        return  # Apache's, which the page says is tried by hand
    assert set(block.splitlines()) <= set(serving.README.read_text(encoding="utf-8").splitlines())


def test_page_quotes_something_of_every_example() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    for framework in serving.FRAMEWORKS.values():
        text = (ROOT / "examples" / f"{framework}_app.py").read_text(encoding="utf-8")
        assert any(block in text for _, block in BLOCKS), framework
        assert f"### {framework.title()}" in page
