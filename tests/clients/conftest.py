"""What the tests with real clients share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.proxy_process import ProxyProcess


@pytest.fixture(scope="module")
def demo() -> Iterator[ProxyProcess]:
    """The proxy in front of the bundled demo server; nothing may have gone wrong in it."""
    with ProxyProcess() as proxy:
        yield proxy
    assert "Traceback" not in proxy.log(), proxy.log()
