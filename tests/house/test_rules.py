"""The rules of the house, read from the source: who imports what, and how large things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mcp_proxy
from tests.house import imports
from tests.house.imports import FILES, MODULES, PACKAGE, ROOT, module_of

#: The rooms from the top down; each row is one layer. Imports go down only.
ORDER = (
    ("server", "__main__", "gunicorn_conf"),
    ("app", "__init__", "wsgi", "django"),
    ("monitoring",),
    ("mounts",),
    ("group_mounts",),
    ("transparent",),
    ("transports",),
    ("ownership",),
    ("eras",),
    ("relay",),
    ("resumption",),
    ("backends",),
    ("processes",),
    ("edge",),
    ("auth",),
    ("sessions",),
    ("redis",),
    ("storage",),
    (
        *("config", "servers", "servers_file", "entry_values", "shown_commands", "server_table"),
        *(
            "server_groups",
            "replica",
            "background",
            "context_value",
            "shared_page",
            "shared_text",
            "metrics",
            "rate_buckets",
        ),
        *("traces", "spans"),
    ),
    ("recent", "shared_texts", "last_uses"),
    ("wire",),
    ("errors",),
)

#: Rooms further down that a room may not import all the same.
BARS = {
    "transparent": {"redis", "processes"},
    "transports": {"redis", "processes"},
    "ownership": {"edge", "redis"},
    "eras": {"edge", "sessions", "storage", "redis", "processes"},
    "relay": {"resumption", "edge", "sessions", "redis", "processes"},
    "resumption": {"edge", "sessions", "redis", "processes"},
    "backends": {"edge", "sessions", "storage", "redis"},
    "processes": {"edge", "sessions", "storage", "redis", "wire"},
    "edge": {"sessions", "storage", "redis"},
    "auth": {"sessions", "storage", "redis"},
}

#: What gunicorn and Python start by its name: nobody has to import it, and it may be short.
ENTRY_POINTS = {"__main__", "wsgi", "gunicorn_conf", "processes/guardian"}

#: Modules of others, and the only places that may know them.
SEAMS = {
    "redis": ("redis/",),
    "requests": ("backends/http.py", "auth/issuer.py"),
    "urllib3": ("backends/http.py", "auth/issuer.py"),
    "jwt": ("auth/",),
    "limits": ("redis/rate_counter.py",),
    "subprocess": ("processes/",),
    "werkzeug": ("transports/", "edge/", "mounts.py"),
    "gunicorn": ("server/",),
    "prometheus_client": ("edge/exposition.py",),
    "opentelemetry": ("spans.py",),
    "django": ("django.py",),
}

_GONE = """
abandon conversation courier delivery departure departures disown dismiss endable errand errands
finder hosted journal keeper kept_back lane lanes letter letters mark marks nudge observed opening
orphaned owes patience pinning place placement places reach recorder remark remarks
remote_exchange restarts retire retired said second_try sharing slots soon staying surround
surroundings tell tells trouble unheard void witness
"""

#: Words that were ours and have given way to the field's: no name consists of them.
GONE = tuple(_GONE.split())


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(name: str) -> str:
    """The room of a file or of a dotted module of ours."""
    parts = name.removesuffix(".py").removeprefix("mcp_proxy").replace("/", ".").strip(".")
    return parts.partition(".")[0] or "__init__"


def layer_of(room: str) -> int:
    return next(number for number, rooms in enumerate(ORDER) if room in rooms)


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every function of a file with its number of lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@cache
def inner_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, those of functions and of type checks included."""
    return imports.inner_imports(path.read_text(encoding="utf-8"), module_of(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_and_not_through_a_bar(path: Path) -> None:
    if room_of(name_of(path)) == "demo":
        assert not inner_imports(path)
        return
    own = room_of(name_of(path))
    for module in inner_imports(path):
        other = room_of(module)
        assert layer_of(other) >= layer_of(own), f"{name_of(path)} imports {module}"
        assert other not in BARS.get(own, ()), f"{name_of(path)} imports {module}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    assert not imports.in_circles(sources)


def test_every_file_has_its_room() -> None:
    rooms = {room for rooms in ORDER for room in rooms} | {"demo"}
    assert {room_of(name_of(path)) for path in FILES} <= rooms


def test_no_short_module_has_one_importer() -> None:
    """What is short and used in one place belongs there."""
    imported = [set(inner_imports(path)) for path in FILES]
    importers = {module: [names for names in imported if module in names] for module in MODULES}
    for module, path in MODULES.items():
        name = name_of(path).removesuffix(".py")
        is_short = len(path.read_text(encoding="utf-8").splitlines()) < 60
        if is_short and path.name != "__init__.py" and name not in ENTRY_POINTS:
            assert len(importers[module]) > 1, f"{name} is short and has one importer"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_behind_their_seams(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for module, line in imports.imports_in(source, module_of(path)):
        places = SEAMS.get(module.split(".")[0], ("",))
        assert name_of(path).startswith(places), f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_environment_is_read_in_two_places(path: Path) -> None:
    """In the configuration, and where the environment of a child is made."""
    allowed = ("config.py", "processes/child.py")
    if name_of(path) not in allowed:
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text
        assert "os.getenv" not in text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_starts_at_import(path: Path) -> None:
    """Threads, processes and ids belong to a process that serves, not to one that imports."""
    started = ("Thread(", "Popen(", "getpid(", "token_hex(", "uuid4(")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
            assert not any(word in ast.unparse(node) for word in started), ast.unparse(node)


def test_functions_are_short() -> None:
    sizes = sorted(
        (size, f"{name_of(path)} {name}") for path in FILES for name, size in functions_of(path)
    )
    assert sizes[-1][0] <= 60, sizes[-1]
    assert sizes[len(sizes) * 9 // 10][0] < 40
    assert sizes[len(sizes) // 2][0] < 10


def test_modules_are_named_for_what_they_are() -> None:
    forbidden = {"utils", "util", "helpers", "helper", "common", "misc"}
    for path in [*FILES, *(ROOT / "tests").glob("*/*.py"), *(ROOT / "bench").glob("*.py")]:
        assert not forbidden & set(path.with_suffix("").parts[-2:])


def words_of(name: str) -> str:
    """The words of a name, each between underscores; none of a name that is Python's."""
    if name.startswith("__"):
        return ""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return f"_{'_'.join(words)}_".lower()


def names_in(path: Path) -> Iterator[str]:
    """What a file names: itself, its classes, functions, parameters and variables."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_are_those_of_the_field(path: Path) -> None:
    for name in names_in(path):
        found = [word for word in GONE if f"_{word}_" in words_of(name)]
        assert not found, f"{name_of(path)}: {name}"


def test_a_name_is_read_word_by_word() -> None:
    assert words_of("RemoteExchange") == words_of("_REMOTE_EXCHANGE") == "_remote_exchange_"
    assert words_of("is_void2") == "_is_void_"
    assert words_of("HTTPCall") == "_http_call_"
    assert words_of("__slots__") == ""


def test_importing_the_package_loads_no_client_library() -> None:
    """Nor does what gunicorn's master imports; and nothing of ours may come before gevent."""
    code = (
        "import sys, mcp_proxy, mcp_proxy.server.cli, mcp_proxy.server.gunicorn, "
        "mcp_proxy.server.worker\n"
        "print(sorted({'opentelemetry', 'redis', 'requests', 'urllib3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in set(mcp_proxy.__all__) - {"__version__"}:
        assert getattr(mcp_proxy, name).__name__ == name
    assert set(mcp_proxy.__all__) <= set(dir(mcp_proxy))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mcp_proxy.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"
