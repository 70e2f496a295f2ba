"""The official Python SDK survives a refusal by `rate_limit`: the session's next call works."""

from __future__ import annotations

import pytest

from tests.clients.programs import HERE, run_client
from tests.clients.test_keys import CLIENTS
from tests.support import needs
from tests.support.proxies import as_options
from tests.support.proxy_process import ProxyProcess

_CLIENT = str(HERE / "limited_client.py")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=needs.MEMORY)])
@pytest.mark.parametrize("name", CLIENTS)
def test_an_official_client_goes_on_after_a_refusal(name: str, workers: int) -> None:
    python, mode, revision = CLIENTS[name]
    settings = {"rate_limit": "4/second:6", "workers": workers}
    with ProxyProcess(options=as_options(settings)) as proxy:
        told = run_client(str(python()), _CLIENT, proxy.url, mode)
    assert told["sdk"].startswith(name[0])
    assert told["revision"] == revision
    assert 1 <= told["served"] <= 20
    assert "Too many requests: 4/second are allowed; try again in" in told["refused"], told
    assert told["echo"] == "again", told
