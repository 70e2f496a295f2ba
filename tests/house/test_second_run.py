"""Which tests are run once more with gevent workers: those that start a gunicorn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tests.proofs import both_eras
from tests.support.proxies import WsgiProxy, running
from tests.support.proxy_process import ProxyProcess, inherited
from tests.support.second_run import lead_to_gunicorn, starts_gunicorn


class Holder:
    def start(self) -> None:
        ProxyProcess()


class Heir(Holder):
    pass


def at_once() -> ProxyProcess:
    return ProxyProcess()


def by_another_room() -> None:
    from tests.support import proxies

    proxies.running("gunicorn")


def by_a_function_of_its_modules_name() -> None:
    both_eras.both_eras()


def by_an_inner_function() -> Callable[[], ProxyProcess]:
    return lambda: at_once()


@contextmanager
def within() -> Iterator[ProxyProcess]:
    yield at_once()


def in_the_environment() -> dict[str, str]:
    return inherited()


LEADING = [
    at_once,
    by_another_room,
    by_a_function_of_its_modules_name,
    by_an_inner_function,
    within,
    in_the_environment,
    Heir,
]


@pytest.mark.parametrize("thing", [*LEADING, partial(running, "gunicorn")])
def test_what_starts_a_gunicorn_is_found(thing: Callable[..., object]) -> None:
    assert lead_to_gunicorn([thing])


def nothing() -> int:
    return len(repr(WsgiProxy))


@pytest.mark.parametrize("thing", [nothing, len, print, partial(print, 1)])
def test_what_starts_none_is_not(thing: Callable[..., object]) -> None:
    assert not lead_to_gunicorn([thing])


@pytest.fixture
def gunicorn() -> type[ProxyProcess]:
    return ProxyProcess


def test_a_test_with_a_fixture_that_starts_one_does(
    request: pytest.FixtureRequest, gunicorn: type[ProxyProcess]
) -> None:
    assert starts_gunicorn(request.node)


@pytest.mark.parametrize("way", ["wsgi", "gunicorn"])
def test_of_both_ways_one_does(
    request: pytest.FixtureRequest, gunicorn: type[ProxyProcess], way: str
) -> None:
    assert starts_gunicorn(request.node) == (way == "gunicorn")
