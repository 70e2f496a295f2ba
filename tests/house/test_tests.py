"""What tests may not do: look inside the objects of others, be skipped, or expect any error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.imports import ROOT

FILES = [
    path for path in sorted((ROOT / "tests").rglob("*.py")) if "node_modules" not in path.parts
]

#: Where a test looks inside all the same, and why.
REASONS = {
    ("backends/test_bridge.py", "_child"): "a server that ends between two looks at it",
    ("backends/test_bridge.py", "_write_lock"): "a write that another one holds up",
    ("clients/corner_client.py", "_request_id"): "SDK 1.x shows nowhere which id a call had",
    ("edge/test_request_targets.py", "_map"): "waitress names its connections nowhere else",
    ("house/test_background.py", "_next_key"): "a thread that ends while it waits for work",
    ("live/few_threads.py", "_start_new_thread"): "a system that has no thread to give",
    ("ownership/test_owner.py", "_interval"): "a sweeper that is in no hurry any more",
    ("ownership/test_owner.py", "_sweeper"): "a sweeper that is in no hurry any more",
    ("processes/test_supervisor.py", "_write_lock"): "a write that another one holds up",
    ("proofs/ending_gunicorn.py", "_run"): "every thread of ours ends once",
    ("redis/test_storage.py", "_sock"): "redis-py shows the options of its sockets nowhere else",
    ("relay/test_lease.py", "_start_of"): "a machine without /proc",
    ("server/test_cpu_affinity.py", "_QUOTA_FILE"): "a container with a quota",
    ("server/test_crowds.py", "_arriving_bytes"): "64 MiB on their way, without sending them",
    ("server/test_crowds.py", "_give_up"): "the same",
    ("server/test_crowds.py", "_spare_memory"): "the same",
    ("server/test_limits.py", "_SHARED_MEMORY"): "a machine without a directory to write to",
    ("server/test_limits.py", "_candidate_tempdir_list"): "the same; Python names it nowhere else",
    ("server/test_limits.py", "_refuse"): "a worker that cannot be given a request otherwise",
    ("server/test_limits.py", "_slow_count"): "the same",
    ("support/second_run.py", "_fixtureinfo"): "pytest says nowhere else what a fixture's name is",
    ("transparent/test_sse_sessions.py", "_client"): "the server's end of kept connections",
    ("wire/test_mending.py", "_PIECE"): "cuts at every place, without texts of many MiB",
}

#: Public in spite of their names.
PUBLIC = {"_exit", "_replace"}


def is_private(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.startswith("_")
        and not name.startswith("__")
        and name not in PUBLIC
    )


def is_own(node: ast.expr) -> bool:
    """Whether this is the object itself."""
    return ast.unparse(node) in ("self", "cls", "super()")


def privates_in(source: str) -> Iterator[str]:
    """The privates of others that a source names: as attributes, in patches and in imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr")):
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    name = argument.value.rpartition(".")[2]
                    if is_private(name):
                        yield name


def test_every_way_to_look_inside_is_found() -> None:
    assert list(privates_in("one._held")) == ["_held"]
    assert list(privates_in("one.bridge()._child._lock")) == ["_lock", "_child"]
    assert list(privates_in("from mcp_proxy.app import _part")) == ["_part"]
    assert list(privates_in("patch.setattr(one, '_held', 1)")) == ["_held"]
    assert list(privates_in("patch.setattr('mcp_proxy.app._part', 1)")) == ["_part"]
    assert list(privates_in("getattr(one, '_held')")) == ["_held"]
    assert list(privates_in("self._held, super()._held(), os._exit(1), one.__dict__")) == []


def test_tests_use_what_objects_show() -> None:
    found = {
        (path.relative_to(ROOT / "tests").as_posix(), name)
        for path in FILES
        for name in privates_in(path.read_text(encoding="utf-8"))
    }
    assert found == set(REASONS)


# --- tests that prove nothing --------------------------------------------------------------------


#: Files with a test that is skipped where something is missing that nobody can install, and what.
SKIPS = {
    "conftest.py": ("pytest.skip", "what a worker of gevent has not, where all tests run with it"),
    "server/test_memory.py": ("pytest.mark.skipif", "glibc: its allocator is what is tested"),
}


def weaknesses_in(source: str) -> Iterator[str]:
    """What lets tests be skipped, fail unseen, or pass with any error or with none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            if node.attr in ("skip", "skipif", "xfail", "importorskip"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args:
            expected = ast.unparse(node.args[0])
            if ast.unparse(node.func) == "pytest.raises" and "Exception" in expected.split("."):
                yield ast.unparse(node)
        elif isinstance(node, ast.Assert):
            parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            if any(isinstance(part, (ast.Constant, ast.Tuple)) for part in parts):
                yield ast.unparse(node)


def test_every_weakness_of_a_test_is_found() -> None:
    assert list(weaknesses_in("pytest.skip('no Go')")) == ["pytest.skip"]
    assert list(weaknesses_in("@pytest.mark.skipif(True)\ndef f(): ...")) == ["pytest.mark.skipif"]
    assert list(weaknesses_in("pytest.raises(Exception)")) == ["pytest.raises(Exception)"]
    assert list(weaknesses_in("assert one or True")) == ["assert one or True"]
    assert list(weaknesses_in("assert (one, 'said')")) == ["assert (one, 'said')"]
    assert list(weaknesses_in("assert one or two\npytest.raises(ValueError)")) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_can_fail(path: Path) -> None:
    """A program that is missing is a failure that says what to install."""
    found = list(weaknesses_in(path.read_text(encoding="utf-8")))
    listed = SKIPS.get(path.relative_to(ROOT / "tests").as_posix())
    assert found == ([] if listed is None else [listed[0]])
