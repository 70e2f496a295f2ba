"""The rules about imports see every way to import."""

from __future__ import annotations

import pytest

from tests.house.imports import imports_in, in_circles, inner_imports

URLS = "mcp_proxy.wire.urls"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mcp_proxy.errors as errors", "mcp_proxy.errors"),
        ("from mcp_proxy.errors import ProxyError", "mcp_proxy.errors"),
        ("from mcp_proxy import errors", "mcp_proxy.errors"),
        ("from mcp_proxy import wire", "mcp_proxy.wire"),
        ("def later():\n    from mcp_proxy.app import create_app", "mcp_proxy.app"),
        ("if TYPE_CHECKING:\n    from mcp_proxy.app import create_app", "mcp_proxy.app"),
        # the package finds these names when they are asked for
        ("from mcp_proxy import create_app", "mcp_proxy.app"),
        ("from mcp_proxy import RedisStorage as Storage", "mcp_proxy.redis.storage"),
        ("from .. import SSEProxy", "mcp_proxy.transports.sse"),
        # all of the package
        ("import mcp_proxy", "mcp_proxy"),
        ("import mcp_proxy as proxy", "mcp_proxy"),
        ("from mcp_proxy import *", "mcp_proxy"),
        ("from mcp_proxy import __version__", "mcp_proxy"),
        ("import importlib\nimportlib.import_module('mcp_proxy')", "mcp_proxy"),
        # relative
        ("from ..app import create_app", "mcp_proxy.app"),
        ("from .. import app", "mcp_proxy.app"),
        ("from . import cookies", "mcp_proxy.wire.cookies"),
        ("from .cookies import anything", "mcp_proxy.wire.cookies"),
        # by a call
        ("import importlib\nimportlib.import_module('mcp_proxy.app')", "mcp_proxy.app"),
        ("from importlib import import_module\nimport_module('mcp_proxy.app')", "mcp_proxy.app"),
        ("import importlib\nimportlib.import_module('..app', __package__)", "mcp_proxy.app"),
        ("importlib.import_module(name='mcp_proxy.app')", "mcp_proxy.app"),
        ("def later():\n    return __import__('mcp_proxy.app')", "mcp_proxy.app"),
    ],
)
def test_every_way_to_import_a_module_is_found(source: str, found: str) -> None:
    assert inner_imports(source, URLS) == {found}


def test_an_import_that_gives_the_package_with_a_module_of_it_counts_as_both() -> None:
    """After it `mcp_proxy.create_app` can be had."""
    found = {"mcp_proxy", "mcp_proxy.errors"}
    assert inner_imports("import mcp_proxy.errors", URLS) == found


def test_dots_of_a_package_begin_with_itself() -> None:
    assert inner_imports("from .urls import anything", "mcp_proxy.wire") == {URLS}
    assert inner_imports("from ..app import create_app", "mcp_proxy.wire") == {"mcp_proxy.app"}
    assert inner_imports("from .app import create_app", "mcp_proxy") == {"mcp_proxy.app"}


@pytest.mark.parametrize(
    "source",
    ["import redis.client", "from redis import Redis", "__import__('redis')"],
)
def test_modules_of_others_are_found_by_their_first_name(source: str) -> None:
    assert [name.partition(".")[0] for name, _ in imports_in(source, URLS)] == ["redis"]


def test_what_is_a_module_of_itself_or_no_import_is_none() -> None:
    assert not inner_imports("from mcp_proxy.wire.urls import anything", URLS)
    assert not inner_imports("path = 'mcp_proxy.app'\nprint('mcp_proxy.app')", URLS)


@pytest.mark.parametrize(
    "back",
    [
        "from mcp_proxy.wire.urls import anything",
        "from . import urls",
        "def later():\n    __import__('mcp_proxy.wire.urls')",
    ],
)
def test_a_circle_of_modules_is_found_by_whatever_way_it_closes(back: str) -> None:
    sources = {URLS: "from .cookies import anything", "mcp_proxy.wire.sse": "import json"}
    assert not in_circles(sources | {"mcp_proxy.wire.cookies": "import re"})
    found = in_circles(sources | {"mcp_proxy.wire.cookies": back})
    assert found == {URLS, "mcp_proxy.wire.cookies"}


def test_a_circle_through_a_name_that_the_package_finds_is_found() -> None:
    """`RedisStorage` comes from `redis/storage.py`."""
    below = "from mcp_proxy import RedisStorage"
    above = "from mcp_proxy.storage.records import Storage"
    sources = {"mcp_proxy.storage.records": below, "mcp_proxy.redis.storage": above}
    assert in_circles(sources) == set(sources)
