"""The rules of the house, read from the source: who imports what, and how large things may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mcp_proxy"

FILES = sorted(PACKAGE.rglob("*.py"))

#: Layers from the top; a module imports from its own layer and from lower ones.
LAYERS = {
    "__main__": 0,
    "cli": 0,
    "gunicorn_conf": 0,
    "wsgi": 0,
    "__init__": 0,
    "check": 0,
    "gunicorn_server": 0,
    "gunicorn_worker": 0,
    "app": 1,
    "sharing": 1,
    "transports": 2,
    "edge": 3,
    "relay": 4,
    "sessions": 5,
    "backends": 5,
    "affinity": 6,
    "banner": 6,
    "servers": 6,
    "wire": 6,
    "config": 6,
    "errors": 6,
    "demo": 6,
}

#: Modules of others, and the only places that may know them.
SEAMS = {
    "redis": ("sessions/redis/", "redis/mailboxes.py"),
    "requests": ("backends/http.py",),
    "urllib3": ("backends/http.py",),
    "subprocess": ("backends/",),
    "werkzeug": ("transports/", "edge/", "app.py"),
    "gunicorn": ("gunicorn_server.py", "gunicorn_worker.py"),
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports when it runs, with the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every function of a file with its number of lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_the_list_only(path: Path) -> None:
    own = LAYERS[layer_of(path)]
    for module, line in imports_of(path):
        if module.startswith("mcp_proxy."):
            other = module.split(".")[1]
            if other in LAYERS:
                assert LAYERS[other] >= own, f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sessions_and_backends_do_not_know_each_other(path: Path) -> None:
    strangers = {"sessions": "mcp_proxy.backends", "backends": "mcp_proxy.sessions"}
    stranger = strangers.get(layer_of(path), "-")
    for module, line in imports_of(path):
        assert not module.startswith(stranger), f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_behind_their_seams(path: Path) -> None:
    for module, line in imports_of(path):
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


def test_the_stateless_transport_knows_no_sessions() -> None:
    path = PACKAGE / "transports" / "stateless.py"
    if path.exists():
        for module, _ in imports_of(path):
            assert not module.startswith(("mcp_proxy.sessions", "mcp_proxy.relay"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_starts_at_import(path: Path) -> None:
    """Threads, processes and ids belong to a process that serves, not to one that imports."""
    started = ("Thread(", "Popen(", "getpid(", "token_hex(", "uuid4(")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
            assert not any(word in ast.unparse(node) for word in started), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"
