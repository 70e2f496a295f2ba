"""Programs of Debian's that tests run: installed, or unpacked by `scripts/environment`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_ALSO = "/usr/sbin:/usr/local/sbin"


def find_program(name: str, package: str) -> str:
    """The program to run; without one the test fails."""
    unpacked = [str(ROOT / f".{package}" / folder) for folder in ("usr/sbin", "usr/bin")]
    searched = ":".join([os.environ.get("PATH", ""), _ALSO, *unpacked])
    return shutil.which(name, path=searched) or pytest.fail(
        f"{name} is missing: install it (`apt-get install {package}`), or let scripts/test unpack "
        "Debian's package"
    )


def with_libraries(program: str) -> dict[str, str]:
    """The environment for a program, with the libraries that were unpacked beside it."""
    root = Path(program).parents[2]
    if root.parent != ROOT:
        return dict(os.environ)
    found = [str(path) for path in (*root.glob("usr/lib/*-linux-gnu*"), root / "usr/lib/systemd")]
    for folder in ("systemd", "pulseaudio"):
        found += [str(path) for path in root.glob(f"usr/lib/*-linux-gnu*/{folder}")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(found)}
