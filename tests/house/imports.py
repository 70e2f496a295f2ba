"""What a module imports, by whatever way, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import mcp_proxy

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mcp_proxy"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}

#: Where the names are defined that the package finds when they are first asked for.
HOMES: Mapping[str, str] = {
    name: getattr(getattr(mcp_proxy, name), "__module__", "mcp_proxy") for name in mcp_proxy.__all__
}


def imports_in(source: str, module: str) -> Iterator[tuple[str, int]]:
    """Every module that a source imports when it runs, as a module of that name, with the line.

    Those of functions and of type checks are included. A name that the package finds lazily counts
    as the module that has it; what gives all of the package, as `import mcp_proxy.errors` does, as
    the package itself, too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
                root = alias.name.partition(".")[0]
                if root == "mcp_proxy" and alias.asname is None:
                    yield root, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), module)
            yield from ((_home(base, alias.name), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by(node)):
            yield _absolute(name, module), node.lineno


def inner_imports(source: str, module: str) -> set[str]:
    """The other modules of ours that a source imports."""
    return {name for name, _ in imports_in(source, module) if name in MODULES} - {module}


def in_circles(sources: Mapping[str, str]) -> set[str]:
    """Of some modules and their sources, those that import each other, and what imports those."""
    left = {module: inner_imports(source, module) for module, source in sources.items()}
    while leaves := [module for module, others in left.items() if not others & set(left)]:
        for module in leaves:
            del left[module]
    return set(left)


def _absolute(name: str, module: str) -> str:
    """What a name that may begin with dots means in a module."""
    levels = len(name) - len(name.lstrip("."))
    if not levels:
        return name
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    parts = module.split(".")
    base = parts[: len(parts) - levels + is_package]
    return ".".join([*base, name[levels:]]).rstrip(".")


def _home(base: str, name: str) -> str:
    """The module that `from base import name` takes a name from."""
    if f"{base}.{name}" in MODULES:
        return f"{base}.{name}"
    return HOMES.get(name, base) if base == "mcp_proxy" else base


def _imported_by(call: ast.Call) -> str | None:
    """The name that a call of `import_module` or `__import__` has as a literal."""
    function = ast.unparse(call.func).rpartition(".")[2]
    names = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
    name = names[0] if names else None
    if function in ("import_module", "__import__") and isinstance(name, ast.Constant):
        return str(name.value)
    return None
