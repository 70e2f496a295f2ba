"""Which tests start a gunicorn: these alone are worth a run with another kind of worker.

A test starts one where `ProxyProcess`, or the environment of one, is named by its function, by one
of its fixtures, or by a function or class of the tests that these name. Of a test of the ways
"wsgi" and "gunicorn" it is the second alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.support.proxy_process import ProxyProcess, inherited

# The value of a parameter that has the application called without a server.
_WITHOUT_SERVER = "wsgi"


def starts_gunicorn(item: pytest.Item) -> bool:
    """Whether a test starts a gunicorn, as far as its source tells."""
    assert isinstance(item, pytest.Function)
    given = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    if any(isinstance(value, str) and value == _WITHOUT_SERVER for value in given):
        return False
    fixtures = [
        fixture.func
        for name in item.fixturenames
        for fixture in item._fixtureinfo.name2fixturedefs.get(name, ())
    ]
    return lead_to_gunicorn([item.function, *fixtures, *given])


def lead_to_gunicorn(things: Iterable[Any]) -> bool:
    """Whether functions or classes name what starts a gunicorn, or others of the tests that do."""
    seen: set[int] = set()
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        thing = inspect.unwrap(thing) if callable(thing) else thing
        if thing is ProxyProcess or thing is inherited:
            return True
        if id(thing) not in seen:
            seen.add(id(thing))
            waiting += _named_by(thing)
    return False


def _named_by(thing: Any) -> Iterator[Any]:
    if isinstance(thing, FunctionType | type) and not thing.__module__.startswith("tests."):
        return
    if isinstance(thing, FunctionType):
        yield from _found_in(thing.__globals__, _names_in(thing.__code__))
        yield from (cell.cell_contents for cell in thing.__closure__ or ())
    elif isinstance(thing, type):
        yield from (*thing.__bases__, *vars(thing).values())
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args)
    elif isinstance(thing, property | staticmethod | classmethod):
        yield thing.fget if isinstance(thing, property) else thing.__func__
    elif isinstance(thing, list | tuple):
        yield from thing
    elif isinstance(thing, dict):
        yield from thing.values()


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    """The names of globals, attributes and modules in a function and the functions in it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


def _found_in(namespace: dict[str, Any], names: frozenset[str]) -> Iterator[Any]:
    for name in names:
        found = importlib.import_module(name) if name.startswith("tests.") else namespace.get(name)
        if isinstance(found, ModuleType):
            if found.__name__.startswith("tests."):
                yield from _found_in(vars(found), names - {name})
                same = vars(found).get(name)  # a function that has the module's name
                if same is not None and not isinstance(same, ModuleType):
                    yield same
        elif found is not None:
            yield found
