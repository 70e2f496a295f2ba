"""An authorization server for the tests of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.authorization import AuthorizationServer


@pytest.fixture
def issuer() -> Iterator[AuthorizationServer]:
    """An authorization server of this test alone."""
    with AuthorizationServer() as server:
        yield server
